"""MIDI files gone wrong: real ones with their bytes flipped, cut, and their lengths, times and headers falsified.

Most of such wrecks no reader accepts. So three of four mutants are gentle: their chunks stay whole, and what their
events say goes wrong, which reaches everything behind the reader.
"""

from __future__ import annotations

import struct

import numpy as np

from meloformer.midi.chunks import MAX_DELTA, events, header, track_chunk
from meloformer.midi.score import MidiError

GENTLE_SHARE = 0.75
_Events = list[tuple[int, bytes]]  # (delta time, event with its status byte) of one track


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three mishaps."""
    if rng.random() < GENTLE_SHARE:
        gentle = _mutate_events(data, rng)
        if gentle is not None:
            return gentle
    for _ in range(rng.integers(1, 4)):
        data = MISHAPS[rng.integers(len(MISHAPS))](bytearray(data), rng) if len(data) > 20 else data
    return bytes(data)


# --- gentle: in what the events say ---------------------------------------------------------------------------------


def _mutate_events(data: bytes, rng) -> bytes | None:
    """None where the file cannot be taken apart."""
    if data[:4] != b"MThd" or len(data) < 14:
        return None
    length, kind, _, division = struct.unpack(">IHHH", data[4:14])
    tracks, at = [], 8 + length
    while data[at : at + 4] == b"MTrk":
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "big")
        try:
            listed = list(events(data[at:end]))
        except MidiError:
            return None
        ticks = [0, *(tick for tick, _ in listed)]
        tracks.append([(after - before, event) for before, after, (_, event) in zip(ticks, ticks[1:], listed)])
        at = end
    if not tracks:
        return None
    for _ in range(rng.integers(1, 4)):
        number = int(rng.integers(len(tracks)))
        if tracks[number]:
            tracks[number] = GENTLE[rng.integers(len(GENTLE))](tracks[number], rng)
    if rng.random() < 0.1:
        tracks = [tracks[i] for i in rng.permutation(len(tracks))]
    if rng.random() < 0.1:
        kind = int(rng.choice([0, 1, 1, 2]))
    if rng.random() < 0.1:
        division = int(rng.choice([1, 3, 24, 25, 481, 32767, 0, 0xE728, 0xE250]))  # the last two are SMPTE
    chunks = [_written(track, rng.random() < 0.3) for track in tracks]
    return header(kind, len(chunks), division) + b"".join(chunks)


def _written(track: _Events, running: bool) -> bytes:
    """An MTrk chunk; running=True leaves out the status bytes that MIDI lets one leave out."""
    written, tick, status = [], 0, -1
    for delta, event in track:
        tick += delta
        leave_out = running and event[0] == status and len(event) > 1
        status = event[0] if event[0] < 0xF0 else -1
        written.append((tick, event[1:] if leave_out else event))
    return track_chunk(written)


def _some(track: _Events, rng) -> list[int]:
    return sorted(set(rng.integers(0, len(track), rng.choice([1, 5, 50])).tolist()))


def _other_data(track: _Events, rng) -> _Events:
    """Channel events with other pitches, velocities, programs, controllers; now and then with a byte above 127."""
    for i in _some(track, rng):
        delta, event = track[i]
        if event[0] < 0xF0:
            high = 256 if rng.random() < 0.01 else 128
            track[i] = delta, bytes((event[0], *rng.integers(0, high, len(event) - 1).tolist()))
    return track


def _other_status(track: _Events, rng) -> _Events:
    """Notes on other channels, ons that become offs."""
    for i in _some(track, rng):
        delta, event = track[i]
        if 0x80 <= event[0] < 0xC0:
            track[i] = delta, bytes((int(rng.integers(0x80, 0xC0)), *event[1:]))
    return track


def _other_deltas(track: _Events, rng) -> _Events:
    for i in _some(track, rng):
        choices = [
            0,
            1,
            min(track[i][0] * 2, MAX_DELTA),
            int(rng.integers(2000)),
            int(rng.integers(100_000)),
            MAX_DELTA,
        ]
        track[i] = choices[rng.choice(len(choices), p=[0.3, 0.2, 0.2, 0.25, 0.03, 0.02])], track[i][1]
    return track


def _dropped(track: _Events, rng) -> _Events:
    gone = set(_some(track, rng))
    return [event for i, event in enumerate(track) if i not in gone]


def _twice(track: _Events, rng) -> _Events:
    again = set(_some(track, rng))
    return [copy for i, event in enumerate(track) for copy in [event] * (2 if i in again else 1)]


def _elsewhere(track: _Events, rng) -> _Events:
    """A stretch of the track in another place: ons without offs, offs before ons, an end in the middle."""
    first, last, to = rng.integers(0, len(track) + 1, 3).tolist()
    moved, rest = track[min(first, last) : max(first, last)], track[: min(first, last)] + track[max(first, last) :]
    return rest[:to] + moved + rest[to:]


def _new_meta(track: _Events, rng) -> _Events:
    """Tempos, meters, keys and programs with any value where they do not belong."""
    for i in _some(track, rng)[::-1]:
        kind = int(rng.integers(5))
        numbers = rng.integers(0, 256, 4, dtype=np.uint8).tobytes()
        event = (
            b"\xff\x51\x03" + numbers[:3],
            b"\xff\x51\x03" + bytes(3),
            b"\xff\x58\x04" + bytes((numbers[0] % 20, numbers[1] % 9)) + numbers[2:],
            b"\xff\x59\x02" + numbers[:2],
            bytes((0xC0 | numbers[0] & 15, numbers[1] & 127)),
        )[kind]
        track.insert(i, (int(rng.choice([0, 0, 1, 100])), event))
    return track


GENTLE = (_other_data, _other_status, _other_deltas, _dropped, _twice, _elsewhere, _new_meta)


# --- not so gentle: in the bytes ------------------------------------------------------------------------------------


def _flip(data: bytearray, rng) -> bytearray:
    for at in rng.integers(0, len(data), rng.choice([1, 5, 50])):
        data[at] ^= 1 << rng.integers(8)
    return data


def _overwrite(data: bytearray, rng) -> bytearray:
    at, size = int(rng.integers(len(data))), int(rng.integers(1, 200))
    data[at : at + size] = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
    return data


def _cut(data: bytearray, rng) -> bytearray:
    first, last = sorted(rng.integers(0, len(data), 2).tolist())
    return data[:last] if rng.random() < 0.5 else data[:first] + data[last:]


def _repeat(data: bytearray, rng) -> bytearray:
    first, last = sorted(rng.integers(0, len(data), 2).tolist())
    return data[:last] + data[first:]


def _chunk_length(data: bytearray, rng) -> bytearray:
    starts = [i for i in range(len(data) - 8) if data[i : i + 4] == b"MTrk"]
    if starts:
        at = int(rng.choice(starts)) + 4
        lengths = [0, 1, 2**31 - 1, 2**32 - 1, int(rng.integers(2**16)), int.from_bytes(data[at : at + 4], "big") - 1]
        data[at : at + 4] = struct.pack(">I", max(lengths[rng.integers(len(lengths))], 0))
    return data


def _huge_delta(data: bytearray, rng) -> bytearray:
    at = int(rng.integers(22, len(data) + 1)) if len(data) > 22 else len(data)
    return data[:at] + bytes([0xFF, 0xFF, 0xFF, 0x7F]) * int(rng.integers(1, 4)) + data[at:]


def _header(data: bytearray, rng) -> bytearray:
    kind, tracks, division = struct.unpack(">HHH", data[8:14])
    which = rng.integers(3)
    kind = int(rng.integers(4)) if which == 0 else kind
    tracks = int(rng.choice([0, 1, 7, 65535])) if which == 1 else tracks
    division = int(rng.choice([0, 1, 3, 32767, 0xE728, 0xE250])) if which == 2 else division  # the last two are SMPTE
    data[8:14] = struct.pack(">HHH", kind, tracks, division)
    return data


def _meta(data: bytearray, rng) -> bytearray:
    """A tempo or a meter with any bytes, somewhere: as likely as not inside an event."""
    at = int(rng.integers(len(data)))
    size, kind = ((3, 0x51), (4, 0x58))[rng.integers(2)]
    return data[:at] + bytes([0, 0xFF, kind, size]) + rng.integers(0, 256, size, dtype=np.uint8).tobytes() + data[at:]


MISHAPS = (_flip, _overwrite, _cut, _repeat, _chunk_length, _huge_delta, _header, _meta)
