"""Many samples of all tasks at random settings: each a valid stream that opens twice and honours its request.

    python benchmarks/soak_generate.py --samples 1000 --midi midi/ --checkpoint runs/demo --output soak.json

Without --checkpoint the model is small and untrained, which tries everything. Checked of each sample: the grammar; the
length; what was asked for, conditions too; both readers open the file and agree; and after a prompt, that no note
outside the written cells changed. The first that fails stops the run, with the settings that made it; they are a
function of --seed.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import symusic
import torch
from miditoolkit import MidiFile

from meloformer.command_line import Parser
from meloformer.config import ModelConfig
from meloformer.errors import UserError, exit_cleanly
from meloformer.generation import Part, Request, Sample, Sampling, Steering, generate
from meloformer.generation.guidance import has_conditions
from meloformer.generation.parts import accompaniment
from meloformer.generation.prompt import Prompt
from meloformer.generation.tasks import Task, anew, continuation, rewriting
from meloformer.hid import Family, Tokenizer, Vocabulary
from meloformer.hid.controls import CONDITIONS
from meloformer.midi import DRUMS, read_score, write_midi
from meloformer.model import MeloFormer

INSTRUMENTS = [128, 0, 33, 48, 25, 73]


def random_sampling(rng: np.random.Generator) -> Sampling:
    by_family = {f: float(rng.choice([0, 0.5, 1.5])) for f in (Family.TIME, Family.PITCH) if rng.random() < 0.2}
    return Sampling(
        temperature=float(rng.choice([0, 0.7, 1.0, 2.0], p=[0.1, 0.3, 0.4, 0.2])),
        top_k=int(rng.choice([0, 5, 50])),
        top_p=float(rng.choice([0.9, 0.98, 1.0])),
        min_p=float(rng.choice([0, 0.02])),
        by_family=by_family,
    )


def random_request(rng: np.random.Generator, known: list[str]) -> Request:
    def maybe(value):
        return value if rng.random() < 0.6 else None

    meters = [(4, 4), (3, 4), (6, 8), (7, 8), (1, 16)]
    bars, instruments = int(rng.integers(1, 9)), rng.choice(INSTRUMENTS, rng.integers(1, 5)).tolist()
    return Request(
        bars=maybe(bars),
        meter=maybe(meters[rng.integers(len(meters))]),
        tempo=maybe(int(rng.integers(20, 321))),
        instruments=maybe(instruments),
        steering=random_steering(rng, known, bars, instruments),
    )


def random_steering(rng: np.random.Generator, known: list[str], bars: int, instruments: list[int]) -> Steering:
    """Any conditions of those that the model knows, that fit into so many bars and, of parts, to these instruments."""

    def maybe(name, value):
        return value if name in known and rng.random() < 0.4 else None

    names = ["C", "Am", "F#7", "Bbmaj7", "Gsus4", "none"]
    described = [i for i in instruments if i != DRUMS and rng.random() < 0.5]
    return Steering(
        key=maybe("key", ["D minor", "Eb"][rng.integers(2)]),
        chords=maybe("chords", [names[i] for i in rng.integers(len(names), size=rng.integers(1, bars + 1))]),
        density=maybe("density", int(rng.integers(1, 11))),
        bar_density=maybe("bar_density", rng.integers(0, 8, rng.integers(1, bars + 1)).tolist()),
        parts=[Part(i, density=maybe("density", 3), polyphony=maybe("polyphony", 2)) for i in described],
        end=[None, True, False][rng.integers(3)],
    )


def random_task(rng: np.random.Generator, prompt: Prompt, max_length: int, known: list[str]) -> Task:
    kind = rng.integers(4)
    steering = random_steering(rng, known, 1, [])
    if kind == 3:
        return anew(prompt, max_length, min(2, prompt.num_bars), steering)
    if kind == 0:
        return continuation(prompt, int(rng.integers(1, 4)), max_length, int(rng.integers(1, 5)), steering)
    if kind == 1:
        tracks, first = len(prompt.score.tracks), int(rng.integers(prompt.num_bars))
        last = min(first + int(rng.integers(1, 4)), prompt.num_bars)
        chosen = rng.choice(tracks, rng.integers(1, min(tracks, 3) + 1), replace=False).tolist()
        return rewriting(prompt, frozenset((t, b) for t in chosen for b in range(first, last)), max_length, steering)
    parts = rng.choice(INSTRUMENTS, rng.integers(1, 3)).tolist()
    return accompaniment(prompt, parts, max_length, int(rng.integers(1, 4)), steering)


def kind_of(task: Task | None) -> str:
    if task is None:
        return "from nothing"
    return "anew" if task.anew else "parts" if task.instruments else "cells"


def check_opens(path: Path) -> int:
    """Notes of a file, by both readers; each must open it and see as many."""
    first = sum(len(track.notes) for track in symusic.Score(path).tracks)
    second = sum(len(track.notes) for track in MidiFile(str(path)).instruments)
    require(first == second, f"symusic sees {first} notes, miditoolkit {second}")
    return first


def check_request(request: Request, sample: Sample, path: Path) -> None:
    score = sample.score
    require(request.bars in (None, score.num_bars), "another number of bars")
    require(request.tempo is None or score.tempos["qpm"].tolist() == [request.tempo], "another tempo")
    meters = [tuple(m) for m in score.meters[["numerator", "denominator"]].tolist()]
    require(request.meter is None or meters == [tuple(request.meter)], "another meter")
    given = request.steering.controls(Vocabulary(score.ticks_per_quarter))
    head = [control.token for control in score.controls if control.track < 0 and control.bar < 0]
    require(sorted(head) == sorted(given.head), "other conditions")
    said = sum(2 if control.onset >= 0 else 1 for control in score.controls if control.track < 0 <= control.bar)
    require(said == given.tokens_in_bars(0, score.num_bars), "other conditions of bars")
    wanted = request.instruments
    require(wanted is None or sorted(wanted) == sorted(score.instruments.tolist()), "other instruments")
    dropped = sum(write_midi(score, path)[name] for name in ("duplicate_dropped",))
    require(check_opens(path) == score.num_notes - dropped, "notes lost in the file")


def check_task(task: Task, sample: Sample, path: Path) -> None:
    if task.anew:
        require(sample.score.instruments.tolist() == task.prompt.score.instruments.tolist(), "other instruments")
        require(sample.score.num_bars * len(task.instruments) == task.cells, "another number of bars")
        require(sample.score.meters.tolist() == task.prompt.score.meters[: len(sample.score.meters)].tolist(), "meters")
        counts = task.write(sample, path)
        require(check_opens(path) == sample.score.num_notes - counts["duplicate_dropped"], "notes lost in the file")
        return
    prompt, old = task.prompt, task.prompt.source.score
    require(sample.tokens[: len(task.request.given)].tolist() == task.request.given.tolist(), "the prompt's tokens")
    counts = task.write(sample, path)
    new = task.new_notes(sample)
    back = read_score(path)
    gone = Counter(map(tuple, prompt.notes_in(task.removed(sample))[NOTE].tolist()))
    kept = Counter(map(tuple, old.notes[NOTE].tolist())) - gone
    require(not kept - Counter(map(tuple, back.notes[NOTE].tolist())), "a kept note changed")
    expected = kept.total() + len(new) - counts["held_dropped"] - counts["duplicate_dropped"]
    require(back.num_notes == expected, f"{back.num_notes} notes, {expected} expected")
    instruments = np.array([*old.instruments, *task.instruments])[new["track"]]
    if task.instruments:
        require(set(instruments.tolist()) == set(task.instruments), "other instruments")
    else:
        require(len(task.masked) == int((sample.tokens == prompt.vocabulary.FILL).sum()), "another number of cells")
    check_opens(path)


NOTE = ["onset", "duration", "pitch", "velocity"]


def require(good: bool, what: str) -> None:
    if not good:
        raise RuntimeError(what)


def prompts(folder: Path, model: MeloFormer, rng: np.random.Generator, count: int) -> list[Prompt]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".mid", ".midi"))
    found: list[Prompt] = []
    for i in rng.permutation(len(files)).tolist():
        try:
            found.append(Prompt(files[i], model.vocabulary, model.conditions if rng.random() < 0.7 else []))
        except UserError:
            continue
        if len(found) == count:
            break
    return found


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--midi", type=Path, help="folder of MIDI files to go on from; without it, all is from nothing")
    parser.add_argument("--checkpoint", help="a trained model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_length", type=int, default=700)
    parser.add_argument("--output", type=Path, help="file for the counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    if options.checkpoint:
        model = MeloFormer.from_pretrained(options.checkpoint)
    else:
        config = ModelConfig(size="small", n_layer=2, n_head=2, d_model=32, d_ff=48)
        model = MeloFormer(config, Vocabulary()).eval()
        model.conditions = [name for name in CONDITIONS if name != "tag"]
    tokenizer, done, started = Tokenizer(model.vocabulary), Counter(), time.perf_counter()
    pool = prompts(options.midi, model, rng, 60) if options.midi else []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sample.mid"
        while done["samples"] < options.samples:
            seed, task = int(rng.integers(2**31)), None
            if pool and rng.random() < 0.6:
                try:
                    task = random_task(rng, pool[rng.integers(len(pool))], options.max_length, model.conditions)
                except UserError:  # a bar of a rich piece is more than this length
                    done["too_long"] += 1
                    continue
            request = random_request(rng, model.conditions) if task is None else task.request
            steered = has_conditions(request, model.vocabulary)
            guidance = float(rng.choice([1.0, 2.0])) if steered else 1.0
            sampling, count = random_sampling(rng), min(int(rng.integers(1, 9)), options.samples - done["samples"])
            samples = generate(model, request, count, sampling, seed, 4, options.max_length, guidance=guidance)
            for sample in samples:
                try:
                    tokenizer.validate(sample.tokens)
                    require(len(sample.tokens) <= options.max_length, "too long")
                    if task is None:
                        check_request(request, sample, path)
                    else:
                        check_task(task, sample, path)
                except (UserError, RuntimeError) as error:
                    where = "" if task is None else f" after {task.prompt.path}"
                    raise SystemExit(f"{error}: seed {seed}, sample {sample.index}{where}, {sampling}") from None
                done["samples"] += 1
                done["hit_max_length"] += sample.hit_limit
                done["with conditions"] += steered
                done["guided"] += guidance != 1
                done["tokens"] += len(sample.tokens)
                done[kind_of(task)] += 1
    done["seconds"] = round(time.perf_counter() - started)
    print(json.dumps(done, indent=1))
    if options.output:
        options.output.write_text(json.dumps(done, indent=1), encoding="utf-8")


if __name__ == "__main__":
    exit_cleanly(main)
