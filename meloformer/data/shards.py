"""The files of a preprocessed corpus: deterministic safetensors, read through memory maps.

A shard holds the token streams of many pieces end to end, with their segment tables (a segment is a bar of one
track that has notes):

    tokens uint16 (T,)                  piece_offsets int64 (P + 1,)           into tokens
    segment_offset uint32 (S,)          segment_offsets int64 (P + 1,)         into the segment table
    segment_bar uint16 (S,)             segment_track uint16 (S,)              segment_instrument uint8 (S,)

segment_offset is the position of the segment's BAR inside its piece. The header carries the format version, the
vocabulary's hash and the pieces' names.

>>> path = "/tmp/shard-00000.safetensors"
>>> sha256 = write_shard(path, [Piece("a.mid", np.array([1, 2]), *EMPTY_SEGMENTS)], "0123456789abcdef")
>>> shard = Shard(path, "0123456789abcdef")
>>> shard.tokens(0).tolist(), shard.names, shard.num_segments
([1, 2], ['a.mid'], 0)

The surprise: safetensors writes its metadata in a random order, one process to the next, so everything this
format has to say stands in one metadata entry, as JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy

from meloformer.errors import UserError
from meloformer.files import write_atomic

FORMAT_VERSION = 1
METADATA_KEY = "meloformer"
SHARD_DTYPES = {
    "tokens": np.dtype(np.uint16),
    "piece_offsets": np.dtype(np.int64),
    "segment_offsets": np.dtype(np.int64),
    "segment_offset": np.dtype(np.uint32),
    "segment_bar": np.dtype(np.uint16),
    "segment_track": np.dtype(np.uint16),
    "segment_instrument": np.dtype(np.uint8),
}
MAX_BARS = MAX_TRACKS = 1 << 16  # what the columns of the segment table hold
_SAFETENSORS_DTYPES = {
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
    "I32": np.int32,
    "I64": np.int64,
}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


class DataError(UserError):
    """A file of a corpus that is damaged, incomplete, or made by another vocabulary or format."""


class Piece(NamedTuple):
    """What a shard stores of one piece; the last four are its segment table, (segments,) each."""

    name: str
    tokens: np.ndarray
    segment_offset: np.ndarray
    segment_bar: np.ndarray
    segment_track: np.ndarray
    segment_instrument: np.ndarray


class SegmentTable(NamedTuple):
    """A piece's segments: position of the BAR, bar, track, instrument; (segments,) each."""

    offset: np.ndarray
    bar: np.ndarray
    track: np.ndarray
    instrument: np.ndarray


EMPTY_SEGMENTS = (np.zeros(0, dtype=np.int64),) * 4


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def checksum(path: str | Path) -> str:
    """sha256 of a file, hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def content_hash(tokens: np.ndarray) -> int:
    """64 bits over a token stream; names a piece, and finds damage when it is read.

    >>> content_hash(np.array([1, 2])) == content_hash(np.array([1, 2], dtype=np.uint16)) != content_hash([2, 1])
    True
    """
    data = np.ascontiguousarray(tokens, dtype="<u2").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def write_arrays(path: str | Path, arrays: dict[str, np.ndarray], metadata: dict) -> str:
    """One safetensors file, whole or absent, the same bytes for the same content; returns its sha256."""
    text = json.dumps(metadata, ensure_ascii=False, separators=(",", ":"))
    data = safetensors.numpy.save(arrays, metadata={METADATA_KEY: text})
    write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()


class MappedArrays:
    """A safetensors file as read-only arrays over a memory map: nothing is read until it is looked at.

    `arrays` by name, `metadata` as it was given to `write_arrays`. DataError where the file is not whole.
    """

    def __init__(self, path: str | Path, remedy: str):
        self.path = Path(path)
        self.remedy = remedy
        try:
            data = np.memmap(self.path, dtype=np.uint8, mode="r")
        except FileNotFoundError:
            raise self.damaged("is missing") from None
        except (OSError, ValueError) as error:
            raise self.damaged(f"cannot be mapped ({error})") from None
        size = int.from_bytes(data[:8].tobytes(), "little") if len(data) >= 8 else _MAX_HEADER
        if size >= min(_MAX_HEADER, len(data)):
            raise self.damaged("has no safetensors header")
        try:
            header = json.loads(data[8 : 8 + size].tobytes())
            self.metadata = json.loads(header.pop("__metadata__")[METADATA_KEY])
            self.arrays = {name: self._array(data, 8 + size, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self.damaged(f"has a header that cannot be read ({error})") from None
        if self.metadata.get("format") != FORMAT_VERSION:
            raise self.damaged(
                f"has format {self.metadata.get('format')!r}, this code reads {FORMAT_VERSION}",
                "preprocess the MIDI files again",
            )

    @staticmethod
    def _array(data: np.ndarray, base: int, entry: dict) -> np.ndarray:
        first, last = entry["data_offsets"]
        values = data[base + first : base + last].view(_SAFETENSORS_DTYPES[entry["dtype"]])
        return values.reshape(entry["shape"])  # ValueError where the file was cut short

    def damaged(self, what: str, remedy: str = "") -> DataError:
        return DataError(f"{self.path}: {what}; {remedy or self.remedy}")


REMEDY = "copy it again from where it is whole, or remove the folder and preprocess the MIDI files again"


def write_shard(path: str | Path, pieces: Sequence[Piece], vocabulary_hash: str) -> str:
    """Write one shard; returns its sha256."""

    def join(name: str) -> np.ndarray:
        dtype = SHARD_DTYPES[name]
        return np.concatenate([np.zeros(0, dtype), *(getattr(p, name).astype(dtype, copy=False) for p in pieces)])

    def offsets(name: str) -> np.ndarray:
        return np.concatenate(([0], np.cumsum([len(getattr(p, name)) for p in pieces], dtype=np.int64)))

    columns = ("tokens", "segment_offset", "segment_bar", "segment_track", "segment_instrument")
    arrays = {name: join(name) for name in columns}
    arrays["piece_offsets"] = offsets("tokens").astype(np.int64)
    arrays["segment_offsets"] = offsets("segment_offset").astype(np.int64)
    metadata = {"format": FORMAT_VERSION, "vocabulary": vocabulary_hash, "names": [p.name for p in pieces]}
    return write_arrays(path, arrays, metadata)


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
