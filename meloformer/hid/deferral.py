"""Deferred bars: cells of (track, bar) moved to fills at the end of the stream, and put back.

`defer(tokens, cells, vocabulary)` writes MASK in the place of each cell's notes and the notes, in stream order, into
FILLs before EOS; `undefer` is its inverse. A model reads the fills with every other part, and both neighbours of the
bar, already known.

>>> v = Vocabulary()
>>> note = [v.time(0), v.pitch(60), v.duration(24), v.velocity(90)]
>>> head = [v.BOS, v.CONDUCTOR, v.BAR, v.meter(4, 4), v.tempo(120), v.instrument(0)]
>>> moved = defer(np.array([*head, v.BAR, *note, v.EOS]), [(0, 0)], v)
>>> moved.tolist() == [*head, v.BAR, v.MASK, v.FILL, *note, v.EOS]
True

The surprise: any bar of the conductor may be deferred in any track, also one beyond the track's last written BAR:
missing BARs are written, and `undefer` strips the trailing empty ones again, and a track that is left without a note.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from meloformer.hid.annotate import annotate
from meloformer.hid.vocabulary import Family, Vocabulary


def defer(tokens: np.ndarray, cells: Iterable[tuple[int, int]], vocabulary: Vocabulary) -> np.ndarray:
    """Move the notes of each (track, bar) cell to a FILL; ValueError for a cell that the stream does not have.

    Cells that are deferred already stay so.
    """
    v = vocabulary
    tokens = np.asarray(tokens)
    a = annotate(tokens, v)
    conductor_bars = int(((a.type == Family.BAR) & (a.track < 0)).sum())
    wanted: dict[int, list[int]] = {}
    num_tracks = int((a.type == Family.INSTRUMENT).sum())
    for track, bar in set(cells):
        if not (0 <= track < num_tracks and 0 <= bar < conductor_bars):
            raise ValueError(f"no cell (track {track}, bar {bar}) in {num_tracks} tracks of {conductor_bars} bars")
        wanted.setdefault(track, []).append(bar)
    if not wanted:
        return tokens.copy()

    fill_at = np.flatnonzero(a.type == Family.FILL)
    body_end = int(fill_at[0]) if len(fill_at) else len(tokens) - 1
    old_fills = iter(_split(tokens[: len(tokens) - 1], fill_at))
    track_starts = np.flatnonzero(a.type[:body_end] == Family.INSTRUMENT)
    out, fills = [tokens[: track_starts[0]]], []
    for track, piece in enumerate(_split(tokens[:body_end], track_starts)):
        bars = _split(piece, np.flatnonzero(piece == v.BAR))
        chosen = set(wanted.get(track, ()))
        first_bar = np.flatnonzero(piece == v.BAR)[0]
        out.append(piece[:first_bar])
        bars += [np.array([v.BAR], dtype=tokens.dtype)] * (max(chosen, default=-1) + 1 - len(bars))
        for bar, cell in enumerate(bars):
            if cell[-1] == v.MASK:
                fills.append(next(old_fills)[1:])
                out.append(cell)
            elif bar in chosen:
                head, notes = _head_and_notes(cell, v)
                fills.append(notes)
                out += [head, [v.MASK]]
            else:
                out.append(cell)
    for notes in fills:
        out += [[v.FILL], notes]
    return np.concatenate([*out, tokens[-1:]]).astype(tokens.dtype)


def undefer(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Put every fill back in the place of its MASK; a valid stream without MASK comes back as it is."""
    v = vocabulary
    tokens = np.asarray(tokens)
    fill_at = np.flatnonzero(tokens == v.FILL)
    if not len(fill_at):
        return tokens.copy()
    body = tokens[: fill_at[0]]
    fills = iter(_split(tokens[:-1], fill_at))
    track_starts = np.flatnonzero(v.family_of[body] == Family.INSTRUMENT)
    out = [body[: track_starts[0]]]
    for piece in _split(body, track_starts):
        bar_at = np.flatnonzero(piece == v.BAR)
        bars = []
        last = 0  # bars up to the last one with notes
        for cell in _split(piece, bar_at):
            head, notes = _head_and_notes(cell, v)
            if len(notes) and notes[0] == v.MASK:
                notes = next(fills)[1:]
            bars += [head, notes]
            if len(notes):
                last = len(bars)
        if last:
            out += [piece[: bar_at[0]], *bars[:last]]
    return np.concatenate([*out, tokens[-1:]]).astype(tokens.dtype)


def _split(tokens: np.ndarray, starts: np.ndarray) -> list[np.ndarray]:
    """Pieces of `tokens` that begin at the given positions; what stands before the first is left out."""
    return [tokens[a:b] for a, b in zip(starts, [*starts[1:], len(tokens)])]


def _head_and_notes(cell: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """A BAR with its controls, and what follows: notes, MASK or nothing."""
    is_content = (cell == vocabulary.MASK) | (vocabulary.family_of[cell] == Family.TIME)
    at = int(np.argmax(is_content)) if is_content.any() else len(cell)
    return cell[:at], cell[at:]
