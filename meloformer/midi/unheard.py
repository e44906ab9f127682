"""What a MIDI file holds beside its notes that `read_score` passes over without a word.

>>> count_unheard("song.mid")      # doctest: +SKIP
Counter({'lyrics': 212, 'unended_notes': 1})

In: a path. Out: counts by name: `unended_notes` (never ended, so dropped), `lone_note_offs` (that end no note),
`aftertouch` (of a channel or a key), `lyrics`, `key_signatures`, `system_exclusive`. MidiError as in `read_score`.

The surprise: none of it is counted when a corpus is made. It means following every event in Python, and that takes as
long as reading and encoding together.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from meloformer.midi.chunks import tidy, track_chunks, walk

META = {0xFF05: "lyrics", 0xFF59: "key_signatures", 0xF0: "system_exclusive", 0xF7: "system_exclusive"}
AFTERTOUCH = (0xA, 0xD)


def count_unheard(path: str | Path) -> Counter:
    """See the module's docstring; a damaged track counts up to the damage."""
    counts = Counter()
    for track in track_chunks(tidy(path)[0]):
        sounding = Counter()  # (channel, pitch): notes not yet ended
        for _, status, at, _ in walk(track):
            kind, note = status >> 4, (status & 15, track[at] if at < len(track) else 0)
            if kind == 0x9 and track[at + 1]:
                sounding[note] += 1
            elif kind in (0x8, 0x9):
                counts["lone_note_offs"] += not sounding[note]
                sounding[note] -= sounding[note] > 0
            elif kind in AFTERTOUCH:
                counts["aftertouch"] += 1
            elif status in META:
                counts[META[status]] += 1
        counts["unended_notes"] += sounding.total()
    return +counts
