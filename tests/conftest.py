"""Fixtures that several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# The same examples in every run, so that what passes passes again; `pytest --hypothesis-profile default` draws others.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def real_midi() -> Path:
    """A folder of real MIDI files: $MELOFORMER_MIDI, or shared/midi beside the repository; skips without one."""
    folder = Path(os.environ.get("MELOFORMER_MIDI") or ROOT.parent / "shared" / "midi")
    if not folder.is_dir():
        pytest.skip(f"no real MIDI at {folder}: set MELOFORMER_MIDI to a folder of MIDI files")
    return folder
