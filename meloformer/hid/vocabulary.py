"""The HID vocabulary: which integer means what. Pure tables, built from the grid resolution alone.

>>> vocabulary = Vocabulary()
>>> vocabulary.name(vocabulary.time(12)), vocabulary.name(vocabulary.meter(6, 8))
('T_12', 'METER_6/8')
>>> Family(vocabulary.family_of[vocabulary.pitch(60)]).name
'PITCH'

Ids are laid out family by family in the order of `Family`, so that a family is a range `start .. start + size`.
The last 64 ids are reserved: a trained model can learn new conditions without a new vocabulary. The saved file
holds the settings, a version and a hash over every name; shards and checkpoints carry the hash and refuse another.
"""

from __future__ import annotations

import hashlib
import json
from enum import IntEnum
from functools import cached_property
from pathlib import Path

import numpy as np

from meloformer.errors import UserError
from meloformer.files import write_atomic

VERSION = 1
DEFAULT_RESOLUTION = 24  # ticks per quarter note: 32nd notes and triplets of 16ths both fall on it
MAX_BAR_QUARTERS = 8
MAX_DURATION_QUARTERS = 32  # eight whole notes
NUM_VELOCITIES = 32
VELOCITY_BIN = 128 // NUM_VELOCITIES  # MIDI velocities that share a token
# What a token's velocity is played with: the middle of its bin
VELOCITIES = (np.arange(NUM_VELOCITIES) * VELOCITY_BIN + VELOCITY_BIN // 2).astype(np.uint8)
MIN_BPM, MAX_BPM = 20, 320
METER_DENOMINATORS = (2, 4, 8, 16)
NUM_RESERVED = 64

PITCH_NAMES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
CHORD_QUALITIES = ("maj", "min", "dim", "aug", "7", "maj7", "min7", "sus4")
ROLES = ("drums", "bass", "chords", "melody", "pad", "other")


class VocabularyError(UserError):
    """A vocabulary file that is damaged, of another version, or does not match what it is used with."""


class Family(IntEnum):
    """Token families in id order; also the `type` annotation of every token."""

    PAD = 0
    BOS = 1
    EOS = 2
    BAR = 3
    CONDUCTOR = 4
    MASK = 5
    FILL = 6
    INSTRUMENT = 7
    TIME = 8
    PITCH = 9
    DURATION = 10
    VELOCITY = 11
    TEMPO = 12
    METER = 13
    PIECE_BEGIN = 14
    PIECE_END = 15
    KEY = 16
    CHORD = 17
    TAG = 18
    ROLE = 19
    DENSITY = 20
    POLYPHONY = 21
    BAR_DENSITY = 22
    RESERVED = 23


# A cell is a bar of one instrument: what begins one, and what ends the one before.
OPENS_CELL = (Family.BAR, Family.FILL)
ENDS_CELL = (*OPENS_CELL, Family.INSTRUMENT, Family.EOS)


# Which controls may stand where. At each place they come in the order of `Family`, at most one of a family.
STREAM_CONTROLS = (
    Family.PIECE_BEGIN,
    Family.PIECE_END,
    Family.KEY,
    Family.TAG,
    Family.DENSITY,
    Family.POLYPHONY,
    Family.RESERVED,
)
TRACK_CONTROLS = (Family.TAG, Family.ROLE, Family.DENSITY, Family.POLYPHONY, Family.RESERVED)
BAR_CONTROLS = (Family.KEY, Family.POLYPHONY, Family.BAR_DENSITY, Family.RESERVED)


def duration_ticks(resolution: int) -> np.ndarray:
    """Representable durations in ticks, rising: every tick up to a half note, then seven to the octave.

    The seven are geometric between the half note, the dotted half and the whole, so that dotted and plain note
    values of any length are exact and the relative error of the rest stays below 6 %.

    >>> values = duration_ticks(24)
    >>> len(values), values[47:56].tolist(), int(values[-1])
    (76, [48, 53, 59, 65, 72, 79, 87, 96, 106], 768)
    """
    exact = np.arange(1, 2 * resolution + 1)
    base = 2 * resolution * 2.0 ** np.arange(int(np.log2(MAX_DURATION_QUARTERS / 2)))[:, None]
    lower = base * 1.5 ** (np.arange(1, 5) / 4)
    upper = 1.5 * base * (4 / 3) ** (np.arange(1, 4) / 3)
    geometric = np.floor(np.concatenate([lower, upper], axis=1).reshape(-1) + 0.5)
    return np.concatenate([exact, geometric]).astype(np.int64)


def meter_list() -> list[tuple[int, int]]:
    """Every n/d with d in METER_DENOMINATORS whose bar is at most 8 quarter notes: 60 of them."""
    return [(n, d) for d in METER_DENOMINATORS for n in range(1, MAX_BAR_QUARTERS * d // 4 + 1)]


class Vocabulary:
    """Token ids for one grid resolution (ticks per quarter note, a multiple of 4 so that a sixteenth is whole)."""

    def __init__(self, resolution: int = DEFAULT_RESOLUTION):
        if not isinstance(resolution, int) or resolution % 4 or not 4 <= resolution <= 96:
            raise VocabularyError(
                f"resolution is {resolution!r}: ticks per quarter note must be a multiple of 4 from 4 to 96"
            )
        self.resolution = resolution
        self.durations = duration_ticks(resolution)
        self.meters = meter_list()
        names = {
            Family.PAD: ["PAD"],
            Family.BOS: ["BOS"],
            Family.EOS: ["EOS"],
            Family.BAR: ["BAR"],
            Family.CONDUCTOR: ["CONDUCTOR"],
            Family.MASK: ["MASK"],
            Family.FILL: ["FILL"],
            Family.INSTRUMENT: [f"INSTRUMENT_{i}" for i in range(128)] + ["INSTRUMENT_DRUMS"],
            Family.TIME: [f"T_{i}" for i in range(MAX_BAR_QUARTERS * resolution)],
            Family.PITCH: [f"P_{i}" for i in range(128)],
            Family.DURATION: [f"L_{i}" for i in self.durations],
            Family.VELOCITY: [f"V_{i}" for i in range(NUM_VELOCITIES)],
            Family.TEMPO: [f"TEMPO_{i}" for i in range(MIN_BPM, MAX_BPM + 1)],
            Family.METER: [f"METER_{n}/{d}" for n, d in self.meters],
            Family.PIECE_BEGIN: ["PIECE_BEGIN"],
            Family.PIECE_END: ["PIECE_END"],
            Family.KEY: [f"KEY_{p}_{mode}" for mode in ("major", "minor") for p in PITCH_NAMES],
            Family.CHORD: [f"CHORD_{p}_{quality}" for p in PITCH_NAMES for quality in CHORD_QUALITIES] + ["CHORD_NONE"],
            Family.TAG: [f"TAG_{i}" for i in range(64)],
            Family.ROLE: [f"ROLE_{role}" for role in ROLES],
            Family.DENSITY: [f"DENSITY_{i}" for i in range(1, 11)],
            Family.POLYPHONY: [f"POLYPHONY_{i}" for i in range(1, 7)],
            Family.BAR_DENSITY: [f"BAR_DENSITY_{i}" for i in range(8)],
            Family.RESERVED: [f"RESERVED_{i}" for i in range(NUM_RESERVED)],
        }
        self.names = [name for family in Family for name in names[family]]
        sizes = np.array([len(names[family]) for family in Family])
        self.size = int(sizes.sum())
        self._start = np.concatenate(([0], np.cumsum(sizes)[:-1]))
        self._family_size = sizes
        self.family_of = np.repeat(np.arange(len(Family)), sizes).astype(np.int8)  # (size,) Family of each id
        self.value_of = np.arange(self.size) - self._start[self.family_of]  # (size,) index inside the family
        # (size,) bar length in ticks of a METER id, 0 elsewhere
        self.bar_ticks_of = np.zeros(self.size, dtype=np.int64)
        meters = np.array(self.meters)
        self.bar_ticks_of[self.ids(Family.METER)] = meters[:, 0] * 4 * resolution // meters[:, 1]
        self._meter_index = {meter: i for i, meter in enumerate(self.meters)}
        self.PAD, self.BOS, self.EOS = self.start(Family.PAD), self.start(Family.BOS), self.start(Family.EOS)
        self.BAR, self.CONDUCTOR = self.start(Family.BAR), self.start(Family.CONDUCTOR)
        self.MASK, self.FILL = self.start(Family.MASK), self.start(Family.FILL)
        self.PIECE_BEGIN, self.PIECE_END = self.start(Family.PIECE_BEGIN), self.start(Family.PIECE_END)

    # --- families as ranges ---------------------------------------------------------------------------------

    def start(self, family: Family) -> int:
        """First id of a family."""
        return int(self._start[family])

    def family_size(self, family: Family) -> int:
        """Number of ids of a family."""
        return int(self._family_size[family])

    def ids(self, family: Family) -> slice:
        """The family's ids as a slice of 0 .. size."""
        return slice(self.start(family), self.start(family) + self.family_size(family))

    def token(self, family: Family, value: int) -> int:
        """Id of the `value`-th token of a family; ValueError outside it."""
        if not 0 <= value < self.family_size(family):
            raise ValueError(f"{family.name} has values 0..{self.family_size(family) - 1}, got {value}")
        return self.start(family) + int(value)

    def name(self, token: int) -> str:
        return self.names[token]

    # --- one line each for what the encoder and the tests write --------------------------------------------

    def instrument(self, instrument: int) -> int:
        return self.token(Family.INSTRUMENT, instrument)

    def time(self, ticks: int) -> int:
        return self.token(Family.TIME, ticks)

    def pitch(self, pitch: int) -> int:
        return self.token(Family.PITCH, pitch)

    def duration(self, ticks: int) -> int:
        """Id of the representable duration nearest to `ticks`."""
        return self.token(Family.DURATION, int(self.duration_index(np.array([ticks]))[0]))

    def velocity(self, velocity: int) -> int:
        """Id of the bin of a MIDI velocity 1..127."""
        return self.token(Family.VELOCITY, velocity // VELOCITY_BIN)

    def tempo(self, bpm: int) -> int:
        return self.token(Family.TEMPO, bpm - MIN_BPM)

    def meter(self, numerator: int, denominator: int) -> int:
        """Id of a meter; ValueError where the table does not hold it."""
        index = self._meter_index.get((numerator, denominator))
        if index is None:
            raise ValueError(
                f"no meter {numerator}/{denominator}: the bar must be at most 8 quarters, over 2, 4, 8, 16"
            )
        return self.token(Family.METER, index)

    def has_meter(self, numerator: int, denominator: int) -> bool:
        return (numerator, denominator) in self._meter_index

    def duration_index(self, ticks: np.ndarray) -> np.ndarray:
        """Index of the nearest representable duration, the longer one where two are equally near."""
        return self._nearest_duration[np.clip(ticks, 0, len(self._nearest_duration) - 1)]

    @cached_property
    def _nearest_duration(self) -> np.ndarray:
        ticks = np.arange(self.durations[-1] + 1)
        above = np.searchsorted(self.durations, ticks)
        below = np.maximum(above - 1, 0)
        return np.where(self.durations[above] - ticks <= ticks - self.durations[below], above, below)

    # --- file ----------------------------------------------------------------------------------------------

    @cached_property
    def hash(self) -> str:
        """16 hex digits over version, resolution and every token name in order."""
        text = json.dumps([VERSION, self.resolution, self.names])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict:
        return {"version": VERSION, "resolution": self.resolution, "size": self.size, "hash": self.hash}

    @classmethod
    def from_dict(cls, data: dict, where: str = "vocabulary") -> Vocabulary:
        """The vocabulary that `to_dict` described; VocabularyError if this code would build another one."""
        if not isinstance(data, dict) or "resolution" not in data or "hash" not in data:
            raise VocabularyError(f"{where}: not a vocabulary (keys version, resolution, hash expected)")
        if data.get("version") != VERSION:
            raise VocabularyError(f"{where}: vocabulary version {data.get('version')!r}, this code reads {VERSION}")
        vocabulary = cls(data["resolution"])
        if vocabulary.hash != data["hash"]:
            raise VocabularyError(
                f"{where}: vocabulary hash {data['hash']} is not this code's {vocabulary.hash}: "
                "it was made by another vocabulary; preprocess the MIDI files again"
            )
        return vocabulary

    def save(self, path: str | Path) -> None:
        """One JSON file: settings, version, hash and, for human readers, every token's name in id order."""
        text = json.dumps({**self.to_dict(), "tokens": self.names}, indent=1)
        write_atomic(path, text.encode())

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise VocabularyError(f"{path}: no such file") from None
        except ValueError as error:
            raise VocabularyError(f"{path}: not JSON ({error})") from None
        return cls.from_dict(data, str(path))

    def __eq__(self, other) -> bool:
        return isinstance(other, Vocabulary) and self.hash == other.hash

    __hash__ = None
