"""Which files a preprocessing run reads, and what they are called in the corpus.

>>> [source.name for source in Input("midi")][:2]     # doctest: +SKIP
['a/Song.MID', 'b.mid']

A folder is searched through in the order of the relative paths, also where a link leads out of it, but no folder twice.
A text file has one path a line, relative to the current folder, as `find midi/ -name "*.mid"` prints them, and keeps
its order. A file's tag is the first folder of its path below the input, or in a list what stands behind a tab; of more
than 64 the most frequent count. Nothing is held in memory but one folder's names at a time, and which folders were
read: every walk over an `Input` reads the folder, or the list, again. The surprise: a name is stored as text, and file
names are bytes: those that are no UTF-8 are written as \\xNN.
"""

from __future__ import annotations

import codecs
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from meloformer.errors import UserError

SUFFIXES = (".mid", ".midi")
MAX_TAGS = 64  # the vocabulary's TAG tokens


class Source(NamedTuple):
    """A file to read, the name it goes by in the corpus, and the number of its tag."""

    path: str
    name: str
    tag: int | None = None


class Input:
    """The files that `--input`, `--limit` and `--part` name, in order; UserError if there are none.

    `files` is their number, `hash` 16 hex digits over the names, sizes and tags: what tells this input from another;
    `tags` are the names of the tags, sorted, the number of a tag its place among them. All three speak of the whole
    input, whatever the part; `first` and `last` are the part's share of it.
    """

    def __init__(self, given: str, limit: int | None = None, part: tuple[int, int] = (1, 1)):
        self.given = given
        self._limit = limit
        if not Path(given).is_dir():
            self._check_list(Path(given))
        digest = hashlib.sha256()
        self.files = 0
        tags: Counter[str] = Counter()
        for path, name, tag in self._all():
            digest.update("\0".join((name, str(_size(path)), *([tag] if tag else []))).encode() + b"\n")
            self.files += 1
            tags[tag] += 1
        self.hash = digest.hexdigest()[:16]
        del tags[""]
        self.tags = sorted(sorted(tags, key=lambda tag: (-tags[tag], tag))[:MAX_TAGS])
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
        numbers = {tag: number for number, tag in enumerate(self.tags)}
        return (Source(path, name, numbers.get(tag)) for path, name, tag in islice(self._all(), number, self.last))

    def describe(self) -> dict:
        return {"files": self.files, "hash": self.hash, "tags": self.tags}

    def _all(self) -> Iterator[tuple[str, str, str]]:
        """Path, name and tag of every file."""
        return islice(_walk(self.given) if Path(self.given).is_dir() else _lines(self.given), self._limit)

    @staticmethod
    def _check_list(path: Path) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such file or folder; --input takes a folder of MIDI files or a list of paths")
        if path.suffix.lower() in SUFFIXES:
            raise UserError(f"{path}: is one MIDI file; --input takes a folder of them, or a text file of paths")


def _walk(folder: str, below: str = "", seen: set[tuple[int, int]] | None = None) -> Iterator[tuple[str, str, str]]:
    """Sorted by name. A folder stands among its siblings as "name/", which is how its files' relative paths sort.

    `seen` are the folders that were read (device, inode): links may go round in a circle.
    """
    names, seen, here = [], set() if seen is None else seen, os.path.join(folder, below)
    try:
        about = os.stat(here)
        if (about.st_dev, about.st_ino) in seen:
            return
        seen.add((about.st_dev, about.st_ino))
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and _leads_out(entry.path, folder)):
                    names.append(entry.name + "/")
                elif entry.name.lower().endswith(SUFFIXES) and not os.path.isdir(entry.path):
                    names.append(entry.name)
    except OSError as error:
        raise _unreadable(here, error) from None
    names.sort(key=_printable)
    for name in names:
        relative = below + name
        if name.endswith("/"):
            yield from _walk(folder, relative, seen)
        else:
            name = _printable(relative)
            yield os.path.join(folder, relative), name, name.split("/")[0] if "/" in name else ""


def _leads_out(link: str, folder: str) -> bool:
    """Whether a link is to a folder elsewhere; what is below the input goes by its own name, not by a link's."""
    folder, target = os.path.realpath(folder), os.path.realpath(link)
    return os.path.isdir(target) and not target.startswith(os.path.join(folder, "")) and target != folder


def _lines(path: str) -> Iterator[tuple[str, str, str]]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file):
                if not number:
                    line = line.removeprefix(codecs.BOM_UTF8)  # which some editors write before a text
                name, _, tag = os.fsdecode(line.strip()).partition("\t")
                if name.strip():
                    yield name.strip(), _printable(name.strip()), _printable(tag.strip())
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}); make it readable or move it away")


def _printable(name: str) -> str:
    """A file name as text that JSON can hold: bytes that are no UTF-8 are written as \\xNN."""
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return -1
