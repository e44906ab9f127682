"""Near-duplicates: pieces that share more than 30 % of their bars, in whatever key, are one cluster.

`bar_shingles(tokens, vocabulary)` gives the distinct bars of a piece as uint64 hashes; `cluster(contents, shingles)`
names each piece's cluster by the smallest content hash in it.

>>> a, b = np.arange(1, 11, dtype=np.uint64), np.arange(6, 16, dtype=np.uint64)       # half their bars are shared
>>> cluster(np.array([30, 20, 10], dtype=np.uint64), [a, b, a + np.uint64(100)]).tolist()
[20, 20, 10]

A shingle is one bar of one pitched track: its set of (onset in the bar, semitones above the bar's lowest note), so
another key, other instruments, velocities, durations, tempo, track order and added parts do not hide a copy. The
surprise: bars that many pieces have (an ostinato of eighths, a scale) say nothing and are left out, or they would
chain half a corpus into one cluster.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meloformer.data.draws import mix
from meloformer.hid.annotate import annotate
from meloformer.hid.vocabulary import Family, Vocabulary
from meloformer.midi.score import DRUMS

SHARED = 0.3  # of the distinct bars of either piece
MIN_NOTES = 4  # a bar with fewer, or with one pitch only, is too plain to recognise a piece by
MIN_SHARED_BARS = 4
COMMON_PIECES = 16  # a bar that more pieces have is common property,
COMMON_SHARE = 1 / 200  # or, in a large corpus, more than this share of the pieces: a hit has dozens of versions
NEIGHBOURS = 16  # of the pieces with a bar, in order of content hash, each is compared with so many; keeps it linear


def bar_shingles(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """(n,) uint64, sorted, distinct: hashes of the bars of the pitched tracks of a stream without fills."""
    a = annotate(tokens, vocabulary)
    value = vocabulary.value_of[tokens]
    at = np.flatnonzero((a.type == Family.PITCH) & (a.instrument != DRUMS))
    if not len(at):
        return np.zeros(0, dtype=np.uint64)
    bar = a.segment[at]
    first = np.flatnonzero(np.diff(bar, prepend=-1))
    num_notes = np.diff(first, append=len(at))
    lowest = np.minimum.reduceat(value[at], first)
    highest = np.maximum.reduceat(value[at], first)
    onset = value[a.type == Family.TIME][a.onset[at]]
    notes = (onset << 8) | (value[at] - np.repeat(lowest, num_notes))
    with np.errstate(over="ignore"):  # a sum of hashes: the order of the notes does not matter
        sums = np.add.reduceat(mix(notes.astype(np.uint64)), first)
    return np.unique(mix(sums)[(num_notes >= MIN_NOTES) & (highest > lowest)])


def cluster(contents: np.ndarray, shingles: Sequence[np.ndarray]) -> np.ndarray:
    """(pieces,) uint64 cluster ids, from content hashes and `bar_shingles` of each piece."""
    distinct, first, inverse = np.unique(contents, return_index=True, return_inverse=True)
    groups = _linked([shingles[i] for i in first])
    # `distinct` rises, so the first member of a group has its smallest hash.
    return distinct[groups][inverse]


def _linked(shingles: list[np.ndarray]) -> np.ndarray:
    """(pieces,) smallest piece number in each piece's group."""
    num_pieces = len(shingles)
    parent = np.arange(num_pieces)
    piece = np.repeat(parent, [len(s) for s in shingles])
    bars = np.concatenate([np.zeros(0, dtype=np.uint64), *shingles])
    order = np.argsort(bars, kind="stable")  # equal bars stand together, their pieces rising
    bars, piece = bars[order], piece[order]
    _, group, size = np.unique(bars, return_inverse=True, return_counts=True)
    rare = size[group] <= max(COMMON_PIECES, num_pieces * COMMON_SHARE)
    bars, piece = bars[rare], piece[rare]
    num_bars = np.bincount(piece, minlength=num_pieces)
    pairs = [np.zeros(0, dtype=np.int64)]
    for distance in range(1, NEIGHBOURS + 1):
        same = np.flatnonzero(bars[distance:] == bars[:-distance])
        pairs.append(piece[same] * num_pieces + piece[same + distance])
    pair, shared = np.unique(np.concatenate(pairs), return_counts=True)
    one, other = np.divmod(pair, max(num_pieces, 1))
    near = (shared >= MIN_SHARED_BARS) & (shared > SHARED * np.minimum(num_bars[one], num_bars[other]))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in zip(one[near].tolist(), other[near].tolist()):
        a, b = root(a), root(b)
        parent[max(a, b)] = min(a, b)
    return np.array([root(i) for i in range(num_pieces)], dtype=np.int64)
