"""Names of conditions and back: keys, chords, roles, as people write them.

>>> parse_key("A minor"), key_name(21), parse_chord("F#m7"), chord_name(54), parse_role("bass")
(21, 'A minor', 54, 'F#m7', 1)

A number is the value inside its token family: keys 0..11 major and 12..23 minor from C upwards, chords 8 x root +
quality and 96 for none. The surprise: a mode or quality may be written in capitals in a key and not in a chord, but for
"M" and "m" ("CM", "Cm", "CM7", "Cm7"), which are major and minor in both.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

from meloformer.errors import UserError
from meloformer.hid.vocabulary import CHORD_QUALITIES, PITCH_NAMES, ROLES

NUM_PITCHES, NUM_QUALITIES = len(PITCH_NAMES), len(CHORD_QUALITIES)
NUM_KEYS, NUM_CHORDS = 2 * NUM_PITCHES, NUM_PITCHES * NUM_QUALITIES + 1
NO_CHORD = NUM_CHORDS - 1
NO_CHORD_NAME = "N"
_LETTERS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
_ACCIDENTALS = {"#": 1, "♯": 1, "b": -1, "♭": -1, "": 0}
_MODES = {"major": 0, "maj": 0, "dur": 0, "": 0, "M": 0, "minor": 1, "min": 1, "m": 1, "moll": 1}
# The first spelling of a quality is the one that `chord_name` writes.
_SPELLINGS = {
    "maj": ("", "maj", "major", "M"),
    "min": ("m", "min", "minor", "-"),
    "dim": ("dim", "o", "°"),
    "aug": ("aug", "+"),
    "7": ("7", "dom7"),
    "maj7": ("maj7", "M7", "Δ", "Δ7", "major7"),
    "min7": ("m7", "min7", "-7", "minor7"),
    "sus4": ("sus4", "sus"),
}
_QUALITIES = {text: CHORD_QUALITIES.index(quality) for quality, texts in _SPELLINGS.items() for text in texts}
_NONE = ("n", "n.c.", "nc", "none")


def key_name(key: int) -> str:
    """Name of key 0..23."""
    mode, root = divmod(key, NUM_PITCHES)
    return f"{PITCH_NAMES[root]} {('major', 'minor')[mode]}"


def parse_key(text: str) -> int:
    """Number of a key such as "A minor", "Am", "Bb" or "F# major"; UserError that names the nearest for others.

    >>> [parse_key(text) for text in ("C", "a min", "Bb", "db major", "Ebm", "EbM")]
    [0, 21, 10, 1, 15, 3]
    """
    root, rest = _root(text.strip()[:1].upper() + text.strip()[1:])
    word = rest.strip()
    mode = _MODES.get(word, _MODES.get(word.lower()))
    if root is None or mode is None:
        names = [key_name(key) for key in range(NUM_KEYS)]
        hint = _german(text, parse_key, key_name) or _nearest(text, names)
        raise UserError(f'key {text!r}: a pitch with "major" or "minor" is accepted{hint}')
    return mode * NUM_PITCHES + root


def chord_name(chord: int) -> str:
    """Name of chord 0..96, such as "Am7"; "N" for none."""
    if chord == NO_CHORD:
        return NO_CHORD_NAME
    root, quality = divmod(chord, NUM_QUALITIES)
    return PITCH_NAMES[root] + _SPELLINGS[CHORD_QUALITIES[quality]][0]


def parse_chord(text: str) -> int:
    """Number of a chord such as "Am", "F#m7", "Bdim", "Gsus4" or "none"; UserError for others.

    >>> [parse_chord(text) for text in ("C", "Am", "Dbmaj7", "F#m7", "Bo", "N.C.")]
    [0, 73, 13, 54, 90, 96]
    """
    if text.strip().lower() in _NONE:
        return NO_CHORD
    root, rest = _root(text.strip())
    quality = _QUALITIES.get(rest.replace(" ", ""))
    if root is None or quality is None:
        names = [chord_name(chord) for chord in range(NUM_CHORDS)]
        accepted = ", ".join(_SPELLINGS[quality][0] or "nothing" for quality in CHORD_QUALITIES)
        hint = _german(text, parse_chord, chord_name) or _nearest(text, names)
        raise UserError(f"chord {text!r}: a pitch with one of {accepted} behind it is accepted, or none{hint}")
    return root * NUM_QUALITIES + quality


def parse_role(text: str) -> int:
    """Number of a role; UserError that names the nearest for others."""
    if text.strip().lower() in ROLES:
        return ROLES.index(text.strip().lower())
    raise UserError(f"role {text!r}: one of {', '.join(ROLES)} is accepted{_nearest(text, list(ROLES))}")


def _root(text: str) -> tuple[int | None, str]:
    """Pitch class of the letter and accidental that a name begins with, and the rest."""
    match = re.match(r"([A-G])([#♯b♭]?)", text)
    if match is None:
        return None, text
    return (_LETTERS[match[1]] + _ACCIDENTALS[match[2]]) % NUM_PITCHES, text[match.end() :]


def _german(text: str, parse: Callable[[str], int], name: Callable[[int], str]) -> str:
    """What a German H stands for, where the rest is understood."""
    if text.strip()[:1] not in ("H", "h"):
        return ""
    try:
        return f"; H is called B here, so {name(parse('B' + text.strip()[1:]))}"
    except UserError:
        return ""


def _nearest(text: str, names: list[str]) -> str:
    near = difflib.get_close_matches(text.strip(), names, 1, 0.4)
    return f"; the nearest is {near[0]}" if near else ""
