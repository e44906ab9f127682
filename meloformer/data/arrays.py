"""Safetensors files that are written as a stream and read through a memory map, the same bytes for the same content.

>>> writer = ArrayWriter("example.safetensors", {"a": np.dtype(np.uint16), "b": np.dtype(np.int64)})
>>> for values in ([1, 2], [3]):
...     writer.append("a", values)
>>> sha256, size = writer.close({"format": FORMAT_VERSION, "title": "three numbers"})
>>> mapped = MappedArrays("example.safetensors", "make it again")
>>> mapped.arrays["a"].tolist(), mapped.metadata["title"]
([1, 2, 3], 'three numbers')

A column grows in a file of its own until `close` copies all of them behind one header, so nothing is held in memory.
The surprise: the safetensors library writes its metadata in a random order, one process to the next, so everything
that these files have to say stands in one metadata entry, as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from queue import Queue
from threading import Thread

import numpy as np

from meloformer.errors import UserError
from meloformer.files import atomic_file

FORMAT_VERSION = 3
METADATA_KEY = "meloformer"
_NUMPY = {"U8": "<u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I32": "<i4", "I64": "<i8", "F64": "<f8"}
_SAFETENSORS = {np.dtype(numpy): name for name, numpy in _NUMPY.items()}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_BUFFER = 1 << 16  # bytes of a column that wait in memory,
_SINGLE = 1 << 10  # and numbers that came one by one


class DataError(UserError):
    """A file of a corpus that is damaged, incomplete, or made by another vocabulary or format."""


class ArrayWriter:
    """One safetensors file of one-dimensional arrays, by name; whole or absent."""

    def __init__(self, path: str | Path, dtypes: dict[str, np.dtype]):
        self.path = Path(path)
        self.dtypes = dtypes
        self._lengths = dict.fromkeys(dtypes, 0)
        self._single: dict[str, list] = {name: [] for name in dtypes}
        self._files = {}
        for name in dtypes:
            aside = self.path.with_name(f".{self.path.name}.{name}.tmp")
            self._files[name] = open(aside, "w+b", buffering=_BUFFER)  # noqa: SIM115 closed in close and discard

    def append(self, name: str, values: Iterable) -> None:
        if self._single[name]:
            self._write_single(name)
        values = np.ascontiguousarray(values, dtype=self.dtypes[name])
        self._files[name].write(values.data)
        self._lengths[name] += len(values)

    def append_one(self, name: str, value: float) -> None:
        """One number, a fifth of the time of an array of one."""
        self._single[name].append(value)
        self._lengths[name] += 1
        if len(self._single[name]) == _SINGLE:
            self._write_single(name)

    def _write_single(self, name: str) -> None:
        self._files[name].write(np.array(self._single[name], dtype=self.dtypes[name]).data)
        self._single[name].clear()

    def length(self, name: str) -> int:
        return self._lengths[name]

    def close(self, metadata: dict) -> tuple[str, int]:
        """Write the file under its name; returns its sha256 and its size."""
        for name in self.dtypes:
            self._write_single(name)
        # Wide elements first, so that every array is aligned.
        names = sorted(self.dtypes, key=lambda name: -self.dtypes[name].itemsize)
        header: dict = {"__metadata__": {METADATA_KEY: _compact(metadata)}}
        at = 0
        for name in names:
            size = self._lengths[name] * self.dtypes[name].itemsize
            dtype = _SAFETENSORS[self.dtypes[name]]
            header[name] = {"dtype": dtype, "shape": [self._lengths[name]], "data_offsets": [at, at + size]}
            at += size
        text = _compact(header).encode()
        text += b" " * (-len(text) % 8)
        try:
            with atomic_file(self.path) as file, _Hashing(file) as hashed:
                hashed.write(len(text).to_bytes(8, "little") + text)
                for name in names:
                    self._files[name].seek(0)
                    shutil.copyfileobj(self._files[name], hashed, 1 << 18)
        finally:
            self.discard()
        return hashed.digest.hexdigest(), 8 + len(text) + at

    def values(self, name: str) -> np.ndarray:
        """What was appended to a column so far; a copy."""
        self._write_single(name)
        self._files[name].seek(0)  # what waits in memory is written first
        values = np.fromfile(self._files[name], self.dtypes[name], self._lengths[name])
        self._files[name].seek(0, os.SEEK_END)
        return values

    def discard(self) -> None:
        """Forget what was appended."""
        for file in self._files.values():
            Path(file.name).unlink(missing_ok=True)
            file.close()
        self._files = {}


class _Hashing:
    """Writes to a file; `digest`, complete when the block is left, is worked out by a thread meanwhile.

    Hashing takes as long as writing, both let go of the interpreter, and at the end of a corpus no worker wants the
    second core.
    """

    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()
        self._chunks: Queue[bytes] = Queue(maxsize=8)
        self._thread = Thread(target=self._hash, daemon=True)

    def _hash(self) -> None:
        while chunk := self._chunks.get():
            self.digest.update(chunk)

    def write(self, data: bytes) -> None:
        self._chunks.put(data)
        self.file.write(data)

    def __enter__(self) -> _Hashing:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._chunks.put(b"")
        self._thread.join()


def _compact(value: dict) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class MappedArrays:
    """A safetensors file as read-only arrays over a memory map: nothing is read until it is looked at.

    `arrays` by name, `metadata` as it was given to `ArrayWriter.close`. DataError where the file is not whole.
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
        values = data[base + first : base + last].view(np.dtype(_NUMPY[entry["dtype"]]))
        return values.reshape(entry["shape"])  # ValueError where the file was cut short

    def damaged(self, what: str, remedy: str = "") -> DataError:
        return DataError(f"{self.path}: {what}; {remedy or self.remedy}")
