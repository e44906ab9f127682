"""Whether music was copied: runs of bars that the training music has too, and the training piece that is nearest.

    library = Library(training_pieces)            Bars of the training music, one after another
    copies = library.copies(bars)                 of one piece: its tracks one by one, and all of them jointly
    library.nearest(bars)                         (name, share of the piece's distinct bars that it has too)

A run of five bars or more counts as copied: in one pitched track, or in all pitched tracks jointly, in any key (the
same interval throughout), every bar of it with at least four notes, and not one bar alone again and again. What is
compared is when in the bar notes begin and their pitches; durations and velocities do not hide a copy.

>>> from meloformer.evaluation.bars import bars_of
>>> from meloformer.midi import Score, Track, note_table
>>> rows = [(0, 96 * bar + 24 * beat, 12, 50 + beat * bar, 90) for bar in range(6) for beat in range(4)]
>>> higher = [(track, onset, duration, pitch + 3, velocity) for track, onset, duration, pitch, velocity in rows]
>>> library = Library([bars_of(Score(24, [Track(33)], note_table(rows)), "song")])
>>> piece = bars_of(Score(24, [Track(0)], note_table(higher)))
>>> library.copies(piece)["tracks"], library.nearest(piece)
(Copies(copied=1, judged=1, longest=6), ('song', 1.0))

The surprise: real music copies real music, for songs quote each other and a bass line of eighths is nobody's. So a
rate means something beside that of held-out real pieces only. Judged are the tracks that have a run long enough.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from meloformer.data.draws import mix
from meloformer.evaluation.bars import Bars

RUN = 5
MIN_NOTES = 4
LONGEST = 256  # a run is followed so far
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd


class Copies(NamedTuple):
    """How many parts hold a copied run, of how many that hold any run of that kind; bars of the longest copied one."""

    copied: int
    judged: int
    longest: int

    def __add__(self, other: Copies) -> Copies:
        return Copies(self.copied + other.copied, self.judged + other.judged, max(self.longest, other.longest))


class Phrases(NamedTuple):
    """The bars of parts, end to end, (n,) each: what a bar holds above its lowest note, how that note moves from
    the bar before, how many bars follow without a gap in the same part (this one included), and the part."""

    content: np.ndarray  # uint64
    step: np.ndarray  # int64
    reach: np.ndarray  # int64
    part: np.ndarray  # int64


def phrases(bars: Bars, jointly: bool) -> Phrases:
    """Of the pitched tracks one by one, or of all of them as one part; bars of fewer than MIN_NOTES notes are gaps."""
    notes = np.flatnonzero(~bars.is_drum)
    track = np.zeros(len(notes), dtype=np.int64) if jointly else bars.track[notes]
    cell = track * (bars.num_bars + 1) + bars.bar[notes]  # one more, so that parts never touch
    # A set: what two tracks play together is one note.
    rows = np.unique((cell << 24) | (bars.onset[notes] << 8) | bars.pitch[notes])
    cell, onset, pitch = rows >> 24, (rows >> 8) & 0xFFFF, rows & 0xFF
    first = np.flatnonzero(np.diff(cell, prepend=-1))
    if not len(first):
        return _joined([])
    size = np.diff(first, append=len(rows))
    lowest = np.minimum.reduceat(pitch, first)
    with np.errstate(over="ignore"):  # a sum of hashes: the order of the notes does not matter
        content = np.add.reduceat(mix((onset << 8) | (pitch - np.repeat(lowest, size))), first)
    telling = size >= MIN_NOTES
    cell, content, lowest = cell[first][telling], content[telling], lowest[telling]
    follows = np.zeros(len(cell), dtype=bool)
    follows[1:] = np.diff(cell) == 1
    step = np.where(follows, np.diff(lowest, prepend=0), 0)
    # Bars to the end of an unbroken stretch.
    ends = np.flatnonzero(np.append(~follows[1:], True)) if len(cell) else np.zeros(0, dtype=np.int64)
    reach = ends[np.searchsorted(ends, np.arange(len(cell)))] - np.arange(len(cell)) + 1
    return Phrases(content, step, reach, cell // (bars.num_bars + 1))


def run_hashes(phrase: Phrases, start: np.ndarray, length: int) -> np.ndarray:
    """uint64 of the runs of `length` bars from each `start`, which must reach so far; the same in any key."""
    code = mix(phrase.content ^ mix(phrase.step.astype(np.uint64)))
    with np.errstate(over="ignore"):
        total = mix(phrase.content[start])  # how its first bar was reached is no part of a run
        for k in range(1, length):
            total = total * _BASE + code[start + k]
    return total


def runs(phrase: Phrases) -> np.ndarray:
    """Where runs of RUN bars begin that hold at least two distinct bars."""
    start = np.flatnonzero(phrase.reach >= RUN)
    changes = np.zeros(len(start), dtype=bool)
    for k in range(1, RUN):
        changes |= (phrase.content[start + k] != phrase.content[start]) | (phrase.step[start + k] != 0)
    return start[changes]


class Library:
    """The training music as sorted hashes. `names`: of its pieces."""

    def __init__(self, pieces: Iterable[Bars]):
        self.names: list[str] = []
        contents: list[np.ndarray] = []
        found: dict[bool, list[Phrases]] = {False: [], True: []}
        for bars in pieces:
            self.names.append(bars.name)
            for jointly, parts in found.items():
                parts.append(phrases(bars, jointly))
            contents.append(np.unique(found[False][-1].content))
        self.phrases = {jointly: _joined(parts) for jointly, parts in found.items()}
        self.starts = {jointly: runs(phrase) for jointly, phrase in self.phrases.items()}
        self.hashes = {
            jointly: np.unique(run_hashes(phrase, self.starts[jointly], RUN))
            for jointly, phrase in self.phrases.items()
        }
        piece = np.repeat(np.arange(len(contents)), [len(c) for c in contents])
        flat = np.concatenate(contents) if contents else np.zeros(0, dtype=np.uint64)
        order = flat.argsort(kind="stable")
        self._bar, self._piece = flat[order], piece[order]

    def copies(self, bars: Bars) -> dict[str, Copies]:
        """{"tracks": .., "jointly": ..} of one piece."""
        return {
            name: self._copies(phrases(bars, jointly), jointly)
            for name, jointly in (("tracks", False), ("jointly", True))
        }

    def _copies(self, phrase: Phrases, jointly: bool) -> Copies:
        start = runs(phrase)
        if not len(start):
            return Copies(0, 0, 0)
        mine = start[np.isin(run_hashes(phrase, start, RUN), self.hashes[jointly])]
        copied = len(np.unique(phrase.part[mine]))
        judged = len(np.unique(phrase.part[start]))
        return Copies(copied, judged, self._longest(phrase, mine, jointly) if len(mine) else 0)

    def _longest(self, phrase: Phrases, mine: np.ndarray, jointly: bool) -> int:
        """Bars of the longest run that both have: runs that match at one length are tried at the next."""
        library, theirs, length = self.phrases[jointly], self.starts[jointly], RUN
        while length <= LONGEST:
            mine, theirs = mine[phrase.reach[mine] >= length], theirs[library.reach[theirs] >= length]
            one, other = run_hashes(phrase, mine, length), run_hashes(library, theirs, length)
            mine, theirs = mine[np.isin(one, other)], theirs[np.isin(other, one)]
            if not len(mine):
                break
            length += 1
        return length - 1

    def nearest(self, bars: Bars) -> tuple[str, float]:
        """The training piece that has most of the piece's distinct telling bars, and the share; ("", 0) for none."""
        contents = np.unique(phrases(bars, False).content)
        low = np.searchsorted(self._bar, contents, side="left")
        count = np.searchsorted(self._bar, contents, side="right") - low
        if not count.sum():
            return "", 0.0
        at = np.repeat(low - np.cumsum(count) + count, count) + np.arange(count.sum())
        shared = np.bincount(self._piece[at], minlength=len(self.names))
        best = int(shared.argmax())
        return self.names[best], float(shared[best] / len(contents))


def _joined(parts: list[Phrases]) -> Phrases:
    if not parts:
        return Phrases(np.zeros(0, dtype=np.uint64), *(np.zeros(0, dtype=np.int64) for _ in range(3)))
    return Phrases(*(np.concatenate(columns) for columns in zip(*parts)))
