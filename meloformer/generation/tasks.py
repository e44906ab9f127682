"""What is to be written into a prompt, as a request to a model, and the file with what it wrote.

>>> prompt = Prompt("song.mid", model.vocabulary)                                    # doctest: +SKIP
>>> task = continuation(prompt, bars=16, max_length=model.max_seq_len)               # doctest: +SKIP
>>> samples = generate(model, task.request)                                          # doctest: +SKIP
>>> task.write(samples[0], "longer.mid")                                             # doctest: +SKIP

Four tasks, one mechanism each: `continuation` masks the new bars of every track, `rewriting` the chosen cells (track,
bar), and their FILLs are generated; `anew` keeps bars, meters, tempos and instruments, and no note; `accompaniment`, in
`generation.parts`, lets new tracks follow the given ones.

A piece that is longer than the context is read through a window: its last bars, or bars round the chosen cells, or one
window after the other (`generation.parts`), so that a continuation is as long as is asked. `Task.note` says so. A
window is so large that room stays for what is written: `prompt.ROOM` times what the chosen cells hold now, or the piece
on average. Where a sample fills it all the same, `Task.unfinished` has the cells that it did not end, and the notes
that those were to replace stay.

The surprise: what is masked is not shown to the model at all, so a rewritten bar owes nothing to the old one but the
music around it, and to what is derived from the piece where the model was trained with that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from meloformer.config import MOST_BARS
from meloformer.errors import UserError
from meloformer.generation.engine import Sample
from meloformer.generation.prompt import Prompt
from meloformer.generation.request import TRACK_LENGTH, ConstrainedState, Request
from meloformer.generation.steering import FREE, Frame, Steering, in_words, prompt_rows
from meloformer.hid import Annotations
from meloformer.hid.tokenizer import note_rows
from meloformer.midi import write_midi
from meloformer.midi.general_midi import instrument_name
from meloformer.midi.merge import merge_midi
from meloformer.midi.score import Score, note_table


@dataclass(frozen=True)
class Task:
    """What is to be written into a prompt: `request` for `generate`, `write` for what comes back.

    first_bar: of the window that the model reads; tracks: the window's, as numbers of `prompt.score`; masked: the
    (track, bar) of `prompt.score` that are written, in the order of the stream; until: new parts end before this bar,
    which may lie behind the window (`generation.parts` goes on then); max_length: as `generate` is given; anew: the
    file is the sample, and nothing of the prompt's; steering: what is asked of all windows; later: what those behind
    the first one rewrite.
    """

    prompt: Prompt
    request: Request
    first_bar: int
    last_bar: int
    until: int
    tracks: list[int]
    masked: list[tuple[int, int]]
    max_length: int
    note: str = ""
    anew: bool = False
    steering: Steering = FREE
    later: tuple[tuple[int, int], ...] = ()

    @property
    def end_bar(self) -> int:
        """The file has so many bars."""
        return max(self.last_bar, self.prompt.num_bars)

    @property
    def replaced(self) -> frozenset[tuple[int, int]]:
        """(track, bar) of `prompt.score` whose old notes go."""
        return frozenset(cell for cell in [*self.masked, *self.later] if cell[1] < self.prompt.given_bars)

    @property
    def to_write(self) -> list[tuple[int, int]]:
        """(track, bar) of all that is new; the tracks of new parts count on from those of `prompt.score`."""
        parts = range(len(self.prompt.score.tracks), len(self.prompt.score.tracks) + len(self.instruments))
        return [*product(parts, range(self.first_bar, self.until)), *self.masked, *self.later]

    @property
    def beyond(self) -> list[tuple[int, int]]:
        """What of `to_write` is not in the window."""
        later = set(self.later)
        return [cell for cell in self.to_write if cell in later or cell[1] >= self.last_bar]

    @property
    def cells(self) -> int:
        """How many bars of parts are new."""
        return len(self.to_write)

    @property
    def told(self) -> str:
        """The conditions that the model reads before it writes, in words."""
        return in_words(self.request.given, self.prompt.vocabulary, self.prompt.tags)

    @property
    def instruments(self) -> list[int]:
        """New parts, in the order in which they are written."""
        return self.request.ordered_instruments()

    def unfinished(self, sample: Sample) -> list[tuple[int, int]]:
        """What of `to_write` is not written or half written: where max_length cut the sample, and what lies beyond the
        window. Nothing says where a bar would have ended, so the one that was cut counts."""
        beyond = self.beyond
        if not sample.hit_limit:
            return beyond
        prompt, given = self.prompt, len(self.request.given)
        state = ConstrainedState(prompt.vocabulary, self.request, self.max_length, prompt.tags, prompt.predicted)
        for token in sample.tokens[given:].tolist():
            state.allowed()
            if state.hit_limit:
                break
            state.push(token)
        if not state.hit_limit:  # another limit than the task's
            return beyond
        track, bar, written = state.state.track, max(state.state.bar, 0), state.state.fills > 0
        behind = set(beyond)
        cells = [cell for cell in self.to_write if cell not in behind]
        if written or track >= len(self.tracks):
            number = self.tracks[track] if track < len(self.tracks) else track - len(self.tracks) + self._first_part
            cells = cells[cells.index((number, bar + self.first_bar)) :]
        return [*cells, *beyond]

    @property
    def _first_part(self) -> int:
        return len(self.prompt.score.tracks)

    def grid_notes(self, sample: Sample) -> np.ndarray:
        """Note table of what is new, in ticks of the grid; tracks as in `to_write`."""
        prompt, given = self.prompt, len(self.request.given)
        annotations = prompt.tokenizer.annotate(sample.tokens)
        annotations = Annotations(*(field[given:] for field in annotations))
        notes = note_rows(sample.tokens[given:], annotations, prompt.vocabulary)
        parts = range(self._first_part, self._first_part + len(self.instruments))
        notes["track"] = np.array([*self.tracks, *parts])[notes["track"]]
        notes["onset"] += prompt.score.bar_lines()[self.first_bar]
        return notes

    def new_notes(self, sample: Sample) -> np.ndarray:
        """Note table in the file's ticks; a track is one of the file's or, beyond them, one of `instruments`. A cell
        that was to be replaced and is half written has none."""
        notes = self.grid_notes(sample)
        left = self.replaced.intersection(self.unfinished(sample))
        if left:
            notes = notes[[cell not in left for cell in self.prompt.cells_of(notes)]]
        return self.prompt.file_notes(notes)

    def removed(self, sample: Sample) -> frozenset[tuple[int, int]]:
        """(track, bar) of `prompt.score` whose old notes are not in the file: of `replaced` what has been written."""
        return self.replaced.difference(self.unfinished(sample))

    def write(self, sample: Sample, path: str | Path, only_new: bool = False) -> Counter:
        """The prompt's file with the sample's new notes in it, or with `only_new` those alone; counts of the rules."""
        if self.anew:
            return write_midi(named(sample.score), path)
        return self.merge(self.new_notes(sample), self.removed(sample), path, only_new)

    def merge(
        self, notes: np.ndarray, gone: frozenset[tuple[int, int]], path: str | Path, only_new: bool = False
    ) -> Counter:
        """The prompt's file with notes as `new_notes` gives them, without the cells that are gone."""
        prompt = self.prompt
        end_tick = int(prompt.file_ticks(replace(prompt.score, num_bars=self.end_bar).bar_lines()[-1]))
        removed = prompt.notes_in(gone)
        return merge_midi(prompt.source, path, notes, self.instruments, removed, end_tick, only_new=only_new)


def named(score: Score) -> Score:
    """The score, its tracks without a name called by their instruments."""
    tracks = [replace(track, name=track.name or instrument_name(track.instrument)) for track in score.tracks]
    return replace(score, tracks=tracks)


# --- the tasks ----------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """Bars [first, last) that the model reads, and the (track, bar) in them that are masked."""

    first: int
    last: int
    masked: frozenset[tuple[int, int]] = frozenset()


def continuation(
    prompt: Prompt, bars: int, max_length: int, prompt_bars: int | None = None, steering: Steering = FREE
) -> Task:
    """`bars` more bars of every track, behind the last bar; the model reads the last `prompt_bars`, or all that fit.
    Where it could not read as many as it writes, or all, the task's window is the first of several, as in `rewriting`;
    densities of bars go into one window."""
    first, tracks = prompt.num_bars, len(prompt.score.tracks)
    end, wanted = first + bars, min(prompt_bars or first, first)
    if end > MOST_BARS:  # said before they are listed
        raise UserError(f"{prompt.path}: it has {first} bars, and {bars} more make over {MOST_BARS}; ask for fewer")

    def window(size: int, last: int = end) -> Window:
        return Window(first - size, last, frozenset(product(range(tracks), range(first, last))))

    is_one = steering.bar_density is not None
    what, remedy = f"a bar of it and {bars} new ones of {tracks} tracks", "ask for fewer --continue_bars"
    if not is_one:
        what, remedy = f"a bar of it and a new one of {tracks} tracks", "take a prompt with fewer"
        largest(prompt, lambda _: window(1, first + 1), 0, 0, [], marks(steering), max_length, what, remedy)
    frame = Frame(0, end, range(first, end), range(tracks))
    rows = prompt_rows(prompt.derived, prompt.score, frame, steering.controls(prompt.vocabulary, prompt.tags))
    longer = prompt.extended(end, rows, first - wanted, is_whole=bool(steering.end))
    least = 1 if is_one else min(bars, wanted)
    if is_one or length(prompt, window(least), [], steering) <= max_length:
        size = largest(prompt, window, least, wanted, [], steering, max_length, what, remedy)
        note = f"reads its last {size} of {first} bars" if size < wanted else ""
        return replace(as_task(prompt, window(size), [], steering, note, max_length), prompt=longer, steering=steering)
    task = rewriting(longer, window(0).masked, max_length, marks(steering))
    note = f"reads bars {task.first_bar + 1}-{first}, writes {first + 1}-{task.last_bar} and goes on from there"
    return replace(task, steering=steering, note=_note(prompt, note, max_length))


def rewriting(prompt: Prompt, cells: frozenset[tuple[int, int]], max_length: int, steering: Steering = FREE) -> Task:
    """The (track, bar) cells of `prompt.score` anew; the model reads as many bars on both sides as fit. Where not even
    what lies between the cells does, the task's window is the first of several, `later` the cells of the others. So it
    is where bars behind the given ones fit, and as many before them do not."""
    bars = sorted({bar for _, bar in cells})
    low, high = bars[0], bars[-1] + 1
    laid = laid_over(prompt, bars, steering, adds_parts=False)
    before = min(high - low, low - prompt.first_read) if low >= prompt.given_bars and len(bars) > 1 else 0
    if length(prompt, Window(low - before, high, cells), [], steering) > max_length:
        first = _first_cells(laid, bars, cells, steering, max_length)
        task = rewriting(laid, first, max_length, marks(steering))
        note = f"rewrites bars {low + 1}-{max(bar for _, bar in first) + 1}, then goes on from there"
        later = tuple(sorted(cells - first))
        return replace(task, prompt=laid, steering=steering, later=later, note=_note(prompt, note, max_length))

    def window(size: int) -> Window:
        return Window(max(low - size, prompt.first_read), min(high + size, end), cells)

    end = max(high, prompt.given_bars)  # nothing stands behind those yet
    wanted = max(low - prompt.first_read, end - high)
    size = largest(prompt, window, 0, wanted, [], steering, max_length, f"bars {low + 1}-{high} of all its tracks", "")
    first, last, _ = window(size)
    note = f"reads bars {first + 1}-{last} of {prompt.num_bars}" if size < wanted else ""
    return replace(as_task(prompt, window(size), [], steering, note, max_length), prompt=laid, steering=steering)


def _first_cells(
    prompt: Prompt, bars: list[int], cells: frozenset[tuple[int, int]], steering: Steering, max_length: int
) -> frozenset[tuple[int, int]]:
    """The cells of as many of these bars as fit beside as many bars before them; UserError where one alone does not."""
    refuse_windows(prompt, bars[0], bars[-1] + 1, steering, max_length)

    def of(some: list[int]) -> frozenset[tuple[int, int]]:
        return frozenset(cell for cell in cells if cell[1] in some)

    for bar in bars:
        if bar > max(prompt.given_bars, bars[0]):  # what is not written yet needs as much everywhere
            break
        what, remedy = f"bar {bar + 1} of all its tracks and room to write in", "rewrite fewer tracks at a time"
        alone = Window(bar, bar + 1, of([bar]))
        largest(prompt, lambda _, alone=alone: alone, 0, 0, [], marks(steering), max_length, what, remedy)

    def window(size: int) -> Window:
        last = bars[size - 1] + 1 if size else bars[0] + 1
        return Window(max(2 * bars[0] - last, prompt.first_read) if size else bars[0], last, of(bars[: max(size, 1)]))

    return window(largest(prompt, window, 0, len(bars), [], marks(steering), max_length, "", "")).masked


def anew(prompt: Prompt, max_length: int, bars: int | None = None, steering: Steering = FREE) -> Task:
    """A new piece on the first `bars` of the prompt, or all that fit: its meters, tempos and instruments, and what is
    derived from each part but where the steering describes parts."""
    if not steering.parts:
        steering = replace(steering, parts=prompt.parts())
    instruments = prompt.score.instruments.tolist()
    if bars is not None and bars > prompt.num_bars:
        raise UserError(f"{prompt.path}: --bars {bars}, it has {prompt.num_bars}; ask for fewer, or leave --bars out")

    def window(size: int) -> Window:
        return Window(0, size)

    wanted = bars or prompt.num_bars
    least = min(max(steering.controls(prompt.vocabulary, prompt.tags).num_bars, 1), wanted)  # what is asked for fits
    what = f"{'a bar' if least == 1 else f'{least} bars'} of {len(instruments)} new parts"
    remedy = "take a prompt with fewer" + (", or give fewer chords or densities of bars" if least > 1 else "")
    size = largest(prompt, window, least, wanted, instruments, steering, max_length, what, remedy, without_tracks=True)
    note = f"writes its first {size} of {prompt.num_bars} bars" if size < wanted else ""
    return as_task(prompt, window(size), instruments, steering, note, max_length, without_tracks=True)


def laid_over(prompt: Prompt, bars: Sequence[int], steering: Steering, adds_parts: bool) -> Prompt:
    """The prompt with what is asked in the place of what is derived, over all of the bars that are to be written, so
    that a progression goes on from window to window."""
    frame = Frame(0, prompt.num_bars, bars, range(len(prompt.score.tracks)), adds_parts)
    rows = prompt_rows(prompt.derived, prompt.score, frame, steering.controls(prompt.vocabulary, prompt.tags))
    return prompt.with_music(rows, note_table())


def marks(steering: Steering) -> Steering:
    """Of a steering that is laid over a prompt what stays: that beginning and end are not to be said."""
    return replace(FREE, begin=None if steering.begin else steering.begin, end=None if steering.end else steering.end)


def refuse_windows(prompt: Prompt, first: int, last: int, steering: Steering, max_length: int) -> None:
    """UserError for what cannot be asked where the bars [first, last) are written in several windows."""
    if steering.bar_density is not None:
        raise UserError(f"{prompt.path}: bar_density needs all new bars in {max_length} tokens; ask for fewer bars")
    for name, given in (("begin", steering.begin and first), ("end", steering.end and last < prompt.num_bars)):
        if given:
            raise UserError(f"{name}: what is written into {prompt.path} is not there; leave it out")


def length(
    prompt: Prompt, window: Window, instruments: Sequence[int], steering: Steering, without_tracks: bool = False
) -> int:
    """Tokens of a window, with room for what is to be written: its masked cells and new parts."""
    first, last, masked = window
    tokens, _ = prompt.stream(first, last, masked, steering, bool(instruments), without_tracks)
    room = prompt.tokens_for(masked, (last - first) * len(instruments))
    return len(tokens) + len(instruments) * TRACK_LENGTH + room + 1


def largest(
    prompt: Prompt,
    window: Callable[[int], Window],
    smallest: int,
    most: int,
    instruments: Sequence[int],
    steering: Steering,
    max_length: int,
    what: str,
    remedy: str,
    without_tracks: bool = False,
) -> int:
    """The largest size whose `length` stays within max_length; UserError if none does."""
    needed = length(prompt, window(smallest), instruments, steering, without_tracks)
    if needed > max_length:
        raise UserError(f"{prompt.path}: {what} need about {needed} tokens, max_length is {max_length}; {remedy}")
    while smallest < most:
        middle = (smallest + most + 1) // 2
        if length(prompt, window(middle), instruments, steering, without_tracks) <= max_length:
            smallest = middle
        else:
            most = middle - 1
    return smallest


def as_task(
    prompt: Prompt,
    window: Window,
    instruments: list[int],
    steering: Steering,
    note: str,
    max_length: int,
    without_tracks: bool = False,
) -> Task:
    """The task of writing a window's masked cells, or new parts in it; `note` says how it was chosen."""
    first, last, masked = window
    if steering.end and last < prompt.num_bars and not without_tracks:
        raise UserError(f"end: the model reads {prompt.path} up to bar {last} of {prompt.num_bars}; leave it out")
    if steering.begin and first > 0:
        raise UserError(f"begin: the model reads {prompt.path} from bar {first + 1} on; leave it out")
    tokens, tracks = prompt.stream(first, last, masked, steering, bool(instruments), without_tracks)
    parts = Steering(parts=steering.parts) if instruments else FREE
    request = Request(instruments=instruments or None, given=tokens, steering=parts)
    note = _note(prompt, note, max_length)
    return Task(prompt, request, first, last, last, tracks, sorted(masked), max_length, note, anew=without_tracks)


def _note(prompt: Prompt, note: str, max_length: int) -> str:
    return f"{prompt.path}: the model {note}, which is what fits into {max_length} tokens" if note else ""
