"""Controls in a stream: put in their places, taken out, cut to a window of bars.

Controls are rows (n, 4) of int64: track, bar, onset, token, as the fields of `midi.score.Control` (-1 for "none").

    insert(tokens, rows, vocabulary)            (T,) -> (T + inserted,) the stream with them
    strip(tokens, which, vocabulary)            the stream without the conditions of these names
    rows_in_window(rows, first, last, tracks)   those of bars [first, last), the chord in force restated

>>> v = Vocabulary()
>>> head = [v.BOS, v.PIECE_BEGIN, v.CONDUCTOR, v.BAR, v.meter(4, 4), v.tempo(120)]
>>> plain = np.array([*head, v.instrument(0), v.BAR, v.time(0), v.pitch(60), v.duration(24), v.velocity(90), v.EOS])
>>> key, chord, role = v.token(Family.KEY, 0), v.token(Family.CHORD, 0), v.token(Family.ROLE, 3)
>>> given = insert(plain, [(-1, -1, -1, key), (-1, 0, 48, chord), (0, -1, -1, role)], v)
>>> " ".join(v.name(token) for token in given[:12])
'BOS PIECE_BEGIN KEY_C_major CONDUCTOR BAR METER_4/4 TEMPO_120 T_48 CHORD_C_maj INSTRUMENT_0 ROLE_melody BAR'
>>> strip(given, CONDITIONS, v).tolist() == plain.tolist()
True

The surprise: sorted rows stand in the order of the stream: the piece, its bars, the tracks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from meloformer.hid.vocabulary import Family, Vocabulary

# Conditions by the names that command lines give them. PIECE_BEGIN and PIECE_END stand in every stream where true.
CONDITIONS = {
    "key": Family.KEY,
    "chords": Family.CHORD,
    "tag": Family.TAG,
    "density": Family.DENSITY,
    "polyphony": Family.POLYPHONY,
    "role": Family.ROLE,
    "bar_density": Family.BAR_DENSITY,
}
TRACK, BAR, ONSET, TOKEN = range(4)  # columns
_FIRST_CONTROL = Family.PIECE_BEGIN
_MOST_AT_ONE_PLACE = 8  # families of STREAM_CONTROLS, and one


def control_rows(controls: Iterable[Sequence[int]]) -> np.ndarray:
    """(n, 4) int64, sorted: the order in which they stand in a stream."""
    rows = controls if isinstance(controls, np.ndarray) else np.array(list(controls), dtype=np.int64)
    rows = rows.astype(np.int64, copy=False).reshape(-1, 4)
    return rows[np.lexsort(rows.T[::-1])]


def insert(tokens: np.ndarray, controls: Iterable[Sequence[int]], vocabulary: Vocabulary) -> np.ndarray:
    """The stream with each control behind the token it belongs to, chords with their T at the end of their bar.

    Controls that the stream has already keep their places. ValueError where a control belongs to a bar or track that
    the stream does not write, where its place holds one of its family, or where a bar has chords already.
    """
    v, tokens, rows = vocabulary, np.asarray(tokens), control_rows(controls)
    if not len(rows):
        return tokens.copy()
    track, bar, onset, token = rows.T
    kind = v.family_of[tokens]
    bars, instruments = np.flatnonzero(kind == Family.BAR), np.flatnonzero(kind == Family.INSTRUMENT)
    # Where the bars of the conductor (owner 0) and of each track begin in `bars`, and the end.
    owners = np.concatenate(([0], np.searchsorted(bars, instruments), [len(bars)]))
    owner = track + 1
    good = (owner >= 0) & (owner < len(owners) - 1)
    number = owners[np.where(good, owner, 0)] + bar
    good &= (bar < 0) | (number < owners[np.where(good, owner, 0) + 1])
    is_chord = onset >= 0
    good &= ~is_chord | ((track < 0) & (bar >= 0))
    if not good.all():
        worst = rows[np.argmin(good)].tolist()
        raise ValueError(f"{v.name(worst[TOKEN])} belongs to bar {worst[BAR]} of track {worst[TRACK]}: no such place")
    # The token that a control stands behind: its BAR, its INSTRUMENT or BOS.
    places = np.where(track < 0, 0, np.concatenate((instruments, [0]))[np.minimum(track, len(instruments))])
    in_bar = bar >= 0
    places[in_bar] = bars[number[in_bar]]
    places += 1
    if is_chord.any():
        end = len(tokens) - (tokens[-1] == v.EOS)  # of a conductor alone, which may be the head of a stream
        ends = np.concatenate((bars[1 : owners[1]], instruments[:1] if len(instruments) else [end]))
        places[is_chord] = ends[bar[is_chord]]
        if (kind[places[is_chord] - 1] == Family.CHORD).any():
            raise ValueError("a bar that is given chords has some already")
    # Behind what stands there already, in the order of families.
    family = v.family_of[token]
    for _ in range(_MOST_AT_ONE_PLACE):
        here = kind[np.minimum(places, len(kind) - 1)]
        if (~is_chord & (here == family)).any():
            raise ValueError("a place that is given a control has one of its family already")
        later = ~is_chord & (here >= _FIRST_CONTROL) & (here != Family.CHORD) & (here < family)
        if not later.any():
            break
        places += later
    # A chord is two tokens, its T and itself.
    counts = 1 + is_chord
    inserted = np.repeat(token, counts)
    inserted[np.cumsum(counts)[is_chord] - 2] = v.start(Family.TIME) + onset[is_chord]
    return np.insert(tokens, np.repeat(places, counts), inserted.astype(tokens.dtype))


def strip(tokens: np.ndarray, which: Collection[str], vocabulary: Vocabulary) -> np.ndarray:
    """The stream without the conditions of these names; a T of the conductor goes with its chord."""
    tokens = np.asarray(tokens)
    gone = np.zeros(len(Family), dtype=bool)
    gone[[CONDITIONS[name] for name in which]] = True
    drop = gone[vocabulary.family_of[tokens]]
    if gone[Family.CHORD]:
        drop[:-1] |= vocabulary.family_of[tokens[1:]] == Family.CHORD
    return tokens[~drop]


def num_tokens(rows: np.ndarray) -> int:
    """How many tokens `insert` adds for rows."""
    return len(rows) + int(np.count_nonzero(rows[:, ONSET] >= 0))


def rows_in_window(rows: np.ndarray, first: int, last: int, tracks: np.ndarray) -> np.ndarray:
    """Sorted rows of the bars [first, last) and of the given tracks, both counted from 0 there.

    What is said of the whole piece or of a whole track is said again, and so is the chord in force at the first bar.
    """
    track, bar, onset = rows[:, TRACK], rows[:, BAR], rows[:, ONSET]
    number = np.full(int(max(track.max(initial=-1), tracks.max(initial=-1))) + 2, -1, dtype=np.int64)
    number[tracks] = np.arange(len(tracks))  # the last stays -1, for track -1
    inside = ((bar < 0) | ((bar >= first) & (bar < last))) & ((track < 0) | (number[track] >= 0))
    kept = rows[inside]
    kept[:, TRACK] = number[kept[:, TRACK]]
    kept[:, BAR] -= np.where(kept[:, BAR] >= 0, first, 0)
    earlier = np.flatnonzero((onset >= 0) & (bar < first))
    if len(earlier) and not ((kept[:, ONSET] == 0) & (kept[:, BAR] == 0)).any():
        kept = control_rows(np.concatenate((kept, [[-1, 0, 0, rows[earlier[-1], TOKEN]]])))
    return kept
