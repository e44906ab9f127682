"""What is asked of a piece, and the stream state that allows nothing else.

`ConstrainedState(vocabulary, request, max_length)` is a `StreamState` whose `allowed()` also keeps to the request:
so many bars, this meter, this tempo, these instruments, at most so many tokens. Whatever the logits are, what is
sampled under it is a valid stream that honours the request.

>>> state = ConstrainedState(Vocabulary(), Request(bars=2, meter=(3, 4), tempo=90, instruments=[33]), max_length=200)
>>> forced = state.forced_prefix()
>>> " ".join(state.vocabulary.name(token) for token in forced)
'BOS PIECE_BEGIN CONDUCTOR BAR METER_3/4 TEMPO_90 BAR INSTRUMENT_33 BAR'

`steering` adds conditions: each is forced where it belongs. None comes from the logits but those of `may_choose`, what
a model was trained to write itself, where none are given (`generation.chosen`).

With `given`, the beginning of a stream, the rest is written behind it: `instruments` are new parts then, and every
MASK of the given tracks gets its FILL, which may stay empty.

The surprise: requested instruments are written in the encoder's order as far as it is known before a note is: drums,
then basses, then the others as they were given. And a bar that is given a chord keeps the meter and tempo in force: a
model that reads chords never learns what one follows, so it cannot be asked whether a change should come first.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from meloformer.errors import UserError
from meloformer.generation.chosen import Chosen, Due, chord_places, only
from meloformer.generation.steering import FREE, Steering
from meloformer.hid.grammar import Region, StreamState, TokenAnnotation
from meloformer.hid.tokenizer import BASS_PROGRAMS
from meloformer.hid.vocabulary import MAX_BPM, MIN_BPM, Family, Vocabulary
from meloformer.midi.score import DRUMS

TRACK_LENGTH = 6  # INSTRUMENT BAR T P L V: the shortest a part can be
# How much one more step may add to the shortest way to the end, itself included: a T has to be followed by P L V (4
# tokens), a BAR by T P L V (5), an INSTRUMENT by BAR T P L V (6). Closing begins while there is still room for that.
LONGEST_STEP = 6
_HEAD_LENGTH = 6  # BOS ... CONDUCTOR BAR METER TEMPO ... EOS


@dataclass(frozen=True, eq=False)
class Request:
    """What the piece must be; None leaves it to the model.

    bars: of the piece; meter (numerator, denominator) and tempo (BPM): from its beginning to its end; instruments:
    the parts, 0..127 or DRUMS, repeats allowed (None, and the steering describes parts: those). given: (T,) tokens, the
    head of a stream up to the end of a track, its conditions included; then nothing but `instruments` is asked for, the
    parts to write behind it (None: no part), and of the steering nothing but parts. chooses: a model that was trained
    to write conditions itself writes those that are not given.
    """

    bars: int | None = None
    meter: tuple[int, int] | None = None
    tempo: int | None = None
    instruments: list[int] | None = None
    given: np.ndarray | None = None
    steering: Steering = FREE
    chooses: bool = True

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
        if self.tempo is not None and self.tempo != int(self.tempo):
            raise UserError(f"tempo is {self.tempo}, must be a whole number of quarter notes a minute")
        for instrument in self.instruments or []:
            if not 0 <= instrument <= DRUMS:
                raise UserError(f"instrument {instrument} does not exist: 0..127 are programs, {DRUMS} is drums")
        if self.instruments is not None and not self.instruments:
            raise UserError("instruments is empty: name at least one, or leave it out")
        if self.given is not None and (self.bars or self.meter or self.tempo):
            raise UserError("bars, meter and tempo are those of the given music: leave them out")
        if self.given is not None and replace(self.steering, parts=()) != FREE:
            raise UserError("conditions of the piece and its bars stand in the given music: leave them out")

    def ordered_instruments(self) -> list[int] | None:
        """Drums, then basses, then the others as given."""
        instruments = self.instruments
        if instruments is None:
            instruments = [part.instrument for part in self.steering.parts]
            if not instruments:
                return None if self.given is None else []
        return [instruments[place] for place in request_order(instruments)]


def request_order(instruments: Sequence[int]) -> list[int]:
    """Places in `instruments` in the order in which a request writes them: drums, then basses, then as given."""
    ranks = [0 if i == DRUMS else 1 if i in BASS_PROGRAMS else 2 for i in instruments]
    return sorted(range(len(ranks)), key=ranks.__getitem__)


class ConstrainedState:
    """A stream under a request; see the module's docstring.

    max_length counts all tokens, EOS too. Where the limit comes near, only tokens remain that leave room to close the
    piece properly; `hit_limit` tells that it did. tags: names of the model's tags; may_choose: names of the conditions
    that the model was trained to write. `chosen_at`: where in `tokens` it chose one.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        request: Request,
        max_length: int,
        tags: Sequence[str] = (),
        may_choose: Sequence[str] = (),
    ):
        request.validate(vocabulary)
        self.vocabulary, self.request, self.max_length = vocabulary, request, max_length
        self.state = StreamState(vocabulary)
        self.tokens: list[int] = []
        self.hit_limit = False
        self.instruments = request.ordered_instruments()
        self.controls = request.steering.controls(vocabulary, tags)
        names = may_choose if request.chooses else ()
        self.chosen = Chosen(
            names, self.controls, vocabulary, len(tags), self.instruments or None, request.given is not None
        )
        self.chosen_at: list[int] = []
        given = self.controls.parts_of(self.instruments or [])
        # Conditions of each part that is asked for
        self.parts = [self.chosen.part(i, said) for i, said in zip(self.instruments or [], given)]
        self.due: list[Due] = []  # what comes next, one token of each
        self.last_chord = -1
        # A BAR of the conductor owes its conditions too, and an INSTRUMENT that was not asked for those of its part.
        self.longest_step = LONGEST_STEP + self.controls.most_in_a_bar
        self.longest_step += len(self.chosen.in_bar()) + len(self.chosen.part_families)
        if request.bars is not None:
            self.controls.require_bars(request.bars)
        if request.meter is not None:
            self.controls.require_meter(request.meter[0])
        self.least_bars = request.bars or max(self.controls.num_bars, 1)
        # Conditions stand where they are due, and nowhere else.
        self._never = np.zeros(vocabulary.size, dtype=bool)
        self._never[vocabulary.start(Family.PIECE_BEGIN) :] = True
        self._never[vocabulary.MASK] = True
        self._closers = np.zeros(vocabulary.size, dtype=bool)
        self._closers[vocabulary.ids(Family.INSTRUMENT)] = True
        self._closers[[vocabulary.FILL, vocabulary.EOS]] = True
        self.given_tracks = 0
        if request.given is not None:
            for token in request.given.tolist():
                self.state.push(token)
            self.tokens = request.given.tolist()
            self.given_tracks = len(self.state.instruments)
            if not self.instruments and not self.state.masks:
                raise UserError("nothing is asked for: no bar of the given music is masked, and no part is to be added")
        self._check_room()

    def _check_room(self) -> None:
        parts = len(self.instruments or [0] * (self.request.given is None))
        if self.request.given is None:
            bars = self.least_bars
            needed = _HEAD_LENGTH + len(self.chosen.head(self.controls.head)) + bars
            needed += bars * len(self.chosen.in_bar()) + len(self.chosen.chord())
            if self.instruments is None:
                needed += len(self.chosen.part_families)
            if bars <= self.max_length:  # a billion bars are refused before they are gone through
                needed += self.controls.tokens_in_bars(0, bars)
            what = f"{bars} bars of {parts} instruments"
        else:
            fills = len(self.state.masks)
            needed, what = len(self.tokens) + fills + 1, f"the given music, {fills} bars in it and {parts} new parts"
        needed += TRACK_LENGTH * parts + sum(map(len, self.parts))
        if self.max_length < needed:
            raise UserError(
                f"max_length is {self.max_length}, and {what} need at least {needed} tokens: raise it or ask for less"
            )

    def branch(self) -> ConstrainedState:
        """A copy that goes its own way from here."""
        twin = copy.copy(self)
        twin.chosen_at = list(self.chosen_at)
        twin.tokens, twin.state = list(self.tokens), copy.deepcopy(self.state, {id(self.vocabulary): self.vocabulary})
        return twin

    @property
    def is_finished(self) -> bool:
        return self.state.is_finished

    def push(self, token: int) -> TokenAnnotation:
        """Take a token that `allowed()` holds."""
        annotation = self.state.push_unchecked(token)
        if self.due and not self.due[0].is_given:
            self.chosen_at.append(len(self.tokens))
        self.tokens.append(token)
        if annotation.type == Family.CHORD:
            self.last_chord = token
        self.due = self.due[1:] or self._due_behind(Family(annotation.type))
        return annotation

    def _due_behind(self, family: Family) -> list[Due]:
        """What must come once a token of this family has been taken."""
        state, controls, chosen = self.state, self.controls, self.chosen
        if family == Family.BOS:
            return chosen.head(controls.head)
        if family == Family.INSTRUMENT:
            if not self.instruments:
                return chosen.part(state.instruments[-1], [])
            return self.parts[state.track - self.given_tracks]
        if state.region != Region.CONDUCTOR:
            return []
        if family == Family.BAR:  # the first bar's chords wait for its meter and tempo
            said = controls.bar(state.bar, state.bar_length) if state.bar else controls.density_in(0)
            return chosen.in_bar() + only(said)
        if family == Family.TEMPO and state.bar == 0:
            return chosen.chord() + only(controls.chords_of(0, state.bar_length))
        if family == Family.TIME:
            return [self.chosen.any_chord()]
        return []

    @property
    def is_choosing(self) -> bool:
        """Whether the next token may be a condition that the model writes, or the T of a chord."""
        if self.due:
            return not self.due[0].is_given
        return self.chosen.chords and self.state.region == Region.CONDUCTOR and self.state.tempo >= 0

    def forced_prefix(self) -> list[int]:
        """Take every token that leaves no choice; all tokens so far, what was given included."""
        while not self.is_finished:
            choices = np.flatnonzero(self.allowed())
            if len(choices) > 1:
                break
            self.push(int(choices[0]))
        return list(self.tokens)

    def allowed(self) -> np.ndarray:
        """(V,) bool, never empty before the stream is finished."""
        state = self.state
        if self.due:
            mask = np.zeros(self.vocabulary.size, dtype=bool)
            mask[self.due[0].start : self.due[0].stop] = True
            if self.chosen.chords and self.last_chord >= 0:  # a chord that only goes on is not said again
                mask[self.last_chord] = False
            return mask
        mask = state.allowed(masks=False)
        mask &= ~self._never
        if self.request.given is not None and len(state.instruments) == self.given_tracks and not state.fills:
            mask &= self._closers  # what was given is not gone on with
        elif state.region == Region.CONDUCTOR:
            self._constrain_conductor(mask)
        self._constrain_tracks(mask)
        self._constrain_length(mask)
        return mask

    def _constrain_conductor(self, mask: np.ndarray) -> None:
        v, state, request = self.vocabulary, self.state, self.request
        times = chord_places(v, state.meter) if self.chosen.chords and state.tempo >= 0 else []
        may = mask[times]
        mask[v.ids(Family.TIME)] = False
        mask[times] = may
        for family, token in (
            (Family.METER, None if request.meter is None else v.meter(*request.meter)),
            (Family.TEMPO, None if request.tempo is None else v.tempo(request.tempo)),
        ):
            if token is not None:
                may = mask[token]
                mask[v.ids(family)] = False
                mask[token] = may
        if self.controls.splits_bars:
            mask[v.ids(Family.METER)] &= np.array([numerator % 2 == 0 for numerator, _ in v.meters])
        mask[v.EOS] = False  # a piece has at least one part
        if state.num_bars:
            more = state.num_bars < self.least_bars
            mask[v.BAR] &= more or request.bars is None
            mask[v.ids(Family.INSTRUMENT)] &= not more

    def _constrain_tracks(self, mask: np.ndarray) -> None:
        if self.instruments is None:
            return
        v, written = self.vocabulary, len(self.state.instruments) - self.given_tracks
        ids = v.ids(Family.INSTRUMENT)
        if mask[ids].any():
            mask[ids] = False
            if written < len(self.instruments):
                mask[v.instrument(self.instruments[written])] = True
        mask[[v.EOS, v.FILL]] &= written == len(self.instruments)

    def _constrain_length(self, mask: np.ndarray) -> None:
        """Where what is owed fills the rest, only steps that shorten it stay."""
        state = self.state
        written = len(state.instruments) - self.given_tracks
        parts_owed = len(self.instruments) - written if self.instruments is not None else 0
        if self.instruments is None and not state.instruments:
            parts_owed = 1
        owed = len(self.chosen.part_families) * (self.instruments is None) * parts_owed
        owed += state.closing_length() + TRACK_LENGTH * parts_owed + sum(map(len, self.parts[written:]))
        if self.request.given is None and state.region <= Region.CONDUCTOR:
            begun = state.num_bars
            owed += max(self.least_bars - begun, 0) + self.controls.tokens_in_bars(begun, max(self.least_bars, begun))
            owed += max(self.least_bars - begun, 0) * len(self.chosen.in_bar())
            if state.tempo < 0:
                owed += len(self.chosen.chord()) + len(self.controls.chords_of(0, 2)) * (begun > 0)
        if len(self.tokens) + owed + self.longest_step <= self.max_length:
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
        elif state.region in (Region.TRACK, Region.FILL) and state.is_between_notes():
            families = (Family.EOS, Family.FILL) if mask[v.EOS] or mask[v.FILL] else (Family.INSTRUMENT,)
        elif state.region == Region.TRACK and state.family == Family.BAR:
            families = (Family.TIME,)
        else:
            return None
        closing = np.zeros_like(mask)
        for family in families:
            closing[v.ids(family)] = True
        return closing
