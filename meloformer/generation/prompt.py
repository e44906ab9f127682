"""Music that is given: the part of a MIDI file that a model reads, and the file with what it wrote.

>>> prompt = Prompt("song.mid", model.vocabulary)                                    # doctest: +SKIP
>>> task = continuation(prompt, bars=16, max_length=model.max_seq_len)               # doctest: +SKIP
>>> samples = generate(model, task.request)                                          # doctest: +SKIP
>>> task.write(samples[0], "longer.mid")                                             # doctest: +SKIP

Four tasks, one mechanism each: `continuation` masks the new bars of every track, `rewriting` the chosen cells (track,
bar), and their FILLs are generated; `accompaniment` lets new tracks follow the given ones; `anew` keeps bars, meters,
tempos and instruments, and no note. A piece that is longer than the context is read through a window: its last bars, or
bars round the chosen cells. `Task.note` says so.

The surprise: what is masked is not shown to the model at all, so a rewritten bar owes nothing to the old one but the
music around it, and to its piece's key, chords, densities and roles where the model was trained with them: those are
derived from the whole file, as they are in training, unless others are asked for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from meloformer.errors import UserError
from meloformer.generation.engine import Sample
from meloformer.generation.request import TRACK_LENGTH, Request
from meloformer.generation.steering import FREE, Frame, Part, Steering, in_words, part_of, prompt_rows
from meloformer.hid import Annotations, Family, Tokenizer, Vocabulary
from meloformer.hid.conditions import derive, insert
from meloformer.hid.controls import TOKEN, TRACK
from meloformer.hid.quantize import round_half_up
from meloformer.hid.tokenizer import canonical_order, note_rows, reorder_tracks
from meloformer.midi import write_midi
from meloformer.midi.general_midi import parse_instrument
from meloformer.midi.merge import MidiSource, merge_midi
from meloformer.midi.score import Score

# Room that is kept for a new bar of a part: this many times the tokens that the piece has in one on average.
ROOM = 1.25


class Prompt:
    """A MIDI file as the model reads it; UserError where it cannot be read or has no notes. conditions: names of those
    that are derived from it for the model; tags: names of the model's tags.

    `source`: the file; `score`: its quantized music, tracks in the encoder's order; `track_of[i]`: which track of
    `source.score`, so of the file, track i of `score` is.
    """

    def __init__(
        self, path: str | Path, vocabulary: Vocabulary, conditions: Sequence[str] = (), tags: Sequence[str] = ()
    ):
        self.path, self.vocabulary, self.tags = path, vocabulary, tags
        self.tokenizer = Tokenizer(vocabulary)
        self.source = MidiSource(path)
        if not self.source.score.num_notes:
            raise UserError(f"{path}: has no notes, so there is nothing to go on from; give another prompt")
        score = self.tokenizer.quantize(self.source.score)
        number = {id(track): i for i, track in enumerate(self.source.score.tracks)}  # equal tracks are still two
        order = canonical_order(score)
        self.track_of = [number[id(score.tracks[i])] for i in order]
        self.score = reorder_tracks(score, order)
        self.derived = derive(self.score).rows(vocabulary, conditions)

    @property
    def num_bars(self) -> int:
        return self.score.num_bars

    @property
    def num_tracks(self) -> int:
        """Tracks of the file's score."""
        return len(self.source.score.tracks)

    def file_ticks(self, ticks: np.ndarray) -> np.ndarray:
        """Ticks of the token grid -> ticks of the file."""
        return round_half_up(ticks * self.source.ticks_per_quarter, self.vocabulary.resolution)

    def notes_in(self, cells: frozenset[tuple[int, int]]) -> np.ndarray:
        """The file's notes that begin in these (track, bar) cells of `score`."""
        notes = self.source.score.notes
        grid = round_half_up(notes["onset"] * self.vocabulary.resolution, self.source.ticks_per_quarter)
        bars = np.searchsorted(self.score.bar_lines(), grid, side="right") - 1
        chosen = {(self.track_of[track], bar) for track, bar in cells}
        return notes[[cell in chosen for cell in zip(notes["track"].tolist(), bars.tolist())]]

    def tokens_per_cell(self) -> float:
        """Tokens of one bar of one part, its BAR included, on average."""
        cells = len(self.score.tracks) * self.num_bars
        return 1 + (3 * self.score.num_notes + len(np.unique(self.score.notes[["track", "onset"]]))) / cells

    def parts(self) -> list[Part]:
        """Its tracks with what is derived from them, for new ones in their place."""
        rows = self.derived
        return [
            part_of(instrument, rows[rows[:, TRACK] == track, TOKEN], self.vocabulary)
            for track, instrument in enumerate(self.score.instruments.tolist())
        ]

    def find_tracks(self, name: str) -> list[int]:
        """Tracks of `score` for a number, counted from 1 in the file's order, or an instrument's name."""
        tracks = self.source.score.tracks
        if name.isdecimal():
            chosen = [i for i, number in enumerate(self.track_of) if number == int(name) - 1]
            said = f"it has {len(tracks)}, counted from 1"
        else:
            instrument = parse_instrument(name)
            chosen = [i for i, track in enumerate(self.score.tracks) if track.instrument == instrument]
            said = "none of its tracks plays it"
        if not chosen:
            raise UserError(f"{self.path}: no track {name}: {said}")
        return chosen

    def stream(
        self,
        first: int,
        last: int,
        masked: frozenset[tuple[int, int]] = frozenset(),
        steering: Steering = FREE,
        adds_parts: bool = False,
        without_tracks: bool = False,
    ) -> tuple[np.ndarray, list[int]]:
        """The head of a stream, all tracks of the bars [first, last) or none, and which tracks of `score` it holds.

        `masked`: (track, bar) cells that hold a MASK; a bar beyond the piece's end has the last meter and tempo. Tracks
        that are silent there and have no such cell are left out. Conditions are those of `steering`, its chords laid
        over the masked bars (all bars, if none is), and beside it what is derived from the score.
        """
        v, score = self.vocabulary, self.score
        ends = last == score.num_bars if steering.end is None else steering.end
        marks = [v.PIECE_BEGIN] * (first == 0 and steering.begin is not False) + [v.PIECE_END] * ends
        tokens = self.tokenizer.encode(_window(score, first, last), order="given")
        kind = v.family_of[tokens]
        instruments = np.flatnonzero(kind == Family.INSTRUMENT)
        pieces = np.split(tokens[:-1], instruments)
        parts = [tokens[:1], marks, pieces.pop(0)[1:]]
        lines = replace(score, num_bars=last).bar_lines()
        inside = score.notes[(score.notes["onset"] >= lines[first]) & (score.notes["onset"] < lines[last])]
        sounding, tracks = set(np.unique(inside["track"]).tolist()), []
        for track, instrument in enumerate([] if without_tracks else score.instruments.tolist()):
            chosen = {bar - first for t, bar in masked if t == track and first <= bar < last}
            if track not in sounding and not chosen:
                continue
            tracks.append(track)
            piece = pieces.pop(0) if track in sounding else np.array([v.instrument(instrument)])
            head, *bars = np.split(piece, np.flatnonzero(piece == v.BAR))
            bars += [np.array([v.BAR])] * (max(chosen, default=-1) + 1 - len(bars))
            parts += [head, *([v.BAR, v.MASK] if bar in chosen else cell for bar, cell in enumerate(bars))]
        bars = sorted({bar for _, bar in masked}) or range(first, last)
        frame = Frame(first, last, bars, tracks, adds_parts)
        rows = prompt_rows(self.derived, score, frame, steering.controls(v, self.tags))
        return insert(np.concatenate(parts).astype(np.uint16), rows, v), tracks


def _window(score: Score, first: int, last: int) -> Score:
    """Bars [first, last) of a quantized score, all its tracks; it may end later than the score does."""
    lines = replace(score, num_bars=last).bar_lines()
    start, end = int(lines[first]), int(lines[-1])
    notes = score.notes[(score.notes["onset"] >= start) & (score.notes["onset"] < end)].copy()
    notes["onset"] -= start
    tables = []
    for table in (score.meters, score.tempos):
        table = table[np.searchsorted(table["tick"], start, side="right") - 1 : np.searchsorted(table["tick"], end)]
        table = table.copy()
        table["tick"] = np.maximum(table["tick"] - start, 0)
        tables.append(table)
    return replace(score, notes=notes, meters=tables[0], tempos=tables[1], num_bars=last - first)


@dataclass(frozen=True)
class Task:
    """What is to be written into a prompt: `request` for `generate`, `write` for what comes back.

    first_bar: of the window that the model reads; tracks: the window's, as numbers of `prompt.score`; cells: how many
    bars of parts are new; replaced: (track, bar) of `prompt.score` whose old notes go; end_bar: the file lasts so long;
    anew: the file is the sample, and nothing of the prompt's.
    """

    prompt: Prompt
    request: Request
    first_bar: int
    end_bar: int
    tracks: list[int]
    cells: int
    replaced: frozenset[tuple[int, int]] = frozenset()
    note: str = ""
    anew: bool = False

    @property
    def told(self) -> str:
        """The conditions that the model reads before it writes, in words."""
        return in_words(self.request.given, self.prompt.vocabulary, self.prompt.tags)

    @property
    def instruments(self) -> list[int]:
        """New parts, in the order in which they are written."""
        return self.request.ordered_instruments()

    def new_notes(self, sample: Sample) -> np.ndarray:
        """Note table in the file's ticks; a track is one of the file's or, beyond them, one of `instruments`."""
        prompt, given = self.prompt, len(self.request.given)
        annotations = prompt.tokenizer.annotate(sample.tokens)
        annotations = Annotations(*(field[given:] for field in annotations))
        notes = note_rows(sample.tokens[given:], annotations, prompt.vocabulary)
        tracks = [prompt.track_of[track] for track in self.tracks]
        tracks += range(prompt.num_tracks, prompt.num_tracks + len(self.instruments))
        notes["track"] = np.array(tracks)[notes["track"]]
        start = notes["onset"] + prompt.score.bar_lines()[self.first_bar]
        end = prompt.file_ticks(start + notes["duration"])
        notes["onset"] = prompt.file_ticks(start)
        notes["duration"] = np.maximum(end - notes["onset"], 1)
        return notes

    def write(self, sample: Sample, path: str | Path, only_new: bool = False) -> Counter:
        """The prompt's file with the sample's new notes in it, or with `only_new` those alone; counts of the rules."""
        prompt = self.prompt
        if self.anew:
            return write_midi(sample.score, path)
        end_tick = int(prompt.file_ticks(replace(prompt.score, num_bars=self.end_bar).bar_lines()[-1]))
        removed = prompt.notes_in(self.replaced)
        return merge_midi(
            prompt.source, path, self.new_notes(sample), self.instruments, removed, end_tick, only_new=only_new
        )


# --- the tasks ----------------------------------------------------------------------------------------------------


def continuation(
    prompt: Prompt, bars: int, max_length: int, prompt_bars: int | None = None, steering: Steering = FREE
) -> Task:
    """`bars` more bars of every track, behind the last bar; the model reads the last `prompt_bars`, or all that fit."""
    end, tracks = prompt.num_bars + bars, len(prompt.score.tracks)
    what, remedy = f"a bar of it and {bars} new ones of {tracks} tracks", "ask for fewer --continue_bars"
    if bars * tracks > max_length:  # said before they are listed: each costs a token at least
        raise UserError(f"{prompt.path}: {what} need over {bars * tracks} tokens, max_length is {max_length}; {remedy}")
    masked = frozenset(product(range(tracks), range(prompt.num_bars, end)))
    wanted = min(prompt_bars or prompt.num_bars, prompt.num_bars)

    def window(size: int) -> tuple[int, int]:
        return prompt.num_bars - size, end

    size = _largest(prompt, window, 1, wanted, masked, [], steering, max_length, what, remedy)
    note = f"reads its last {size} of {prompt.num_bars} bars" if size < wanted else ""
    return _task(prompt, *window(size), masked, [], steering, note, max_length)


def rewriting(prompt: Prompt, cells: frozenset[tuple[int, int]], max_length: int, steering: Steering = FREE) -> Task:
    """The (track, bar) cells of `prompt.score` anew; the model reads as many bars on both sides as fit."""
    bars = [bar for _, bar in cells]
    low, high = min(bars), max(bars) + 1

    def window(size: int) -> tuple[int, int]:
        return max(low - size, 0), min(high + size, prompt.num_bars)

    wanted = max(low, prompt.num_bars - high)
    what = f"bars {low + 1}-{high} of all its tracks"
    size = _largest(prompt, window, 0, wanted, cells, [], steering, max_length, what, "rewrite fewer bars at a time")
    first, last = window(size)
    note = f"reads bars {first + 1}-{last} of {prompt.num_bars}" if size < wanted else ""
    return _task(prompt, first, last, cells, [], steering, note, max_length)


def accompaniment(
    prompt: Prompt,
    instruments: Sequence[int],
    max_length: int,
    prompt_bars: int | None = None,
    steering: Steering = FREE,
) -> Task:
    """New parts beside the given ones, in the last `prompt_bars`, or the whole piece; the steering's parts are they."""
    wanted = min(prompt_bars or prompt.num_bars, prompt.num_bars)

    def window(size: int) -> tuple[int, int]:
        return prompt.num_bars - size, prompt.num_bars

    what = f"{wanted} bars of it and {len(instruments)} new parts"
    remedy = "give the last bars alone a new part with --prompt_bars"
    _largest(prompt, window, wanted, wanted, frozenset(), instruments, steering, max_length, what, remedy)
    return _task(prompt, *window(wanted), frozenset(), list(instruments), steering, "", max_length)


def anew(prompt: Prompt, max_length: int, bars: int | None = None, steering: Steering = FREE) -> Task:
    """A new piece on the first `bars` of the prompt, or all that fit: its meters, tempos and instruments, and what is
    derived from each part but where the steering describes parts."""
    if not steering.parts:
        steering = replace(steering, parts=prompt.parts())
    instruments = prompt.score.instruments.tolist()
    if bars is not None and bars > prompt.num_bars:
        raise UserError(f"{prompt.path}: --bars {bars}, it has {prompt.num_bars}; ask for fewer, or leave --bars out")

    def window(size: int) -> tuple[int, int]:
        return 0, size

    wanted = bars or prompt.num_bars
    least = min(max(steering.controls(prompt.vocabulary, prompt.tags).num_bars, 1), wanted)  # what is asked for fits
    what = f"{'a bar' if least == 1 else f'{least} bars'} of {len(instruments)} new parts"
    remedy = "take a prompt with fewer" + (", or give fewer chords or densities of bars" if least > 1 else "")
    size = _largest(
        prompt, window, least, wanted, frozenset(), instruments, steering, max_length, what, remedy, without_tracks=True
    )
    note = f"writes its first {size} of {prompt.num_bars} bars" if size < wanted else ""
    return _task(prompt, 0, size, frozenset(), instruments, steering, note, max_length, without_tracks=True)


def _largest(
    prompt: Prompt,
    window: Callable[[int], tuple[int, int]],
    smallest: int,
    largest: int,
    masked: frozenset[tuple[int, int]],
    instruments: Sequence[int],
    steering: Steering,
    max_length: int,
    what: str,
    remedy: str,
    without_tracks: bool = False,
) -> int:
    """The largest size whose window, with room for what is new, stays within max_length; UserError if none does."""

    def length(size: int) -> int:
        first, last = window(size)
        tokens, _ = prompt.stream(first, last, masked, steering, bool(instruments), without_tracks)
        cells = len(masked) + (last - first) * len(instruments)
        return len(tokens) + len(instruments) * TRACK_LENGTH + math.ceil(ROOM * prompt.tokens_per_cell() * cells) + 1

    if length(smallest) > max_length:
        raise UserError(
            f"{prompt.path}: {what} need about {length(smallest)} tokens, max_length is {max_length}; {remedy}"
        )
    while smallest < largest:
        middle = (smallest + largest + 1) // 2
        if length(middle) <= max_length:
            smallest = middle
        else:
            largest = middle - 1
    return smallest


def _task(
    prompt: Prompt,
    first: int,
    last: int,
    masked: frozenset[tuple[int, int]],
    instruments: list[int],
    steering: Steering,
    note: str,
    max_length: int,
    without_tracks: bool = False,
) -> Task:
    if steering.end and last < prompt.num_bars and not without_tracks:
        raise UserError(f"end: the model reads {prompt.path} up to bar {last} of {prompt.num_bars}; leave it out")
    if steering.begin and first > 0:
        raise UserError(f"begin: the model reads {prompt.path} from bar {first + 1} on; leave it out")
    tokens, tracks = prompt.stream(first, last, masked, steering, bool(instruments), without_tracks)
    cells = len(masked) + (last - first) * len(instruments)
    note = f"{prompt.path}: the model {note}, which is what fits into {max_length} tokens" if note else ""
    parts = Steering(parts=steering.parts) if instruments else FREE
    request = Request(instruments=instruments or None, given=tokens, steering=parts)
    end_bar = max(last, prompt.num_bars)
    replaced = frozenset(c for c in masked if c[1] < prompt.num_bars)
    return Task(prompt, request, first, end_bar, tracks, cells, replaced, note, anew=without_tracks)


# --- what the command line says -----------------------------------------------------------------------------------


def parse_rewrite(words: Sequence[str]) -> list[tuple[str, int, int]]:
    """(track, first bar, last bar) of each `track=2,bars=8-16`; bars as written: from 1, the last one included.

    >>> parse_rewrite(["track=2", "bars=8-16", "track=drums,bars=3"])
    [('2', 8, 16), ('drums', 3, 3)]
    """
    fields = [word.strip().partition("=") for given in words for word in given.split(",")]
    chosen = []
    for (key, _, track), (other, _, bars) in zip(fields[::2], fields[1::2]):
        first, dash, last = bars.partition("-")
        good = key == "track" and other == "bars" and first.isdecimal() and (not dash or last.isdecimal())
        if not good or not track or not 1 <= int(first) <= int(last or first):
            break
        chosen.append((track, int(first), int(last or first)))
    if not chosen or 2 * len(chosen) != len(fields):
        raise UserError(f'--rewrite is {",".join(words)!r}, must be like "track=2,bars=8-16" or "track=drums,bars=1"')
    return chosen


def find_cells(prompt: Prompt, chosen: Sequence[tuple[str, int, int]]) -> frozenset[tuple[int, int]]:
    """(track, bar) of `prompt.score`; UserError for a track or a bar that it does not have."""
    cells = set()
    for name, first, last in chosen:
        if last > prompt.num_bars:
            raise UserError(f"{prompt.path}: --rewrite bars={first}-{last}, it has bars 1-{prompt.num_bars}")
        cells |= set(product(prompt.find_tracks(name), range(first - 1, last)))
    return frozenset(cells)
