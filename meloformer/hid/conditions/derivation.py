"""What a piece's conditions are: key, chords, densities, polyphony and roles, as pure functions of its notes.

`derive(score)` takes a quantized Score and returns `Conditions`; about half a millisecond for a piece of 2,000 notes.

>>> from meloformer.midi import Track, note_table
>>> notes = [(0, 48 * i, 48, root + step, 80) for i, root in enumerate((60, 65, 67, 60)) for step in (0, 4, 7)]
>>> found = derive(Score(24, [Track(0)], note_table(notes), num_bars=2, quantized=True))     # C F | G C
>>> found.key, found.chords.tolist()
(0, [[0, 0, 0], [0, 48, 40], [1, 0, 56], [1, 48, 0]])
>>> found.density, found.bar_density.tolist(), [ROLES[role] for role in found.role]          # 12 notes, 8 quarters
(0, [1, 1], ['pad'])

Definitions, every number the value inside its token family:

- *weights*: seconds are not asked for; what a pitch class weighs in a stretch of bars is the number of ticks for which
  it sounds there, summed over the notes of all parts but the drums.
- *key*, 0..23 or None without pitched notes: the largest Pearson correlation of the piece's weights with the profiles
  of Krumhansl and Kessler (Psychological Review 89, 1982, p. 343; printed in Krumhansl, Cognitive Foundations of
  Musical Pitch, 1990, p. 30).
- *chords*, one for each half bar where the meter's numerator is even, else for each bar: the chord whose template has
  the largest cosine with the weights; templates are the chord's pitch classes (after Fujishima, Proc. ICMC 1999,
  p. 464), the root counted ROOT times, all but plain triads times RARER. The weights have CONTEXT of the whole piece's
  added to them, so that a fifth without a third takes the third of the key. A bar has one chord unless two gain SPLIT.
  None where nothing sounds or no template reaches LEAST_FIT, as for a single pitch. Listed where it changes.
- *density*: notes to a quarter note: of all parts over the whole piece (10 bins), of a part over the bars in which it
  plays (10 bins), of all parts in each bar (0 for no note, else 7 bins).
- *polyphony* of a part, not of drums: notes that sound at once, on average while it sounds (6 bins).
- *role* of a part, the first that holds: drums; bass, a bass program or a mean pitch below 45 (as the order of tracks
  in a stream has it); other, a program of percussion or sound effects (112-127); pad, polyphony at least 1.5 and notes
  of two quarters or longer on average; chords, polyphony at least 1.5; melody, a mean pitch of at least G3 (55);
  other.

The edges of the bins are quantiles of real music. The surprise: a window keeps the piece's key and densities.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meloformer.hid.conditions.names import NO_CHORD, NUM_PITCHES, NUM_QUALITIES
from meloformer.hid.controls import BAR, CONDITIONS, ONSET, TOKEN, TRACK
from meloformer.hid.tokenizer import BASS_MEAN_PITCH, BASS_PROGRAMS, CHORDAL_POLYPHONY, mean_polyphony, track_bounds
from meloformer.hid.vocabulary import ROLES, Family, Vocabulary
from meloformer.midi.score import DRUMS, Score

ROOT, CONTEXT, SPLIT, LEAST_FIT, RARER = 1.25, 0.05, 0.1, 0.7, 0.95
PAD_QUARTERS, MELODY_PITCH = 2.0, 55
EFFECT_PROGRAMS = range(112, 128)
# Where the next bin begins. Quantiles of 3,545 pieces of all kinds, rounded: a tenth of the pieces or parts, a seventh
# of the bars in each bin; of the pitched parts 56 % sound one note at a time, and the other bins share the rest.
PIECE_DENSITY = np.array([3.0, 4.0, 5.0, 6.0, 7.25, 8.75, 10.25, 12.5, 16.0])
TRACK_DENSITY = np.array([0.55, 0.75, 0.95, 1.1, 1.25, 1.5, 1.8, 2.25, 3.2])
BAR_DENSITY = np.array([3.25, 5.0, 6.5, 8.75, 11.5, 16.0])
POLYPHONY = np.array([1.02, 1.12, 1.45, 1.85, 2.5])

_MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
_MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)
_CHORD_STEPS = ((0, 4, 7), (0, 3, 7), (0, 3, 6), (0, 4, 8), (0, 4, 7, 10), (0, 4, 7, 11), (0, 3, 7, 10), (0, 5, 7))
_SCALE_STEPS = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10, 11))


def _rotations(pattern: np.ndarray) -> np.ndarray:
    """(12, 12) the pattern from each root on."""
    return np.stack([np.roll(pattern, root) for root in range(NUM_PITCHES)])


def _tones(steps: tuple[int, ...]) -> np.ndarray:
    return np.isin(np.arange(NUM_PITCHES), steps)


# (97, 12) pitch classes of each chord, all of them for none; (24, 12) of each key's scale, minor with both sevenths
CHORD_TONES = np.concatenate(
    [
        np.stack([_rotations(_tones(steps)) for steps in _CHORD_STEPS], axis=1).reshape(-1, NUM_PITCHES),
        np.ones((1, NUM_PITCHES), dtype=bool),
    ]
)
KEY_TONES = np.concatenate([_rotations(_tones(steps)) for steps in _SCALE_STEPS])


def _templates() -> np.ndarray:
    """(12, 96) unit columns."""
    templates = CHORD_TONES[:NO_CHORD].astype(np.float64)
    templates[np.arange(NO_CHORD), np.arange(NO_CHORD) // NUM_QUALITIES] = ROOT
    templates /= np.linalg.norm(templates, axis=1, keepdims=True)
    templates[np.arange(NO_CHORD) % NUM_QUALITIES > 1] *= RARER
    return templates.T.copy()


def _profiles() -> np.ndarray:
    """(12, 24) columns of mean 0 and length 1."""
    profiles = np.concatenate([_rotations(np.array(profile)) for profile in (_MAJOR, _MINOR)])
    profiles -= profiles.mean(axis=1, keepdims=True)
    return (profiles / np.linalg.norm(profiles, axis=1, keepdims=True)).T.copy()


_TEMPLATES, _PROFILES = _templates(), _profiles()
_IS_BASS, _IS_EFFECT = (np.isin(np.arange(DRUMS + 1), programs) for programs in (BASS_PROGRAMS, EFFECT_PROGRAMS))
_CLASS_OF = np.concatenate((np.arange(128) % NUM_PITCHES, np.full(128, NUM_PITCHES)))


@dataclass
class Conditions:
    """Of one score, its tracks in their order; every number is the value inside its token family.

    chords: (n, 3) int64 rows bar, tick in the bar, chord, each in force until the next; bar_density: (num_bars,);
    role, track_density, polyphony: (tracks,), polyphony -1 for drums. None: there is nothing to say.
    """

    key: int | None
    chords: np.ndarray
    bar_density: np.ndarray
    density: int | None
    role: np.ndarray
    track_density: np.ndarray
    polyphony: np.ndarray
    tag: int | None = None

    def rows(self, vocabulary: Vocabulary, which=CONDITIONS) -> np.ndarray:
        """(n, 4) int64 rows of controls (`hid.controls`), sorted; only of the given names."""
        v = vocabulary
        piece = [
            v.token(CONDITIONS[name], value)
            for name, value in (("key", self.key), ("tag", self.tag), ("density", self.density))
            if name in which and value is not None
        ]
        parts = [_rows(-1, -1, -1, np.array(piece, dtype=np.int64))]
        bars = []
        if "bar_density" in which:
            bars.append(_rows(-1, np.arange(len(self.bar_density)), -1, v.start(Family.BAR_DENSITY) + self.bar_density))
        if "chords" in which:
            bar, tick, chord = self.chords.T
            bars.append(_rows(-1, bar, tick, v.start(Family.CHORD) + chord))
        if len(bars) == 2:
            both = np.concatenate(bars)
            bars = [both[np.argsort((both[:, BAR] << 16) + both[:, ONSET], kind="stable")]]
        tracks = []
        for name, values in (("role", self.role), ("density", self.track_density), ("polyphony", self.polyphony)):
            if name in which:
                said = np.flatnonzero(values >= 0)
                tracks.append(_rows(said, -1, -1, v.start(CONDITIONS[name]) + values[said]))
        if len(tracks) > 1:
            both = np.concatenate(tracks)
            tracks = [both[np.argsort(both[:, TRACK], kind="stable")]]
        return np.concatenate(parts + bars + tracks)


def _rows(track, bar, onset, token: np.ndarray) -> np.ndarray:
    rows = np.empty((len(token), 4), dtype=np.int64)
    rows[:, TRACK], rows[:, BAR], rows[:, ONSET], rows[:, TOKEN] = track, bar, onset, token
    return rows


@dataclass
class Measures:
    """What is put into bins: notes to a quarter note, notes at once; and the weights of each half bar."""

    density: float
    bar_density: np.ndarray  # (num_bars,)
    track_density: np.ndarray  # (tracks,)
    polyphony: np.ndarray  # (tracks,)
    instruments: np.ndarray  # (tracks,)
    mean_pitch: np.ndarray  # (tracks,)
    mean_quarters: np.ndarray  # (tracks,) of a note's duration
    weights: np.ndarray  # (halves, 12) ticks
    half_bar: np.ndarray  # (halves,) which bar
    half_tick: np.ndarray  # (halves,) where in it


def derive(score: Score, tag: int | None = None, polyphony: np.ndarray | None = None) -> Conditions:
    """The conditions of a quantized score; see the module's docstring. `polyphony` where it is known already."""
    m = measure(score, polyphony)
    total = m.weights.sum(axis=0)
    has_notes = score.num_notes > 0
    bar_density = np.searchsorted(BAR_DENSITY, m.bar_density, side="right") + 1
    is_drum = m.instruments == DRUMS
    return Conditions(
        key=find_key(total),
        chords=find_chords(m.weights, m.half_bar, m.half_tick),
        bar_density=np.where(m.bar_density > 0, bar_density, 0),
        density=int(np.searchsorted(PIECE_DENSITY, m.density, side="right")) if has_notes else None,
        role=find_roles(m),
        track_density=np.searchsorted(TRACK_DENSITY, m.track_density, side="right"),
        polyphony=np.where(is_drum, -1, np.searchsorted(POLYPHONY, m.polyphony, side="right")),
        tag=tag,
    )


def _steps(values: np.ndarray) -> np.ndarray:
    """np.diff without its overhead, a tenth of all this."""
    return values[1:] - values[:-1]


def measure(score: Score, polyphony: np.ndarray | None = None) -> Measures:
    """The numbers behind the conditions, of a quantized score; `polyphony` where it is known already."""
    notes, num_bars, num_tracks = score.columns, score.num_bars, len(score.tracks)
    lines, instruments = score.bar_lines(), score.instruments
    starts, half_bar, half_tick = _halves(score, lines)
    onset, duration, pitch = notes.onset, notes.duration, notes.pitch
    bounds = track_bounds(score)
    sizes = _steps(bounds)
    half, last = _half_of(starts, onset, np.minimum(onset + duration, starts[-1]) - 1)

    quarters = _steps(lines) / score.ticks_per_quarter
    cells = np.bincount(
        np.repeat(np.arange(num_tracks) * num_bars, sizes) + half_bar[half], None, num_tracks * num_bars
    )
    cells = cells.reshape(num_tracks, num_bars)
    played = (cells > 0) @ quarters
    sums = (_steps(np.concatenate(([0], np.cumsum(column)))[bounds]) for column in (pitch, duration))
    mean_pitch, mean_ticks = (total / np.maximum(sizes, 1) for total in sums)

    # Drums go to a thirteenth pitch class, which is faster than to leave them out.
    pitch_class = _CLASS_OF[pitch + np.repeat(128 * (instruments == DRUMS), sizes)]
    return Measures(
        density=score.num_notes / float(quarters.sum()),
        bar_density=cells.sum(axis=0) / quarters,
        track_density=sizes / np.where(played > 0, played, 1),
        polyphony=mean_polyphony(score.notes, bounds) if polyphony is None else polyphony,
        instruments=instruments,
        mean_pitch=mean_pitch,
        mean_quarters=mean_ticks / score.ticks_per_quarter,
        weights=_weights(onset, duration, pitch_class, half, last, starts),
        half_bar=half_bar,
        half_tick=half_tick,
    )


def _halves(score: Score, lines: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(H + 1,) ticks of the bar lines and, where the numerator is even, of the middles; bar and tick in it, (H,)."""
    change = np.searchsorted(score.meters["tick"], lines[:-1], side="right") - 1
    parts = 1 + (score.meters["numerator"][change] % 2 == 0)
    bar = np.repeat(np.arange(len(parts)), parts)
    is_middle = np.zeros(len(bar), dtype=bool)
    is_middle[1:] = bar[1:] == bar[:-1]
    tick = np.where(is_middle, _steps(lines)[bar] // 2, 0)
    return np.append(lines[bar] + tick, lines[-1]), bar, tick


def _half_of(starts: np.ndarray, *ticks: np.ndarray) -> list[np.ndarray]:
    """Which half bar each tick lies in."""
    if starts[-1] > 8 * len(ticks[0]):
        return [np.searchsorted(starts, tick, side="right") - 1 for tick in ticks]
    of_tick = np.repeat(np.arange(len(starts) - 1), _steps(starts))  # faster for a piece of usual density
    return [of_tick[tick] for tick in ticks]


def _weights(onset, duration, pitch_class, half, last, starts) -> np.ndarray:
    """(H, 12) ticks for which each pitch class sounds in each half bar, of notes from half bar `half` to `last`."""
    classes, num_halves = NUM_PITCHES + 1, len(starts) - 1
    size = num_halves * classes
    first_place, last_place = half * classes + pitch_class, last * classes + pitch_class
    inside = half == last
    # A note in one half bar adds its duration there; a longer one what it has of the first and of the last, and all of
    # those between.
    end = np.minimum(onset + duration, starts[-1])
    ticks = np.bincount(first_place, np.where(inside, end, starts[half + 1]) - onset, size)
    longer = np.flatnonzero(~inside)
    if len(longer):
        first_place, last_place = first_place[longer], last_place[longer]
        ticks += np.bincount(last_place, end[longer] - starts[last[longer]], size)
        step = np.bincount(first_place + classes, minlength=size) - np.bincount(last_place, minlength=size)
        ticks = ticks.reshape(-1, classes)
        ticks += np.cumsum(step.reshape(-1, classes), axis=0) * _steps(starts)[:, None]
    return ticks.reshape(-1, classes)[:, :NUM_PITCHES]


def find_key(weights: np.ndarray) -> int | None:
    """Key of (12,) weights, None where there are none or all are equal."""
    fit = key_fit(weights)
    return int(fit.argmax()) if fit is not None else None


def key_fit(weights: np.ndarray) -> np.ndarray | None:
    """(24,) correlation of (12,) weights with each key's profile."""
    centred = weights - weights.mean()
    length = float(np.sqrt((centred * centred).sum()))
    return centred @ _PROFILES / length if length > 0 else None


def find_chords(weights: np.ndarray, bar: np.ndarray, tick: np.ndarray) -> np.ndarray:
    """(n, 3) rows bar, tick, chord, where it changes, of (H, 12) weights of half bars."""
    if not len(weights):
        return np.zeros((0, 3), dtype=np.int64)
    fit = chord_fit(weights)
    # A bar is one half bar or two, so what reduceat would add up is one sum; it was a seventh of all this.
    first, second = np.flatnonzero(tick == 0), np.flatnonzero(tick)
    split = bar[second]

    def by_bar(values: np.ndarray) -> np.ndarray:
        total = values[first]
        total[split] += values[second]
        return total

    of_bar = by_bar(fit)
    chord = fit.argmax(axis=1)
    best = fit[np.arange(len(fit)), chord]
    both = by_bar(best)
    one = of_bar.argmax(axis=1)
    fits_one = of_bar[np.arange(len(first)), one]
    sounding = by_bar((best > 0).astype(np.int64))
    good = best >= LEAST_FIT
    joined = both - fits_one < SPLIT
    chord = np.where(joined[bar], one[bar], chord)
    good = np.where(joined[bar], (fits_one >= LEAST_FIT * np.maximum(sounding, 1))[bar], good)
    chord = np.where(good, chord, NO_CHORD)
    changes = np.ones(len(chord), dtype=bool)
    changes[1:] = chord[1:] != chord[:-1]
    return np.stack([bar[changes], tick[changes], chord[changes]], axis=1)


def chord_fit(weights: np.ndarray) -> np.ndarray:
    """(H, 96) cosine of (H, 12) weights, the whole piece's added, with each template; 0 where nothing sounds."""
    total = weights.sum(axis=0)
    length = np.sqrt((weights * weights).sum(axis=1, keepdims=True))
    weights = weights / np.where(length > 0, length, 1)
    norm = float(np.sqrt((total * total).sum()))
    if norm > 0:
        weights = weights + (length > 0) * (CONTEXT / norm) * total
        length = np.sqrt((weights * weights).sum(axis=1, keepdims=True))
        weights /= np.where(length > 0, length, 1)
    return weights @ _TEMPLATES


def find_roles(m: Measures) -> np.ndarray:
    """(tracks,) index into ROLES."""
    program = m.instruments
    chordal = m.polyphony >= CHORDAL_POLYPHONY
    return np.select(
        [
            program == DRUMS,
            _IS_BASS[program] | (m.mean_pitch < BASS_MEAN_PITCH),
            _IS_EFFECT[program],
            chordal & (m.mean_quarters >= PAD_QUARTERS),
            chordal,
            m.mean_pitch >= MELODY_PITCH,
        ],
        [ROLES.index(role) for role in ("drums", "bass", "other", "pad", "chords", "melody")],
        ROLES.index("other"),
    )
