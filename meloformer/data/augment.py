"""Augmentation of a window, on its tokens: transposition, loudness, tracks left out, track order, deferred bars.

In: one valid stream without MASK, (T,) uint16. Out: another valid stream, and the `Augmentation` that says what was
done to it. Nothing here looks at notes to decide what is deferred.

>>> tokens, done = augment(tokens, tokenizer, data_config, rng, Deferral.CONTINUATION, 0.5, 4096)  # doctest: +SKIP
>>> done.transpose, done.deferral.name, len(done.cells)                                            # doctest: +SKIP
(-3, 'CONTINUATION', 12)

The surprise: deferring makes a stream longer (a MASK and a FILL for each cell, and the empty BARs that lead to it), so
what may be deferred is fixed by a kind and a level in 0..1, from which the plan of rows reserves enough room before
any cell is drawn (`growth_bound`); where a window is too close to the budget, cells are given up until it fits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from meloformer.hid.controls import strip
from meloformer.hid.vocabulary import CHORD_QUALITIES, NUM_VELOCITIES, PITCH_NAMES, Family, Vocabulary
from meloformer.midi.score import DRUMS

OF_ALL_TRACKS = ("density", "bar_density")  # conditions of a stream that are false once it has lost a track
MAX_RECTANGLES = 64  # a bound on the loop; half the cells are covered long before


class Deferral(IntEnum):
    """What is deferred: the task a stream teaches."""

    NONE = 0
    RECTANGLES = 1  # infilling: some tracks, some bars
    CONTINUATION = 2  # all tracks from a bar on
    TRACKS = 3  # accompaniment: whole tracks
    SCATTERED = 4  # single cells


@dataclass(frozen=True)
class Augmentation:
    """What was done to a window. `tracks`: which of its tracks, in their new order. `cells`: (n, 2) track and bar of
    the result's deferred cells."""

    transpose: int = 0
    loudness: float = 1.0
    tracks: tuple[int, ...] = ()
    deferral: Deferral = Deferral.NONE
    cells: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))


# --- deferred bars: how many cells ------------------------------------------------------------------------------


def draw_deferral(probabilities: list[float], draw: np.ndarray) -> np.ndarray:
    """(n,) `Deferral` for draws in [0, 1); probabilities of RECTANGLES, CONTINUATION, TRACKS, SCATTERED.

    >>> draw_deferral([0.3, 0.25, 0.1, 0.1], np.array([0.1, 0.5, 0.6, 0.7, 0.9])).tolist()
    [1, 2, 3, 4, 0]
    """
    edges = np.cumsum(probabilities)
    kind = np.searchsorted(edges, draw, side="right") + 1
    return np.where(kind > len(probabilities), 0, kind)


def num_cells(deferral: np.ndarray, level: np.ndarray, num_tracks: np.ndarray, num_bars: np.ndarray) -> np.ndarray:
    """How many of the num_tracks x num_bars cells are deferred; works on arrays, and never falls as tracks are added.

    RECTANGLES and SCATTERED: a density of level / 2. CONTINUATION: from bar 1 + level x (bars - 1) on. TRACKS: from one
    track to all but one. At least one cell, whatever the level.
    """
    tracks, bars = np.asarray(num_tracks, dtype=np.int64), np.asarray(num_bars, dtype=np.int64)
    density = np.maximum(1, (level * 0.5 * tracks * bars).astype(np.int64))
    remaining = np.maximum(1, bars - _first_deferred_bar(level, bars))
    whole = 1 + (level * (tracks - 1)).astype(np.int64)
    counts = np.select(
        [deferral == Deferral.CONTINUATION, deferral == Deferral.TRACKS, deferral == Deferral.NONE],
        [tracks * remaining, whole * bars, 0],
        density,
    )
    return np.where(tracks > 0, counts, 0)


def _first_deferred_bar(level: np.ndarray, bars: np.ndarray) -> np.ndarray:
    return np.where(bars > 1, 1 + (level * (bars - 1)).astype(np.int64), 0)


def growth_bound(deferral, level, num_tracks, num_bars, num_track_bars) -> np.ndarray:
    """Tokens that deferring adds at most: MASK and FILL for each cell, and every BAR that the tracks leave out."""
    cells = num_cells(deferral, level, num_tracks, num_bars)
    missing = np.asarray(num_tracks, dtype=np.int64) * num_bars - num_track_bars
    return 2 * cells + np.where(cells > 0, missing, 0)


def deferred_share(deferral: np.ndarray, level: np.ndarray) -> np.ndarray:
    """About which share of all cells `num_cells` is, whatever the number of tracks and bars."""
    return np.select(
        [deferral == Deferral.NONE, deferral == Deferral.CONTINUATION, deferral == Deferral.TRACKS],
        [0.0, 1.0 - level, level],
        level / 2,
    )


# --- deferred bars: which cells -----------------------------------------------------------------------------------


def draw_cells(
    deferral: Deferral, level: float, num_tracks: int, num_bars: int, rng: np.random.Generator
) -> np.ndarray:
    """(n, 2) track and bar, n = num_cells(...) at most, in the order in which they may be given up."""
    count = int(num_cells(deferral, level, num_tracks, num_bars))
    if count == 0:
        return np.zeros((0, 2), dtype=np.int64)
    if deferral == Deferral.CONTINUATION:
        first = int(_first_deferred_bar(level, np.int64(num_bars)))
        bar, track = np.meshgrid(np.arange(first, num_bars), np.arange(num_tracks), indexing="ij")
    elif deferral == Deferral.TRACKS:
        chosen = rng.permutation(num_tracks)[: count // num_bars]
        track, bar = np.meshgrid(chosen, np.arange(num_bars), indexing="ij")
    elif deferral == Deferral.SCATTERED:
        track, bar = np.divmod(rng.choice(num_tracks * num_bars, size=count, replace=False), num_bars)
    else:
        bar, track = np.nonzero(_rectangles(count, num_tracks, num_bars, rng).T)
    return np.stack([track.reshape(-1), bar.reshape(-1)], axis=1).astype(np.int64)


def _rectangles(count: int, num_tracks: int, num_bars: int, rng: np.random.Generator) -> np.ndarray:
    """(tracks, bars) bool with at most `count` cells set: overlapping rectangles, short ones more often than long."""
    grid = np.zeros((num_tracks, num_bars), dtype=bool)
    for _ in range(MAX_RECTANGLES):
        missing = count - int(grid.sum())
        if missing <= 0:
            break
        width = int((num_bars + 1) ** rng.random())
        height = int((num_tracks + 1) ** rng.random())
        first = int(rng.integers(num_bars - width + 1))
        tracks = rng.permutation(num_tracks)[:height]
        bar, track = np.meshgrid(np.arange(first, first + width), tracks, indexing="ij")
        track, bar = track.reshape(-1), bar.reshape(-1)
        fresh = np.flatnonzero(~grid[track, bar])[:missing]
        grid[track[fresh], bar[fresh]] = True
    return grid


def deferred_length(num_tokens: int, bars_written: np.ndarray, cells: np.ndarray) -> int:
    """Length of a stream once `cells` are deferred; bars_written (tracks,) are the BARs of each track."""
    needed = bars_written.copy()
    np.maximum.at(needed, cells[:, 0], cells[:, 1] + 1)
    return int(num_tokens + 2 * len(cells) + (needed - bars_written).sum())


def fit_cells(cells: np.ndarray, num_tokens: int, bars_written: np.ndarray, max_tokens: int) -> np.ndarray:
    """The cells less as few of the first ones as it takes for the deferred stream to have at most max_tokens."""
    low, high = 0, len(cells)
    while low < high:  # giving up a cell never makes the stream longer
        middle = (low + high) // 2
        if deferred_length(num_tokens, bars_written, cells[middle:]) <= max_tokens:
            high = middle
        else:
            low = middle + 1
    return cells[low:]


# --- on tokens ----------------------------------------------------------------------------------------------------


def track_slices(tokens: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Head (BOS, controls, conductor), one array a track, and the rest (fills and EOS)."""
    kind = vocabulary.family_of[tokens]
    starts = np.flatnonzero(kind == Family.INSTRUMENT)
    if not len(starts):
        return tokens[:-1], [], tokens[-1:]
    fills = np.flatnonzero(kind == Family.FILL)
    end = int(fills[0]) if len(fills) else len(tokens) - 1
    return tokens[: starts[0]], np.split(tokens[starts[0] : end], starts[1:] - starts[0]), tokens[end:]


def transpose(tokens: np.ndarray, semitones: int, vocabulary: Vocabulary) -> np.ndarray:
    """Pitches of all tracks but drums, keys and chords moved; ValueError if a pitch would leave 0..127."""
    v = vocabulary
    out = np.array(tokens, dtype=np.uint16)
    kind, value = v.family_of[out], v.value_of[out]
    pitched = _is_pitched_note(kind, value)
    moved = value[pitched] + semitones
    if len(moved) and (moved.min() < 0 or moved.max() > 127):
        raise ValueError(f"transposing by {semitones} leaves the pitches 0..127")
    out[pitched] = v.start(Family.PITCH) + moved
    octave, qualities = len(PITCH_NAMES), len(CHORD_QUALITIES)
    keys = kind == Family.KEY
    mode, root = np.divmod(value[keys], octave)
    out[keys] = v.start(Family.KEY) + mode * octave + (root + semitones) % octave
    chords = (kind == Family.CHORD) & (value < octave * qualities)  # CHORD_NONE stays
    root, quality = np.divmod(value[chords], qualities)
    out[chords] = v.start(Family.CHORD) + (root + semitones) % octave * qualities + quality
    return out


def _is_pitched_note(kind: np.ndarray, value: np.ndarray) -> np.ndarray:
    """(T,) bool: PITCH tokens of tracks that are not drums, in a stream without fills."""
    is_instrument = kind == Family.INSTRUMENT
    drums = np.concatenate(([False], value[is_instrument] == DRUMS))[np.cumsum(is_instrument)]
    return (kind == Family.PITCH) & ~drums


def transpositions(tokens: np.ndarray, limit: int, vocabulary: Vocabulary) -> np.ndarray:
    """Intervals other than 0, at most `limit` semitones, that keep every pitch within 0..127."""
    kind, value = vocabulary.family_of[tokens], vocabulary.value_of[tokens]
    pitches = value[_is_pitched_note(kind, value)]
    if not len(pitches):
        return np.zeros(0, dtype=np.int64)
    intervals = np.arange(max(-limit, -int(pitches.min())), min(limit, 127 - int(pitches.max())) + 1)
    return intervals[intervals != 0]


def scale_velocity(tokens: np.ndarray, factor: float, vocabulary: Vocabulary) -> np.ndarray:
    """Velocities multiplied, on the centres of their bins, and kept in range."""
    v = vocabulary
    scaled = np.floor((np.arange(NUM_VELOCITIES) + 0.5) * factor).clip(0, NUM_VELOCITIES - 1).astype(np.int64)
    out = np.array(tokens, dtype=np.uint16)
    at = v.family_of[out] == Family.VELOCITY
    out[at] = v.start(Family.VELOCITY) + scaled[v.value_of[out[at]]]
    return out


def augment(
    tokens: np.ndarray,
    tokenizer,
    data,
    rng: np.random.Generator,
    deferral: Deferral,
    level: float,
    max_tokens: int,
) -> tuple[np.ndarray, Augmentation]:
    """Vary one window as `data` (a DataConfig) says; the result has at most max_tokens, if the window had."""
    v = tokenizer.vocabulary
    interval, loudness = 0, 1.0
    # These are made whether they are used or not: to switch one augmentation off leaves what the others choose by them
    # as it was. Which tracks are dropped, in which order they come and which cells are deferred is drawn after them.
    draws = rng.random(4)
    pick, swing, share = rng.random(3)
    if draws[0] < data.transpose_probability:
        choices = transpositions(tokens, data.transpose_max, v)
        if len(choices):
            interval = int(choices[int(pick * len(choices))])
            tokens = transpose(tokens, interval, v)
    if draws[1] < data.velocity_probability:
        loudness = 1.0 + data.velocity_max * (2.0 * swing - 1.0)
        tokens = scale_velocity(tokens, loudness, v)
    head, tracks, end = track_slices(tokens, v)
    order = np.arange(len(tracks))
    if draws[2] < data.drop_track_probability and len(tracks) > 1:
        dropped = 1 + int(share * (len(tracks) // 2))  # at most half of them, rounded down, and never all
        order = np.sort(rng.permutation(len(tracks))[min(dropped, len(tracks) // 2) :])
    if draws[3] < data.shuffle_tracks_probability:
        order = rng.permutation(order)
    if len(order) < len(tracks):
        head = strip(head, OF_ALL_TRACKS, v)
    tracks = [tracks[i] for i in order]
    tokens = np.concatenate([head, *tracks, end]).astype(np.uint16)
    cells = np.zeros((0, 2), dtype=np.int64)
    if deferral != Deferral.NONE and tracks:
        num_bars = int((head == v.BAR).sum())
        written = np.array([int((track == v.BAR).sum()) for track in tracks])
        cells = draw_cells(deferral, level, len(tracks), num_bars, rng)
        cells = fit_cells(cells, len(tokens), written, max_tokens)
        if len(cells):
            tokens = tokenizer.defer(tokens, [(int(track), int(bar)) for track, bar in cells])
    done = Deferral(deferral) if len(cells) else Deferral.NONE
    return tokens, Augmentation(interval, float(loudness), tuple(int(i) for i in order), done, cells)
