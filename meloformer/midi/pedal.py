"""The sustain pedal, played out: a note that is let go while the pedal is down sounds until the pedal is lifted.

>>> score = extend_sustained(score, data)        # doctest: +SKIP
>>> score.counts["sustained"]                    # doctest: +SKIP
812

In: a raw Score and the tidied bytes it was read from (`midi.chunks`). Out: the Score with longer notes, how many is
counted as `sustained`; drums are left alone. A pedal that is never lifted holds to the end of the last note. Where the
same pitch is struck again meanwhile, the notes overlap here, and `hid.quantize` ends the earlier one there.

The surprise: a pedal belongs to a channel, and pianists' files often have it in another track than the notes. So
the channel of every track of the Score is found again in the bytes: the k-th of its tracks is the k-th of the sorted
(track of the file, channel, program) that have notes.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import replace

import numpy as np

from meloformer.midi.chunks import track_chunks, walk
from meloformer.midi.score import Score, note_table

SUSTAIN, HALF = 64, 64  # controller number; the pedal is down from this value on


def extend_sustained(score: Score, data: bytes) -> Score:
    """See the module's docstring; where its tracks are not found again (damaged files) `pedal_lost`."""
    parts, presses = _walk(data)
    if not presses:
        return score
    if [-1 if channel == 9 else program for _, channel, program in parts] != [
        -1 if track.is_drum else track.program for track in score.tracks
    ]:
        return replace(score, counts=score.counts + Counter(pedal_lost=1))
    notes = score.notes.copy()
    end = notes["onset"] + notes["duration"]
    last = int(end.max(initial=0))
    lifted = end.copy()
    channel_of = np.array([channel for _, channel, _ in parts])[notes["track"]]
    for channel, (down, up) in _spans(presses, last).items():
        if channel == 9:
            continue
        i = np.searchsorted(down, end, side="right") - 1
        held = (channel_of == channel) & (i >= 0) & (end < up[i])
        lifted[held] = up[i[held]]
    counts = score.counts.copy()
    counts["sustained"] += int(np.count_nonzero(lifted > end))
    notes["duration"] += lifted - end
    return replace(score, notes=note_table(notes), counts=+counts)


def sounding_parts(data: bytes) -> list[tuple[int, int, int]]:
    """Sorted (track of the file, channel, program) with a whole note, of tidied data."""
    return _walk(data)[0]


def _walk(data: bytes) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, bool]]]:
    """Sorted (track of the file, channel, program) with a whole note; (tick, channel, down) of every pedal event."""
    parts, presses = set(), []
    for number, track in enumerate(track_chunks(data)):
        program = [0] * 16
        sounding = defaultdict(deque)
        for tick, status, at, _ in walk(track):
            kind, channel = status >> 4, status & 15
            if kind == 0x9 and track[at + 1]:
                sounding[channel, track[at]].append(program[channel])
            elif kind in (0x8, 0x9):
                if sounding[channel, track[at]]:
                    parts.add((number, channel, sounding[channel, track[at]].popleft()))
            elif kind == 0xC:
                program[channel] = track[at]
            elif kind == 0xB and track[at] == SUSTAIN:  # a damaged file may state times beyond 64 bits
                presses.append((min(tick, 1 << 40), channel, track[at + 1] >= HALF))
    presses.sort(key=lambda press: press[0])  # stable: what stands first in the file comes first
    return sorted(parts), presses


def _spans(presses: list[tuple[int, int, bool]], last: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """For each channel the ticks where its pedal goes down, and where it comes up."""
    spans: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for tick, channel, is_down in presses:
        down, up = spans[channel]
        if is_down and len(down) == len(up):
            down.append(tick)
        elif not is_down and len(down) > len(up):
            up.append(tick)
    return {
        channel: (np.array(down), np.array([*up, last][: len(down)])) for channel, (down, up) in spans.items() if down
    }
