"""Speed and memory as ratios beside a named peer, ablations on real music, soak tests."""

from __future__ import annotations


def whole_numbers(words: str) -> list[int]:
    """For argparse: "128,256" -> [128, 256]."""
    return [int(word) for word in words.split(",")]


def in_short(error: Exception) -> str:
    """Its kind and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
