"""generate.py's work: from a `GenerateConfig` to MIDI files, pictures, sound and generation.json.

Sample i of seed s is `seed{s}_{i:03d}.mid`, after a prompt `{prompt}_seed{s}_{i:03d}.mid`; a file of an earlier,
finished run is never written over. generation.json lists every run into the folder, one for each prompt: settings,
files, tokens, seconds. It is written when a prompt is done.

>>> run(GenerateConfig(checkpoint="runs/base", output="out", prompt="song.mid", continue_bars=16))   # doctest: +SKIP

What surprises: every prompt is read, and its task planned, before the first note is written, so a bad one in a long
list costs nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

import numpy as np
from tqdm import tqdm

from meloformer.command_config import GenerateConfig
from meloformer.device import choose_device
from meloformer.errors import UserError
from meloformer.evaluation.plots import piano_roll, require_matplotlib
from meloformer.files import make_folder
from meloformer.generation.chosen import chosen_words
from meloformer.generation.engine import Sample, begin, generate
from meloformer.generation.prompt import (
    Prompt,
    Task,
    accompaniment,
    anew,
    continuation,
    find_cells,
    parse_rewrite,
    rewriting,
)
from meloformer.generation.request import Request
from meloformer.generation.sampling import Sampling
from meloformer.generation.sound import Synthesizer
from meloformer.generation.steering import Steering, parse_parts
from meloformer.hid import Family
from meloformer.midi import write_midi
from meloformer.midi.general_midi import instrument_name, parse_instrument
from meloformer.midi.merge import MidiSource
from meloformer.model import MeloFormer
from meloformer.report import earlier_runs, refuse_taken, write_report

WORDS_A_LINE = 8  # of the chords that a model chose; generation.json has all of them


@dataclass
class Job:
    """One request and the names of its files; `task` where it goes on from a prompt."""

    request: Request
    names: list[str]
    task: Task | None = None

    @property
    def cells(self) -> int | None:
        """Bars of parts that a sample will have, where that is known."""
        if self.task is not None:
            return self.task.cells
        bars, instruments = self.request.bars, self.request.instruments
        return None if bars is None or instruments is None else bars * len(instruments)


def run(config: GenerateConfig) -> None:
    """Generate and write; UserError before anything is written where something is wrong."""
    config.validate()
    request, paths = read_request(config), read_prompts(config)
    steering = request.steering
    output = Path(config.output)
    runs = earlier_runs(output)
    names = _names(config, paths)
    refuse_taken(output, runs, (name for group in names for name in group))
    if config.plot:
        require_matplotlib()
    synthesizer = Synthesizer(config.soundfont) if config.wav else None
    model = MeloFormer.from_pretrained(config.checkpoint).to(choose_device(config.device))
    max_length = config.max_length or model.max_seq_len
    steering.require_known(model.conditions)
    if not (config.derive or paths or model.predicted):
        raise UserError(
            "--no-derive needs a MIDI file to go on from, or a model that was trained with --predict_conditions; give "
            "--prompt, or leave it out"
        )
    derived = model.conditions if config.derive else []
    prompts = (Prompt(path, model.vocabulary, derived, model.tags) for path in paths)
    tasks = [plan(config, prompt, steering, max_length) for prompt in prompts]
    tasks = [replace(task, request=replace(task.request, chooses=config.derive)) for task in tasks]
    jobs = [Job(task.request, group, task) for task, group in zip(tasks, names)] or [Job(request, names[0])]
    for job in jobs:
        begin(model, job.request, max_length, config.guidance)
    for task in tasks:
        if task.note:
            print(task.note)
        if task.prompt.source.loss and not task.anew:
            print(f"{task.prompt.path}: {task.prompt.source.loss}")
        if task.told:
            print(f"{task.prompt.path}: the model is told {task.told}")
    make_folder(output)
    for job in jobs:
        samples, seconds = _generate(model, job, config, max_length)
        changes = [_write(job, name, sample, config, synthesizer, model) for name, sample in zip(job.names, samples)]
        runs.append(_record(job, samples, changes, seconds, config, model))
        write_report(output, runs)


def _generate(model: MeloFormer, job: Job, config: GenerateConfig, max_length: int) -> tuple[list[Sample], float]:
    """The samples of a job and how many seconds they took, under a progress bar in bars of parts."""
    started = time.perf_counter()
    total = None if job.cells is None else config.num_samples * job.cells
    written = 0
    with tqdm(total=total, unit="bar", desc="generating", disable=not sys.stderr.isatty(), leave=False) as bar:

        def progress(tokens: int, bars: int) -> None:
            nonlocal written
            written += tokens
            bar.set_postfix_str(f"{written / (time.perf_counter() - started):.0f} tokens/s", refresh=False)
            bar.update(bars)

        samples = generate(
            model,
            job.request,
            config.num_samples,
            read_sampling(config),
            config.seed,
            config.batch_size,
            max_length,
            progress,
            config.guidance,
        )
    return samples, time.perf_counter() - started


def _write(
    job: Job, name: str, sample: Sample, config: GenerateConfig, synthesizer: Synthesizer | None, model: MeloFormer
) -> Counter:
    """The files of a sample; counts of what writing the MIDI file changed."""
    path = Path(config.output) / f"{name}.mid"
    counts = write_midi(sample.score, path) if job.task is None else job.task.write(sample, path, config.only_new)
    if config.plot:
        score, new = sample.score, None
        if job.task is not None and not job.task.anew:
            written = MidiSource(path)
            score, new = written.score, _is_new(written, job.task, config.only_new)
        piano_roll(score, path.with_suffix(".png"), name, new)
    if synthesizer is not None:
        synthesizer.render(path, path.with_suffix(".wav"))
    words = chosen_words(sample.chosen, model.vocabulary, model.tags, most=WORDS_A_LINE)
    print(f"{path}: {describe(job, sample, counts)}" + (f"; the model chose {words}" if words else ""))
    return counts


def _is_new(written: MidiSource, task: Task, only_new: bool) -> np.ndarray:
    """(notes,) bool: which notes of the written file are not the prompt's. By their places in the file: a new part that
    shares a channel has the instrument of its host there."""
    source = task.prompt.source
    kept = set() if only_new else {*source.places(source.score.notes)}
    kept -= {*source.places(task.prompt.notes_in(task.replaced))}
    return np.array([place not in kept for place in written.places(written.score.notes)], dtype=bool)


def _record(
    job: Job,
    samples: list[Sample],
    changes: list[Counter],
    seconds: float,
    config: GenerateConfig,
    model: MeloFormer,
) -> dict:
    """The run's entry in generation.json; prints its last line."""
    tokens = sum(len(sample.tokens) - _given(job) for sample in samples)
    num_notes = [_num_notes(job, sample, counts) for sample, counts in zip(samples, changes)]
    notes = sum(num_notes)
    cut = sum(sample.hit_limit for sample in samples)
    if cut:
        fewer = "--bars or --instruments" if job.task is None else "bars"
        print(f"{cut} of {len(samples)} were closed at max_length: ask for fewer {fewer}")
    print(f"{len(samples)} pieces, {notes} notes in {seconds:.1f} s ({tokens / seconds:.0f} tokens/s): {config.output}")
    return {
        "settings": config.to_dict(),
        "prompt": None if job.task is None else str(job.task.prompt.path),
        "note": "" if job.task is None else job.task.note,
        "told": "" if job.task is None else job.task.told,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "notes_per_second": round(notes / seconds, 1),
        "samples": [
            {
                "file": f"{name}.mid",
                "index": sample.index,
                "tokens": len(sample.tokens) - _given(job),
                "notes": written,
                "bars": sample.score.num_bars,
                "instruments": [instrument_name(i) for i in sample.score.instruments.tolist()],
                "chosen": chosen_words(sample.chosen, model.vocabulary, model.tags),
                "hit_max_length": sample.hit_limit,
                "changes": dict(counts),
            }
            for name, sample, written, counts in zip(job.names, samples, num_notes, changes)
        ],
    }


def _given(job: Job) -> int:
    return 0 if job.request.given is None else len(job.request.given)


def _num_notes(job: Job, sample: Sample, counts: Counter) -> int:
    """New notes that are in the sample's file, by what writing it counted."""
    asked = sample.score.num_notes if job.task is None else len(job.task.new_notes(sample))
    return asked - counts["held_dropped"] - counts["duplicate_dropped"]


def describe(job: Job, sample: Sample, counts: Counter) -> str:
    """One line about a piece for people; counts: what writing it changed."""
    notes = _num_notes(job, sample, counts)
    if job.task is not None:
        return f"{notes} new notes in {job.task.cells} bars of parts"
    names = ", ".join(instrument_name(i) for i in sample.score.instruments.tolist())
    return f"{sample.score.num_bars} bars, {notes} notes: {names}"


# --- what the flags say -------------------------------------------------------------------------------------------


def read_request(config: GenerateConfig) -> Request:
    """The request of the flags for a piece from nothing; UserError names the flag that cannot be read."""
    meter = None
    if config.time_signature is not None:
        numerator, slash, denominator = config.time_signature.partition("/")
        if not (slash and numerator.strip().isdecimal() and denominator.strip().isdecimal()):
            raise UserError(f"--time_signature is {config.time_signature!r}, must be like 4/4 or 6/8")
        meter = (int(numerator), int(denominator))
    instruments = None if config.instruments is None else [parse_instrument(word) for word in config.instruments]
    steering = read_steering(config)
    return Request(config.bars, meter, config.tempo, instruments, steering=steering, chooses=config.derive)


def read_steering(config: GenerateConfig) -> Steering:
    """The conditions of the flags."""
    return Steering(
        key=config.key,
        chords=config.chords,
        chord_bars=config.chord_bars,
        density=config.density,
        bar_density=config.bar_density,
        tag=config.tag,
        parts=tuple(parse_parts(config.track or [])),
        begin=config.begin,
        end=config.end,
    )


def read_sampling(config: GenerateConfig) -> Sampling:
    """The sampling of the flags."""
    by_family = {
        Family.TIME: config.temperature_time,
        Family.PITCH: config.temperature_pitch,
        Family.DURATION: config.temperature_duration,
        Family.VELOCITY: config.temperature_velocity,
    }
    by_family = {family: value for family, value in by_family.items() if value is not None}
    return Sampling(config.temperature, config.top_k, config.top_p, config.min_p, by_family)


def read_prompts(config: GenerateConfig) -> list[str]:
    """Paths of the prompts, none for pieces from nothing; checks what can be checked without reading them."""
    if config.rewrite is not None:
        parse_rewrite(config.rewrite)
    for word in config.add_instruments or []:
        parse_instrument(word)
    if config.prompt is not None:
        return [config.prompt]
    if config.prompts_file is None:
        return []
    given = f"--prompts_file {config.prompts_file}"
    try:
        text = Path(config.prompts_file).read_bytes()
    except OSError as error:
        raise UserError(f"{given}: {error.strerror}; give a text file, one path a line") from None
    if b"\0" in text:
        raise UserError(f"{given}: is no text file; give one with a path a line, or one MIDI file as --prompt")
    lines = [os.fsdecode(line.strip()) for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{given}: is empty; write the path of a MIDI file on each line")
    return lines


def plan(config: GenerateConfig, prompt: Prompt, steering: Steering, max_length: int) -> Task:
    """The task of the flags on one prompt."""
    if config.continue_bars is not None:
        return continuation(prompt, config.continue_bars, max_length, config.prompt_bars, steering)
    if config.rewrite is not None:
        return rewriting(prompt, find_cells(prompt, parse_rewrite(config.rewrite)), max_length, steering)
    if config.anew:
        return anew(prompt, max_length, config.bars, steering)
    instruments = [parse_instrument(word) for word in config.add_instruments or []]
    return accompaniment(prompt, instruments, max_length, config.prompt_bars, steering)


def _names(config: GenerateConfig, paths: list[str]) -> list[list[str]]:
    """Names of the files of each prompt; prompts of one name are told apart by a number."""
    heads: list[str] = []
    for path in paths:
        stem = Path(path).stem
        numbered = (f"{stem}_{number}_" for number in count(2))
        heads.append(next(head for head in chain([f"{stem}_"], numbered) if head not in heads))
    return [[f"{head}seed{config.seed}_{i:03d}" for i in range(config.num_samples)] for head in heads or [""]]
