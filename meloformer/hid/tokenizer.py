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

import numpy as np

from meloformer.hid.annotate import Annotations, annotate
from meloformer.hid.deferral import defer, undefer
from meloformer.hid.grammar import validate
from meloformer.hid.quantize import quantize
from meloformer.hid.vocabulary import MIN_BPM, NUM_VELOCITIES, Family, Vocabulary
from meloformer.midi.score import (
    DRUMS,
    METER_DTYPE,
    NOTE_DTYPE,
    TEMPO_DTYPE,
    Control,
    MidiError,
    Score,
    Track,
)

BASS_PROGRAMS = range(32, 40)
BASS_MEAN_PITCH = 45
CHORDAL_POLYPHONY = 1.5


def canonical_order(score: Score) -> np.ndarray:
    """(tracks,) indices in the order of `encode`: drums, bass, chordal, the rest; then program, then as given.

    Bass is a bass program or a mean pitch below 45; chordal is a mean polyphony of at least 1.5 while sounding.
    """
    keys = []
    for i, track in enumerate(score.tracks):
        notes = score.notes[np.searchsorted(score.notes["track"], i) : np.searchsorted(score.notes["track"], i + 1)]
        if track.is_drum:
            rank = 0
        elif track.program in BASS_PROGRAMS or (len(notes) and notes["pitch"].mean() < BASS_MEAN_PITCH):
            rank = 1
        else:
            rank = 2 if mean_polyphony(notes) >= CHORDAL_POLYPHONY else 3
        keys.append((rank, track.instrument, i))
    return np.array([i for _, _, i in sorted(keys)], dtype=np.int64)


def mean_polyphony(notes: np.ndarray) -> float:
    """Notes sounding at once, averaged over the time in which at least one sounds; 0 without notes.

    Expects notes sorted by onset.
    """
    if not len(notes):
        return 0.0
    end = notes["onset"] + notes["duration"]
    reached = np.concatenate(([notes["onset"][0]], np.maximum.accumulate(end)[:-1]))
    covered = np.maximum(end - np.maximum(notes["onset"], reached), 0).sum()
    return float(notes["duration"].sum() / covered)


def reorder_tracks(score: Score, order: np.ndarray) -> Score:
    """The same score with tracks[order]."""
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order))
    notes = score.notes.copy()
    notes["track"] = rank[notes["track"]]
    notes = notes[np.argsort(notes["track"], kind="stable")]
    controls = [c._replace(track=int(rank[c.track])) if c.track >= 0 else c for c in score.controls]
    return replace(score, tracks=[score.tracks[i] for i in order], notes=notes, controls=sorted(controls))


def note_rows(tokens: np.ndarray, a: Annotations, vocabulary: Vocabulary) -> np.ndarray:
    """Note table, in the order of the stream, of (T,) tokens that begin and end between notes, in ticks of the grid."""
    value = vocabulary.value_of[tokens]
    pitch_at = np.flatnonzero(a.type == Family.PITCH)
    notes = np.empty(len(pitch_at), dtype=NOTE_DTYPE)
    notes["track"], notes["onset"], notes["pitch"] = a.track[pitch_at], a.time[pitch_at], value[pitch_at]
    notes["duration"] = vocabulary.durations[value[pitch_at + 1]]
    width = 128 // NUM_VELOCITIES
    notes["velocity"] = value[pitch_at + 2] * width + width // 2
    return notes


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
        if order not in ("canonical", "given"):
            raise ValueError(f'order is {order!r}, must be "canonical" or "given"')
        score = self.quantize(score)
        if order == "canonical":
            score = reorder_tracks(score, canonical_order(score))
        lines = score.bar_lines()
        parts = [[self.vocabulary.BOS, self.vocabulary.CONDUCTOR], self._conductor(score, lines)]
        tokens = np.concatenate([*parts, self._tracks(score, lines), [self.vocabulary.EOS]]).astype(np.uint16)
        if score.controls:
            tokens = self._insert_controls(tokens, score.controls)
        return tokens, score.counts

    def _conductor(self, score: Score, lines: np.ndarray) -> np.ndarray:
        """BAR, then the meter and the tempo that begin there."""
        v = self.vocabulary
        slots = np.full((score.num_bars, 3), -1, dtype=np.int64)
        slots[:, 0] = v.BAR
        for column, table, tokens in (
            (1, score.meters, [v.meter(int(m["numerator"]), int(m["denominator"])) for m in score.meters]),
            (2, score.tempos, score.tempos["qpm"].astype(np.int64) - MIN_BPM + v.start(Family.TEMPO)),
        ):
            bars = np.searchsorted(lines, table["tick"])
            if len(table) and (bars[-1] >= score.num_bars or not np.array_equal(lines[bars], table["tick"])):
                raise MidiError("a quantized score has a meter or tempo that is not at a bar line of the piece")
            slots[bars, column] = tokens
        return slots[slots >= 0]

    def _tracks(self, score: Score, lines: np.ndarray) -> np.ndarray:
        """All tracks in the score's order, without a Python loop over notes."""
        v, notes = self.vocabulary, score.notes
        if not len(notes):
            return np.empty(0, dtype=np.int64)
        track, onset = notes["track"], notes["onset"]
        if onset[0] < 0 or onset.max() >= lines[-1]:
            raise MidiError("a quantized score has a note outside its bars")
        bar = np.searchsorted(lines, onset, side="right") - 1
        first = np.diff(track, prepend=-1) != 0
        new_bars = bar - np.where(first, -1, np.roll(bar, 1))
        new_onset = first | (np.diff(onset, prepend=-1) != 0)
        end = np.cumsum(first + new_bars + new_onset + 3)
        tokens = np.full(end[-1], v.BAR, dtype=np.int64)
        start = np.concatenate(([0], end[:-1]))
        tokens[start[first]] = v.start(Family.INSTRUMENT) + score.instruments[track[first]]
        tokens[end[new_onset] - 4] = (v.start(Family.TIME) + onset - lines[bar])[new_onset]
        tokens[end - 3] = v.start(Family.PITCH) + notes["pitch"].astype(np.int64)
        tokens[end - 2] = v.start(Family.DURATION) + np.searchsorted(v.durations, notes["duration"])
        tokens[end - 1] = v.start(Family.VELOCITY) + notes["velocity"].astype(np.int64) * NUM_VELOCITIES // 128
        return tokens

    def _insert_controls(self, tokens: np.ndarray, controls: list[Control]) -> np.ndarray:
        """Each control behind the token it belongs to; chords, with their T, at the end of their conductor bar."""
        v = self.vocabulary
        a = annotate(tokens, v)
        places, inserted = [], []
        for control in sorted(controls):
            if control.onset >= 0:  # the last token of that bar of the conductor
                position = np.flatnonzero((a.track < 0) & (a.bar == control.bar))[-1]
                inserted += [v.time(control.onset), control.token]
                places += [position + 1, position + 1]
                continue
            head = {-1: Family.BOS if control.track < 0 else Family.INSTRUMENT}.get(control.bar, Family.BAR)
            at = np.flatnonzero((a.track == control.track) & (a.bar == control.bar) & (a.type == head))
            if not len(at):
                raise MidiError(
                    f"{v.name(control.token)} belongs to bar {control.bar} of a track that does not reach it"
                )
            inserted.append(control.token)
            places.append(at[0] + 1)
        return np.insert(tokens, places, np.array(inserted, dtype=tokens.dtype))

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
