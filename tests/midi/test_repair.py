"""What strict readers refuse a file over does not go into a new one."""

from __future__ import annotations

from collections import Counter

import mido
import pytest

from meloformer.midi import note_table, read_score
from meloformer.midi.chunks import header, track_chunk
from meloformer.midi.merge import MidiSource, merge_midi
from meloformer.midi.repair import repaired

BROKEN = {  # events that strict readers refuse a file over
    "a key of mode 255": b"\xff\x59\x02\xfa\xff",
    "a key of eight sharps": b"\xff\x59\x02\x08\x00",
    "half a key": b"\xff\x59\x01\x00",
    "half a tempo": b"\xff\x51\x02\x07\xa1",
    "half a meter": b"\xff\x58\x02\x04\x02",
    "no channel": b"\xff\x20\x00",
    "half a number": b"\xff\x00\x01\x05",
    "frames at no rate": b"\xff\x54\x05\x80\x00\x00\x00\x00",
    "half an offset": b"\xff\x54\x02\x20\x00",
    "a sysex with a status byte in it": b"\xf0\x03\x41\x90\xf7",
}
SOUND = [
    b"\xff\x59\x02\xf9\x01",
    b"\xff\x51\x04\x07\xa1\x20\x00",  # longer than stated: more may follow
    b"\xff\x00\x00",
    b"\xff\x21\x01\x00",
    b"\xff\x7f\x02\xff\xfe",
    b"\xff\x03\x01\xe9",
    b"\xf0\x02\x41\xf7",
    b"\xf7\x01\xfa",
    b"\x90\x3c\x7f",
    b"\xc0\x7f",
]


@pytest.mark.parametrize("what", BROKEN)
def test_an_event_that_strict_readers_refuse_is_left_out(tmp_path, what):
    """It was copied, and miditoolkit could not open the continuation of a song that symusic had read."""
    notes = [(0, b"\x90\x3c\x5a"), (96, b"\x80\x3c\x00"), (192, b"\xff\x2f\x00")]
    path, out = tmp_path / "song.mid", tmp_path / "out.mid"
    path.write_bytes(header(0, 1, 96) + track_chunk([(0, BROKEN[what]), *notes]))
    with pytest.raises(Exception):  # noqa: B017  mido has an error of its own for some of them
        mido.MidiFile(path)
    source = MidiSource(path)
    assert source.loss == "not copied are events that MIDI does not define: 1"
    assert merge_midi(source, out, note_table([(0, 200, 40, 64, 80)])) == Counter(broken_events=1)
    assert [n.note for n in mido.MidiFile(out).tracks[0] if n.type == "note_on"] == [60, 64]
    assert read_score(out).notes.tolist() == [(0, 0, 96, 60, 90), (0, 200, 40, 64, 80)]


def test_sound_events_stay_and_bytes_above_127_become_127(tmp_path):
    assert [repaired(event) for event in SOUND] == SOUND
    notes = [(0, b"\x90\x3c\xc8"), (96, b"\x80\x3c\x00"), (192, b"\xff\x2f\x00")]
    path, out = tmp_path / "song.mid", tmp_path / "out.mid"
    path.write_bytes(header(0, 1, 96) + track_chunk(notes))
    assert merge_midi(MidiSource(path), out, note_table([(0, 200, 40, 64, 80)])) == Counter(repaired_events=1)
    assert [n.velocity for n in mido.MidiFile(out).tracks[0] if n.type == "note_on"] == [127, 80]
