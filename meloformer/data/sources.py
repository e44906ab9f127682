"""Which files a preprocessing run reads, and what they are called in the corpus.

>>> [source.name for source in list_input("midi")][:2]     # doctest: +SKIP
['a/Song.MID', 'b.mid']

A folder is searched through and sorted by relative path; a text file has one path a line, relative to the current
folder, as `find midi/ -name "*.mid"` prints them, and keeps its order. The surprise: a name is stored as text, and file
names are bytes: those that are no UTF-8 are written as \\xNN.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from meloformer.errors import UserError

SUFFIXES = (".mid", ".midi")


class Source(NamedTuple):
    """A file to read, and the name it goes by in the corpus."""

    path: str
    name: str


def list_input(given: str) -> list[Source]:
    """The files of a folder, sorted by relative path, or of a list, in its order; UserError if there are none."""
    path = Path(given)
    if path.is_dir():
        found = [
            os.path.relpath(os.path.join(folder, name), path)
            for folder, _, names in os.walk(path)
            for name in names
            if name.lower().endswith(SUFFIXES)
        ]
        sources = [Source(str(path / name), _printable(Path(name).as_posix())) for name in found]
        if not sources:
            raise UserError(f"{given}: no .mid or .midi file in this folder or below it; give a folder that has some")
        return sorted(sources, key=lambda source: source.name)
    if not path.is_file():
        raise UserError(f"{given}: no such file or folder; --input takes a folder of MIDI files or a list of paths")
    if path.suffix.lower() in SUFFIXES:
        raise UserError(f"{given}: is one MIDI file; --input takes a folder of them, or a text file of paths")
    lines = [os.fsdecode(line.strip()) for line in path.read_bytes().splitlines()]
    sources = [Source(line, _printable(line)) for line in lines if line]
    if not sources:
        raise UserError(f"{given}: the list is empty; it should have one path a line, as find prints them")
    return sources


def _printable(name: str) -> str:
    """A file name as text that JSON can hold: bytes that are no UTF-8 are written as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return -1


def describe_input(sources: list[Source]) -> dict:
    """What tells this input from another: the number of files and a hash over their names and sizes."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.name}\0{_size(source.path)}\n".encode())
    return {"files": len(sources), "hash": digest.hexdigest()[:16]}
