"""A piece as its notes bar by bar, which is what the metrics read; and the controls that a metric must tell from music.

    bars_of(score)                    a Score, raw or quantized -> Bars on the token grid
    bars_of_stream(tokens, v)         the same of a valid stream without MASK, much faster than by way of a Score
    shuffled_bars(bars, rng)          the piece's own bars in random order, all instruments together
    bars_of_others(bars, pool, rng)   every pitched bar of every track taken from some other song
    loop(bars)                        the first four bars with music, over and over

>>> from meloformer.midi import Score, Track, note_table
>>> bars = bars_of(Score(24, [Track(33)], note_table([(0, 0, 24, 40, 90), (0, 108, 12, 45, 90)])))
>>> bars.num_bars, bars.bar.tolist(), bars.onset.tolist()
(2, [0, 1], [0, 12])

The surprise: a note belongs to the bar it begins in, with its whole duration, also where it rings into the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from meloformer.hid import Family, Vocabulary, annotate, quantize
from meloformer.hid.tokenizer import note_rows
from meloformer.midi.score import DRUMS, Score

LOOP_BARS = 4
CODE_BITS = 34  # of `Bars.code`: onset (a bar has at most 8 x 96 ticks), duration, pitch


@dataclass(frozen=True)
class Bars:
    """One piece. Per note, (notes,) int64: `track`, `bar`, `onset` in ticks from its bar line, `pitch`, `duration` in
    ticks. `lines` (num_bars + 1,): ticks of the bar lines. `instruments` (tracks,): 0..127, or DRUMS."""

    track: np.ndarray
    bar: np.ndarray
    onset: np.ndarray
    pitch: np.ndarray
    duration: np.ndarray
    lines: np.ndarray
    instruments: np.ndarray
    name: str = ""

    @property
    def num_bars(self) -> int:
        return len(self.lines) - 1

    @property
    def num_tracks(self) -> int:
        return len(self.instruments)

    @property
    def start(self) -> np.ndarray:
        """(notes,) ticks from the beginning of the piece."""
        return self.lines[self.bar] + self.onset

    @property
    def is_drum(self) -> np.ndarray:
        """(notes,) bool."""
        return self.instruments[self.track] == DRUMS

    @property
    def code(self) -> np.ndarray:
        """(notes,) int64: equal for notes of the same pitch, duration and onset in the bar, whoever plays them."""
        return (self.onset << 24) | (self.duration << 8) | self.pitch  # duration: at most 32 x 96 ticks

    def at(self, index: np.ndarray) -> Bars:
        """The piece with these of its notes."""
        notes = {name: getattr(self, name)[index] for name in ("track", "bar", "onset", "pitch", "duration")}
        return replace(self, **notes)


def bars_of(score: Score, name: str = "") -> Bars:
    """On the token grid, so that pieces of any resolution compare; MidiError where `hid.quantize` refuses."""
    if not score.quantized:
        score = quantize(score, Vocabulary())
    lines, notes = score.bar_lines(), score.notes
    onset = notes["onset"]
    bar = np.searchsorted(lines, onset, side="right") - 1
    columns = (notes["track"], bar, onset - lines[bar], notes["pitch"], notes["duration"])
    return Bars(*(np.ascontiguousarray(c).astype(np.int64) for c in columns), lines, score.instruments, name)


def bars_of_stream(tokens: np.ndarray, vocabulary: Vocabulary, name: str = "") -> Bars:
    """Of a stream that was written by `encode`: it is not checked again."""
    a = annotate(tokens, vocabulary)
    is_bar = (a.type == Family.BAR) & (a.track < 0)
    meters = np.flatnonzero(a.type == Family.METER)
    last = int(a.time[is_bar][-1] + vocabulary.bar_ticks_of[tokens[meters[-1]]])
    lines = np.append(a.time[is_bar], last).astype(np.int64)
    notes = note_rows(tokens, a, vocabulary)
    bar = a.bar[a.type == Family.PITCH]
    columns = (notes["track"], bar, notes["onset"] - lines[bar], notes["pitch"], notes["duration"])
    instruments = vocabulary.value_of[tokens[a.type == Family.INSTRUMENT]].astype(np.int32)
    return Bars(*(np.ascontiguousarray(c).astype(np.int64) for c in columns), lines, instruments, name)


# --- controls ---------------------------------------------------------------------------------------------------


def shuffled_bars(bars: Bars, rng: np.random.Generator) -> Bars:
    """Every bar is real and the form is gone."""
    return replace(bars, bar=rng.permutation(bars.num_bars)[bars.bar])


def bars_of_others(bars: Bars, pool: Sequence[Bars], rng: np.random.Generator) -> Bars:
    """Rhythm section, meter and the places that are silent stay; what a pitched track plays has no history."""
    pool = [other for other in pool if other.name != bars.name and not other.is_drum.all()]
    if not pool:
        return bars
    drums = bars.at(bars.is_drum)
    pitched = np.flatnonzero(~bars.is_drum)
    cells = np.unique(np.stack([bars.track[pitched], bars.bar[pitched]], axis=1), axis=0)
    parts = [np.stack([drums.track, drums.bar, drums.onset, drums.pitch, drums.duration])]
    for track, bar in cells.tolist():
        other = pool[int(rng.integers(len(pool)))]
        notes = np.flatnonzero(~other.is_drum)
        chosen = notes[int(rng.integers(len(notes)))]  # a bar is drawn as often as it has notes
        here = np.flatnonzero((other.track == other.track[chosen]) & (other.bar == other.bar[chosen]))
        given = np.full((2, len(here)), [[track], [bar]])
        parts.append(np.concatenate([given, np.stack([other.onset[here], other.pitch[here], other.duration[here]])]))
    track, bar, onset, pitch, duration = np.concatenate(parts, axis=1)
    return replace(bars, track=track, bar=bar, onset=onset, pitch=pitch, duration=duration)


def loop(bars: Bars) -> Bars:
    """A machine that has found four good bars."""
    if not len(bars.bar):
        return bars
    first = int(bars.bar.min())
    source = np.flatnonzero(bars.bar < first + LOOP_BARS)
    repeats = -(-bars.num_bars // LOOP_BARS)
    again = bars.at(np.tile(source, repeats))
    bar = again.bar - first + np.repeat(np.arange(repeats) * LOOP_BARS, len(source))
    again = replace(again, bar=bar)
    return again.at(np.flatnonzero(bar < bars.num_bars))
