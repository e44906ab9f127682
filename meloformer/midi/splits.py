"""How many tracks of a Score a program change began, counted without following every event.

`num_split(data, parse, parsed)`: the (track of the file, channel, program) with notes beyond the first of each (track
of the file, channel). In: tidied data, symusic's parser, and what it made of them. Out: an int.

>>> data, parse = tidy("song.mid")[0], symusic.Score.from_midi        # doctest: +SKIP
>>> num_split(data, parse, parse(data))                              # doctest: +SKIP
2

symusic hands out tracks without their channels, and following the events in Python (as the second reader does, which
the tests hold this against) takes as long as all of reading and encoding. So the bytes are searched for what looks like
a program change behind the first note of its channel; most files have none that changes anything. Tracks that have one
are parsed by themselves, as they are and with their program changes made into channel pressure, which nobody reads: the
tracks that are gone then were split off.

The surprise: what looks like a program change may be part of a time or of a text, and turning it into something else
does no harm there. Only the length of a long text must not change: then the notes come out otherwise, and the events
are followed after all. Overlooked is a change that the same channel takes back at once under running status.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np

from meloformer.midi.pedal import sounding_parts

# 0xCn, program change, to 0xDn, channel pressure: one data byte each
AS_PRESSURE = bytes(byte + 0x10 if byte >> 4 == 0xC else byte for byte in range(256))


def num_split(data: bytes, parse: Callable, parsed) -> int:
    """See the module's docstring; `parsed` is what `parse` made of the data."""
    tracks = _with_changes(data)
    if not tracks:
        return 0
    head = data[:10] + struct.pack(">H", len(tracks)) + data[12:14]
    as_it_is = b"".join([head, *tracks])
    try:
        split = parsed if len(as_it_is) == len(data) else parse(as_it_is)
        whole = parse(b"".join([head, *(track[:8] + track[8:].translate(AS_PRESSURE) for track in tracks)]))
        if split.note_num() == whole.note_num():
            return _num_sounding(split) - _num_sounding(whole)
    except (RuntimeError, IndexError, MemoryError, OverflowError, UnicodeError):
        pass  # a length was changed
    parts = sounding_parts(as_it_is)
    return len(parts) - len({part[:2] for part in parts})


def _num_sounding(parsed) -> int:
    return sum(len(track.notes) > 0 for track in parsed.tracks)


def _with_changes(data: bytes) -> list[bytes]:
    """The MTrk chunks in which a program may change behind a note of its channel; few others are among them."""
    found: list[bytes] = []
    start, end = 0, 14  # of a chunk; before the first
    in_force: dict[int, int] = {}  # status byte -> program
    is_found = False
    for at in _look_like_changes(np.frombuffer(data, dtype=np.uint8)):
        while at >= end:
            start, end = end, end + 8 + int.from_bytes(data[end + 4 : end + 8], "big")
            in_force, is_found = {}, False
        status, program = data[at], data[at + 1]
        if is_found or in_force.get(status, 0) == program:
            continue
        in_force[status] = program
        if data.find(status - 0x30, start + 8, at) >= 0:  # 0x9n: a note-on of this channel, or what looks like one
            found.append(data[start:end])
            is_found = True
    return found


def _look_like_changes(data: np.ndarray) -> list[int]:
    """Where a byte 0xCn stands that a time and a status byte follow, as they do behind a program change.

    A time that begins with such a byte is followed by a status byte and its data, or by data alone.
    """
    at = np.flatnonzero(data[:-4] & 0xF0 == 0xC0)
    program, first, second, third = (data[at + i] < 0x80 for i in (1, 2, 3, 4))
    return at[program & ~(second & (first | third))].tolist()
