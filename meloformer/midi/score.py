"""A piece of music as numpy tables: notes, meters, tempos, tracks. Everything else reads or makes a `Score`.

Times are integer ticks from the beginning, `ticks_per_quarter` of them to a quarter note.

>>> score = Score(480, [Track(program=33)], note_table([(0, 480, 240, 40, 90)]))
>>> score.num_notes, score.tracks[0].instrument
(1, 33)

A Score is either *raw*, as a reader found it (any resolution, meters and tempos anywhere), or *quantized*
(`hid.quantize`): then every time lies on the token grid, meters and tempos stand at bar lines, `num_bars` is set,
and the tokenizer takes it exactly as it stands. The surprise: equality is about the music alone, so track
names and the counts of what was lost do not enter it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from meloformer.errors import UserError

DRUMS = 128  # the instrument number of every drum track; 0..127 are General MIDI programs
DEFAULT_QPM = 120.0  # what a MIDI file without a tempo event means (Standard MIDI Files 1.0, p. 9)
DEFAULT_METER = (4, 4)

NOTE_DTYPE = np.dtype(
    [("track", np.int32), ("onset", np.int64), ("duration", np.int64), ("pitch", np.uint8), ("velocity", np.uint8)]
)
METER_DTYPE = np.dtype([("tick", np.int64), ("numerator", np.int32), ("denominator", np.int32)])
TEMPO_DTYPE = np.dtype([("tick", np.int64), ("qpm", np.float64)])  # quarter notes per minute


class MidiError(UserError):
    """A file or score that cannot be read as music; the message says what, where and what to do."""


class NoteColumns(NamedTuple):
    """What a note table holds, (notes,) int64 each: a third of the time of the table's own strided fields."""

    track: np.ndarray
    onset: np.ndarray
    duration: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray

    def take(self, rows: np.ndarray) -> NoteColumns:
        return NoteColumns(*[column[rows] for column in self])

    def table(self) -> np.ndarray:
        """As `note_table` has them."""
        order = note_order(self.track, self.onset, self.pitch, self.duration)
        notes = np.empty(len(self.track), dtype=NOTE_DTYPE)
        for name, column in zip(self._fields, self):
            notes[name] = column if order is None else column[order]
        return notes


class Control(NamedTuple):
    """A condition token and the place it belongs to.

    `track` -1 with `bar` -1 is the whole stream; `track` -1 with a bar is that bar of the conductor; a track with
    `bar` -1 is the whole track. `onset` is a tick inside the bar for a chord, else -1. `token` is the vocabulary id.
    """

    track: int
    bar: int
    onset: int
    token: int


@dataclass(frozen=True)
class Track:
    """One part. `program` is a General MIDI program 0..127 (ignored by drums)."""

    program: int
    is_drum: bool = False
    name: str = ""

    @property
    def instrument(self) -> int:
        """0..127, or DRUMS."""
        return DRUMS if self.is_drum else self.program


def note_table(rows: Iterable[tuple[int, int, int, int, int]] | np.ndarray = ()) -> np.ndarray:
    """(track, onset, duration, pitch, velocity) rows as a table sorted by track, onset, pitch, duration."""
    notes = np.asarray(rows if isinstance(rows, np.ndarray) else list(rows), dtype=NOTE_DTYPE).reshape(-1)
    order = note_order(notes["track"], notes["onset"], notes["pitch"], notes["duration"])
    return notes if order is None else notes[order]


def note_order(track: np.ndarray, second: np.ndarray, third: np.ndarray, *ties: np.ndarray) -> np.ndarray | None:
    """The stable order by track, then the other keys; None where they are in it already.

    Much faster than np.lexsort, for three keys of usual size are packed into one number, and readers hand over
    tracks that are almost sorted.
    """
    keys = [np.ascontiguousarray(key, dtype=np.int64) for key in (track, second, third)]
    bits = [int(key.view(np.uint64).max(initial=0)).bit_length() for key in keys]  # 64 where one is negative
    if sum(bits) > 63:
        return np.lexsort((*ties[::-1], third, second, track))
    packed = (keys[0] << (bits[1] + bits[2])) | (keys[1] << bits[2]) | keys[2]
    if (packed[1:] > packed[:-1]).all():
        return None
    order = np.argsort(packed, kind="stable")
    if ties and len(order):
        in_order = packed[order]
        if (in_order[1:] == in_order[:-1]).any():
            return np.lexsort((*ties[::-1], packed))
    return order


def _meter_table(rows=((0, *DEFAULT_METER),)) -> np.ndarray:
    return np.asarray(list(rows), dtype=METER_DTYPE)


def _tempo_table(rows=((0, DEFAULT_QPM),)) -> np.ndarray:
    return np.asarray(list(rows), dtype=TEMPO_DTYPE)


@dataclass(eq=False)
class Score:
    """Notes sorted by (track, onset, pitch); meters and tempos sorted by tick, the first at tick 0.

    `num_bars` is None in a raw score. `controls` are the condition tokens of a decoded stream. `counts` says what
    reading and quantising changed or dropped, by name of the rule.

    `notes` may be given as columns; they become a table, sorted, when somebody asks for it. Until then they are what
    `columns` gives, and those of a raw score stand in any order.
    """

    ticks_per_quarter: int
    tracks: list[Track] = field(default_factory=list)
    notes: np.ndarray = field(default_factory=note_table)
    meters: np.ndarray = field(default_factory=_meter_table)
    tempos: np.ndarray = field(default_factory=_tempo_table)
    num_bars: int | None = None
    controls: list[Control] = field(default_factory=list)
    quantized: bool = False
    counts: Counter = field(default_factory=Counter)

    def __post_init__(self):
        if self.ticks_per_quarter <= 0:
            raise MidiError(f"ticks_per_quarter is {self.ticks_per_quarter}, must be positive")
        if not isinstance(self.meters, np.ndarray):
            self.meters = _meter_table(self.meters)
        if not isinstance(self.tempos, np.ndarray):
            self.tempos = _tempo_table(self.tempos)
        if isinstance(self.notes, NoteColumns):
            self._columns = self.__dict__.pop("notes")

    def __getattr__(self, name: str) -> np.ndarray:
        # Called for `notes` alone, once: most scores of a corpus are encoded without anybody looking at their table.
        if name != "notes" or "_columns" not in self.__dict__:
            raise AttributeError(f"Score has no attribute {name!r}")
        self.notes = self.__dict__.pop("_columns").table()
        return self.notes

    @property
    def columns(self) -> NoteColumns:
        """The notes by column, for reading only."""
        if "_columns" in self.__dict__:
            return self._columns
        return NoteColumns(*[self.notes[name].astype(np.int64) for name in NoteColumns._fields])

    @property
    def num_notes(self) -> int:
        return len(self._columns.track if "_columns" in self.__dict__ else self.notes)

    @property
    def instruments(self) -> np.ndarray:
        """(tracks,) int32: instrument number of each track."""
        return np.array([track.instrument for track in self.tracks], dtype=np.int32)

    @property
    def end_tick(self) -> int:
        """Where the last note stops sounding."""
        notes = self.columns
        return int((notes.onset + notes.duration).max(initial=0))

    def bar_lines(self) -> np.ndarray:
        """(num_bars + 1,) int64 ticks of the bar lines of a quantized score, the end of the last bar included."""
        if self.num_bars is None:
            raise MidiError("bar_lines() needs a quantized score: call hid.quantize first")
        return bar_lines(self.meters, self.ticks_per_quarter, self.num_bars)

    def seconds_at(self, ticks: np.ndarray | int) -> np.ndarray:
        """Seconds from the beginning to each tick, through the tempo map."""
        return seconds_at(self.tempos, self.ticks_per_quarter, ticks)

    def __eq__(self, other) -> bool:
        if not isinstance(other, Score):
            return NotImplemented
        return (
            self.ticks_per_quarter == other.ticks_per_quarter
            and self.num_bars == other.num_bars
            and np.array_equal(self.instruments, other.instruments)
            and np.array_equal(self.notes, other.notes)
            and np.array_equal(self.meters, other.meters)
            and np.array_equal(self.tempos, other.tempos)
            and self.controls == other.controls
        )

    __hash__ = None


def flaw_of(score: Score) -> str:
    """What neither a MIDI file nor a stream can hold of a score's tracks and notes, in words; "" where all is well.

    >>> flaw_of(Score(480, [Track(0)], note_table([(1, 0, 480, 60, 90)])))
    'a note of a track that is not there: the score has 1'
    """
    if any(not track.is_drum and not 0 <= track.program < DRUMS for track in score.tracks):
        return "a program outside 0..127"
    notes = score.columns
    if not len(notes.track):
        return ""
    for column, highest, flaw in (
        (notes.onset, 2**63 - 1, "a note before tick 0"),
        (notes.pitch, 127, "a pitch outside 0..127"),
        (notes.velocity, 127, "a velocity outside 0..127"),
        (notes.track, len(score.tracks) - 1, f"a note of a track that is not there: the score has {len(score.tracks)}"),
    ):
        if int(column.view(np.uint64).max()) > highest:  # as unsigned, a negative number is a large one
            return flaw
    return ""


def seconds_at(tempos: np.ndarray, ticks_per_quarter: int, ticks: np.ndarray | int) -> np.ndarray:
    """Seconds from the beginning to each tick, through a tempo map."""
    ticks = np.asarray(ticks)
    seconds_per_tick = 60.0 / (tempos["qpm"] * ticks_per_quarter)
    starts = tempos["tick"]
    if len(tempos) == 1:
        return (ticks - starts[0]) * seconds_per_tick[0]
    elapsed = np.concatenate(([0.0], np.cumsum(np.diff(starts) * seconds_per_tick[:-1])))
    i = np.searchsorted(starts, ticks, side="right") - 1
    return elapsed[i] + (ticks - starts[i]) * seconds_per_tick[i]


def bar_ticks(numerator, denominator, ticks_per_quarter: int):
    """Length of a bar in ticks; works on arrays."""
    return numerator * 4 * ticks_per_quarter // denominator


def bar_lines(meters: np.ndarray, ticks_per_quarter: int, num_bars: int) -> np.ndarray:
    """(num_bars + 1,) int64: ticks of the bar lines when every meter change stands on one.

    >>> bar_lines(_meter_table([(0, 4, 4), (192, 3, 4)]), 24, 4).tolist()
    [0, 96, 192, 264, 336]
    """
    lengths = bar_ticks(meters["numerator"].astype(np.int64), meters["denominator"], ticks_per_quarter)
    if len(meters) == 1:
        return np.arange(num_bars + 1) * lengths[0]
    spans = np.diff(meters["tick"])
    repeats = np.zeros(len(meters), dtype=np.int64)
    repeats[:-1] = spans // lengths[:-1]
    repeats[-1] = max(num_bars - int(repeats[:-1].sum()), 0)
    return np.concatenate(([0], np.cumsum(np.repeat(lengths, repeats))))[: num_bars + 1]


def bar_of(ticks: np.ndarray, meters: np.ndarray, ticks_per_quarter: int) -> np.ndarray:
    """Bar index of each tick without listing the bar lines: a damaged file may claim millions of them."""
    lengths = bar_ticks(meters["numerator"].astype(np.int64), meters["denominator"], ticks_per_quarter)
    if len(meters) == 1:
        return ticks // lengths[0]
    bars_before = np.concatenate(([0], np.cumsum(np.diff(meters["tick"]) // lengths[:-1])))
    i = np.searchsorted(meters["tick"], ticks, side="right") - 1
    return bars_before[i] + (ticks - meters["tick"][i]) // lengths[i]
