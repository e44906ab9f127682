"""The tokenizer: Score -> HID tokens -> Score.

>>> from meloformer.midi import Track, note_table
>>> tokenizer = Tokenizer()
>>> score = Score(24, [Track(33)], note_table([(0, 12, 24, 40, 90), (0, 12, 24, 47, 90), (0, 48, 12, 40, 70)]))
>>> tokens = tokenizer.encode(score)
>>> print(tokenizer.text(tokens))
BOS CONDUCTOR BAR METER_4/4 TEMPO_120 INSTRUMENT_33 BAR T_12 P_40 L_24 V_22 P_47 L_24 V_22 T_48 P_40 L_12 V_17 EOS
>>> tokenizer.decode(tokens) == tokenizer.quantize(score)
True

One bar, worked by hand: two notes struck together half a quarter after the bar line share one T_12; each is pitch,
duration in ticks, and velocity bin 90 // 4 = 22; the third, on the third quarter, gets T_48.

The surprise: `encode` puts the accompaniment first (drums, bass, chords, the rest), so a round trip may reorder the
tracks; `order="given"` keeps them. A quantized score is taken exactly as it stands, however odd its meters and tempos:
that is what makes encode(decode(s), order="given") == s for every valid stream s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from meloformer.hid.annotate import Annotations, annotate
from meloformer.hid.controls import insert
from meloformer.hid.deferral import defer, undefer
from meloformer.hid.grammar import validate
from meloformer.hid.quantize import quantize
from meloformer.hid.vocabulary import MIN_BPM, VELOCITIES, VELOCITY_BIN, Family, Vocabulary
from meloformer.midi.score import (
    DRUMS,
    METER_DTYPE,
    NOTE_DTYPE,
    TEMPO_DTYPE,
    Control,
    MidiError,
    Score,
    Track,
    bar_of,
)

BASS_PROGRAMS = range(32, 40)
BASS_MEAN_PITCH = 45
CHORDAL_POLYPHONY = 1.5


def canonical_order(score: Score, polyphony: np.ndarray | None = None) -> np.ndarray:
    """(tracks,) indices in the order of `encode`: drums, bass, chordal, the rest; then program, then as given.

    Bass is a bass program or a mean pitch below 45; chordal is a mean polyphony of at least 1.5 while sounding.
    """
    notes, bounds = score.columns, track_bounds(score)
    sizes = bounds[1:] - bounds[:-1]
    if polyphony is None:
        polyphony = _polyphony(notes.onset, notes.duration, bounds)
    pitch_sums = _sums(notes.pitch, bounds).tolist() if len(sizes) else []
    sizes = sizes.tolist()
    keys = []
    for i, track in enumerate(score.tracks):
        if track.is_drum:
            rank = 0
        elif track.program in BASS_PROGRAMS or (sizes[i] and pitch_sums[i] / sizes[i] < BASS_MEAN_PITCH):
            rank = 1
        else:
            rank = 2 if polyphony[i] >= CHORDAL_POLYPHONY else 3
        keys.append((rank, track.instrument, i))
    return np.array([i for _, _, i in sorted(keys)], dtype=np.int64)


def track_bounds(score: Score) -> np.ndarray:
    """(tracks + 1,) where each track's notes begin in the note table, and the end."""
    return np.searchsorted(score.columns.track, np.arange(len(score.tracks) + 1))


def mean_polyphony(notes: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """(tracks,) notes sounding at once, averaged over the time in which at least one sounds; 0 without notes.

    Expects notes sorted by track and onset; `bounds` are `track_bounds`.
    """
    return _polyphony(notes["onset"].astype(np.int64), notes["duration"].astype(np.int64), bounds)


def _polyphony(onset: np.ndarray, duration: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    sizes = bounds[1:] - bounds[:-1]
    if not len(onset):
        return np.zeros(len(sizes))
    # Tracks are laid end to end in time, so that no note of one reaches into the next.
    onset = onset + np.repeat(np.arange(len(sizes)) * int((onset + duration).max()), sizes)
    end = onset + duration
    reached = np.empty_like(end)  # up to where something sounds before each note
    reached[0] = 0
    np.maximum.accumulate(end[:-1], out=reached[1:])
    covered = np.maximum(end - np.maximum(onset, reached), 0)
    covered, sounded = _sums(covered, bounds), _sums(duration, bounds)
    return np.divide(sounded, covered, out=np.zeros(len(sizes)), where=sizes > 0)


def _sums(column: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """(tracks,) sum of each track's part of a column; that of a track without notes means nothing."""
    # reduceat gives an empty track the first note of the next; the table may end before the last track
    return np.add.reduceat(column if bounds[-2] < len(column) else np.append(column, 0), bounds[:-1])


def reorder_tracks(score: Score, order: np.ndarray) -> Score:
    """The same score with tracks[order]."""
    bounds = track_bounds(score)
    starts, sizes = bounds[:-1][order], (bounds[1:] - bounds[:-1])[order]
    rows = np.arange(score.num_notes) + np.repeat(starts - sizes.cumsum() + sizes, sizes)
    notes = score.columns.take(rows)._replace(track=np.repeat(np.arange(len(order)), sizes))
    order = order.tolist()
    rank = {old: new for new, old in enumerate(order)}
    controls = [c._replace(track=rank[c.track]) if c.track >= 0 else c for c in score.controls]
    return replace(score, tracks=[score.tracks[i] for i in order], notes=notes, controls=sorted(controls))


def note_rows(tokens: np.ndarray, a: Annotations, vocabulary: Vocabulary) -> np.ndarray:
    """Note table, in the order of the stream, of (T,) tokens that begin and end between notes, in ticks of the grid."""
    value = vocabulary.value_of[tokens]
    pitch_at = np.flatnonzero(a.type == Family.PITCH)
    notes = np.empty(len(pitch_at), dtype=NOTE_DTYPE)
    notes["track"], notes["onset"], notes["pitch"] = a.track[pitch_at], a.time[pitch_at], value[pitch_at]
    notes["duration"] = vocabulary.durations[value[pitch_at + 1]]
    notes["velocity"] = VELOCITIES[value[pitch_at + 2]]
    return notes


def _differs_from_previous(values: np.ndarray) -> np.ndarray:
    """(n,) bool, true for the first of them."""
    differs = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=differs[1:])
    return differs


class Encoding(NamedTuple):
    """A stream, the quantized score in the stream's order of tracks, and its segments (`hid.annotate`), (M,) each."""

    tokens: np.ndarray  # (T,) uint16
    score: Score
    segment_start: np.ndarray
    segment_bar: np.ndarray
    segment_track: np.ndarray
    num_track_bars: int  # BAR tokens of the tracks
    onset_in_bar: np.ndarray  # (notes,)
    segment_first: np.ndarray  # (M,) each segment's first note
    polyphony: np.ndarray | None = None  # (tracks,) see mean_polyphony


class Tokenizer:
    """Encodes, decodes, annotates and defers over one vocabulary."""

    def __init__(self, vocabulary: Vocabulary | None = None):
        self.vocabulary = vocabulary or Vocabulary()

    # --- encode ------------------------------------------------------------------------------------------------

    def quantize(self, score: Score) -> Score:
        """The score as the tokens hold it; see `hid.quantize`."""
        return quantize(score, self.vocabulary)

    def encode(self, score: Score, order: str = "canonical") -> np.ndarray:
        """(T,) uint16 tokens. order: "canonical" (accompaniment first) or "given". MidiError if it is too long."""
        return self.encode_counted(score, order)[0]

    def encode_counted(self, score: Score, order: str = "canonical") -> tuple[np.ndarray, Counter]:
        """Tokens, and what quantising changed or dropped by name of the rule."""
        encoding = self.encode_fully(score, order)
        return encoding.tokens, encoding.score.counts

    def encode_fully(self, score: Score, order: str = "canonical") -> Encoding:
        """Tokens with what is known of them on the way; the segments only hold for a score without controls."""
        if order not in ("canonical", "given"):
            raise ValueError(f'order is {order!r}, must be "canonical" or "given"')
        score = self.quantize(score)
        notes = score.columns
        polyphony = _polyphony(notes.onset, notes.duration, track_bounds(score))
        if order == "canonical":
            new_order = canonical_order(score, polyphony)
            score, polyphony = reorder_tracks(score, new_order), polyphony[new_order]
        lines = score.bar_lines()
        v = self.vocabulary
        head = np.concatenate([[v.BOS, v.CONDUCTOR], self._conductor(score, lines)])
        encoding = self._tracks(score, lines, head)
        if score.controls:
            try:
                encoding = encoding._replace(tokens=insert(encoding.tokens, score.controls, v))
            except ValueError as error:
                raise MidiError(f"a score's control cannot be written: {error}") from None
        return encoding._replace(polyphony=polyphony)

    def _conductor(self, score: Score, lines: np.ndarray) -> np.ndarray:
        """BAR, then the meter and the tempo that begin there."""
        v = self.vocabulary
        meters = [v.meter(above, below) for _, above, below in score.meters.tolist()]
        tempos = [v.tempo(int(qpm)) for _, qpm in score.tempos.tolist()]
        begins = []
        for table, tokens in ((score.meters, meters), (score.tempos, tempos)):
            bars = np.searchsorted(lines, table["tick"])
            if len(table) and (bars[-1] >= score.num_bars or not (lines[bars] == table["tick"]).all()):
                raise MidiError("a quantized score has a meter or tempo that is not at a bar line of the piece")
            begins.append(dict(zip(bars.tolist(), tokens)))
        written: list[int] = []
        at = 0
        for bar in sorted(begins[0].keys() | begins[1].keys()):
            written += [v.BAR] * (bar + 1 - at)
            written += [tokens[bar] for tokens in begins if bar in tokens]
            at = bar + 1
        return np.array(written + [v.BAR] * (score.num_bars - at), dtype=np.int64)

    def _tracks(self, score: Score, lines: np.ndarray, head: np.ndarray) -> Encoding:
        """The stream that begins with `head`, all tracks in the score's order, without a Python loop over notes."""
        v, notes = self.vocabulary, score.columns
        track, onset = notes.track, notes.onset
        if not len(onset):
            none = np.empty(0, dtype=np.int64)
            return Encoding(np.append(head, v.EOS).astype(np.uint16), score, none, none, none, 0, none, none)
        if onset[0] < 0 or onset.max() >= lines[-1]:
            raise MidiError("a quantized score has a note outside its bars")
        bar = bar_of(onset, score.meters, score.ticks_per_quarter)
        onset_in_bar = onset - lines[bar]
        first = _differs_from_previous(track)
        new_bars = np.empty(len(bar), dtype=np.int64)
        new_bars[0] = bar[0]
        np.subtract(bar[1:], bar[:-1], out=new_bars[1:])
        new_onset = _differs_from_previous(onset) | first
        first = first.nonzero()[0]
        new_bars[first] = bar[first] + 1
        # A note is P L V; before it may stand INSTRUMENT, BARs and T.
        size = new_bars + new_onset + 3
        size[first] += 1
        end = size.cumsum()
        end += len(head)
        tokens = np.full(end[-1] + 1, v.BAR, dtype=np.uint16)
        tokens[: len(head)] = head
        tokens[-1] = v.EOS
        tokens[end[first] - size[first]] = v.start(Family.INSTRUMENT) + score.instruments[track[first]]
        tokens[end[new_onset] - 4] = onset_in_bar[new_onset] + v.start(Family.TIME)
        tokens[end - 3] = notes.pitch + v.start(Family.PITCH)
        tokens[end - 2] = self._duration_tokens[notes.duration]
        tokens[end - 1] = notes.velocity // VELOCITY_BIN + v.start(Family.VELOCITY)
        opens = new_bars.nonzero()[0]
        return Encoding(
            tokens=tokens,
            score=score,
            segment_start=end[opens] - 5,  # BAR, T, P, L, V
            segment_bar=bar[opens],
            segment_track=track[opens],
            num_track_bars=int(new_bars.sum()),
            onset_in_bar=onset_in_bar,
            segment_first=opens,
        )

    @cached_property
    def _duration_tokens(self) -> np.ndarray:
        """Token of the first representable duration from each number of ticks on."""
        durations = self.vocabulary.durations
        index = np.searchsorted(durations, np.arange(durations[-1] + 1))
        return (index + self.vocabulary.start(Family.DURATION)).astype(np.uint16)

    # --- decode ------------------------------------------------------------------------------------------------

    def decode(self, tokens: np.ndarray) -> Score:
        """The quantized Score of a valid stream, deferred bars put back; GrammarError for any other."""
        self.validate(tokens)
        v = self.vocabulary
        tokens = undefer(np.asarray(tokens), v)
        a = annotate(tokens, v)
        value, kind = v.value_of[tokens], a.type
        meter_at, tempo_at = np.flatnonzero(kind == Family.METER), np.flatnonzero(kind == Family.TEMPO)
        return Score(
            ticks_per_quarter=v.resolution,
            tracks=[
                Track(program=0, is_drum=True) if i == DRUMS else Track(program=int(i))
                for i in value[kind == Family.INSTRUMENT]
            ],
            notes=note_rows(tokens, a, v),
            meters=np.array([(a.time[i], *v.meters[value[i]]) for i in meter_at], dtype=METER_DTYPE),
            tempos=np.array([(a.time[i], value[i] + MIN_BPM) for i in tempo_at], dtype=TEMPO_DTYPE),
            num_bars=int(((kind == Family.BAR) & (a.track < 0)).sum()),
            controls=self._controls(tokens, a),
            quantized=True,
        )

    def _controls(self, tokens: np.ndarray, a: Annotations) -> list[Control]:
        controls = []
        for i in np.flatnonzero(a.type >= Family.PIECE_BEGIN):
            onset = int(self.vocabulary.value_of[tokens[i - 1]]) if a.type[i] == Family.CHORD else -1
            controls.append(Control(int(a.track[i]), int(a.bar[i]), onset, int(tokens[i])))
        return sorted(controls)

    # --- the rest of the room, over this vocabulary ----------------------------------------------------------------

    def annotate(self, tokens: np.ndarray) -> Annotations:
        return annotate(tokens, self.vocabulary)

    def defer(self, tokens: np.ndarray, cells: Iterable[tuple[int, int]]) -> np.ndarray:
        return defer(tokens, cells, self.vocabulary)

    def undefer(self, tokens: np.ndarray) -> np.ndarray:
        return undefer(tokens, self.vocabulary)

    def validate(self, tokens: np.ndarray) -> None:
        """GrammarError, naming the first wrong token, unless `tokens` is one whole valid stream."""
        validate(tokens, self.vocabulary)

    def text(self, tokens: np.ndarray) -> str:
        """Token names, for people."""
        return " ".join(self.vocabulary.name(token) for token in np.asarray(tokens).tolist())
