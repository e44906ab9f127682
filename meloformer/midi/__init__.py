"""Reading, holding and writing music: MIDI files and the `Score` table. No torch here."""

from meloformer.midi.read import read_score
from meloformer.midi.score import DRUMS, Control, MidiError, Score, Track, note_table
from meloformer.midi.write import write_midi

__all__ = ["DRUMS", "Control", "MidiError", "Score", "Track", "note_table", "read_score", "write_midi"]
