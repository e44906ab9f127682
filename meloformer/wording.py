"""Numbers in sentences.

>>> counted(1, "piece"), counted(1234, "piece")
('1 piece', '1,234 pieces')

The surprise: there is none.
"""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """A number and what it counts, in the plural where it is not one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
