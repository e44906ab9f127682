"""Conditions: what a musician steers by, derived from the notes, named, and placed in a stream. No torch."""

from meloformer.hid.conditions.derivation import CHORD_TONES, KEY_TONES, Conditions, derive
from meloformer.hid.conditions.names import chord_name, key_name, parse_chord, parse_key, parse_role
from meloformer.hid.controls import CONDITIONS, insert, strip

__all__ = [
    "CHORD_TONES",
    "CONDITIONS",
    "KEY_TONES",
    "Conditions",
    "chord_name",
    "derive",
    "insert",
    "key_name",
    "parse_chord",
    "parse_key",
    "parse_role",
    "strip",
]
