"""MIDI files gone wrong: real ones with their bytes flipped, cut, and their lengths, times and headers falsified."""

from __future__ import annotations

import struct

import numpy as np


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three mishaps."""
    for _ in range(rng.integers(1, 4)):
        data = MISHAPS[rng.integers(len(MISHAPS))](bytearray(data), rng) if len(data) > 20 else data
    return bytes(data)


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
