"""Numbers and the short names of token types, in words.

>>> counted(1, "piece"), counted(1234, "piece")
('1 piece', '1,234 pieces')
>>> type_word("P"), type_word("tempo")
('pitch', 'tempo')

The surprise: it needs no torch, so drawing curves does not wait for it.
"""

from __future__ import annotations

TYPE_WORDS = {"T": "onset", "P": "pitch", "L": "duration", "V": "velocity"}


def counted(number: int, noun: str) -> str:
    """A number and what it counts, in the plural where it is not one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def type_word(name: str) -> str:
    """What a key of `by_type` is called for people."""
    return TYPE_WORDS.get(name, name)
