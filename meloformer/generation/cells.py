"""Which bars of which tracks: what --rewrite and --add_bars say, in words and as (track, bar) cells.

>>> parse_rewrite(["track=2,bars=8-16", "track=drums,bars=3"])
[('2', 8, 16), ('drums', 3, 3)]
>>> parse_bars("9-16"), in_words([(0, 3), (0, 4), (0, 6), (1, 0)], ["Drums", "Violin"])
((9, 16), 'bars 4-5, 7 of Drums; bar 1 of Violin')

The surprise: people count bars and tracks from 1 and include the last one, the code counts from 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

from meloformer.errors import UserError
from meloformer.generation.prompt import Prompt


def _first_and_last(text: str) -> tuple[int, int] | None:
    first, dash, last = text.strip().partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or not 1 <= int(first) <= int(last or first):
        return None
    return int(first), int(last or first)


def parse_bars(text: str) -> tuple[int, int]:
    """First and last bar of `9-16` or `9`, as written; UserError for what is neither."""
    bars = _first_and_last(text)
    if bars is None:
        raise UserError(f"--add_bars is {text!r}, must be like 9-16, or 9 for a single bar")
    return bars


def parse_rewrite(words: Sequence[str]) -> list[tuple[str, int, int]]:
    """(track, first bar, last bar) of each `track=2,bars=8-16`; bars as written: from 1, the last one included.

    >>> parse_rewrite(["track=2", "bars=8-16", "track=drums,bars=3"])
    [('2', 8, 16), ('drums', 3, 3)]
    """
    fields = [word.strip().partition("=") for given in words for word in given.split(",")]
    chosen = []
    for (key, _, track), (other, _, text) in zip(fields[::2], fields[1::2]):
        bars = _first_and_last(text) if key == "track" and other == "bars" and track else None
        if bars is None:
            break
        chosen.append((track, *bars))
    if not chosen or 2 * len(chosen) != len(fields):
        raise UserError(f'--rewrite is {",".join(words)!r}, must be like "track=2,bars=8-16" or "track=drums,bars=1"')
    return chosen


def find_bars(prompt: Prompt, first: int, last: int, flag: str) -> range:
    """Bars of `prompt.score`, counted from 0; UserError for one that it does not have."""
    if last > prompt.num_bars:
        raise UserError(f"{prompt.path}: {flag}{first}-{last}, it has bars 1-{prompt.num_bars}")
    return range(first - 1, last)


def find_cells(prompt: Prompt, chosen: Sequence[tuple[str, int, int]]) -> frozenset[tuple[int, int]]:
    """(track, bar) of `prompt.score`; UserError for a track or a bar that it does not have."""
    cells = set()
    for name, first, last in chosen:
        bars = find_bars(prompt, first, last, "--rewrite bars=")
        cells |= set(product(prompt.find_tracks(name), bars))
    return frozenset(cells)


def in_words(cells: Iterable[tuple[int, int]], names: Sequence[str]) -> str:
    """Cells for people, track by track: "bars 4-5, 7 of Drums"."""
    by_track: dict[int, list[int]] = {}
    for track, bar in sorted(set(cells)):
        by_track.setdefault(track, []).append(bar + 1)
    said = []
    for track, bars in by_track.items():
        runs: list[list[int]] = []
        for bar in bars:
            if runs and bar == runs[-1][-1] + 1:
                runs[-1][1:] = [bar]
            else:
                runs.append([bar])
        text = ", ".join("-".join(map(str, run)) for run in runs)
        said.append(f"{'bar' if len(bars) == 1 else 'bars'} {text} of {names[track]}")
    return "; ".join(said)
