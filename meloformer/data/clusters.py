"""Near-duplicates: pieces that share more than 30 % of their bars, in whatever key, are one cluster.

`bar_shingles(encoding)` gives the distinct bars of a piece as uint64 hashes; `cluster(contents, shingles,
work)` names each piece's cluster by the smallest content hash in it.

>>> from tempfile import TemporaryDirectory
>>> a, b = np.arange(1, 11, dtype=np.uint64), np.arange(6, 16, dtype=np.uint64)       # half their bars are shared
>>> with TemporaryDirectory() as work:
...     cluster(np.array([30, 20, 10], dtype=np.uint64), [a, b, a + np.uint64(100)], Path(work)).tolist()
[20, 20, 10]

A shingle is one bar of one pitched track: its set of (onset in the bar, semitones above the bar's lowest note), so
another key, other instruments, velocities, durations, tempo, track order and added parts do not hide a copy. The
surprise: bars that many pieces have (an ostinato of eighths, a scale) say nothing and are left out, or they would
chain half a corpus into one cluster. So that forty versions of one song do not make its own bars such common ones,
pieces that agree as wholes are joined first, and count as one.

Memory: about 40 bytes a piece, and one bucket of bars. The bars are dealt out by their hash into files in `work`, so
that equal ones meet in one file; what each file finds, pairs of pieces, is dealt out again and added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np

from meloformer.data.draws import mix
from meloformer.hid.tokenizer import Encoding
from meloformer.midi.score import DRUMS

SHARED = 0.3  # of the distinct bars of either piece
MIN_NOTES = 4  # a bar with fewer, or with one pitch only, is too plain to recognise a piece by
MIN_SHARED_BARS = 4
COMMON_PIECES = 16  # a bar that more pieces have is common property; those that agree as wholes are one,
COMMON_SHARE = 1 / 200  # or, in a large corpus, more than this share of the pieces: a hit has dozens of versions
SKETCH = 16  # bars of a piece, by the smallest hashes: of two pieces they overlap about as the wholes do
AGREEING = 0.75  # of the larger sketch has to be shared, whoever else has those bars
NEIGHBOURS = 16  # of the pieces with a bar, in order of content hash, each is compared with so many; keeps it linear
ROWS = 1 << 16  # rows in memory at once; a bucket has about so many, but of 1,024 files none is more than its share
MAX_BUCKETS = 1024
_BAR = np.dtype([("bar", np.uint64), ("piece", np.int32)])
_PAIR = np.dtype([("pair", np.int64), ("shared", np.int32)])


def bar_shingles(encoding: Encoding) -> np.ndarray:
    """(n,) uint64, sorted, distinct: hashes of the bars of the pitched tracks of a piece."""
    first = encoding.segment_first
    if not len(first):
        return np.zeros(0, dtype=np.uint64)
    pitch = encoding.score.columns.pitch
    num_notes = np.append(first[1:], len(pitch)) - first
    lowest = np.minimum.reduceat(pitch, first)
    highest = np.maximum.reduceat(pitch, first)
    notes = (encoding.onset_in_bar << 7) | (pitch - np.repeat(lowest, num_notes))
    with np.errstate(over="ignore"):  # a sum of hashes: the order of the notes does not matter
        sums = np.add.reduceat(_mixed(int(notes.max()).bit_length())[notes], first)
    telling = (num_notes >= MIN_NOTES) & (highest > lowest)
    telling &= encoding.score.instruments[encoding.segment_track] != DRUMS
    return distinct(mix(sums[telling]))


def distinct(values: np.ndarray) -> np.ndarray:
    """np.unique, without what it imports and looks into for other kinds of arrays."""
    values = np.sort(values)
    first = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=first[1:])
    return values[first]


@cache
def _mixed(bits: int) -> np.ndarray:
    """`mix` of every number of so many bits: a table, for notes are many and of few kinds."""
    return mix(np.arange(1 << bits, dtype=np.uint64))


def cluster(contents: np.ndarray, shingles: Iterable[np.ndarray], work: Path, rows: int = ROWS) -> np.ndarray:
    """(pieces,) uint64 cluster ids, from content hashes and `bar_shingles` of each piece.

    Of pieces with the same content one has to give its shingles, the others may be empty. `work` is an empty folder.
    """
    names = distinct(contents)
    # Pieces are numbered by their content hash, so the order in which they come does not matter.
    numbers = np.searchsorted(names, contents)
    groups = _linked(_numbered(numbers.astype(np.int32), shingles), len(names), work, rows)
    return names[groups][numbers]


def _numbered(numbers: np.ndarray, shingles: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Tables of _BAR rows, of one piece each; the first that has any speaks for its content."""
    given = np.zeros(numbers.max(initial=-1) + 1, dtype=bool)
    for number, bars in zip(numbers.tolist(), shingles):
        if given[number] or not len(bars):
            continue
        given[number] = True
        table = np.empty(len(bars), dtype=_BAR)
        table["bar"], table["piece"] = bars, number
        yield table


def _linked(tables: Iterable[np.ndarray], num_pieces: int, work: Path, rows: int) -> np.ndarray:
    """(num_pieces,) smallest piece number in each piece's group."""
    parent = np.arange(num_pieces, dtype=np.int64)
    bars, sketches = _Buckets(work, "bars", _BAR, "bar", rows), _Buckets(work, "sketches", _BAR, "bar", rows)
    wholes = np.zeros(num_pieces, dtype=np.uint64)
    for table in tables:
        bars.add(table)
        if len(table) >= MIN_SHARED_BARS:
            # Mixed again, for what comes as a hash may have been chosen by its size.
            hashes = mix(table["bar"])
            wholes[table["piece"][0]] = hashes.sum()
            sketches.add(table[np.argsort(hashes)[:SKETCH]])
    _join_equal(parent, wholes)

    def agree(shared: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return shared >= AGREEING * np.maximum(one, other)

    def overlap(shared: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return shared > SHARED * np.minimum(one, other)

    _join(parent, sketches, num_pieces, agree, work, rows)
    _join(parent, bars, max(COMMON_PIECES, num_pieces * COMMON_SHARE), overlap, work, rows)
    return _roots(parent)


def _join_equal(parent: np.ndarray, wholes: np.ndarray) -> None:
    """Pieces whose hashes of all their bars are equal become one group; 0 is none."""
    order = np.argsort(wholes, kind="stable")
    same = np.flatnonzero((wholes[order[1:]] == wholes[order[:-1]]) & (wholes[order[1:]] != 0)) + 1
    for i in same.tolist():  # rising, so the one before has its group already
        parent[order[i]] = parent[order[i - 1]]


def _join(
    parent: np.ndarray,
    bars: _Buckets,
    common: float,
    near: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    work: Path,
    rows: int,
) -> None:
    """Join groups that share enough bars, those left out that more than `common` groups have.

    `near` is given how many bars pairs share, and how many the one and the other have.
    """
    groups, num_pieces = _roots(parent), len(parent)
    num_bars = np.zeros(num_pieces, dtype=np.int32)
    pairs = _Buckets(work, "pairs", _PAIR, "pair", rows)
    for table in bars.take():
        table["piece"] = groups[table["piece"]]
        pairs.add(_pairs_in(table, num_pieces, common, num_bars))
    for table in pairs.take():
        pair, inverse = np.unique(table["pair"], return_inverse=True)
        shared = np.bincount(inverse, table["shared"])
        one, other = np.divmod(pair, max(num_pieces, 1))
        linked = (shared >= MIN_SHARED_BARS) & near(shared, num_bars[one], num_bars[other])
        for a, b in zip(one[linked].tolist(), other[linked].tolist()):
            a, b = _root(parent, a), _root(parent, b)
            parent[max(a, b)] = min(a, b)


def _roots(parent: np.ndarray) -> np.ndarray:
    """(pieces,) int64: the smallest number in each piece's group."""
    roots = parent[parent]
    while ((further := roots[roots]) != roots).any():
        roots = further
    return roots


def _root(parent: np.ndarray, i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = int(parent[i])
    return i


def _pairs_in(table: np.ndarray, num_pieces: int, common: float, num_bars: np.ndarray) -> np.ndarray:
    """_PAIR rows of the pieces that meet in these bars; adds each piece's bars that are not common to `num_bars`."""
    table = table[np.lexsort((table["piece"], table["bar"]))]  # equal bars stand together, their pieces rising
    bar, piece = table["bar"], table["piece"].astype(np.int64)
    again = np.zeros(len(bar), dtype=bool)  # where pieces count as one, several may have brought a bar
    again[1:] = (bar[1:] == bar[:-1]) & (piece[1:] == piece[:-1])
    bar, piece = bar[~again], piece[~again]
    first = np.flatnonzero(np.concatenate(([True], bar[1:] != bar[:-1])))
    size = np.diff(first, append=len(bar))
    rare = np.repeat(size <= common, size)
    bar, piece = bar[rare], piece[rare]
    np.add.at(num_bars, piece, 1)
    pairs = [np.zeros(0, dtype=np.int64)]
    for distance in range(1, NEIGHBOURS + 1):
        same = np.flatnonzero(bar[distance:] == bar[:-distance])
        pairs.append(piece[same] * num_pieces + piece[same + distance])
    pair, shared = np.unique(np.concatenate(pairs), return_counts=True)
    found = np.empty(len(pair), dtype=_PAIR)
    found["pair"], found["shared"] = pair, shared
    return found


class _Buckets:
    """Rows dealt out into files by the hash of a key: rows of one key are in one file.

    Starts with one file; whenever the mean exceeds `rows`, every file is cut in two by the next bit of the hash.
    """

    def __init__(self, work: Path, name: str, dtype: np.dtype, key: str, rows: int):
        self.work, self.name, self.dtype, self.key, self.rows = work, name, dtype, key, rows
        self.num_files, self.num_rows = 1, 0
        self._held: list[np.ndarray] = []
        self._num_held = 0

    def _path(self, number: int) -> Path:
        return self.work / f"{self.name}-{number:04d}"

    def add(self, table: np.ndarray) -> None:
        self._held.append(table)
        self._num_held += len(table)
        if self._num_held >= self.rows:
            self._spill()

    def _spill(self) -> None:
        table = np.concatenate([np.zeros(0, self.dtype), *self._held])
        self._held, self._num_held = [], 0
        self.num_rows += len(table)
        self._deal(table, range(self.num_files))
        while self.num_rows > self.num_files * self.rows and self.num_files < MAX_BUCKETS:
            self.num_files *= 2
            for number in range(self.num_files // 2):
                if self._path(number).exists():
                    whole = self._path(number).rename(self.work / f"{self.name}-whole")
                    for start in range(0, whole.stat().st_size // self.dtype.itemsize, self.rows):
                        rows = np.fromfile(whole, self.dtype, self.rows, offset=start * self.dtype.itemsize)
                        self._deal(rows, (number, number + self.num_files // 2))
                    whole.unlink()

    def _deal(self, table: np.ndarray, numbers: Iterable[int]) -> None:
        bucket = (mix(table[self.key].astype(np.uint64)) % np.uint64(self.num_files)).astype(np.int64)
        order = np.argsort(bucket, kind="stable")
        table, bucket = table[order], bucket[order]
        for number in numbers:
            first, last = np.searchsorted(bucket, (number, number + 1))
            if last > first:
                with open(self._path(number), "ab") as file:
                    file.write(table[first:last].data)

    def take(self) -> Iterator[np.ndarray]:
        """The rows, file by file; each file is removed."""
        self._spill()
        for number in range(self.num_files):
            if self._path(number).exists():
                table = np.fromfile(self._path(number), self.dtype)
                self._path(number).unlink()
                yield table
