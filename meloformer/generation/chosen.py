"""The conditions that a model writes itself: those it was trained to (`--predict_conditions`) and that are not given.

`Chosen(names, controls, vocabulary)` says which, by place: the head of a stream, the bars of the conductor, new parts.
What is due somewhere is a range of ids: of one id where it is given, of a family where the model chooses.

>>> from meloformer.generation import Steering
>>> v = Vocabulary()
>>> chosen = Chosen(["key", "chords", "role"], Steering().controls(v), v)
>>> [v.name(due.start) for due in chosen.head([v.PIECE_BEGIN])], chosen.chords
(['PIECE_BEGIN', 'KEY_C_major'], True)
>>> [(v.name(due.start), due.is_given) for due in chosen.part(33, [v.token(Family.DENSITY, 3)])]
[('ROLE_bass', False), ('DENSITY_4', True)]

They stand where the encoder puts them: a key, a tag and a density behind BOS; a density in every bar; a chord at the
beginning of the first bar and then, as the model likes, another at the beginning of a bar or, where the meter's number
is even, in its middle; role, density and polyphony behind INSTRUMENT. Each is always written: how often training leaves
one out is a setting and says nothing of music. What is drawn is its value, and of later chords the place.

The surprise: a model writes from left to right, so what stands before something that was asked for would be chosen
without knowing it. A key is not chosen where chords are given, nor a density of the piece where densities of bars or
parts are; behind the beginning of a stream that is given, only what belongs to new parts is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from meloformer.generation.steering import Controls
from meloformer.hid.conditions import chord_name, key_name
from meloformer.hid.controls import CONDITIONS
from meloformer.hid.tokenizer import BASS_PROGRAMS
from meloformer.hid.vocabulary import ROLES, Family, Vocabulary
from meloformer.midi.score import DRUMS

OF_PARTS = (Family.ROLE, Family.DENSITY, Family.POLYPHONY)


class Due(NamedTuple):
    """Token ids start .. stop - 1, one of which comes next; `is_given`: not for the model to say."""

    start: int
    stop: int
    is_given: bool = False


class Chosen:
    """See the module's docstring. `chords`, `bar_density`: whether the model writes those of every bar.

    names: of CONDITIONS, what the model may choose; controls: what is given; tags: how many the model knows;
    instruments: the parts that are asked for; behind_given: a beginning of the stream is given.
    """

    def __init__(
        self,
        names: Collection[str],
        controls: Controls,
        vocabulary: Vocabulary,
        num_tags: int = 0,
        instruments: Sequence[int] | None = None,
        behind_given: bool = False,
    ):
        v = self.vocabulary = vocabulary
        steering = controls.steering
        whole = () if behind_given else names
        is_drums = instruments is not None and set(instruments) == {DRUMS}
        is_dense = bool(controls.densities) or any(part.density is not None for part in steering.parts)
        self._head = []
        if "key" in whole and steering.key is None and not controls.chords and not is_drums:
            self._head.append(self._any(Family.KEY))
        if "tag" in whole and steering.tag is None and num_tags:
            self._head.append(Due(v.start(Family.TAG), v.start(Family.TAG) + num_tags))
        if "density" in whole and steering.density is None and not is_dense:
            self._head.append(self._any(Family.DENSITY))
        self.chords = "chords" in whole and not controls.chords
        self.bar_density = "bar_density" in whole and not controls.densities
        self.part_families = [family for family in OF_PARTS if family in {CONDITIONS[name] for name in names}]

    def __bool__(self) -> bool:
        return bool(self._head or self.chords or self.bar_density or self.part_families)

    def head(self, given: Sequence[int]) -> list[Due]:
        """What stands behind BOS, the given tokens included. Ids rise in the order of families."""
        return sorted([*only(given), *self._head])

    def in_bar(self) -> list[Due]:
        """What stands behind every BAR of the conductor."""
        return [self._any(Family.BAR_DENSITY)] if self.bar_density else []

    def chord(self) -> list[Due]:
        """The piece's first chord, behind its first tempo."""
        return [*only([self.vocabulary.time(0)]), self.any_chord()] if self.chords else []

    def any_chord(self) -> Due:
        """What stands behind a T of the conductor."""
        return self._any(Family.CHORD)

    def part(self, instrument: int, given: Sequence[int]) -> list[Due]:
        """What stands behind an INSTRUMENT, the given tokens included."""
        said = set(self.vocabulary.family_of[list(given)].tolist())
        families = [family for family in self.part_families if family not in said]
        if instrument == DRUMS:  # nobody counts how many drums sound at once
            families = [family for family in families if family != Family.POLYPHONY]
        due = [self.roles(instrument) if family == Family.ROLE else self._any(family) for family in families]
        return sorted([*only(given), *due])

    def roles(self, instrument: int) -> Due:
        """Those that an instrument can have: drums and basses have theirs, the others any but the drums'."""
        start, bass = self.vocabulary.start(Family.ROLE), ROLES.index("bass")
        if instrument == DRUMS:
            return Due(start, start + 1)
        return Due(start + bass, start + (bass + 1 if instrument in BASS_PROGRAMS else len(ROLES)))

    def _any(self, family: Family) -> Due:
        ids = self.vocabulary.ids(family)
        return Due(ids.start, ids.stop)


def only(tokens: Sequence[int]) -> list[Due]:
    """What is given."""
    return [Due(token, token + 1, is_given=True) for token in tokens]


def chord_places(vocabulary: Vocabulary, meter: int) -> list[int]:
    """Where in a bar of a METER token a chord may begin, as derivation has it: its beginning and, where the numerator
    is even, its middle.

    >>> v = Vocabulary()
    >>> [v.name(token) for token in chord_places(v, v.meter(6, 8))]
    ['T_0', 'T_36']
    """
    numerator, _ = vocabulary.meters[vocabulary.value_of[meter]]
    return [vocabulary.time(half * int(vocabulary.bar_ticks_of[meter]) // 2) for half in range(2 - numerator % 2)]


def chosen_words(tokens: np.ndarray, vocabulary: Vocabulary, tags: Sequence[str] = (), most: int | None = None) -> str:
    """The conditions among (n,) tokens of a stream, in its order, for people: "A minor, chords Am F C G". Of chords and
    of densities of bars the first `most`.

    >>> v = Vocabulary()
    >>> chosen_words(np.array([v.token(Family.KEY, 21), *(v.token(Family.CHORD, 8 * n + 1) for n in (9, 2))]), v)
    'A minor, chords Am Dm'
    """
    kind, value = vocabulary.family_of[tokens], vocabulary.value_of[tokens]

    def said(family: Family, offset: int = 1) -> list[str]:
        return [str(number + offset) for number in value[kind == family].tolist()]

    def row(name: str, words: Sequence[str]) -> list[str]:
        shown = list(words[:most])
        return [f"{name} {' '.join(shown)}" + (" ..." if len(shown) < len(words) else "")] if len(words) else []

    words = [key_name(key) for key in value[kind == Family.KEY].tolist()]
    words += [f"tag {tags[tag]}" for tag in value[kind == Family.TAG].tolist()]
    words += row("density", said(Family.DENSITY))
    words += row("chords", [chord_name(chord) for chord in value[kind == Family.CHORD].tolist()])
    words += row("densities of bars", said(Family.BAR_DENSITY, 0))
    words += row("roles", [ROLES[role] for role in value[kind == Family.ROLE].tolist()])
    words += row("polyphony", said(Family.POLYPHONY))
    return ", ".join(words)
