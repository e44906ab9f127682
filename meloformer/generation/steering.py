"""What a musician steers by, and where its tokens stand: keys, chords, densities, tags, roles, beginnings and endings.

`Steering` is what is asked, in people's words. `Controls` is the same as tokens, by place: the head of the stream, each
bar of the conductor, each part. `prompt_rows` lays them over what a prompt's own music says.

>>> v = Vocabulary()
>>> controls = Steering(key="A minor", chords="Am F C", end=True, parts=[Part(33, density=4)]).controls(v)
>>> [v.name(token) for token in controls.head], [v.name(token) for token in controls.bar(1, 96)]
(['PIECE_BEGIN', 'PIECE_END', 'KEY_A_minor'], ['T_0', 'CHORD_F_maj'])
>>> [v.name(token) for token in controls.parts_of([128, 33])[1]]
['DENSITY_4']

Chords last `chord_bars` bars each and are said where they change; a progression begins again at its end, and the last
time round is cut at the last bar. So are the numbers of `bar_density`, one a bar.

The surprise: a part that is described is found by its instrument, the second of an instrument by being the second that
is described, so descriptions and instruments may come in any order.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from meloformer.errors import UserError
from meloformer.hid.conditions import key_name, parse_chord, parse_key, parse_role
from meloformer.hid.controls import BAR, CONDITIONS, TOKEN, TRACK, control_rows, rows_in_window
from meloformer.hid.tokenizer import BASS_PROGRAMS
from meloformer.hid.vocabulary import ROLES, Family, Vocabulary
from meloformer.midi.general_midi import instrument_name, parse_instrument
from meloformer.midi.score import DRUMS, Score

MAX_CHORD_BARS = 1000
PART_CONDITIONS = ("role", "density", "polyphony")


@dataclass(frozen=True)
class Part:
    """What is asked of one part; instrument 0..127 or DRUMS, a role of ROLES, density 1..10, polyphony 1..6."""

    instrument: int
    role: str | None = None
    density: int | None = None
    polyphony: int | None = None

    def tokens(self, vocabulary: Vocabulary) -> list[int]:
        """In the order of the grammar; UserError where it contradicts itself."""
        name = f"the track of {instrument_name(self.instrument)}"
        tokens = []
        if self.role is not None:
            role = parse_role(self.role)
            for is_one, number in ((self.instrument == DRUMS, 0), (self.instrument in BASS_PROGRAMS, 1)):
                if is_one and role != number:
                    raise UserError(f"{name} has role {ROLES[role]!r}, and its role is always {ROLES[number]!r}")
            if role == 0 and self.instrument != DRUMS:
                raise UserError(f"{name} has role 'drums', which is that of drums alone; give program=drums")
            tokens.append(vocabulary.token(Family.ROLE, role))
        if self.density is not None:
            tokens.append(_number(vocabulary, Family.DENSITY, self.density, f"{name}: density"))
        if self.polyphony is not None:
            if self.instrument == DRUMS:
                raise UserError(f"{name} has a polyphony, which is asked of pitched tracks alone; leave it out")
            tokens.append(_number(vocabulary, Family.POLYPHONY, self.polyphony, f"{name}: polyphony"))
        return tokens


def part_of(instrument: int, tokens: np.ndarray, vocabulary: Vocabulary) -> Part:
    """The `Part` that a track's control tokens describe."""
    said = {Family(int(vocabulary.family_of[token])): int(vocabulary.value_of[token]) for token in tokens}
    role = said.get(Family.ROLE)
    counted = [None if number is None else number + 1 for number in map(said.get, (Family.DENSITY, Family.POLYPHONY))]
    return Part(instrument, None if role is None else ROLES[role], *counted)


@dataclass(frozen=True)
class Steering:
    """What is asked of a piece beside its bars, meter, tempo and instruments; None leaves it to the model.

    key "A minor"; chords "Am F C G" or a list, each chord_bars long (a multiple of 0.5); density 1..10, of all parts;
    bar_density 0..7 for each bar, of all parts, repeated; tag a name that the model knows; parts, what is asked of some
    or all of them. begin, end: the piece begins or ends here; None leaves that to the task (a piece from nothing begins
    and goes on).
    """

    key: str | None = None
    chords: str | Sequence[str] | None = None
    chord_bars: float = 1.0
    density: int | None = None
    bar_density: Sequence[int] | None = None
    tag: str | None = None
    parts: Sequence[Part] = ()
    begin: bool | None = None
    end: bool | None = None

    def names(self) -> list[str]:
        """Which of CONDITIONS it speaks of."""
        found = {name for name in CONDITIONS if getattr(self, name, None) is not None}
        found |= {name for part in self.parts for name in PART_CONDITIONS if getattr(part, name) is not None}
        return [name for name in CONDITIONS if name in found]

    def controls(self, vocabulary: Vocabulary, tags: Sequence[str] = ()) -> Controls:
        """The tokens; UserError for what is no key, chord, tag or number."""
        return Controls(self, vocabulary, tags)

    def require_known(self, conditions: Collection[str]) -> None:
        """UserError where the model was trained without a condition that is asked for."""
        for name in self.names():
            if name not in conditions:
                known = ", ".join(conditions) or "no condition"
                raise UserError(
                    f"{name}: the model was trained without it and knows {known}; leave it out, or take a checkpoint "
                    "that was trained with it"
                )


FREE = Steering()  # nothing is asked for


def _number(vocabulary: Vocabulary, family: Family, value: int, what: str, first: int = 1) -> int:
    """Token of a number as people count, from `first` on."""
    last = first + vocabulary.family_size(family) - 1
    if not first <= value <= last:
        raise UserError(f"{what} is {value}, must be from {first} to {last}")
    return vocabulary.token(family, value - first)


class Controls:
    """The tokens of a `Steering`. said: the head without the marks of beginning and end; num_bars: it needs so many."""

    def __init__(self, steering: Steering, vocabulary: Vocabulary, tags: Sequence[str] = ()):
        v = self.vocabulary = vocabulary
        self.steering = steering
        self.said = []
        if steering.key is not None:
            self.said.append(v.token(Family.KEY, parse_key(steering.key)))
        if steering.tag is not None:
            self.said.append(v.token(Family.TAG, find_tag(steering.tag, tags)))
        if steering.density is not None:
            self.said.append(_number(v, Family.DENSITY, steering.density, "density"))
        marks = [v.PIECE_BEGIN] * (steering.begin is not False) + [v.PIECE_END] * bool(steering.end)
        self.head = marks + self.said
        words = steering.chords if steering.chords is not None else []
        words = re.findall(r"[^\s,|]+", words) if isinstance(words, str) else words
        self.chords = [v.token(Family.CHORD, parse_chord(word)) for word in words]
        if not (0.5 <= steering.chord_bars <= MAX_CHORD_BARS and steering.chord_bars % 0.5 == 0):
            raise UserError(
                f"chord_bars is {steering.chord_bars}, must be a multiple of 0.5, such as 0.5, 1 or 2, at most "
                f"{MAX_CHORD_BARS}"
            )
        self.halves = int(2 * steering.chord_bars)  # of a bar, that a chord lasts
        self.densities = [_number(v, Family.BAR_DENSITY, n, "bar_density", first=0) for n in steering.bar_density or []]
        for name, given in (("chords", self.chords), ("bar_density", self.densities)):
            if getattr(steering, name) is not None and not given:
                raise UserError(f"{name} is empty: name at least one, or leave it out")
        self.num_bars = max(-(-len(self.chords) * self.halves // 2), len(self.densities))
        self._parts = [(part.instrument, part.tokens(v)) for part in steering.parts]

    @property
    def splits_bars(self) -> bool:
        """Whether a chord may begin in the middle of a bar, which is a place only where the meter's number is even."""
        return bool(self.halves % 2 and len(self.chords) > 1)

    def require_bars(self, bars: int) -> None:
        """UserError where there is more than fits into so many bars."""
        n = len(self.chords)
        if n * self.halves > 2 * bars:
            each = f" of {self.steering.chord_bars:g} bars each" if self.halves != 2 else ""
            raise UserError(
                f"chords has {n}{each}, and there are {bars} bars for them; give fewer, or ask for more bars"
            )
        if len(self.densities) > bars:
            raise UserError(f"bar_density has {len(self.densities)} numbers for {bars} bars; give at most one a bar")

    def require_meter(self, numerator: int) -> None:
        """UserError where a chord would begin in the middle of a bar that has none."""
        if self.splits_bars and numerator % 2:
            raise UserError(
                f"chord_bars is {self.steering.chord_bars:g}, which splits bars, and one has {numerator} beats; "
                "give whole bars, or another meter"
            )

    def bar(self, bar: int, ticks: int) -> list[int]:
        """Tokens of one conductor bar, `ticks` long: its density, then each chord that begins in it, behind its T."""
        return self.density_in(bar) + self.chords_of(bar, ticks)

    def chords_of(self, bar: int, ticks: int) -> list[int]:
        return [token for tick, chord in self.chords_in(bar, ticks) for token in (self.vocabulary.time(tick), chord)]

    @property
    def most_in_a_bar(self) -> int:
        """Tokens that a bar holds at most."""
        return 2 * bool(self.chords) * (1 + self.splits_bars) + bool(self.densities)

    def density_in(self, bar: int) -> list[int]:
        return [self.densities[bar % len(self.densities)]] if self.densities else []

    def chords_in(self, bar: int, ticks: int, restate: bool = False) -> list[tuple[int, int]]:
        """(tick, token) of the chords that begin in a bar, less those that only go on; `restate`: the one in force at
        its beginning too."""
        found = []
        for half in (0, 1) if self.chords else ():
            turn, rest = divmod(2 * bar + half, self.halves)
            chord, before = (self.chords[i % len(self.chords)] for i in (turn, turn - 1))
            if (not rest and (turn == 0 or chord != before)) or (restate and half == 0):
                found.append((half * ticks // 2, chord))
        return found

    def tokens_in_bars(self, first: int, last: int) -> int:
        """How many tokens the bars [first, last) hold."""
        return sum(len(self.bar(bar, 2)) for bar in range(first, last))

    def parts_of(self, instruments: Sequence[int]) -> list[list[int]]:
        """Tokens of each of these parts; UserError where one is described that is not among them."""
        tokens: list[list[int]] = [[] for _ in instruments]
        free = list(range(len(instruments)))
        for instrument, described in self._parts:
            place = next((i for i in free if instruments[i] == instrument), None)
            if place is None:
                raise UserError(
                    f"a track of {instrument_name(instrument)} is described, and there is none, or no other, among the "
                    "instruments; name it there too, or take it out"
                )
            free.remove(place)
            tokens[place] = described
        return tokens


def find_tag(name: str, tags: Sequence[str]) -> int:
    """Number of a tag; UserError that names the valid ones."""
    if name not in tags:
        raise UserError(f"tag {name!r}: {'the model knows ' + ', '.join(tags) if tags else 'the model knows no tags'}")
    return list(tags).index(name)


# --- what a prompt says of itself -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """Where in a prompt's score the new notes will stand: the bars [first, last) that are read, those of them that
    chords and bar densities are asked for, in order, and the tracks that are read; `adds_parts` where the new notes are
    parts of their own."""

    first: int
    last: int
    bars: Sequence[int]
    tracks: Sequence[int]
    adds_parts: bool = False


def prompt_rows(derived: np.ndarray, score: Score, frame: Frame, controls: Controls) -> np.ndarray:
    """(n, 4) control rows of a frame: what is asked, and of the whole score's `derived` rows what is not.

    What may not hold once the new notes are there is left out: chords, where there are bars behind the score's end and
    none are asked for them; the density of a piece that gets more parts beside its own; and the densities of bars, but
    where some are asked for, since all bars have one or none.
    """
    v = controls.vocabulary
    end = min(frame.last, score.num_bars)
    asked = [(-1, -1, -1, token) for token in controls.said]
    if not frame.adds_parts:  # found among all tracks of the score, those that are silent here too
        parts = controls.parts_of(score.instruments.tolist())
        asked += [(place, -1, -1, token) for place, track in enumerate(frame.tracks) for token in parts[track]]
    asked += _rows_of_bars(controls, score, frame)

    family = v.family_of[derived[:, TOKEN]]
    in_bars = (family == Family.CHORD) | (family == Family.BAR_DENSITY)
    grows = frame.adds_parts and bool(len(frame.tracks))
    kept = derived[~in_bars & ~(grows & (derived[:, TRACK] < 0) & (family == Family.DENSITY))]
    kept = rows_in_window(kept, frame.first, end, np.array(frame.tracks, dtype=np.int64))
    said = {(track, int(v.family_of[token])) for track, _, _, token in asked}
    groups = [kept[[(row[TRACK], int(v.family_of[row[TOKEN]])) not in said for row in kept.tolist()]]]
    for is_asked, which in ((controls.chords, Family.CHORD), (controls.densities, Family.BAR_DENSITY)):
        rows = derived[family == which]
        if is_asked:
            edges = [frame.first - 1, *frame.bars, end]
            groups += [_part(rows, before + 1, bar, frame) for before, bar in pairwise(edges)]
        elif which == Family.CHORD and frame.last == end:
            groups.append(_part(rows, frame.first, end, frame))
    rows = control_rows(np.concatenate([*groups, np.array(asked, dtype=np.int64).reshape(-1, 4)]))
    chords = np.flatnonzero(v.family_of[rows[:, TOKEN]] == Family.CHORD)
    same = rows[chords[1:], TOKEN] == rows[chords[:-1], TOKEN]  # what is asked for may go on from what is there
    return np.delete(rows, chords[1:][same], axis=0)


def _part(rows: np.ndarray, first: int, last: int, frame: Frame) -> np.ndarray:
    """Rows of the bars [first, last), the chord in force restated, counted from the frame's first bar."""
    if first >= last:
        return rows[:0]
    found = rows_in_window(rows, first, last, np.zeros(0, dtype=np.int64))
    found[:, BAR] += first - frame.first
    return found


def _rows_of_bars(controls: Controls, score: Score, frame: Frame) -> list[tuple[int, int, int, int]]:
    """The chords and bar densities that are asked for; UserError where they do not fit the frame's bars."""
    controls.require_bars(len(frame.bars))
    lines = replace(score, num_bars=frame.last).bar_lines()
    rows, before = [], -2
    for number, bar in enumerate(frame.bars):
        numerator = score.meters["numerator"][np.searchsorted(score.meters["tick"], lines[bar], side="right") - 1]
        controls.require_meter(numerator)
        at = bar - frame.first
        rows += [(-1, at, -1, token) for token in controls.density_in(number)]
        chords = controls.chords_in(number, int(lines[bar + 1] - lines[bar]), restate=bar != before + 1)
        rows += [(-1, at, tick, token) for tick, token in chords]
        before = bar
    return rows


def in_words(tokens: np.ndarray, vocabulary: Vocabulary, tags: Sequence[str] = ()) -> str:
    """The conditions of a stream's head for people: "C major, density 4, 5 chords, 3 roles"; empty without any."""
    kind, value = vocabulary.family_of[tokens], vocabulary.value_of[tokens]
    in_head = np.cumsum(kind == Family.CONDUCTOR) == 0
    words = [key_name(int(key)) for key in value[kind == Family.KEY]]
    words += [tags[tag] for tag in value[kind == Family.TAG]]
    words += [f"density {n + 1}" for n in value[in_head & (kind == Family.DENSITY)]]
    for family, one, many in (
        (Family.CHORD, "chord", "chords"),
        (Family.BAR_DENSITY, "density of a bar", "densities of bars"),
        (Family.ROLE, "role", "roles"),
    ):
        count = int((kind == family).sum())
        words += [f"{count} {one if count == 1 else many}"] if count else []
    return ", ".join(words)


# --- what the command line says -------------------------------------------------------------------------------------


def parse_parts(words: Sequence[str]) -> list[Part]:
    """Parts of `program=33,role=bass,density=4`, words that may hold any number of them; a program begins each.

    >>> parse_parts(["program=33", "role=bass", "density=4", "program=drums,density=9"])[1]
    Part(instrument=128, role=None, density=9, polyphony=None)
    """
    described: list[dict] = []
    for field in (word.strip() for given in words for word in given.split(",")):
        key, equals, value = (text.strip() for text in field.partition("="))
        number = key in ("density", "polyphony")
        good = equals and key in ("program", *PART_CONDITIONS) and (value.isdecimal() or not number) and value
        if not good or (key != "program" and not described):
            raise UserError(
                f'--track is {",".join(words)!r}, must be like "program=33,role=bass,density=4,polyphony=1": program '
                "first, then what else is asked for"
            )
        if key == "program":
            described.append({"instrument": parse_instrument(value)})
        elif key in described[-1]:
            raise UserError(f"--track {','.join(words)}: {key} is given twice for one track; keep one of them")
        else:
            described[-1][key] = int(value) if number else value
    return [Part(**fields) for fields in described]
