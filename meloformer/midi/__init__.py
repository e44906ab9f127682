"""Reading, holding and writing music: MIDI files and the `Score` table. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meloformer.midi.read import read_score
from meloformer.midi.score import DRUMS, Control, MidiError, Score, Track, note_table

if TYPE_CHECKING:
    from meloformer.midi.write import write_midi

__all__ = ["DRUMS", "Control", "MidiError", "Score", "Track", "note_table", "read_score", "write_midi"]


def __getattr__(name: str):
    # Imported when it is asked for: a worker of preprocessing writes no MIDI, and mido takes a moment.
    if name != "write_midi":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from meloformer.midi.write import write_midi

    return write_midi
