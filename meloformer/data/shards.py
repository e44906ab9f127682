"""The files of a preprocessed corpus: deterministic safetensors, read through memory maps.

A shard holds the token streams of many pieces end to end, with their segment tables (a segment is a bar of one
track that has notes) and what the token grid changed in each:

    tokens uint16 (T,)                  piece_offsets int64 (P + 1,)           into tokens
    segment_offset uint32 (S,)          segment_offsets int64 (P + 1,)         into the segment table
    segment_bar uint16 (S,)             segment_track uint16 (S,)              segment_instrument uint8 (S,)
    change_rule uint8 (C,)              change_count uint32 (C,)               change_offsets int64 (P + 1,)
    condition_token uint16 (K,)         condition_track uint16 (K,)            condition_offsets int64 (P + 1,)
    condition_bar uint16 (K,)           condition_onset uint16 (K,)            each plus one, 0 for none

segment_offset is the position of the segment's BAR inside its piece. The conditions of a piece (hid.conditions) are
rows of controls beside its stream and not tokens in it: so the stream, its hash, its length and its segments do not
depend on what is derived and how; a row of a batch has room for those conditions alone that it holds; and a window
restates what is in force without a search. They take 8 bytes each, a twentieth of a shard. The header carries the
format version, the vocabulary's hash, the pieces' names, and the names of the rules (see hid.quantize and midi.read).

>>> path = "shard-00000.safetensors"
>>> piece = Piece("a.mid", np.array([1, 2]), *EMPTY_SEGMENTS, {"overlaps": 3})
>>> sha256, size = write_shard(path, [piece], "0123456789abcdef")
>>> shard = Shard(path, "0123456789abcdef")
>>> shard.tokens(0).tolist(), shard.names, shard.num_segments, shard.changes(0)
([1, 2], ['a.mid'], 0, {'overlaps': 3})

The surprise: a shard of any size is written in the same memory, for `ShardWriter` keeps only the pieces' names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from meloformer.data.arrays import FORMAT_VERSION, ArrayWriter, MappedArrays
from meloformer.hid.controls import BAR, ONSET, TOKEN, TRACK

SHARD_DTYPES = {
    "tokens": np.dtype(np.uint16),
    "piece_offsets": np.dtype(np.int64),
    "segment_offsets": np.dtype(np.int64),
    "segment_offset": np.dtype(np.uint32),
    "segment_bar": np.dtype(np.uint16),
    "segment_track": np.dtype(np.uint16),
    "segment_instrument": np.dtype(np.uint8),
    "change_offsets": np.dtype(np.int64),
    "change_rule": np.dtype(np.uint8),
    "change_count": np.dtype(np.uint32),
    "condition_offsets": np.dtype(np.int64),
    "condition_token": np.dtype(np.uint16),
    "condition_track": np.dtype(np.uint16),
    "condition_bar": np.dtype(np.uint16),
    "condition_onset": np.dtype(np.uint16),
}
MAX_BARS = MAX_TRACKS = (1 << 16) - 1  # what the columns of the tables hold
NO_CONDITIONS = np.zeros((0, 4), dtype=np.int64)
REMEDY = "copy it again from where it is whole, or remove the folder and preprocess the MIDI files again"


class Piece(NamedTuple):
    """What a shard stores of one piece; four columns are its segment table, (segments,) each."""

    name: str
    tokens: np.ndarray
    segment_offset: np.ndarray
    segment_bar: np.ndarray
    segment_track: np.ndarray
    segment_instrument: np.ndarray
    changes: Mapping[str, int] = {}  # how often which rule changed or dropped something
    conditions: np.ndarray = NO_CONDITIONS  # (n, 4) rows of controls, sorted; see hid.controls


class SegmentTable(NamedTuple):
    """A piece's segments: position of the BAR, bar, track, instrument; (segments,) each."""

    offset: np.ndarray
    bar: np.ndarray
    track: np.ndarray
    instrument: np.ndarray


EMPTY_SEGMENTS = (np.zeros(0, dtype=np.int64),) * 4


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def content_hash(tokens: np.ndarray) -> int:
    """64 bits over a token stream; names a piece, and finds damage when it is read.

    >>> content_hash(np.array([1, 2])) == content_hash(np.array([1, 2], dtype=np.uint16)) != content_hash([2, 1])
    True
    """
    data = np.ascontiguousarray(tokens, dtype="<u2").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class ShardWriter:
    """Takes pieces one by one; `close` puts the shard in its place, `discard` leaves nothing."""

    def __init__(self, path: str | Path, vocabulary_hash: str):
        self._arrays = ArrayWriter(path, SHARD_DTYPES)
        self._vocabulary_hash = vocabulary_hash
        self._names: list[str] = []
        self._rules: dict[str, int] = {}
        self._append_ends()

    def _append_ends(self) -> None:
        for offsets, column in (
            ("piece_offsets", "tokens"),
            ("segment_offsets", "segment_bar"),
            ("change_offsets", "change_rule"),
            ("condition_offsets", "condition_token"),
        ):
            self._arrays.append_one(offsets, self._arrays.length(column))

    def add(self, piece: Piece) -> None:
        for name in ("tokens", "segment_offset", "segment_bar", "segment_track", "segment_instrument"):
            self._arrays.append(name, getattr(piece, name))
        for rule in sorted(piece.changes):
            self._arrays.append_one("change_rule", self._rules.setdefault(rule, len(self._rules)))
            self._arrays.append_one("change_count", piece.changes[rule])
        for name, column in (("track", TRACK), ("bar", BAR), ("onset", ONSET)):
            self._arrays.append(f"condition_{name}", piece.conditions[:, column] + 1)
        self._arrays.append("condition_token", piece.conditions[:, TOKEN])
        self._append_ends()
        self._names.append(piece.name)

    @property
    def num_tokens(self) -> int:
        return self._arrays.length("tokens")

    def close(self) -> tuple[str, int]:
        """The shard's sha256 and size in bytes."""
        metadata = {"format": FORMAT_VERSION, "vocabulary": self._vocabulary_hash}
        return self._arrays.close({**metadata, "rules": list(self._rules), "names": self._names})

    def discard(self) -> None:
        self._arrays.discard()


def write_shard(path: str | Path, pieces: Sequence[Piece], vocabulary_hash: str) -> tuple[str, int]:
    """Write one shard; returns its sha256 and its size in bytes."""
    writer = ShardWriter(path, vocabulary_hash)
    for piece in pieces:
        writer.add(piece)
    return writer.close()


class Shard:
    """One shard, memory-mapped. DataError if it is damaged or holds the ids of another vocabulary."""

    def __init__(self, path: str | Path, vocabulary_hash: str):
        self._file = MappedArrays(path, REMEDY)
        self.path = self._file.path
        self._arrays = self._file.arrays
        found = self._file.metadata.get("vocabulary")
        if found != vocabulary_hash:
            raise self._file.damaged(
                f"was made with vocabulary {found}, this corpus has {vocabulary_hash}",
                "keep corpora in separate folders, or preprocess the MIDI files again",
            )
        wrong = [name for name, dtype in SHARD_DTYPES.items() if self._dtype(name) != dtype]
        if wrong:
            raise self._file.damaged(f"has no proper {wrong[0]}")
        self.names: list[str] = self._file.metadata["names"]
        self._rules: list[str] = self._file.metadata["rules"]

    def _dtype(self, name: str):
        return self._arrays[name].dtype if name in self._arrays else None

    @property
    def num_pieces(self) -> int:
        return len(self._arrays["piece_offsets"]) - 1

    @property
    def num_tokens(self) -> int:
        return len(self._arrays["tokens"])

    @property
    def num_segments(self) -> int:
        return len(self._arrays["segment_bar"])

    def tokens(self, piece: int) -> np.ndarray:
        """(T,) uint16 view of one piece's stream; read-only."""
        first, last = self._arrays["piece_offsets"][piece : piece + 2]
        return self._arrays["tokens"][first:last]

    def segments(self, piece: int) -> SegmentTable:
        first, last = self._arrays["segment_offsets"][piece : piece + 2]
        return SegmentTable(*(self._arrays[f"segment_{name}"][first:last] for name in SegmentTable._fields))

    def changes(self, piece: int) -> dict[str, int]:
        """What the token grid changed or could not hold in one piece, by the rule's name."""
        first, last = self._arrays["change_offsets"][piece : piece + 2]
        rules, counts = self._arrays["change_rule"][first:last], self._arrays["change_count"][first:last]
        return {self._rules[rule]: count for rule, count in zip(rules.tolist(), counts.tolist())}

    def conditions(self, piece: int) -> np.ndarray:
        """(n, 4) int64 rows of one piece's conditions (hid.controls), sorted; a copy."""
        first, last = self._arrays["condition_offsets"][piece : piece + 2]
        rows = np.empty((last - first, 4), dtype=np.int64)
        for name, column in (("track", TRACK), ("bar", BAR), ("onset", ONSET)):
            rows[:, column] = self._arrays[f"condition_{name}"][first:last].astype(np.int64) - 1
        rows[:, TOKEN] = self._arrays["condition_token"][first:last]
        return rows
