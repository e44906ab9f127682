"""A prompt's own events stay as they were, tick for tick: read with mido, which had no part in writing them."""

from __future__ import annotations

from collections import Counter

import mido
import numpy as np
import pytest

from meloformer.midi import DRUMS, MidiError, note_table, read_score
from meloformer.midi.chunks import header, split, track_chunk
from meloformer.midi.merge import MidiSource, merge_midi
from meloformer.midi.read import read_with_miditoolkit, read_with_symusic
from tests.midi.real_files import readable_sample


def timed_events(path) -> list[Counter]:
    """Per track of the file, how often it has each (tick, message)."""
    return [
        Counter((tick, str(message)) for tick, message in with_ticks(track) if message.type != "end_of_track")
        for track in mido.MidiFile(path, clip=True).tracks
    ]


def with_ticks(track):
    tick = 0
    for message in track:
        tick += message.time
        yield tick, message.copy(time=0)


def band(path, kind=1, channels=(0, 1, 9), extra=()) -> None:
    """Bass, a part that changes its program on the second bar, drums; names, controllers, bends, a lyric, a sysex."""
    file = mido.MidiFile(type=kind, ticks_per_beat=96, charset="latin-1")
    file.tracks.append(
        mido.MidiTrack(
            [
                mido.MetaMessage("track_name", name="Café"),
                mido.MetaMessage("set_tempo", tempo=612345),
                mido.MetaMessage("key_signature", key="Eb"),
                mido.MetaMessage("time_signature", numerator=4, denominator=4, clocks_per_click=36),
                mido.Message("sysex", data=(65, 16, 66, 18)),
                mido.MetaMessage("set_tempo", tempo=512345, time=500),
            ]
        )
    )
    for channel in channels:
        track = mido.MidiTrack([mido.MetaMessage("track_name", name=f"part {channel}")])
        track.append(mido.Message("program_change", channel=channel, program=33))
        track.append(mido.Message("control_change", channel=channel, control=7, value=90))
        for bar in range(3):
            if channel == 1 and bar == 1:
                track.append(mido.Message("program_change", channel=1, program=61))
            for beat in range(4):
                track.append(mido.Message("note_on", channel=channel, note=40 + beat, velocity=80))
                track.append(mido.Message("pitchwheel", channel=channel, pitch=beat * 100, time=40))
                track.append(mido.Message("note_off", channel=channel, note=40 + beat, velocity=11, time=56))
        track.append(mido.MetaMessage("lyrics", text="la"))
        file.tracks.append(track)
    for track in extra:
        file.tracks.append(track)
    file.save(path)


def new_notes(path, source) -> list[tuple]:
    """(instrument, onset, duration, pitch, velocity) that `path` has and the source has not."""
    rows = []
    for score, sign in ((read_score(path), 1), (source.score, -1)):
        for track, *note in score.notes.tolist():
            rows.append(((int(score.instruments[track]), *note), sign))
    counts = Counter()
    for row, sign in rows:
        counts[row] += sign
    return sorted(counts.elements())


@pytest.fixture
def source(tmp_path) -> MidiSource:
    band(tmp_path / "band.mid")
    return MidiSource(tmp_path / "band.mid")


def test_new_notes_join_their_track_and_nothing_else_changes(source, tmp_path):
    assert [track.program for track in source.score.tracks] == [33, 33, 61, 33]
    out = tmp_path / "out.mid"
    notes = note_table([(0, 1152, 96, 50, 70), (2, 1152, 48, 60, 71), (3, 1200, 24, 36, 72)])
    assert merge_midi(source, out, notes, end_tick=1536) == Counter()
    before, after = timed_events(source.path), timed_events(out)
    assert len(after) == len(before)
    assert all(not old - new for old, new in zip(before, after))
    assert sum(sum((new - old).values()) for old, new in zip(before, after)) == 6
    assert new_notes(out, source) == [(33, 1152, 96, 50, 70), (61, 1152, 48, 60, 71), (DRUMS, 1200, 24, 36, 72)]
    assert sum(message.time for message in mido.MidiFile(out).tracks[0]) == 1536


def test_a_part_whose_channel_plays_another_program_by_now_gets_its_own(source, tmp_path):
    """Track 1 left channel 1 to a horn after its first bar: notes written there would have sounded as a horn."""
    out = tmp_path / "out.mid"
    assert merge_midi(source, out, note_table([(1, 1152, 96, 50, 70), (1, 96, 9, 70, 70)])) == {"own_channel": 1}
    tracks = mido.MidiFile(out).tracks
    assert len(tracks) == 5 and {m.channel for m in tracks[4] if not m.is_meta} == {2}
    assert tracks[4][0].name == "part 1"
    assert new_notes(out, source) == [(33, 96, 9, 70, 70), (33, 1152, 96, 50, 70)]


def test_new_instruments_take_free_channels_and_share_where_there_are_none(tmp_path):
    out = tmp_path / "out.mid"
    band(tmp_path / "band.mid")
    notes = note_table([(4, 0, 9, 60, 60), (5, 0, 9, 61, 61), (6, 0, 9, 38, 62), (7, 0, 9, 63, 63)])
    assert merge_midi(MidiSource(tmp_path / "band.mid"), out, notes, [0, 40, DRUMS, 0]) == Counter()
    channels = [{m.channel for m in track if not m.is_meta} for track in mido.MidiFile(out).tracks[4:]]
    assert channels == [{2}, {3}, {9}, {2}]
    band(tmp_path / "full.mid", channels=range(16))
    full = MidiSource(tmp_path / "full.mid")
    notes = note_table([(len(full.parts), 0, 9, 90, 60)])
    assert merge_midi(full, out, notes, [56]) == Counter(channel_shared=1)
    shared = mido.MidiFile(out).tracks[-1]
    assert [m.channel for m in shared if not m.is_meta] == [1, 1]  # the horn's: brass, as a trumpet is
    assert not any(m.type == "program_change" for m in shared)


def test_the_old_notes_of_a_cell_go(source, tmp_path):
    out = tmp_path / "out.mid"
    notes = source.score.notes
    removed = notes[(notes["track"] == 0) & (notes["onset"] >= 384) & (notes["onset"] < 768)]
    assert merge_midi(source, out, note_table([(0, 384, 384, 41, 99)]), removed=removed) == Counter()
    back = read_score(out).notes
    assert len(back) == len(notes) - 4 + 1
    old, new = timed_events(source.path)[1], timed_events(out)[1]
    assert sum((old - new).values()) == 8 and sum((new - old).values()) == 2
    assert not any("pitchwheel" in message for _, message in old - new)


def test_only_new_leaves_the_conductor_and_the_setup(source, tmp_path):
    out = tmp_path / "out.mid"
    merge_midi(source, out, note_table([(0, 384, 96, 50, 99)]), only_new=True)
    assert read_score(out).notes[["onset", "pitch"]].tolist() == [(384, 50)]
    assert timed_events(out)[0] == timed_events(source.path)[0]


def test_kept_notes_stay_whole(source, tmp_path):
    """A reader ends the oldest note of a pitch: a new one struck inside a kept one would have taken its end."""
    out = tmp_path / "out.mid"
    notes = note_table([(0, 50, 400, 40, 1), (0, 96, 600, 40, 2), (0, 200, 300, 99, 3), (0, 300, 50, 99, 4)])
    assert merge_midi(source, out, notes) == Counter(held_dropped=1, overlap_cut=3)
    expected = [(33, 96, 288, 40, 2), (33, 200, 100, 99, 3), (33, 300, 50, 99, 4)]
    assert new_notes(out, source) == expected
    for read in (read_with_symusic, read_with_miditoolkit):
        assert not set(source.score.notes.tolist()) - set(read(out).notes.tolist())


def test_two_kits_of_one_track_share_their_channel(tmp_path):
    """They are two parts on channel 10, and overlaps were looked for part by part: each pair of events here was written
    twice, and a reader ended the first note with what was meant for the second."""
    drums = mido.MidiTrack()
    for kit in (0, 25):
        drums.append(mido.Message("program_change", channel=9, program=kit))
        drums += [mido.Message(f"note_{what}", channel=9, note=38, velocity=9, time=48) for what in ("on", "off")]
    band(tmp_path / "kits.mid", channels=(0,), extra=[drums])
    source = MidiSource(tmp_path / "kits.mid")
    assert [part.channel for part in source.parts] == [0, 9, 9]
    notes = note_table([(1, 960, 20, 36, 70), (2, 960, 30, 36, 71), (1, 1056, 96, 42, 72), (2, 1080, 20, 42, 73)])
    out = tmp_path / "out.mid"
    assert merge_midi(source, out, notes) == Counter(duplicate_dropped=1, overlap_cut=1)
    expected = [(DRUMS, 960, 30, 36, 71), (DRUMS, 1056, 24, 42, 72), (DRUMS, 1080, 20, 42, 73)]
    assert new_notes(out, source) == expected
    assert not list((timed_events(source.path)[2] - timed_events(out)[2]).elements())


def test_a_single_track_file_gets_company(tmp_path):
    """Type 0 holds one track: with a new instrument the file becomes type 1."""
    file = mido.MidiFile(type=0, ticks_per_beat=96)
    file.tracks.append(mido.MidiTrack([mido.Message("note_on", note=60), mido.Message("note_off", note=60, time=96)]))
    file.save(tmp_path / "one.mid")
    source = MidiSource(tmp_path / "one.mid")
    assert merge_midi(source, tmp_path / "same.mid", note_table([(0, 96, 96, 60, 9)])) == Counter()
    assert split(tmp_path / "same.mid").kind == 0
    merge_midi(source, tmp_path / "two.mid", note_table([(1, 96, 96, 60, 9)]), [48])
    assert split(tmp_path / "two.mid").kind == 1
    assert read_score(tmp_path / "two.mid").instruments.tolist() == [0, 48]


def test_damage_is_one_line(tmp_path):
    with pytest.raises(MidiError, match="cannot be read"):
        MidiSource(tmp_path / "nowhere.mid")
    events = bytes((0, 0xF8, 0, 0x90, 60, 64, 96, 0x80, 60, 0, 0, 0xFF, 0x2F, 0))  # a clock message: not in files
    (tmp_path / "status.mid").write_bytes(header(0, 1, 96) + b"MTrk" + len(events).to_bytes(4, "big") + events)
    assert read_score(tmp_path / "status.mid").num_notes == 1
    with pytest.raises(MidiError, match=r"status.mid.*0xf8") as caught:
        MidiSource(tmp_path / "status.mid")
    assert "\n" not in str(caught.value)


def test_real_files_keep_every_event(real_midi, tmp_path):
    """Notes at random places, some old ones gone: all the rest is there, and reads as before."""
    rng, checked, out = np.random.default_rng(0), 0, tmp_path / "out.mid"
    for path in readable_sample(real_midi, share=0.02):
        try:
            source = MidiSource(path)
            before = timed_events(path)
        except (MidiError, OSError, ValueError, EOFError, KeyError):
            continue
        old = source.score.notes
        if not len(old) or len(before) != len(source.tracks):
            continue
        gone = old[rng.random(len(old)) < 0.1]
        gone_rows = set(gone.tolist())
        is_kept = np.array([row not in gone_rows for row in old.tolist()])
        rows = [
            (rng.integers(len(source.parts) + 1), rng.integers(source.score.end_tick), 50, rng.integers(128), 64)
            for _ in range(20)
        ]
        counts = merge_midi(source, out, note_table(rows), [19], removed=gone)
        after = timed_events(out)
        lost = sum((sum((a - b).values()) for a, b in zip(before, after)), 0)
        assert lost <= 2 * (~is_kept).sum()
        assert not any("note_" not in message for a, b in zip(before, after) for _, message in a - b), path
        back = read_score(out)
        names = ["onset", "duration", "pitch", "velocity"]
        kept, found = [Counter(map(tuple, notes[names].tolist())) for notes in (old[is_kept], back.notes)]
        assert not kept - found
        assert {(n[0], *n[2:]) for n in found - kept} <= {(row[1], *row[3:]) for row in rows}, path
        assert len(back.notes) == is_kept.sum() + 20 - counts["held_dropped"] - counts["duplicate_dropped"]
        checked += 1
    assert checked > 15


def test_a_long_name_is_cut_between_characters(tmp_path):
    """127 bytes are what a new track's name may have, and the last one was half of an é."""
    name = ("xx" + "é" * 100).encode()
    events = [(0, b"\xff\x03\x81\x4a" + name), (0, b"\xc0\x21"), (0, b"\x90\x3c\x5a"), (96, b"\x80\x3c\x00")]
    chunk = track_chunk([*events, (192, b"\xc0\x05"), (384, b"\xff\x2f\x00")])
    (tmp_path / "a.mid").write_bytes(header(0, 1, 96) + chunk)
    counts = merge_midi(MidiSource(tmp_path / "a.mid"), tmp_path / "b.mid", note_table([(0, 200, 40, 64, 80)]))
    assert counts["own_channel"] == 1
    names = [track.name for track in read_score(tmp_path / "b.mid").tracks]
    assert names == ["xx" + "é" * 100, "xx" + "é" * 62]


def test_a_note_of_a_chord_may_be_removed_alone(tmp_path):
    """What is removed are rows of the note table; all that began with one went."""
    chunk = track_chunk(
        [(0, bytes((0x90, pitch, 90))) for pitch in (60, 64, 67)] + [(96, bytes((0x80, p, 0))) for p in (60, 64, 67)]
    )
    (tmp_path / "a.mid").write_bytes(header(0, 1, 96) + chunk)
    source = MidiSource(tmp_path / "a.mid")
    removed = source.score.notes[source.score.notes["pitch"] == 64]
    merge_midi(source, tmp_path / "b.mid", note_table(), removed=removed)
    assert read_score(tmp_path / "b.mid").notes["pitch"].tolist() == [60, 67]
