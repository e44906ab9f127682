"""generate.py's work: from a `GenerateConfig` to MIDI files, pictures, sound and generation.json.

Sample i of seed s is `seed{s}_{i:03d}.mid`, after a prompt `{prompt}_seed{s}_{i:03d}.mid`; a file of an earlier,
finished run is never written over. generation.json lists every run into the folder, one for each prompt: settings,
files, tokens, seconds. It is written when a prompt is done.

>>> run(GenerateConfig(checkpoint="runs/base", output="out", prompt="song.mid", continue_bars=16))   # doctest: +SKIP

What surprises: every prompt is read, and its task planned, before the first note is written, so a bad one in a long
list costs nothing. And a bar that max_length left without its end is no error: it is named on stderr and in
generation.json, it keeps its old notes if it has any, and the exit status is 0.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from meloformer.command_config import GenerateConfig
from meloformer.device import choose_device
from meloformer.errors import UserError
from meloformer.evaluation.plots import piano_roll, require_matplotlib
from meloformer.files import new_folder
from meloformer.generated import earlier_runs, refuse_taken, write_report
from meloformer.generation.cells import find_bars, find_cells, in_words, parse_bars, parse_rewrite
from meloformer.generation.chosen import chosen_words
from meloformer.generation.engine import Sample, begin, generate
from meloformer.generation.guidance import has_conditions
from meloformer.generation.parts import accompaniment, go_on
from meloformer.generation.prompt import Prompt
from meloformer.generation.request import Request
from meloformer.generation.sampling import Sampling
from meloformer.generation.sound import Synthesizer
from meloformer.generation.steering import Steering, parse_parts
from meloformer.generation.tasks import Task, anew, continuation, named, rewriting
from meloformer.hid import Family
from meloformer.midi import write_midi
from meloformer.midi.general_midi import instrument_name, parse_instrument
from meloformer.midi.merge import MidiSource
from meloformer.model import MeloFormer
from meloformer.settings import expand_home
from meloformer.wording import counted

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


@dataclass
class Piece:
    """One sample, all windows of it: how many tokens and notes are new, and which (track, bar) of `task.to_write` are
    unfinished. After a prompt also the notes, as `Task.new_notes` has them, and the cells whose old ones go."""

    sample: Sample
    tokens: int
    num_notes: int
    unfinished: list[tuple[int, int]]
    notes: np.ndarray | None = None
    gone: frozenset[tuple[int, int]] = frozenset()


def run(config: GenerateConfig) -> None:
    """Generate and write; UserError before anything is written where something is wrong."""
    config.validate()
    request, paths = read_request(config), read_prompts(config)
    steering = request.steering
    output = Path(config.output)
    runs = earlier_runs(output)
    names = _names(config, [given.path for given in paths])
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
    tasks = []
    for given in paths:
        try:
            prompt = Prompt(given.path, model.vocabulary, derived, model.tags, model.predicted)
            task = plan(config, prompt, steering, max_length)
        except UserError as error:
            raise UserError(f"{given.where}{error}") from None
        tasks.append(replace(task, request=replace(task.request, chooses=config.derive)))
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
    with new_folder(output):
        for job in jobs:
            pieces, seconds = _generate(model, job, config, max_length)
            changes = [_write(job, name, piece, config, synthesizer, model) for name, piece in zip(job.names, pieces)]
            runs.append(_record(job, pieces, changes, seconds, config, model))
            write_report(output, runs)


def _generate(model: MeloFormer, job: Job, config: GenerateConfig, max_length: int) -> tuple[list[Piece], float]:
    """The pieces of a job and how many seconds they took, under a progress bar in bars of parts."""
    started = time.perf_counter()
    total = None if job.cells is None else config.num_samples * job.cells
    written = 0
    with tqdm(total=total, unit="bar", desc="generating", disable=not sys.stderr.isatty(), leave=False) as bar:

        def progress(tokens: int, bars: int) -> None:
            nonlocal written
            written += tokens
            bar.set_postfix_str(f"{written / (time.perf_counter() - started):.0f} tokens/s", refresh=False)
            bar.update(bars)

        def draw(request: Request, number: int, seed: int, guidance: float) -> list[Sample]:
            sampling, size = read_sampling(config), config.batch_size
            return generate(model, request, number, sampling, seed, size, max_length, progress, guidance)

        def later(task: Task, index: int, window: int) -> Sample:
            """The sample of a later window of piece `index`: its random stream is its own."""
            seed = int(np.random.SeedSequence([config.seed, index, window]).generate_state(1, np.uint64)[0])
            weighs = has_conditions(task.request, model.vocabulary)
            return draw(task.request, 1, seed, config.guidance if weighs else 1.0)[0]

        samples = draw(job.request, config.num_samples, config.seed, config.guidance)
        pieces = [_finish(job, sample, later) for sample in samples]
    return pieces, time.perf_counter() - started


def _finish(job: Job, sample: Sample, later: Callable[[Task, int, int], Sample]) -> Piece:
    """The piece of a sample; `later` writes its windows behind the first."""
    task = job.task
    if task is None:
        return Piece(sample, len(sample.tokens), sample.score.num_notes, [])
    if task.anew:
        tokens = len(sample.tokens) - len(task.request.given)
        return Piece(sample, tokens, sample.score.num_notes, task.unfinished(sample))
    added = go_on(task, sample, lambda step, window: later(step, sample.index, window))
    return Piece(sample, added.tokens, len(added.notes), added.unfinished, added.notes, added.gone)


def _write(
    job: Job, name: str, piece: Piece, config: GenerateConfig, synthesizer: Synthesizer | None, model: MeloFormer
) -> Counter:
    """The files of a piece; counts of what writing the MIDI file changed."""
    path, task, score, new = Path(config.output) / f"{name}.mid", job.task, named(piece.sample.score), None
    if task is None or task.anew:
        counts = write_midi(score, path)
    else:
        counts = task.merge(piece.notes, piece.gone, path, config.only_new)
    if config.plot:
        if task is not None and not task.anew:
            written = MidiSource(path)
            score, new = written.score, _is_new(written, task, piece.gone, config.only_new)
        piano_roll(score, path.with_suffix(".png"), name, new)
    if synthesizer is not None:
        synthesizer.render(path, path.with_suffix(".wav"))
    words = chosen_words(piece.sample.chosen, model.vocabulary, model.tags, most=WORDS_A_LINE)
    print(f"{path}: {describe(job, piece, counts)}" + (f"; the model chose {words}" if words else ""))
    if piece.unfinished:
        print(f"{path}: {_left(task, piece)}", file=sys.stderr)
    return counts


def _left(task: Task, piece: Piece) -> str:
    """What a piece lacks, for people."""
    prompt = task.prompt
    names = [instrument_name(instrument) for instrument in [*prompt.score.instruments.tolist(), *task.instruments]]
    for track, number in enumerate(prompt.track_of):
        names[track] = f"track {number + 1} ({names[track]})"
    kept = "keep their old notes" if task.replaced else "are empty or half written"
    return f"{task.max_length} tokens were too few: {in_words(piece.unfinished, names)} {kept}"


def _is_new(written: MidiSource, task: Task, gone: frozenset[tuple[int, int]], only_new: bool) -> np.ndarray:
    """(notes,) bool: which notes of the written file are not the prompt's, less the cells that are gone. By their
    places in the file: a new part that shares a channel has the instrument of its host there."""
    source = task.prompt.source
    kept = set() if only_new else {*source.places(source.score.notes)}
    kept -= {*source.places(task.prompt.notes_in(gone))}
    return np.array([place not in kept for place in written.places(written.score.notes)], dtype=bool)


def _record(
    job: Job,
    pieces: list[Piece],
    changes: list[Counter],
    seconds: float,
    config: GenerateConfig,
    model: MeloFormer,
) -> dict:
    """The run's entry in generation.json; prints its last line."""
    tokens = sum(piece.tokens for piece in pieces)
    num_notes = [_in_file(piece, counts) for piece, counts in zip(pieces, changes)]
    notes = sum(num_notes)
    cut = sum(piece.sample.hit_limit for piece in pieces)
    if cut and job.task is None:
        what = f"{cut} of {counted(len(pieces), 'piece')} {'was' if cut == 1 else 'were'} closed at max_length"
        print(f"{what}: ask for fewer --bars or --instruments; --continue_bars makes a piece longer", file=sys.stderr)
    said = f"{counted(len(pieces), 'piece')}, {counted(notes, 'note')} in {seconds:.1f} s"
    print(f"{said} ({tokens / seconds:.0f} tokens/s): {config.output}")
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
                "index": piece.sample.index,
                "tokens": piece.tokens,
                "notes": written,
                "bars": piece.sample.score.num_bars,
                "instruments": [instrument_name(i) for i in piece.sample.score.instruments.tolist()],
                "chosen": chosen_words(piece.sample.chosen, model.vocabulary, model.tags),
                "hit_max_length": piece.sample.hit_limit,
                "unfinished": "" if not piece.unfinished else _left(job.task, piece),
                "changes": dict(counts),
            }
            for name, piece, written, counts in zip(job.names, pieces, num_notes, changes)
        ],
    }


def _in_file(piece: Piece, counts: Counter) -> int:
    """New notes that are in the piece's file, by what writing it counted."""
    return piece.num_notes - counts["held_dropped"] - counts["duplicate_dropped"]


def describe(job: Job, piece: Piece, counts: Counter) -> str:
    """One line about a piece for people; counts: what writing it changed."""
    notes = _in_file(piece, counts)
    if job.task is not None:
        tracks, bars = (len(set(numbers)) for numbers in zip(*job.task.to_write))
        where = f"{counted(bars, 'bar')} of {counted(tracks, 'track')}"
        if tracks * bars != job.task.cells:
            where = f"{counted(job.task.cells, 'bar')}, those of {tracks} tracks together"
        return f"{counted(notes, 'new note')} in {where}"
    score = piece.sample.score
    names = ", ".join(instrument_name(i) for i in score.instruments.tolist())
    return f"{counted(score.num_bars, 'bar')}, {counted(notes, 'note')}: {names}"


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


class PromptFile(NamedTuple):
    """A prompt's path; `where` it was named begins an error about it: a list and its line, or nothing."""

    path: str
    where: str = ""


def read_prompts(config: GenerateConfig) -> list[PromptFile]:
    """The prompts, none for pieces from nothing; checks what can be checked without reading them."""
    if config.rewrite is not None:
        parse_rewrite(config.rewrite)
    if config.add_bars is not None:
        parse_bars(config.add_bars)
    for word in config.add_instruments or []:
        parse_instrument(word)
    if config.prompt is not None:
        return [PromptFile(config.prompt)]
    if config.prompts_file is None:
        return []
    given = f"--prompts_file {config.prompts_file}"
    try:
        text = Path(config.prompts_file).read_bytes()
    except OSError as error:
        raise UserError(f"{given}: {error.strerror}; give a text file, one path a line") from None
    if b"\0" in text:
        raise UserError(f"{given}: is no text file; give one with a path a line, or one MIDI file as --prompt")
    lines = [os.fsdecode(line.strip()) for line in text.splitlines()]
    prompts = [
        PromptFile(expand_home(line), f"{config.prompts_file}, line {number}: ")
        for number, line in enumerate(lines, 1)
        if line and not line.startswith("#")
    ]
    if not prompts:
        raise UserError(f"{given}: names no file; write the path of a MIDI file on each line")
    return prompts


def plan(config: GenerateConfig, prompt: Prompt, steering: Steering, max_length: int) -> Task:
    """The task of the flags on one prompt."""
    if config.continue_bars is not None:
        return continuation(prompt, config.continue_bars, max_length, config.prompt_bars, steering)
    if config.rewrite is not None:
        return rewriting(prompt, find_cells(prompt, parse_rewrite(config.rewrite)), max_length, steering)
    if config.anew:
        return anew(prompt, max_length, config.bars, steering)
    instruments = [parse_instrument(word) for word in config.add_instruments or []]
    bars = None if config.add_bars is None else find_bars(prompt, *parse_bars(config.add_bars), "--add_bars ")
    return accompaniment(prompt, instruments, max_length, config.prompt_bars, steering, bars)


def _names(config: GenerateConfig, paths: list[str]) -> list[list[str]]:
    """Names of the files of each prompt; prompts of one name are told apart by a number."""
    heads: list[str] = []
    for path in paths:
        stem = Path(path).stem
        numbered = (f"{stem}_{number}_" for number in count(2))
        heads.append(next(head for head in chain([f"{stem}_"], numbered) if head not in heads))
    return [[f"{head}seed{config.seed}_{i:03d}" for i in range(config.num_samples)] for head in heads or [""]]
