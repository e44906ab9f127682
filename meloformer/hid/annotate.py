"""Annotations: what each token of a HID stream is about, as a pure, vectorised function of the tokens.

`annotate(tokens, vocabulary)` takes (T,) ids, a whole valid stream or any prefix of one, and returns
`Annotations`, eight fields of (T,) int32 each. `find_segments` lists the segments they speak of.

>>> v = Vocabulary()
>>> bar = [v.BAR, v.time(0), v.pitch(60), v.duration(24), v.velocity(90)]
>>> tokens = [v.BOS, v.CONDUCTOR, v.BAR, v.meter(4, 4), v.tempo(120), v.instrument(0), *bar, v.EOS]
>>> annotations = annotate(tokens, v)
>>> annotations.segment.tolist()
[-1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, -1]
>>> annotations.bar.tolist()
[-1, -1, 0, 0, 0, -1, 0, 0, 0, 0, 0, -1]

The surprise: a BAR belongs to a segment only if notes follow it before the next BAR, so a BAR's own segment is
known once its first onset has come. Nothing else about a token depends on what comes after it; the attention rule
never lets a query read a segment number that a later token decided.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from meloformer.hid.vocabulary import Family, Vocabulary

_NOTE_FAMILIES = np.zeros(len(Family), dtype=bool)
_NOTE_FAMILIES[[Family.TIME, Family.PITCH, Family.DURATION, Family.VELOCITY, Family.CHORD]] = True


class Annotations(NamedTuple):
    """Per token, (T,) int32 each; -1 is "none".

    bar: bar of the piece; track: ordinal of the track in the stream; instrument: 0..127 or 128 for drums;
    ordinal: of the track among the tracks of its instrument; type: `Family`; onset: id shared by a T and all its
    notes; segment: ordinal of the BAR or FILL, with notes, that opened it; time: ticks from the start of the piece.
    A FILL and its content have the track, instrument, bar and time of their MASK.
    """

    bar: np.ndarray
    track: np.ndarray
    instrument: np.ndarray
    ordinal: np.ndarray
    type: np.ndarray
    onset: np.ndarray
    segment: np.ndarray
    time: np.ndarray


class Segments(NamedTuple):
    """Per segment, (M,) int32 each: stream positions of its BAR or FILL and of its last token, and whose bar it is."""

    start: np.ndarray
    end: np.ndarray
    bar: np.ndarray
    track: np.ndarray
    instrument: np.ndarray
    ordinal: np.ndarray
    time: np.ndarray


def instrument_ordinals(instruments: np.ndarray) -> np.ndarray:
    """(tracks,) how many earlier tracks play the same instrument.

    >>> instrument_ordinals(np.array([0, 33, 0, 0])).tolist()
    [0, 0, 1, 2]
    """
    same = instruments[:, None] == instruments[None, :]
    return np.tril(same, -1).sum(axis=1)


def annotate(tokens: np.ndarray, vocabulary: Vocabulary) -> Annotations:
    """Annotations of a valid stream or a prefix of one; see the module's docstring."""
    tokens = np.asarray(tokens, dtype=np.int64)
    kind = vocabulary.family_of[tokens].astype(np.int32)
    value = vocabulary.value_of[tokens]
    is_bar, is_instrument, is_fill = kind == Family.BAR, kind == Family.INSTRUMENT, kind == Family.FILL
    is_time, is_end = kind == Family.TIME, (kind == Family.EOS) | (kind == Family.PAD)

    track = np.cumsum(is_instrument) - 1
    bars_seen = np.cumsum(is_bar)
    bar = bars_seen - np.maximum.accumulate(np.where(is_instrument, bars_seen, 0)) - 1
    bar[is_end] = -1
    track[is_end] = -1

    # Bar lines, from the conductor's meters: a bar's start depends on earlier bars only.
    conductor_bars = int((is_bar & (track < 0)).sum())
    length = np.zeros(conductor_bars + 1, dtype=np.int64)
    meters = np.flatnonzero(kind == Family.METER)
    length[bar[meters]] = vocabulary.bar_ticks_of[tokens[meters]]
    in_force = np.maximum.accumulate(np.where(length > 0, np.arange(len(length)), 0))
    lines = np.concatenate(([0], np.cumsum(length[in_force])))[: conductor_bars + 1]

    # The k-th FILL speaks of the cell of the k-th MASK.
    if is_fill.any():
        masks = np.flatnonzero(kind == Family.MASK)
        filled = (np.cumsum(is_fill) > 0) & ~is_end
        source = masks[np.minimum(np.cumsum(is_fill)[filled] - 1, len(masks) - 1)]
        bar[filled], track[filled] = bar[source], track[source]

    instruments = value[is_instrument]
    ordinals = instrument_ordinals(instruments)
    in_track = track >= 0
    instrument, ordinal = np.full(len(tokens), -1), np.full(len(tokens), -1)
    instrument[in_track], ordinal[in_track] = instruments[track[in_track]], ordinals[track[in_track]]

    has_onset = _NOTE_FAMILIES[kind]
    onset = np.where(has_onset, np.cumsum(is_time) - 1, -1)
    time = np.where(bar >= 0, lines[np.clip(bar, 0, conductor_bars)], 0)
    time[has_onset] += value[is_time][onset[has_onset]]

    # A segment is a BAR of a track, or a FILL, that holds at least one T.
    opener = np.cumsum((is_bar & in_track) | is_fill) - 1
    in_cell = in_track & (bar >= 0)
    sounding = np.zeros(max(int(opener[-1]) + 1, 0) if len(opener) else 0, dtype=bool)
    sounding[opener[is_time & in_track]] = True
    segment = np.full(len(tokens), -1)
    if len(sounding):
        segment[in_cell] = np.where(sounding, np.cumsum(sounding) - 1, -1)[opener[in_cell]]
    return Annotations(*(a.astype(np.int32) for a in (bar, track, instrument, ordinal, kind, onset, segment, time)))


def find_segments(annotations: Annotations) -> Segments:
    """The segments of a stream in order, read off its annotations."""
    inside = np.flatnonzero(annotations.segment >= 0)
    ids = annotations.segment[inside]
    start = inside[np.flatnonzero(np.diff(ids, prepend=-1))]
    end = inside[np.flatnonzero(np.diff(ids, append=ids[-1] + 1))] if len(ids) else inside
    a = annotations
    return Segments(
        *(x.astype(np.int32) for x in (start, end)),
        *(x[start] for x in (a.bar, a.track, a.instrument, a.ordinal, a.time)),
    )
