"""What is asked of a piece, and the stream state that allows nothing else.

`ConstrainedState(vocabulary, request, max_length)` is a `StreamState` whose `allowed()` also keeps to the request:
so many bars, this meter, this tempo, these instruments, at most so many tokens. Whatever the logits are, what is
sampled under it is a valid stream that honours the request.

>>> state = ConstrainedState(Vocabulary(), Request(bars=2, meter=(3, 4), tempo=90, instruments=[33]), max_length=200)
>>> forced = state.forced_prefix()
>>> " ".join(state.vocabulary.name(token) for token in forced)
'BOS PIECE_BEGIN CONDUCTOR BAR METER_3/4 TEMPO_90 BAR INSTRUMENT_33 BAR'

The surprise: requested instruments are written in the encoder's order as far as it is known before a note is: drums,
then basses, then the others as they were given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meloformer.errors import UserError
from meloformer.hid.grammar import Region, StreamState, TokenAnnotation
from meloformer.hid.tokenizer import BASS_PROGRAMS
from meloformer.hid.vocabulary import MAX_BPM, MIN_BPM, Family, Vocabulary
from meloformer.midi.score import DRUMS

TRACK_LENGTH = 6  # INSTRUMENT BAR T P L V: the shortest a part can be
_HEAD_LENGTH = 7  # BOS PIECE_BEGIN CONDUCTOR BAR METER TEMPO ... EOS


@dataclass(frozen=True)
class Request:
    """What the piece must be; None leaves it to the model.

    bars: of the piece; meter (numerator, denominator) and tempo (BPM): from its beginning to its end; instruments:
    the parts, 0..127 or DRUMS, repeats allowed.
    """

    bars: int | None = None
    meter: tuple[int, int] | None = None
    tempo: int | None = None
    instruments: list[int] | None = None

    def validate(self, vocabulary: Vocabulary) -> None:
        """UserError where no stream can honour it."""
        if self.bars is not None and self.bars < 1:
            raise UserError(f"bars is {self.bars}, must be at least 1")
        if self.meter is not None and not vocabulary.has_meter(*self.meter):
            n, d = self.meter
            raise UserError(
                f"time_signature is {n}/{d}: the lower number must be 2, 4, 8 or 16, the bar at most 8 quarter notes"
            )
        if self.tempo is not None and not MIN_BPM <= self.tempo <= MAX_BPM:
            raise UserError(f"tempo is {self.tempo}, must be from {MIN_BPM} to {MAX_BPM}")
        for instrument in self.instruments or []:
            if not 0 <= instrument <= DRUMS:
                raise UserError(f"instrument {instrument} does not exist: 0..127 are programs, {DRUMS} is drums")
        if self.instruments is not None and not self.instruments:
            raise UserError("instruments is empty: name at least one, or leave it out")

    def ordered_instruments(self) -> list[int] | None:
        """Drums, then basses, then the others as given."""
        if self.instruments is None:
            return None
        rank = {i: 0 if i == DRUMS else 1 if i in BASS_PROGRAMS else 2 for i in self.instruments}
        return sorted(self.instruments, key=rank.__getitem__)


class ConstrainedState:
    """A stream from nothing under a request; see the module's docstring.

    max_length counts all tokens, EOS too. Where the limit comes near, only tokens remain that leave room to close the
    piece properly; `hit_limit` tells that it did.
    """

    def __init__(self, vocabulary: Vocabulary, request: Request, max_length: int):
        request.validate(vocabulary)
        self.vocabulary, self.request, self.max_length = vocabulary, request, max_length
        self.state = StreamState(vocabulary)
        self.tokens: list[int] = []
        self.hit_limit = False
        self.instruments = request.ordered_instruments()
        # Conditions come from the request, never from the logits; a T of the conductor would begin a chord.
        self._never = np.zeros(vocabulary.size, dtype=bool)
        self._never[vocabulary.start(Family.PIECE_BEGIN) :] = True
        self._never[vocabulary.MASK] = True
        needed = _HEAD_LENGTH + (request.bars or 1) + TRACK_LENGTH * len(self.instruments or [0])
        if max_length < needed:
            raise UserError(
                f"max_length is {max_length}, and {request.bars or 1} bars of {len(self.instruments or [0])} "
                f"instruments need at least {needed} tokens: raise it or ask for less"
            )

    @property
    def is_finished(self) -> bool:
        return self.state.is_finished

    def push(self, token: int) -> TokenAnnotation:
        """Take a token that `allowed()` holds."""
        annotation = self.state.push_unchecked(token)
        self.tokens.append(token)
        return annotation

    def forced_prefix(self) -> list[int]:
        """Take every token that leaves no choice, and return them."""
        taken = []
        while not self.is_finished:
            choices = np.flatnonzero(self.allowed())
            if len(choices) > 1:
                break
            taken.append(int(choices[0]))
            self.push(taken[-1])
        return taken

    def allowed(self) -> np.ndarray:
        """(V,) bool, never empty before the stream is finished."""
        v, state = self.vocabulary, self.state
        if state.region == Region.STREAM and state.family == Family.BOS:
            return self._only(v.PIECE_BEGIN)
        mask = state.allowed(masks=False)
        mask &= ~self._never
        if state.region == Region.CONDUCTOR:
            self._constrain_conductor(mask)
        self._constrain_tracks(mask)
        self._constrain_length(mask)
        return mask

    def _only(self, token: int) -> np.ndarray:
        mask = np.zeros(self.vocabulary.size, dtype=bool)
        mask[token] = True
        return mask

    def _constrain_conductor(self, mask: np.ndarray) -> None:
        v, state, request = self.vocabulary, self.state, self.request
        mask[v.ids(Family.TIME)] = False
        for family, token in (
            (Family.METER, None if request.meter is None else v.meter(*request.meter)),
            (Family.TEMPO, None if request.tempo is None else v.tempo(request.tempo)),
        ):
            if token is not None:
                may = mask[token]
                mask[v.ids(family)] = False
                mask[token] = may
        mask[v.EOS] = False  # a piece has at least one part
        if request.bars is not None and state.num_bars:
            more = state.num_bars < request.bars
            mask[v.BAR] &= more
            mask[v.ids(Family.INSTRUMENT)] &= not more

    def _constrain_tracks(self, mask: np.ndarray) -> None:
        if self.instruments is None:
            return
        v, written = self.vocabulary, len(self.state.instruments)
        ids = v.ids(Family.INSTRUMENT)
        if mask[ids].any():
            mask[ids] = False
            if written < len(self.instruments):
                mask[v.instrument(self.instruments[written])] = True
        mask[v.EOS] &= written == len(self.instruments)

    def _constrain_length(self, mask: np.ndarray) -> None:
        """Where what is owed fills the rest, only steps that shorten it stay."""
        state = self.state
        parts_owed = len(self.instruments) - len(state.instruments) if self.instruments is not None else 0
        if self.instruments is None and not state.instruments:
            parts_owed = 1
        bars_owed = max((self.request.bars or 1) - state.num_bars, 0)
        owed = state.closing_length() + TRACK_LENGTH * parts_owed + bars_owed
        # The longest step that owes more than it writes is a T after a whole note: 1 token that owes 3 more. A BAR
        # after a whole note owes 4, an INSTRUMENT that was not asked for 5.
        if len(self.tokens) + owed + 6 <= self.max_length:
            return
        closing = self._closing_choices(mask)
        if closing is not None:
            mask &= closing
            self.hit_limit = True

    def _closing_choices(self, mask: np.ndarray) -> np.ndarray | None:
        """The part of `mask` that is on the shortest way to EOS; None where every way is as short."""
        v, state = self.vocabulary, self.state
        if state.region == Region.CONDUCTOR and state.tempo >= 0:
            families = (Family.BAR,) if not mask[v.ids(Family.INSTRUMENT)].any() else (Family.INSTRUMENT,)
        elif state.region == Region.TRACK and state.family == Family.VELOCITY:
            families = (Family.EOS,) if mask[v.EOS] else (Family.INSTRUMENT,)
        elif state.region == Region.TRACK and state.family == Family.BAR:
            families = (Family.TIME,)
        else:
            return None
        closing = np.zeros_like(mask)
        for family in families:
            closing[v.ids(family)] = True
        return closing
