"""Two readers, one Score; and every file is read or refused with one line."""

from __future__ import annotations

import struct
import sys
from collections import Counter, defaultdict
from pathlib import Path

import mido
import numpy as np
import pytest

from meloformer.errors import UserError
from meloformer.midi import DRUMS, MidiError, Score, read_score
from meloformer.midi import read as reading
from meloformer.midi.read import read_with_miditoolkit, read_with_symusic
from meloformer.midi.unheard import count_unheard
from tests.midi.real_files import midi_files, readable_sample

READERS = [read_with_symusic, read_with_miditoolkit]

# Files that symusic reads and mido refuses, and why: the only differences between the readers on 1,859 real files.
MIDO_REFUSES = {
    "jazzsoft__test-running-status-sysex.mid": "a sysex does not end running status for symusic",
    "ntrks-mismatch__buxehude-buxethude_buxwv138_prelude.mid": "a meta event too short for its kind",
    "buxehude-buxethude_buxwv161_passcaglia.mid": "a meta event too short for its kind",
    "laurasmidiheaven__mmxend.mid": "the last event reaches past the end of its track",
    "laurasmidiheaven__mmxvile.mid": "the last event reaches past the end of its track",
}


def midi_bytes(*tracks: bytes, kind: int = 1, division: int = 480) -> bytes:
    """A file of raw tracks; each gets its end-of-track event."""
    file = b"MThd" + struct.pack(">IHHH", 6, kind, len(tracks), division)
    for track in tracks:
        body = track + b"\x00\xff\x2f\x00"
        file += b"MTrk" + struct.pack(">I", len(body)) + body
    return file


def save(folder: Path, *tracks: list[tuple[int, mido.Message]], kind: int = 1) -> Path:
    """A file of (tick, message) lists."""
    file = mido.MidiFile(type=kind, ticks_per_beat=480)
    for events in tracks:
        track, now = mido.MidiTrack(), 0
        for tick, message in events:
            track.append(message.copy(time=tick - now))
            now = tick
        file.tracks.append(track)
    path = folder / "made.mid"
    file.save(path)
    return path


def on(pitch, velocity=64, channel=0):
    return mido.Message("note_on", note=pitch, velocity=velocity, channel=channel)


def off(pitch, channel=0):
    return mido.Message("note_off", note=pitch, channel=channel)


def program(number, channel=0):
    return mido.Message("program_change", program=number, channel=channel)


def tempo(microseconds):
    return mido.MetaMessage("set_tempo", tempo=microseconds)


def meter(numerator, denominator):
    return mido.MetaMessage("time_signature", numerator=numerator, denominator=denominator)


# --- the rules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", READERS)
def test_program_change_starts_another_track(read, tmp_path):
    """The note that sounds across the change keeps the program it began with: miditoolkit gives it the new one."""
    path = save(
        tmp_path, [(0, program(40)), (0, on(60)), (100, program(5)), (200, off(60)), (200, on(62)), (300, off(62))]
    )
    score = read(path)
    assert score.counts["tracks_split"] == 1
    assert [track.program for track in score.tracks] == [5, 40]  # by program within a channel
    assert score.notes[["track", "onset", "duration", "pitch"]].tolist() == [(0, 200, 100, 62), (1, 0, 200, 60)]


@pytest.mark.parametrize("read", READERS)
def test_tracks_come_by_file_track_then_channel_then_program(read, tmp_path):
    first = [(0, program(9, 3)), (0, program(20, 2)), (0, on(1, 64, 3)), (0, on(2, 64, 2)), (5, off(1, 3))]
    first += [
        (5, off(2, 2)),
        (6, program(5, 2)),
        (6, on(3, 64, 2)),
        (6, on(36, 64, 9)),
        (9, off(3, 2)),
        (9, off(36, 9)),
    ]
    second = [(0, program(1)), (0, on(60)), (9, off(60))]
    assert read(save(tmp_path, first, second)).instruments.tolist() == [5, 20, 9, DRUMS, 1]
    assert read(save(tmp_path, first, kind=0)).instruments.tolist() == [5, 20, 9, DRUMS]


@pytest.mark.parametrize("read", READERS)
def test_a_program_stated_in_another_track_of_the_channel_holds(read, tmp_path):
    """5 % of web files state the organ once and play it from two tracks: the second used to come out as a piano."""
    notes = [(0, on(60)), (9, off(60))]
    score = read(save(tmp_path, [(0, program(19)), *notes], notes, [(0, program(52)), *notes]))
    assert score.instruments.tolist() == [19, 19, 52]
    setup = read(save(tmp_path, [(0, tempo(400000)), (3, program(19))], notes))
    assert setup.instruments.tolist() == [19]


@pytest.mark.parametrize("read", READERS)
def test_a_later_program_change_stays_in_its_track(read, tmp_path):
    notes = [(0, on(60)), (9, off(60))]
    score = read(save(tmp_path, [*notes, (50, program(19)), (60, on(62)), (70, off(62))], notes))
    assert score.instruments.tolist() == [0, 19, 0]


@pytest.mark.parametrize("read", READERS)
def test_overlaps_are_left_alone_and_paired_in_order(read, tmp_path):
    path = save(
        tmp_path, [(0, on(60, 1)), (50, on(60, 2)), (100, off(60)), (200, off(60)), (200, off(60)), (210, on(60))]
    )
    assert read(path).notes[["onset", "duration", "velocity"]].tolist() == [(0, 100, 1), (50, 150, 2)]


@pytest.mark.parametrize("read", READERS)
def test_a_note_of_no_length_lasts_one_tick(read, tmp_path):
    """Drum tracks of the nineties are full of them: a stroke has no length, and dropping it empties the track."""
    score = read(save(tmp_path, [(7, on(36, 90, 9)), (7, off(36, 9))]))
    assert score.notes["duration"].tolist() == [1]
    assert score.counts["zero_duration"] == 1


@pytest.mark.parametrize("read", READERS)
def test_meters_and_tempos_start_at_tick_0(read, tmp_path):
    notes = [(0, on(60)), (9, off(60))]
    bare = read(save(tmp_path, notes))
    assert bare.meters.tolist() == [(0, 4, 4)] and bare.tempos.tolist() == [(0, 120.0)]
    assert bare.counts["no_meter"] == 1
    late = read(save(tmp_path, [(480, meter(3, 4)), (960, tempo(250000))], notes))
    assert late.meters.tolist() == [(0, 4, 4), (480, 3, 4)] and late.tempos.tolist() == [(0, 120.0), (960, 240.0)]
    assert "no_meter" not in late.counts


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("events", [3, 200])
def test_of_several_on_one_tick_the_last_of_the_file_wins(read, events, tmp_path):
    """symusic sorts longer lists by an unstable sort, so that the first track's tempo came back now and then."""
    first = [(i * 10, tempo(500000 + i)) for i in range(events)]
    second = [(i * 10, tempo(300000 + i)) for i in range(events)]
    score = read(save(tmp_path, first, [*second, (5000, on(60)), (5001, off(60))]))
    assert score.tempos["qpm"].tolist() == [60_000_000 / (300000 + i) for i in range(events)]
    assert score.counts["same_tick_tempos"] == events
    first = [(i * 10, meter(9, 8)) for i in range(events)]
    second = [(i * 10, meter(i % 3 + 2, 4)) for i in range(events)]
    score = read(save(tmp_path, first, [*second, (5000, on(60)), (5001, off(60))]))
    assert score.meters["numerator"].tolist() == [i % 3 + 2 for i in range(events)]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("numerator, power", [(0, 2), (4, 8), (4, 9), (4, 40)])
def test_a_meter_that_is_none_is_dropped(read, numerator, power, tmp_path):
    path = tmp_path / "made.mid"
    signature = b"\x00\xff\x58\x04" + bytes([numerator, power, 24, 8])
    path.write_bytes(midi_bytes(signature + b"\x00\xff\x51\x03\x00\x00\x00" + b"\x00\x90\x40\x40\x10\x80\x40\x40"))
    score = read(path)
    assert score.meters.tolist() == [(0, 4, 4)] and score.tempos.tolist() == [(0, 120.0)]
    assert score.counts["invalid_meters"] == 1 and score.counts["invalid_tempos"] == 1


@pytest.mark.parametrize("read", READERS)
def test_what_a_score_does_not_hold_is_counted(read, tmp_path):
    pedal = [mido.Message("control_change", control=64, value=value) for value in (100, 0)]
    bend = mido.Message("pitchwheel", pitch=30)
    score = read(save(tmp_path, [(0, on(60)), (1, pedal[0]), (2, bend), (3, pedal[1]), (9, off(60))]))
    assert score.counts == Counter(control_changes=2, pedals=1, pitch_bends=1, no_meter=1)


def parts_of(*programs: int, channel: int = 0, rest: int = 60) -> list[tuple[int, mido.Message]]:
    """A track with a note under each of the programs in turn."""
    events = []
    for i, number in enumerate(programs):
        start = i * (rest + 1)
        events += [(start, program(number, channel)), (start, on(60, 64, channel)), (start + 1, off(60, channel))]
    return events


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("tracks", "split"),
    {
        "restated": ([parts_of(5, 5, 5)], 0),
        "there and back": ([parts_of(5, 9, 5)], 1),
        "three": ([parts_of(5, 9, 3), parts_of(9)], 2),
        "from the piano that nobody states": ([[(0, on(60)), (1, off(60)), *parts_of(0, 19)[3:]]], 1),
        "two channels are two tracks anyhow": ([parts_of(5) + parts_of(9, channel=1)], 0),
        "two kits": ([parts_of(0, 25, channel=9)], 1),
        "a change that no note follows": ([[*parts_of(5), (90, program(7)), (95, off(1))]], 0),
        "a change before a time of two bytes": ([[*parts_of(5, 9, rest=9000), (30000, program(7))]], 1),
        "a text of eight kilobytes": ([[(0, mido.MetaMessage("text", text="x" * 8200)), *parts_of(5, 9)]], 1),
        "a time that looks like a program change": ([[(0, on(60)), (64 * 128 + 9, off(60)), (9000, on(61))]], 0),
    }.values(),
)
def test_tracks_that_a_program_change_split_off_are_counted(read, tracks, split, tmp_path):
    """One file in seven has such a change, and a corpus said nothing of it."""
    for events in tracks:
        events.sort(key=lambda event: event[0])
    assert read(save(tmp_path, *tracks)).counts["tracks_split"] == split


@pytest.mark.parametrize("read", READERS)
def test_a_drum_kit_is_lost_and_counted(read, tmp_path):
    """The drum channel's program chooses a kit; no instrument stands for one."""
    assert read(save(tmp_path, parts_of(25, channel=9), parts_of(25))).counts["drum_kits"] == 1  # shared by no channel
    assert not read(save(tmp_path, parts_of(0, channel=9))).counts["drum_kits"]


def test_what_is_passed_over_without_a_count_is_counted_on_request(tmp_path):
    """symusic drops a note that is never ended without a word, and neither reader keeps aftertouch or lyrics."""
    touch = mido.Message("aftertouch", value=50), mido.Message("polytouch", note=60, value=50)
    rest = mido.MetaMessage("lyrics", text="la"), mido.MetaMessage("key_signature", key="Eb")
    events = [on(60), off(60), on(70), on(70), off(70), off(71), on(70, 0), on(71), on(72, 0), *touch, *rest]
    path = save(tmp_path, [(i, event) for i, event in enumerate([*events, mido.Message("sysex", data=(1, 2))])])
    assert count_unheard(path) == Counter(
        unended_notes=1, lone_note_offs=2, aftertouch=2, lyrics=1, key_signatures=1, system_exclusive=1
    )
    assert [read(path).num_notes for read in READERS] == [3, 3]


@pytest.mark.parametrize("read", READERS)
def test_data_bytes_above_127_are_clipped(read, tmp_path):
    path = tmp_path / "made.mid"
    path.write_bytes(midi_bytes(b"\x00\xc0\xff\x00\x90\x40\x40\x10\x80\x40\x40"))
    score = read(path)
    assert score.instruments.tolist() == [127] and score.num_notes == 1
    assert score.counts["repaired"] == 1


NOTE = b"\x00\x90\x40\x40\x10\x80\x40\x40"


@pytest.mark.parametrize("read", READERS)
def test_foreign_chunks_and_a_wrong_track_count_do_not_stop_the_readers(read, tmp_path):
    """mido stops at a chunk that is no track and at a count that is too high; what is there is music all the same."""
    path = tmp_path / "made.mid"
    good = midi_bytes(NOTE, NOTE)
    foreign = good[:14] + b"XFIH" + struct.pack(">I", 3) + b"abc" + good[14:] + b"\x00\x01junk after the last track"
    path.write_bytes(foreign[:10] + struct.pack(">H", 7) + foreign[12:])
    score = read(path)
    assert len(score.tracks) == 2 and score.counts["skipped_chunks"] == 2


@pytest.mark.parametrize("read", READERS)
def test_what_was_left_of_a_longer_file_is_not_read(read, tmp_path):
    """A real file stated four parts and held them twice, the second time from an older version of itself."""
    path = tmp_path / "made.mid"
    data = midi_bytes(NOTE, NOTE, NOTE, NOTE[:-1])
    path.write_bytes(data[:10] + struct.pack(">H", 2) + data[12:])
    score = read(path)
    assert len(score.tracks) == 2 and score.counts["leftover_tracks"] == 2
    whole = midi_bytes(NOTE, NOTE)
    path.write_bytes(whole[:10] + struct.pack(">H", 0) + whole[12:])
    assert len(read(path).tracks) == 2  # a count of none is no count


# --- what is refused ----------------------------------------------------------------------------------------

REFUSED = {
    "empty": (b"", "empty"),
    "zeros": (bytes(4000), "zeros"),
    "html": (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
    "riff": (b"RIFF\x10\x00\x00\x00RMIDdata" + midi_bytes(NOTE), "RIFF"),
    "zip": (b"PK\x03\x04" + bytes(100), "zip"),
    "macbinary": (bytes(1) + b"x" * 127 + midi_bytes(NOTE), "MacBinary"),
    "offset": (b"x" * 57 + midi_bytes(NOTE), "byte 57"),
    "text": (b"# a readme", "not a MIDI file"),
    "header alone": (midi_bytes(), "no tracks"),
    "half a header": (midi_bytes(NOTE)[:9], "cut short"),
    "type 2": (midi_bytes(NOTE, kind=2), "type 2"),
    "type 9": (midi_bytes(NOTE, kind=9), "header"),
    "smpte": (midi_bytes(NOTE, division=0xE728), "SMPTE"),
    "division 0": (midi_bytes(NOTE, division=0), "division 0"),
    "cut short": (midi_bytes(NOTE)[:-3], "cut short: track 1 states 12 bytes, 9 are there"),
    "unknown status": (midi_bytes(b"\x00\xf4\x00" + NOTE), "damaged"),
    "no status": (midi_bytes(b"\x00\x40\x40" + NOTE), "damaged"),
    "ends inside an event": (midi_bytes(b"\x00\xff\x01\x7fhello"), "damaged"),
}


@pytest.mark.parametrize("read", [read_score, *READERS])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_line(read, name, tmp_path):
    data, reason = REFUSED[name]
    path = tmp_path / "bad.mid"
    path.write_bytes(data)
    with pytest.raises(MidiError, match=reason) as caught:
        read(path)
    assert_one_line(caught.value, path)


def assert_one_line(error: UserError, path: Path) -> None:
    """`path: reason; what to do`."""
    text = str(error)
    assert "\n" not in text and text.startswith(f"{path}: ") and ";" in text, text


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.mid", tmp_path):
        with pytest.raises(MidiError, match="cannot be read") as caught:
            read_score(path)
        assert_one_line(caught.value, path)


def test_bytes_turned_at_random_are_read_or_refused(tmp_path):
    """symusic is C++: whatever it throws comes out as a MidiError, and nothing kills the process."""
    rng = np.random.default_rng(0)
    tracks = [program(3, 1), on(60, 64, 1), on(64, 64, 1), off(60, 1), off(64, 1), meter(3, 4), tempo(400000)]
    good = save(tmp_path, [(10 * i, message) for i, message in enumerate(tracks)]).read_bytes()
    path, outcomes = tmp_path / "turned.mid", Counter()
    for _ in range(400):
        data = np.frombuffer(good, dtype=np.uint8).copy()
        data[rng.integers(8, len(data), size=3)] = rng.integers(0, 256, size=3)
        path.write_bytes(data.tobytes())
        for read in READERS:
            try:
                outcomes[isinstance(read(path), Score)] += 1
            except MidiError as error:
                assert "\n" not in str(error)
                outcomes["refused"] += 1
    assert outcomes[True] > 50 and outcomes["refused"] > 50


def test_without_symusic_miditoolkit_reads(monkeypatch, tmp_path):
    path = save(tmp_path, [(0, on(60)), (9, off(60))])
    with_symusic = read_score(path)
    monkeypatch.setattr(reading, "symusic", None)
    assert read_score(path) == with_symusic
    with pytest.raises(MidiError, match="pip install symusic"):
        read_with_symusic(path)
    monkeypatch.setitem(sys.modules, "mido", None)
    with pytest.raises(MidiError, match="pip install miditoolkit"):
        read_score(path)


# --- real files ---------------------------------------------------------------------------------------------


def attempt(read, path: Path) -> Score | None:
    try:
        return read(path)
    except MidiError as error:
        assert_one_line(error, path)
        return None


def test_both_readers_agree_on_real_files(real_midi):
    agreed = 0
    for path in readable_sample(real_midi, share=0.06):
        ours, oracle = attempt(read_with_symusic, path), attempt(read_with_miditoolkit, path)
        if path.name in MIDO_REFUSES:
            assert ours is not None and oracle is None, f"{path}: listed as refused by mido"
            continue
        assert (ours is None) == (oracle is None), path
        assert ours == oracle, path
        if ours is not None:
            assert [ours.counts[name] - oracle.counts[name] for name in ("tracks_split", "drum_kits")] == [0, 0], path
        agreed += ours is not None
    assert agreed


def test_miditoolkit_itself_finds_the_same_notes(real_midi):
    """The parser beneath is shared with our second reader, the pairing of notes is not: nor are its bugs."""
    import miditoolkit

    compared = 0
    for path in readable_sample(real_midi, share=0.02):
        score = attempt(read_score, path)
        if score is None or path.name in MIDO_REFUSES or score.counts["skipped_chunks"]:
            continue
        try:
            theirs = miditoolkit.MidiFile(path, clip=True)
        except (mido.KeySignatureError, EOFError, ValueError):
            continue  # a key that mido does not know; a track count too high; a file without events
        notes = Counter(
            (instrument.is_drum, note.start, max(note.end - note.start, 1), note.pitch, note.velocity)
            for instrument in theirs.instruments
            for note in instrument.notes
        )
        drums = score.instruments == DRUMS
        rows = zip(
            drums[score.notes["track"]].tolist(), *(score.notes[c].tolist() for c in score.notes.dtype.names[1:])
        )
        assert Counter(rows) == notes, path
        compared += 1
    assert compared


def test_awkward_files_are_read_or_refused(real_midi):
    if not (real_midi / "awkward").is_dir():
        pytest.skip(f"no folder of awkward files in {real_midi}")
    outcomes = defaultdict(list)
    for path in midi_files(real_midi / "awkward"):
        score = attempt(read_score, path)
        outcomes[score is not None].append(path.name)
        if score is not None:
            assert score.meters["tick"][0] == 0 and score.tempos["tick"][0] == 0
            assert (np.diff(score.meters["tick"]) > 0).all() and (np.diff(score.tempos["tick"]) > 0).all()
            assert not score.num_notes or (score.notes["duration"].min() > 0 and score.notes["velocity"].min() > 0)
    assert outcomes[True] and outcomes[False]
    # by their names most of these are refused; what only needs a tidy header is read
    assert all(
        name.startswith(("reject", "synthetic", "type2", "smpte", "tpq0", "jazzsoft", "no-notes"))
        for name in outcomes[False]
    )


@pytest.mark.parametrize("read", READERS)
def test_a_time_beyond_64_bits_is_damage(tmp_path, read):
    """Found by fuzzing: mido adds up such times without a murmur, and numpy would not take them."""
    huge = b"\xff" * 12 + b"\x7f"
    events = b"\x00\x90\x3c\x40" + huge + b"\xff\x51\x03\x07\xa1\x20" + b"\x00\x80\x3c\x40\x00\xff\x2f\x00"
    header = b"MThd" + struct.pack(">IHHH", 6, 0, 1, 480)
    (tmp_path / "a.mid").write_bytes(header + b"MTrk" + struct.pack(">I", len(events)) + events)
    with pytest.raises(MidiError):
        read(tmp_path / "a.mid")
