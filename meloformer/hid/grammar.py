"""The HID grammar as a state machine: which tokens may come next, and what the token just pushed is about.

`StreamState` follows a stream token by token: `allowed()` gives the (V,) mask of tokens that keep it valid, `push`
takes one and returns its annotations, the incremental twin of `annotate`. `validate` runs a whole stream through it.

>>> state = StreamState(Vocabulary())
>>> for token in (1, 4, 3): _ = state.push(token)          # BOS CONDUCTOR BAR
>>> [state.vocabulary.name(i) for i in np.flatnonzero(state.allowed()) if i < 7]
[]
>>> validate(np.array([1, 4, 3, 3]), Vocabulary())
Traceback (most recent call last):
...
meloformer.hid.grammar.GrammarError: token 3 is BAR, which may not follow BAR in the conductor

The surprise: `push` cannot say that a BAR opens a segment until the first onset has come. It returns segment -1 for
the BAR and the segment's number from the T on; `segment_start` is then the position of that BAR.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from meloformer.errors import UserError
from meloformer.hid.vocabulary import BAR_CONTROLS, ENDS_CELL, STREAM_CONTROLS, TRACK_CONTROLS, Family, Vocabulary

_FIRST_CONTROL = Family.PIECE_BEGIN


class GrammarError(UserError):
    """A token stream that is not valid HID: which token, where."""


class Region(IntEnum):
    """Part of the stream that the last token belongs to."""

    START = 0
    STREAM = 1
    CONDUCTOR = 2
    TRACK = 3
    FILL = 4
    END = 5


_REGION_NAMES = {
    Region.START: "at the start",
    Region.STREAM: "at the head of the stream",
    Region.CONDUCTOR: "in the conductor",
    Region.TRACK: "in a track",
    Region.FILL: "in a fill",
    Region.END: "at the end",
}


class TokenAnnotation(NamedTuple):
    """One token's annotations; the fields of `Annotations`, plain ints."""

    bar: int
    track: int
    instrument: int
    ordinal: int
    type: int
    onset: int
    segment: int
    time: int


class StreamState:
    """Where a stream stands. Cost per token is constant; nothing is re-read.

    Public state, read only: `region`, `bar`, `num_bars`, `track`, `instruments`, `position` (tokens so far), `masks`
    [(track, bar)], `fills`, `meter` and `tempo` (tokens in force, -1: none), `num_segments`, `segment_start`, and
    `open_segment`, the segment that the next token may still continue (-1: none).
    """

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.region = Region.START
        self.position = 0
        self.family = Family.PAD
        self.bar = -1
        self.track = -1
        self.instruments: list[int] = []
        self.ordinals: list[int] = []
        self.bar_lines = [0]  # one more than the bars whose length is known
        self.bar_length = 0  # of the meter in force
        self.masks: list[tuple[int, int]] = []
        self.fills = 0
        self.num_onsets = 0
        self.num_segments = 0
        self.open_segment = -1
        self.segment_start = -1
        self._opener = -1  # position of the BAR or FILL of the current cell
        self.meter = self.tempo = -1  # tokens in force
        self._last_time = self._last_pitch = -1

    @property
    def num_bars(self) -> int:
        """Bars of the conductor so far; final once the region is TRACK."""
        return len(self.bar_lines) - 1

    @property
    def is_finished(self) -> bool:
        return self.region == Region.END

    def is_between_notes(self) -> bool:
        """True where a bar or part may end: the last note is whole and the cell is not an empty BAR."""
        return self.family in (Family.VELOCITY, Family.MASK, Family.FILL)

    # --- what may come next ----------------------------------------------------------------------------------

    def allowed(self, masks: bool = True) -> np.ndarray:
        """(V,) bool: tokens after which the stream is still the prefix of a valid one. masks=False bars MASK."""
        v = self.vocabulary
        mask = np.zeros(v.size, dtype=bool)
        region, family = self.region, self.family
        if region == Region.START:
            mask[v.BOS] = True
        elif region == Region.STREAM:
            self._allow_controls(mask, STREAM_CONTROLS)
            mask[v.CONDUCTOR] = True
        elif region == Region.CONDUCTOR:
            self._allow_in_conductor(mask)
        elif family == Family.TIME:
            mask[v.ids(Family.PITCH)] = True
        elif family == Family.PITCH:
            mask[v.ids(Family.DURATION)] = True
        elif family == Family.DURATION:
            mask[v.ids(Family.VELOCITY)] = True
        elif region == Region.TRACK:
            self._allow_in_track(mask, masks)
        elif region == Region.FILL:
            if family == Family.VELOCITY:
                mask[v.start(Family.PITCH) + self._last_pitch + 1 : v.ids(Family.PITCH).stop] = True
            self._allow_times(mask)
            mask[v.FILL if self.fills < len(self.masks) else v.EOS] = True
        return mask

    def _allow_controls(self, mask: np.ndarray, families: tuple[Family, ...]) -> None:
        """Controls of a family later than the last one's: each at most once, in one order."""
        last = self.family if self.family >= _FIRST_CONTROL else -1
        for family in families:
            if family > last:
                mask[self.vocabulary.ids(family)] = True

    def _allow_times(self, mask: np.ndarray) -> None:
        start = self.vocabulary.start(Family.TIME)
        mask[start + self._last_time + 1 : start + self._cell_length()] = True

    def _cell_length(self) -> int:
        return self.bar_lines[self.bar + 1] - self.bar_lines[self.bar]

    def _allow_in_conductor(self, mask: np.ndarray) -> None:
        v, family = self.vocabulary, self.family
        if family == Family.CONDUCTOR:
            mask[v.BAR] = True
            return
        if family == Family.TIME:
            mask[v.ids(Family.CHORD)] = True
            return
        at_head = family == Family.BAR or (family >= _FIRST_CONTROL and family != Family.CHORD)
        if at_head:
            self._allow_controls(mask, BAR_CONTROLS)
            mask[v.ids(Family.METER)] = True
            if self.meter >= 0:
                mask[self.meter] = False
        if (at_head and self.bar > 0) or family == Family.METER:
            mask[v.ids(Family.TEMPO)] = True
            if self.tempo >= 0:
                mask[self.tempo] = False
        if self.tempo >= 0:  # only the first bar waits for its meter and tempo
            start = v.start(Family.TIME)
            mask[start + self._last_time + 1 : start + self.bar_length] = True
            mask[v.BAR] = True
            mask[v.ids(Family.INSTRUMENT)] = True
            mask[v.EOS] = True

    def _allow_in_track(self, mask: np.ndarray, masks: bool) -> None:
        v, family = self.vocabulary, self.family
        if self.bar < 0:  # INSTRUMENT or a control of the track
            self._allow_controls(mask, TRACK_CONTROLS)
            mask[v.BAR] = True
            return
        if family == Family.BAR or family >= _FIRST_CONTROL:
            self._allow_controls(mask, BAR_CONTROLS)
            mask[v.MASK] = masks
        if family == Family.VELOCITY:
            mask[v.start(Family.PITCH) + self._last_pitch + 1 : v.ids(Family.PITCH).stop] = True
        if family != Family.MASK:
            self._allow_times(mask)
        mask[v.BAR] = self.bar + 1 < self.num_bars
        if family in (Family.VELOCITY, Family.MASK):  # never behind an empty bar: trailing ones are not written
            mask[v.ids(Family.INSTRUMENT)] = True
            mask[v.FILL if self.masks else v.EOS] = True

    def closing_length(self) -> int:
        """Fewest tokens from here to EOS, EOS included, once the conductor has begun.

        >>> state = StreamState(Vocabulary())
        >>> for name in ("BOS", "CONDUCTOR", "BAR", "METER_4/4", "TEMPO_120", "INSTRUMENT_0", "BAR", "T_0"):
        ...     _ = state.push(state.vocabulary.names.index(name))
        >>> state.closing_length()                                   # P L V EOS
        4
        """
        if self.is_finished:
            return 0
        note = {Family.TIME: 3, Family.PITCH: 2, Family.DURATION: 1}
        rest = 1 + len(self.masks) - self.fills  # the FILLs that are still owed, and EOS
        if self.region <= Region.CONDUCTOR:
            head = {Region.START: 5, Region.STREAM: 4}.get(self.region, 3 if self.family == Family.CONDUCTOR else 0)
            if self.region == Region.CONDUCTOR and self.family == Family.TIME:
                return 1 + rest
            if self.region == Region.CONDUCTOR and head == 0 and self.tempo < 0:
                return (1 if self.family == Family.METER else 2) + rest
            return head + rest
        if self.family in note:
            return note[self.family] + rest
        if self.region == Region.TRACK and not self.is_between_notes():  # an empty BAR owes one note
            return 4 + rest + (1 if self.bar < 0 else 0)
        return rest

    # --- taking a token ----------------------------------------------------------------------------------------

    def push(self, token: int) -> TokenAnnotation:
        """Take one token; GrammarError, and no change, where it may not stand."""
        v = self.vocabulary
        if not 0 <= token < v.size:
            raise GrammarError(f"token {self.position} is {token}, the vocabulary has ids 0..{v.size - 1}")
        if not self.allowed()[token]:
            after = f"follow {self.family.name}" if self.position else "begin a stream"
            raise GrammarError(
                f"token {self.position} is {v.name(token)}, which may not {after} {_REGION_NAMES[self.region]}"
            )
        return self.push_unchecked(int(token))

    def push_unchecked(self, token: int) -> TokenAnnotation:
        """`push` for a token that is known to be allowed, as one sampled under `allowed()` is."""
        v = self.vocabulary
        family, value = Family(int(v.family_of[token])), int(v.value_of[token])
        in_note = family in (Family.TIME, Family.PITCH, Family.DURATION, Family.VELOCITY)
        if family == Family.BOS:
            self.region = Region.STREAM
        elif family == Family.CONDUCTOR:
            self.region = Region.CONDUCTOR
        elif family == Family.EOS:
            self.region, self.bar, self.track = Region.END, -1, -1
        elif family == Family.INSTRUMENT:
            self.region = Region.TRACK
            self.track = len(self.instruments)
            self.ordinals.append(self.instruments.count(value))
            self.instruments.append(value)
            self.bar = -1
        elif family == Family.BAR:
            self.bar += 1
            if self.region == Region.CONDUCTOR:
                self.bar_lines.append(self.bar_lines[-1] + self.bar_length)
        elif family == Family.FILL:
            self.region = Region.FILL
            self.track, self.bar = self.masks[self.fills]
            self.fills += 1
        elif family == Family.MASK:
            self.masks.append((self.track, self.bar))
        elif family == Family.METER:
            self.meter, self.bar_length = token, int(v.bar_ticks_of[token])
            self.bar_lines[-1] = self.bar_lines[-2] + self.bar_length
        elif family == Family.TEMPO:
            self.tempo = token

        if family in ENDS_CELL or family == Family.MASK:
            self._last_time = self._last_pitch = -1
            self.open_segment = -1
            self._opener = self.position
        elif family == Family.TIME:
            self._last_time, self._last_pitch = value, -1
            self.num_onsets += 1
            if self.track >= 0 and self.open_segment < 0:
                self.open_segment, self.segment_start = self.num_segments, self._opener
                self.num_segments += 1
        elif family == Family.PITCH:
            self._last_pitch = value

        self.family = family
        self.position += 1
        instrument = ordinal = -1
        if self.track >= 0:
            instrument, ordinal = self.instruments[self.track], self.ordinals[self.track]
        has_onset = in_note or family == Family.CHORD
        time = self.bar_lines[self.bar] if self.bar >= 0 else 0
        return TokenAnnotation(
            bar=self.bar,
            track=self.track,
            instrument=instrument,
            ordinal=ordinal,
            type=int(family),
            onset=self.num_onsets - 1 if has_onset else -1,
            segment=self.open_segment if self.bar >= 0 else -1,
            time=time + (self._last_time if has_onset else 0),
        )


def validate(tokens: np.ndarray, vocabulary: Vocabulary) -> None:
    """GrammarError, naming the first wrong token, unless `tokens` is one whole valid stream."""
    state = StreamState(vocabulary)
    for token in np.asarray(tokens).tolist():
        state.push(token)
    if not state.is_finished:
        raise GrammarError(f"the stream ends after {state.position} tokens without EOS")
