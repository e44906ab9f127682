"""Which files a preprocessing run reads, and what they are called in the corpus.

>>> [source.name for source in Input("midi")][:2]     # doctest: +SKIP
['a/Song.MID', 'b.mid']

A folder is searched through in the order of the relative paths; a text file has one path a line, relative to the
current folder, as `find midi/ -name "*.mid"` prints them, and keeps its order. Nothing is held in memory but one
folder's names at a time: every walk over an `Input` reads the folder, or the list, again. The surprise: a name is
stored as text, and file names are bytes: those that are no UTF-8 are written as \\xNN.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from meloformer.errors import UserError

SUFFIXES = (".mid", ".midi")


class Source(NamedTuple):
    """A file to read, and the name it goes by in the corpus."""

    path: str
    name: str


class Input:
    """The files that `--input`, `--limit` and `--part` name, in order; UserError if there are none.

    `files` is their number, `hash` 16 hex digits over the names and sizes: what tells this input from another. Both
    speak of the whole input, whatever the part; `first` and `last` are the part's share of it.
    """

    def __init__(self, given: str, limit: int | None = None, part: tuple[int, int] = (1, 1)):
        self.given = given
        self._limit = limit
        if not Path(given).is_dir():
            self._check_list(Path(given))
        digest = hashlib.sha256()
        self.files = 0
        for source in self._all():
            digest.update(f"{source.name}\0{_size(source.path)}\n".encode())
            self.files += 1
        self.hash = digest.hexdigest()[:16]
        if not self.files and Path(given).is_dir():
            raise UserError(f"{given}: no .mid or .midi file in this folder or below it; give a folder that has some")
        if not self.files:
            raise UserError(f"{given}: the list is empty; it should have one path a line, as find prints them")
        i, n = part
        if n > self.files:
            raise UserError(f"{given}: {self.files} files cannot be cut into {n} parts; give fewer")
        self.first, self.last = self.files * (i - 1) // n, self.files * i // n

    def __iter__(self) -> Iterator[Source]:
        return self.after(self.first)

    def after(self, number: int) -> Iterator[Source]:
        """This part's files from that number of the whole input on."""
        return islice(self._all(), number, self.last)

    def describe(self) -> dict:
        return {"files": self.files, "hash": self.hash}

    def _all(self) -> Iterator[Source]:
        return islice(_walk(self.given) if Path(self.given).is_dir() else _lines(self.given), self._limit)

    @staticmethod
    def _check_list(path: Path) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such file or folder; --input takes a folder of MIDI files or a list of paths")
        if path.suffix.lower() in SUFFIXES:
            raise UserError(f"{path}: is one MIDI file; --input takes a folder of them, or a text file of paths")


def _walk(folder: str, below: str = "") -> Iterator[Source]:
    """Sorted by name. A folder stands among its siblings as "name/", which is how its files' relative paths sort."""
    names = []
    try:
        with os.scandir(os.path.join(folder, below)) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    names.append(entry.name + "/")
                elif entry.name.lower().endswith(SUFFIXES) and not entry.is_dir():
                    names.append(entry.name)
    except OSError as error:
        raise UserError(
            f"{error.filename}: cannot be read ({error.strerror}); make it readable or move it away"
        ) from None
    names.sort(key=_printable)
    for name in names:
        relative = below + name
        if name.endswith("/"):
            yield from _walk(folder, relative)
        else:
            yield Source(os.path.join(folder, relative), _printable(relative))


def _lines(path: str) -> Iterator[Source]:
    with open(path, "rb") as file:
        for line in file:
            name = os.fsdecode(line.strip())
            if name:
                yield Source(name, _printable(name))


def _printable(name: str) -> str:
    """A file name as text that JSON can hold: bytes that are no UTF-8 are written as \\xNN."""
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return -1
