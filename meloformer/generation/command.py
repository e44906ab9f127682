"""generate.py's work: from a `GenerateConfig` to MIDI files, pictures and generation.json.

Sample i of seed s is `seed{s}_{i:03d}.mid`; a file of an earlier, finished run is never written over. generation.json,
written last, lists every run into the folder: settings, files, tokens, seconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

from meloformer.config import GenerateConfig
from meloformer.device import choose_device
from meloformer.errors import UserError
from meloformer.evaluation.plots import piano_roll, require_matplotlib
from meloformer.files import write_atomic
from meloformer.generation.engine import Sample, generate
from meloformer.generation.request import Request
from meloformer.generation.sampling import Sampling
from meloformer.midi import write_midi
from meloformer.midi.general_midi import instrument_name, parse_instrument
from meloformer.model import MeloFormer

REPORT = "generation.json"


def run(config: GenerateConfig) -> None:
    """Generate and write; UserError before anything is written where something is wrong."""
    config.validate()
    request = read_request(config)
    output = Path(config.output)
    runs = _earlier_runs(output)
    names = [f"seed{config.seed}_{i:03d}" for i in range(config.num_samples)]
    taken = {sample["file"] for run in runs for sample in run["samples"]} & {f"{name}.mid" for name in names}
    if taken:
        raise UserError(f"{output / min(taken)} is there already: choose another --seed or --output")
    if config.plot:
        require_matplotlib()
    model = MeloFormer.from_pretrained(config.checkpoint).to(choose_device(config.device))
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.min_p)
    output.mkdir(parents=True, exist_ok=True)

    started = time.perf_counter()
    known = request.bars is not None and request.instruments is not None
    parts = config.num_samples * request.bars * len(request.instruments) if known else None
    written = 0
    with tqdm(total=parts, unit="bar", desc="generating", disable=not sys.stderr.isatty(), leave=False) as bar:

        def progress(tokens: int, bars: int) -> None:
            nonlocal written
            written += tokens
            bar.set_postfix_str(f"{written / (time.perf_counter() - started):.0f} tokens/s", refresh=False)
            bar.update(bars)

        samples = generate(
            model,
            request,
            config.num_samples,
            sampling,
            config.seed,
            config.batch_size,
            config.max_length,
            progress,
        )
    seconds = time.perf_counter() - started

    for name, sample in zip(names, samples):
        write_midi(sample.score, output / f"{name}.mid")
        if config.plot:
            piano_roll(sample.score, output / f"{name}.png", title=name)
        print(f"{output / name}.mid: {describe(sample)}")
    tokens = sum(len(sample.tokens) for sample in samples)
    notes = sum(sample.score.num_notes for sample in samples)
    record = {
        "settings": config.to_dict(),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "notes_per_second": round(notes / seconds, 1),
        "samples": [
            {
                "file": f"{name}.mid",
                "index": sample.index,
                "tokens": len(sample.tokens),
                "notes": sample.score.num_notes,
                "bars": sample.score.num_bars,
                "instruments": [instrument_name(i) for i in sample.score.instruments.tolist()],
                "hit_max_length": sample.hit_limit,
            }
            for name, sample in zip(names, samples)
        ],
    }
    write_atomic(output / REPORT, json.dumps({"runs": [*runs, record]}, indent=1).encode())
    cut = sum(sample.hit_limit for sample in samples)
    if cut:
        print(f"{cut} of {len(samples)} were closed at max_length: ask for fewer --bars or --instruments")
    print(f"{len(samples)} pieces, {notes} notes in {seconds:.1f} s ({tokens / seconds:.0f} tokens/s): {output}")


def read_request(config: GenerateConfig) -> Request:
    """The request of the flags; UserError names the flag that cannot be read."""
    meter = None
    if config.time_signature is not None:
        numerator, slash, denominator = config.time_signature.partition("/")
        if not (slash and numerator.strip().isdecimal() and denominator.strip().isdecimal()):
            raise UserError(f"--time_signature is {config.time_signature!r}, must be like 4/4 or 6/8")
        meter = (int(numerator), int(denominator))
    instruments = None if config.instruments is None else [parse_instrument(word) for word in config.instruments]
    return Request(config.bars, meter, config.tempo, instruments)


def describe(sample: Sample) -> str:
    """One line about a piece for people."""
    names = ", ".join(instrument_name(i) for i in sample.score.instruments.tolist())
    return f"{sample.score.num_bars} bars, {sample.score.num_notes} notes: {names}"


def _earlier_runs(output: Path) -> list[dict]:
    if not (output / REPORT).exists():
        return []
    try:
        return json.loads((output / REPORT).read_text(encoding="utf-8"))["runs"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{output / REPORT} is not this program's: choose another --output") from None
