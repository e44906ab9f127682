"""The field's metrics of a piece, over all tracks and track by track, vectorised.

In: `Bars`. Each metric is `f(bars, part, num_parts)`: `part` (notes,) says which part each note belongs to, and the
answer is (num_parts,) float64, NaN where a part has nothing to measure. Out of `measure(bars)`: {"all": {name: value},
"tracks": {name: mean over tracks}}.

    pitch_class_entropy    bits, 0 .. 3.58       pitched notes
    scale_consistency      share, 7/12 .. 1      pitched notes
    polyphony              pitches at once       pitched notes
    groove_consistency     share                 all notes
    empty_bar_rate         share                 all notes
    notes_per_bar                                all notes

>>> from meloformer.evaluation.bars import bars_of
>>> from meloformer.midi import Score, Track, note_table
>>> score = Score(24, [Track(0)], note_table([(0, 0, 24, 60, 90), (0, 0, 24, 64, 90), (0, 96, 24, 60, 90)]))
>>> values = measure(bars_of(score))["all"]
>>> round(values["pitch_class_entropy"], 3), values["polyphony"], round(values["groove_consistency"], 3)
(0.918, 1.5, 1.0)

What surprises: closer to real music is better, not higher. A scale is the most scale-consistent melody there is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from meloformer.evaluation.bars import Bars
from meloformer.midi.score import DRUMS

MAJOR = np.array([1, 0, 1, 0, 1, 1, 0, 1, 0, 1, 0, 1])
MINOR = np.array([1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0])  # natural
SCALES = np.stack([np.roll(scale, root) for scale in (MAJOR, MINOR) for root in range(12)])  # (24, 12)

Metric = Callable[[Bars, np.ndarray, int], np.ndarray]


def pitch_class_entropy(bars: Bars, part: np.ndarray, num_parts: int) -> np.ndarray:
    """-sum p log2 p over the 12 pitch classes of the pitched notes.

    Wu and Yang, The Jazz Transformer on the Front Line, ISMIR 2020 (arXiv 2008.01307), pitch class histogram entropy,
    over whole pieces as in MusPy (arXiv 2008.01951), metrics.
    """
    counts = pitch_classes(bars, part, num_parts)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = counts / counts.sum(axis=1, keepdims=True)
        bits = np.where(counts > 0, -p * np.log2(p), 0.0).sum(axis=1)
    return np.where(counts.sum(axis=1) > 0, bits, np.nan)


def scale_consistency(bars: Bars, part: np.ndarray, num_parts: int) -> np.ndarray:
    """The largest share of the pitched notes that lies inside one of the 24 major and natural minor scales.

    Mogren, C-RNN-GAN, 2016 (arXiv 1611.09904), scale consistency; the 24 scales are MusPy's.
    """
    counts = pitch_classes(bars, part, num_parts)
    return _ratio((counts @ SCALES.T).max(axis=1), counts.sum(axis=1))


def pitch_classes(bars: Bars, part: np.ndarray, num_parts: int) -> np.ndarray:
    """(num_parts, 12) pitched notes of each class."""
    pitched = ~bars.is_drum
    codes = part[pitched] * 12 + bars.pitch[pitched] % 12
    return np.bincount(codes, minlength=num_parts * 12).reshape(num_parts, 12)


def polyphony(bars: Bars, part: np.ndarray, num_parts: int) -> np.ndarray:
    """Mean number of pitches that sound at once, over the ticks where at least one pitched note sounds.

    MusPy (arXiv 2008.01951), metrics: a pitch that two tracks of a part play together is one pitch.
    """
    pitched = ~bars.is_drum
    part, pitch, start = part[pitched], bars.pitch[pitched], bars.start[pitched]
    end = start + bars.duration[pitched]
    pitches = covered(part * 128 + pitch, start, end, num_parts * 128).reshape(num_parts, 128).sum(axis=1)
    return _ratio(pitches, covered(part, start, end, num_parts))


def covered(group: np.ndarray, start: np.ndarray, end: np.ndarray, num_groups: int) -> np.ndarray:
    """(num_groups,) ticks in which at least one interval [start, end) of the group lies.

    >>> covered(np.array([0, 0, 1]), np.array([0, 2, 5]), np.array([3, 4, 6]), 2).tolist()
    [4, 1]
    """
    order = np.lexsort((start, group))
    group, start, end = group[order], start[order], end[order]
    # The groups are laid end to end in time, so that no interval of one reaches into the next.
    offset = group * (int(end.max(initial=0)) + 1)
    start, end = start + offset, end + offset
    reached = np.concatenate((start[:1], np.maximum.accumulate(end)[:-1]))
    new = np.maximum(end - np.maximum(start, reached), 0)
    return np.bincount(group, new, num_groups).astype(np.int64)


def groove_consistency(bars: Bars, part: np.ndarray, num_parts: int) -> np.ndarray:
    """1 - the mean over adjacent bars of hamming(onset vectors) / ticks of the bar; drums count.

    Wu and Yang, ISMIR 2020 (arXiv 2008.01307), grooving pattern similarity, between neighbours alone as in MusPy (arXiv
    2008.01951), metrics. Neighbours of different length are not compared. The value depends on the grid: 24 ticks a
    quarter note here, so 96 in a bar of 4/4.
    """
    length = np.diff(bars.lines)
    same = length[1:] == length[:-1]
    if not same.any():
        return np.full(num_parts, np.nan)
    num_bars, span = bars.num_bars, int(max(length.max(), bars.onset.max(initial=0) + 1))
    onsets = np.unique((part * num_bars + bars.bar) * span + bars.onset)
    cell = onsets // span  # part and bar
    sizes = np.bincount(cell, minlength=num_parts * num_bars).reshape(num_parts, num_bars)
    again = onsets[(cell + 1) % num_bars > 0] + span  # the same place one bar later
    found = again[np.isin(again, onsets, assume_unique=True)] // span
    both = np.bincount(found, minlength=num_parts * num_bars).reshape(num_parts, num_bars)[:, 1:]
    hamming = sizes[:, 1:] + sizes[:, :-1] - 2 * both
    consistency = 1 - (hamming[:, same] / length[1:][same]).mean(axis=1)
    return np.where(sizes.sum(axis=1) > 0, consistency, np.nan)


def empty_bar_rate(bars: Bars, part: np.ndarray, num_parts: int) -> np.ndarray:
    """Bars in which nothing sounds / bars of the piece; a held note sounds.

    Dong et al., MuseGAN, AAAI 2018 (arXiv 1709.06298), EB: ratio of empty bars.
    """
    if not bars.num_bars:
        return np.full(num_parts, np.nan)
    last = np.searchsorted(bars.lines, bars.start + bars.duration - 1, side="right") - 1
    last = np.clip(last, bars.bar, bars.num_bars - 1)
    width = bars.num_bars + 1
    edges = np.bincount(part * width + bars.bar, minlength=num_parts * width).astype(np.int64)
    edges -= np.bincount(part * width + last + 1, minlength=num_parts * width)
    sounding = np.cumsum(edges.reshape(num_parts, width), axis=1)[:, :-1] > 0
    return np.where(sounding.any(axis=1), 1 - sounding.mean(axis=1), np.nan)


def notes_per_bar(bars: Bars, part: np.ndarray, num_parts: int) -> np.ndarray:
    """Notes / bars in which the part begins one."""
    count = np.bincount(part, minlength=num_parts)
    cells = np.unique(part * max(bars.num_bars, 1) + bars.bar) // max(bars.num_bars, 1)
    return _ratio(count, np.bincount(cells, minlength=num_parts))


METRICS: dict[str, Metric] = {
    metric.__name__: metric
    for metric in (
        pitch_class_entropy,
        scale_consistency,
        polyphony,
        groove_consistency,
        empty_bar_rate,
        notes_per_bar,
    )
}
PITCHED = ("pitch_class_entropy", "scale_consistency", "polyphony")


def measure(bars: Bars) -> dict[str, dict[str, float]]:
    """Every metric over all tracks together, and its mean over tracks (pitched ones for those of PITCHED)."""
    everything = np.zeros_like(bars.track)
    values: dict[str, dict[str, float]] = {"all": {}, "tracks": {}}
    for name, metric in METRICS.items():
        values["all"][name] = float(metric(bars, everything, 1)[0])
        each = metric(bars, bars.track, bars.num_tracks)
        if name in PITCHED:
            each = each[bars.instruments != DRUMS]
        each = each[~np.isnan(each)]
        values["tracks"][name] = float(each.mean()) if len(each) else float("nan")
    return values


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.divide(over, under, out=np.full(len(under), np.nan), where=under > 0)
