"""Files that are whole or absent: the one place that writes through a temporary name and a rename.

>>> write_atomic("example.json", b"{}")
>>> checksum("example.json")[:8]
'44136fa3'
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from meloformer.errors import UserError


def make_folder(path: str | Path) -> None:
    """The folder and those around it, if they are not there; UserError where that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: no folder can be made there ({error.strerror}); give another --output") from None


@contextmanager
def new_folder(path: str | Path) -> Iterator[None]:
    """`make_folder`; where the block fails or is interrupted, folders that were made for it and are empty go again."""
    made = [folder for folder in (Path(path), *Path(path).parents) if not folder.exists()]
    make_folder(path)
    try:
        yield
    except BaseException:
        for folder in made:
            try:
                folder.rmdir()
            except OSError:  # something has been written there
                break
        raise


def require_file(path: str | Path) -> None:
    """UserError where no file can be written at `path`; asked before hours of work, not after."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"--output {path}: is a folder, and a file is written here; name one, such as {path / 'out'}")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: {path.parent} is no folder; make it first, or leave --output out")


def sync_directory(path: str | Path) -> None:
    """Make a rename inside `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write; `path` holds its old content until the block ends well, then all of the new."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write `data` so that `path` holds either its old content or all of the new, whatever happens meanwhile."""
    with atomic_file(path) as file:
        file.write(data)


def checksum(path: str | Path) -> str:
    """sha256 of a file, hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
