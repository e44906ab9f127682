"""HID beside REMI, the tokens that others use: the same transformer, the same music, nats a note and bits a second.

    python -m benchmarks.remi --data_dir processed/ --output runs/remi [--seeds 0,1,2]      (pip install ".[bench]")

REMI is MidiTok's, with programs, tempos and meters, on HID's grid (24 positions a quarter note, 32 velocities, every
pitch, every whole tempo); durations are exact up to a half note and coarser after. Both read the quantized score, so
they tell of the same notes. Three runs a seed, with equal parameters and equally many rows of equally many tokens:

    remi             REMI, causal attention, one rotary axis, no annotations
    hid_full_causal  HID, causal attention
    hid              HID under its own rule

Measured on every test piece whole, cut into rows as in training. Cutting is kinder to HID: a row of REMI is cut at any
token and begins without context, a window of HID begins at a bar and restates meter, tempo and instruments (tokens that
count). The surprise: nats a token would call the longer stream the better one; what is divided by here is notes and
seconds of the same pieces.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.ablation import (
    PLAIN,
    add_common,
    equal_parameters,
    fit,
    held_out,
    keep_settings,
    prepare_corpus,
    reference_model,
    steps_of,
)
from meloformer.command_line import Parser
from meloformer.config import DataConfig, ModelConfig
from meloformer.data import Corpus, RowPlan, Step, num_targets
from meloformer.data.draws import generator, mix
from meloformer.device import choose_device, choose_precision
from meloformer.errors import UserError, exit_cleanly
from meloformer.evaluation.by_piece import evaluate_pieces
from meloformer.evaluation.likelihood import evaluate_likelihood
from meloformer.files import write_atomic
from meloformer.hid import Family, Tokenizer
from meloformer.hid.rows import stack_rows
from meloformer.midi import write_midi
from meloformer.model import MeloFormer

RUNS = ("remi", "hid_full_causal", "hid")
FAMILIES = {  # the first word of a REMI token
    "BOS": Family.BOS,
    "EOS": Family.EOS,
    "Bar": Family.BAR,
    "TimeSig": Family.METER,
    "Tempo": Family.TEMPO,
    "Position": Family.TIME,
    "Program": Family.INSTRUMENT,
    "Pitch": Family.PITCH,
    "PitchDrum": Family.PITCH,
    "Velocity": Family.VELOCITY,
    "Duration": Family.DURATION,
}


class Remi:
    """MidiTok's REMI, and what a model asks of a vocabulary: `size`, `family_of`, `resolution`."""

    resolution = 24

    def __init__(self):
        try:
            import miditok
            import symusic
        except ImportError:
            raise UserError("this compares with MidiTok; pip install '.[bench]'") from None
        config = miditok.TokenizerConfig(
            pitch_range=(0, 127),  # MidiTok leaves out the highest
            drums_pitch_range=(0, 127),
            beat_res={(0, 2): 24, (2, 4): 8, (4, 8): 4, (8, 32): 1},
            num_velocities=32,
            use_programs=True,
            use_tempos=True,
            tempo_range=(20, 320),
            num_tempos=301,
            use_time_signatures=True,
            time_signature_range={d: list(range(1, 2 * d + 1)) for d in (2, 4, 8, 16)},
        )
        self._read, self.tokenizer = symusic.Score, miditok.REMI(config)
        self.size = len(self.tokenizer)
        self.family_of = np.full(self.size, Family.PAD, dtype=np.int64)
        for token, number in self.tokenizer.vocab.items():
            self.family_of[number] = FAMILIES.get(token.split("_")[0], Family.PAD)
        self.BOS, self.EOS = (self.tokenizer.vocab[name] for name in ("BOS_None", "EOS_None"))

    def encode(self, path: Path) -> np.ndarray:
        """(T,) int32, from BOS to EOS."""
        return np.array([self.BOS, *self.tokenizer(self._read(path)).ids, self.EOS], dtype=np.int32)


def remi_streams(corpus: Corpus, pieces: np.ndarray, remi: Remi) -> list[np.ndarray]:
    """REMI of the quantized scores, by way of a MIDI file on the same grid."""
    tokenizer = Tokenizer(corpus.vocabulary)
    streams = []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "piece.mid"
        for piece in pieces.tolist():
            write_midi(tokenizer.decode(corpus.piece(piece)), path)
            streams.append(remi.encode(path))
    return streams


def rows_of(stream: np.ndarray, length: int) -> Iterator[dict[str, np.ndarray]]:
    """Rows of at most `length` tokens with their targets; each token but the first is a target once."""
    for first in range(0, len(stream) - 1, length):
        part = stream[first : first + length + 1]
        tokens, targets = part[:length], part[1:]
        inside = np.arange(length) < len(tokens)
        none, zero = np.full(length, -1, dtype=np.int32), np.zeros(length, dtype=np.int32)
        row = {name: none for name in ("bar", "track", "instrument", "ordinal", "onset", "segment")}
        row["time"], row["type"] = zero, np.where(inside, Family.TIME, Family.PAD).astype(np.int32)
        row["document"] = np.where(inside, 0, -1).astype(np.int32)
        row["position"] = np.where(inside, np.arange(length), 0).astype(np.int32)
        row["tokens"] = np.concatenate([tokens, zero[len(tokens) :]])
        row["targets"] = np.concatenate([targets, none[len(targets) :]])
        for name in ("document", "start", "end", "bar", "track", "instrument", "ordinal", "time"):
            row[f"segment_{name}"] = np.zeros(0, dtype=np.int32)
        yield row


def batched(rows: list[dict], size: int) -> Iterator[dict[str, np.ndarray]]:
    for first in range(0, len(rows), size):
        yield stack_rows(rows[first : first + size])


def cut(stream: np.ndarray, start: int, length: int) -> Iterator[dict[str, np.ndarray]]:
    """The rows of a stream from `start` on, and what stands before: each token but the first is a target once."""
    if start:
        yield from rows_of(stream[: start + 1], length)
    yield from rows_of(stream[start:], length)


def remi_steps(streams: list[np.ndarray], length: int, seed: int, arguments: argparse.Namespace) -> Iterator[Step]:
    """Steps over the rows of all pieces in random order, cut from another place in every epoch."""
    epoch, size = 0, arguments.batch_size * arguments.gradient_accumulation_steps
    while True:
        rng = generator(seed, epoch, "remi")
        starts = [int(rng.integers(length)) % (len(stream) - 1) for stream in streams]
        rows = [row for stream, start in zip(streams, starts) for row in cut(stream, start, length)]
        rows = [rows[i] for i in rng.permutation(len(rows))]
        for index in range(len(rows) // size):
            micro_batches = list(batched(rows[index * size : (index + 1) * size], arguments.batch_size))
            yield Step(index, micro_batches, [], [num_targets(batch) for batch in micro_batches])
        epoch += 1


def run_one(name: str, seed: int, corpus: Corpus, arguments: argparse.Namespace) -> dict:
    """Train one and measure it on the test pieces."""
    device = choose_device(arguments.device)
    precision = choose_precision(arguments.precision, device)
    reference = reference_model(arguments)
    target = MeloFormer(reference, corpus.vocabulary).num_parameters()
    length = arguments.max_seq_len
    data = DataConfig(
        data_dir=str(corpus.path),
        max_seq_len=length,
        max_samples=arguments.max_samples,
        validation_fraction=2 * arguments.held_out,
        **PLAIN,
    )
    pieces = held_out(corpus, data, RowPlan, arguments.held_out)[1].pieces
    chosen = pieces[mix(corpus.index["content_hash"][pieces]).argsort(kind="stable")[: arguments.test_pieces]]
    every = RowPlan(corpus, data, split="validation").pieces
    test = RowPlan(corpus, data, split="validation", without=np.setdiff1d(every, chosen))
    vocabulary = Remi() if name == "remi" else corpus.vocabulary
    changes = {} if name == "hid" else {"pattern": "full_causal", "rotary_axes": 1 if name == "remi" else 2}
    config: ModelConfig = equal_parameters(replace(reference, **changes), target, vocabulary)
    torch.manual_seed(seed)
    model = MeloFormer(config, vocabulary, length).to(device)

    def look(step: int, seconds: float) -> None:
        print(f"    {name}, seed {seed}, step {step}", flush=True)

    if name == "remi":
        train = RowPlan(corpus, data, seed, 0, "train").pieces
        steps = remi_steps(remi_streams(corpus, train, vocabulary), length, seed, arguments)
        spent = fit(model, steps, arguments, precision, look)
        rows = [row for s in remi_streams(corpus, test.pieces, vocabulary) for row in rows_of(s, length)]
        result = evaluate_likelihood(model, batched(rows, arguments.batch_size), precision)
    else:
        spent = fit(
            model,
            steps_of(lambda epoch: RowPlan(corpus, data, seed, epoch, "train"), arguments),
            arguments,
            precision,
            look,
        )
        result = evaluate_pieces(model, test, arguments.batch_size, precision)
    notes = int(corpus.index["num_notes"][test.pieces].sum())
    music = float(corpus.index["seconds"][test.pieces].sum())
    return {
        "run": name,
        "seed": seed,
        "parameters": model.num_parameters(),
        "pieces": len(test.pieces),
        "notes": notes,
        "notes_in_stream": result["notes"],
        "tokens": result["tokens"],
        "nats_per_note": result["nats"] / notes,
        "bits_per_second": result["nats"] / math.log(2) / music,
        **spent,
    }


def show(results: list[dict]) -> str:
    lines = [f"{'':18}{'seeds':>6}{'nats a note':>13}{'spread':>9}{'bits a second':>15}{'tokens a note':>15}"]
    for name in RUNS:
        runs = [result for result in results if result["run"] == name]
        if runs:
            values = [run["nats_per_note"] for run in runs]
            spread = f"{np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            bits = np.mean([run["bits_per_second"] for run in runs])
            length = runs[0]["tokens"] / runs[0]["notes"]
            lines.append(f"{name:18}{len(runs):6}{np.mean(values):13.3f}{spread:>9}{bits:15.2f}{length:15.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2", help="numbers, with commas")
    parser.add_argument("--runs", default=",".join(RUNS), help="which of them, with commas")
    parser.add_argument("--max_samples", type=int, help="training pieces, the same ones for all (default: all)")
    parser.add_argument("--test_pieces", type=int, default=60, help="test pieces to measure, whole")
    add_common(parser)
    arguments = parser.parse_args()
    names = arguments.runs.split(",")
    for name in names:
        if name not in RUNS:
            raise UserError(f"--runs {name}: no such run; there are {', '.join(RUNS)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    corpus = prepare_corpus(arguments, arguments.output)
    keep_settings(arguments, corpus)
    for seed in map(int, arguments.seeds.split(",")):
        for name in names:
            path = arguments.output / f"{name}-{seed}.json"
            if not path.is_file():
                write_atomic(path, json.dumps(run_one(name, seed, corpus, arguments), indent=1).encode())
                print(f"{name}, seed {seed}: done", flush=True)
    results = [json.loads(path.read_text()) for path in sorted(arguments.output.glob("*-[0-9]*.json"))]
    write_atomic(arguments.output / "results.json", json.dumps(results, indent=1).encode())
    print(show(results))


if __name__ == "__main__":
    exit_cleanly(main)
