"""Notes that the pedal holds: by channel, across tracks, until it is lifted."""

import mido
import pytest

from meloformer.midi import read_score
from meloformer.midi.chunks import tidy
from meloformer.midi.pedal import extend_sustained
from meloformer.midi.read import read_with_miditoolkit, read_with_symusic


def write(path, *tracks) -> None:
    """Tracks of (tick, message) on 480 ticks a quarter note."""
    file = mido.MidiFile(ticks_per_beat=480)
    for messages in tracks:
        track, now = mido.MidiTrack(), 0
        for tick, kind, fields in messages:
            track.append(mido.Message(kind, time=tick - now, **fields))
            now = tick
        file.tracks.append(track)
    file.save(path)


def note(start: int, end: int, pitch: int, channel: int = 0) -> list:
    fields = {"note": pitch, "channel": channel}
    return [(start, "note_on", fields | {"velocity": 80}), (end, "note_off", fields)]


def pedal(tick: int, value: int, channel: int = 0) -> tuple:
    return tick, "control_change", {"control": 64, "value": value, "channel": channel}


@pytest.mark.parametrize("read", [read_with_symusic, read_with_miditoolkit])
def test_a_note_sounds_until_its_channels_pedal_is_lifted(tmp_path, read):
    """The left hand's track has the pedal of both hands; drums have a pedal that means nothing."""
    path = tmp_path / "a.mid"
    left = [pedal(0, 127), *note(0, 100, 40), pedal(480, 63), *note(500, 600, 41), pedal(700, 64), pedal(800, 100)]
    right = [*note(10, 90, 72), *note(200, 480, 74), *note(650, 720, 76), *note(900, 1000, 77)]
    other = [pedal(0, 127, 9), *note(0, 50, 36, 9), *note(60, 70, 50, 3)]
    write(path, left, right, other)
    score = extend_sustained(read(path), tidy(path)[0])
    ends = {int(n["pitch"]): int(n["onset"] + n["duration"]) for n in score.notes}
    assert ends == {40: 480, 41: 600, 72: 480, 74: 480, 76: 1000, 77: 1000, 36: 50, 50: 70}
    assert score.counts["sustained"] == 3


def test_the_default_is_to_ignore_it(tmp_path):
    write(tmp_path / "a.mid", [pedal(0, 127), *note(0, 100, 40), pedal(480, 0)])
    assert read_score(tmp_path / "a.mid").notes["duration"].tolist() == [100]
    assert read_score(tmp_path / "a.mid", "extend").notes["duration"].tolist() == [480]


def test_both_readers_agree_on_real_files(real_midi):
    """And the channels of their tracks are found again in all of them but wrecks."""
    extended = lost = 0
    for path in sorted(path for path in real_midi.rglob("*") if path.suffix.lower() in (".mid", ".midi"))[::12]:
        try:
            scores = [
                extend_sustained(read(path), tidy(path)[0]) for read in (read_with_symusic, read_with_miditoolkit)
            ]
        except ValueError:
            continue
        assert scores[0] == scores[1], path
        extended += scores[0].counts["sustained"] > 0
        lost += scores[0].counts["pedal_lost"]
    assert extended > 10 and not lost
