"""Randomness from counters: a draw is a function of what it is for, never of what was drawn before.

>>> uniform(0, 3, "deferral", np.array([7, 8])).shape
(2,)
>>> [int(generator(0, 3, "augment", 7).integers(1000)) for _ in range(2)]          # the same counters, the same draw
[829, 829]

The surprise: this is why resuming needs no generator state, and why the order in which rows are made is nobody's
business. `purpose` keeps two uses of one (seed, epoch, index) apart.
"""

from __future__ import annotations

import zlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, a bijection whose bits look random (splitmix64's finalizer)."""
    x = np.asarray(values, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = x + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(seed: int, epoch: int, purpose: str, *indices: np.ndarray | int) -> np.ndarray:
    """uint64 of the broadcast shape of `indices`: each tuple of counters has its own."""
    state = mix(np.uint64(seed % (1 << 64)))
    for counter in (epoch, zlib.crc32(purpose.encode()), *indices):
        state = mix(state ^ mix(np.asarray(counter).astype(np.uint64)))
    return state


def uniform(seed: int, epoch: int, purpose: str, *indices: np.ndarray | int) -> np.ndarray:
    """float64 in [0, 1), 53 bits, of the broadcast shape of `indices`."""
    return (key(seed, epoch, purpose, *indices) >> np.uint64(11)) * 2.0**-53


def generator(seed: int, epoch: int, purpose: str, *indices: int) -> np.random.Generator:
    """A numpy generator of its own for one tuple of counters."""
    return np.random.Generator(np.random.Philox(key=int(key(seed, epoch, purpose, *indices))))
