"""Which real files a test reads: a fixed sample in the suite, every one with MELOFORMER_FULL=1."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

SUFFIXES = (".mid", ".midi")


def midi_files(folder: Path) -> list[Path]:
    """All MIDI files under a folder, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def readable_sample(folder: Path, share: float = 0.15) -> list[Path]:
    """The same files on every machine: chosen by the hash of their names."""
    files = midi_files(folder)
    if os.environ.get("MELOFORMER_FULL") == "1":
        return files
    return [path for path in files if hashlib.sha256(path.name.encode()).digest()[0] < 256 * share]
