"""How much a piece is like itself so many bars later: the similarity curve, its error and its peaks, and repeats.

The similarity of bars i and j is |N(i) & N(j)| / |N(i) | N(j)|, N the set of (pitch, duration, onset in the bar) of a
bar's notes. L_t is its mean over all pairs t bars apart, t = 1..40; pairs without a note on either side do not count.
Museformer (arXiv 2210.10349), section 4.1, similarity error. Curves come in three views:

    pitched   the notes of all pitched tracks together
    drums     of all drum tracks
    tracks    every track by itself

In: `Bars`. Out of `similarity_sums`: (40, 2) float64, sum of similarities and number of pairs at each distance, so that
the sums of a set of pieces are the sum of theirs. `curve` divides.

>>> from meloformer.evaluation.bars import bars_of
>>> from meloformer.midi import Score, Track, note_table
>>> one_bar_again_and_again = [(0, 96 * bar, 24, 60, 90) for bar in range(3)]
>>> curve(similarity_sums(bars_of(Score(24, [Track(0)], note_table(one_bar_again_and_again))))["pitched"])[:3].tolist()
[1.0, 1.0, nan]

What surprises: the scalar error proves little. Against other real music, real music with its bars shuffled scores
about what a second sample of real music does; its peaks do not, and a loop's do not.
"""

from __future__ import annotations

import numpy as np

from meloformer.data.draws import mix
from meloformer.evaluation.bars import CODE_BITS, Bars

DISTANCES = 40
PEAKS = (4, 8, 12, 16)
VIEWS = ("pitched", "drums", "tracks")


def similarity_sums(bars: Bars) -> dict[str, np.ndarray]:
    """{"pitched", "drums", "tracks"}: (DISTANCES, 2) of one piece; see the module's docstring."""
    drums = np.flatnonzero(bars.is_drum)
    pitched = np.flatnonzero(~bars.is_drum)
    code = bars.code
    together = np.zeros_like(bars.track)
    return {
        "pitched": _sums(together[pitched], bars.bar[pitched], code[pitched], 1, bars.num_bars),
        "drums": _sums(together[drums], bars.bar[drums], code[drums], 1, bars.num_bars),
        "tracks": _sums(bars.track, bars.bar, code, bars.num_tracks, bars.num_bars),
    }


def _sums(part: np.ndarray, bar: np.ndarray, code: np.ndarray, num_parts: int, num_bars: int) -> np.ndarray:
    """(DISTANCES, 2) over the parts, from the notes' part, bar and code."""
    sums = np.zeros((DISTANCES, 2))
    if not len(bar):
        return sums
    _, kind = np.unique((part << CODE_BITS) | code, return_inverse=True)  # which note of which part
    notes = np.unique(kind * num_bars + bar)  # a set: by kind, then by bar
    kind_of, bar_of = np.divmod(notes, num_bars)
    part_of_kind = np.zeros(int(kind_of.max()) + 1, dtype=np.int64)
    part_of_kind[kind] = part
    place = part_of_kind[kind_of] * num_bars + bar_of
    size = np.bincount(place, minlength=num_parts * num_bars).reshape(num_parts, num_bars)
    shared = np.zeros((DISTANCES + 1, num_parts * num_bars))
    for step in range(1, min(DISTANCES, len(notes) - 1) + 1):  # the step-th next bar with the same note
        distance = notes[step:] - notes[:-step]
        near = (kind_of[step:] == kind_of[:-step]) & (distance <= DISTANCES)
        if not near.any():
            break  # bars of one note rise: a larger step only goes further
        np.add.at(shared, (distance[near], place[:-step][near]), 1.0)
    shared = shared.reshape(DISTANCES + 1, num_parts, num_bars)
    for t in range(1, min(DISTANCES, num_bars - 1) + 1):
        both = shared[t, :, :-t]
        union = size[:, :-t] + size[:, t:] - both
        sums[t - 1] = np.divide(both, union, out=np.zeros_like(both), where=union > 0).sum(), (union > 0).sum()
    return sums


def curve(sums: np.ndarray) -> np.ndarray:
    """(..., DISTANCES) L_t of (..., DISTANCES, 2) sums; NaN where there are no pairs."""
    total, pairs = sums[..., 0], sums[..., 1]
    return np.divide(total, pairs, out=np.full(total.shape, np.nan), where=pairs > 0)


def similarity_error(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Mean over t of |L_t - L'_t|, in percent, over the distances that both curves (..., DISTANCES) have."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(one - other)
    known = ~np.isnan(difference)
    total = np.where(known, difference, 0.0).sum(axis=-1)
    return 100 * np.divide(total, known.sum(axis=-1), out=np.full(total.shape, np.nan), where=known.any(axis=-1))


def peaks(one: np.ndarray) -> np.ndarray:
    """Mean over t = 4, 8, 12, 16 of L_t - (L_{t-1} + L_{t+1}) / 2, in percent: how much phrases of four bars show."""
    at = np.array(PEAKS) - 1
    return 100 * (one[..., at] - (one[..., at - 1] + one[..., at + 1]) / 2).mean(axis=-1)


def repeats(bars: Bars) -> tuple[int, int]:
    """(bars of the tracks that have exactly the notes of an earlier bar of their track, bars with notes)."""
    if not len(bars.bar):
        return 0, 0
    notes = np.unique(((bars.track * bars.num_bars + bars.bar) << CODE_BITS) | bars.code)
    cell, code = notes >> CODE_BITS, notes & ((1 << CODE_BITS) - 1)
    first = np.flatnonzero(np.diff(cell, prepend=-1))
    with np.errstate(over="ignore"):  # a sum of hashes: the order of the notes does not matter
        content = np.add.reduceat(mix(code), first)
    track = cell[first] // bars.num_bars
    distinct = np.unique(mix(content ^ mix(track)))
    return len(first) - len(distinct), len(first)
