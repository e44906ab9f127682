"""What is written comes back: through both readers, for made scores and for real files."""

from __future__ import annotations

from collections import Counter

import miditoolkit
import mido
import numpy as np
import pytest
import symusic

from meloformer.midi import MidiError, Score, Track, note_table, read_score, write_midi
from meloformer.midi.chunks import MAX_DELTA
from meloformer.midi.read import read_with_miditoolkit, read_with_symusic
from tests.midi.real_files import readable_sample

READERS = [read_with_symusic, read_with_miditoolkit]


def assert_same_music(back: Score, score: Score) -> None:
    """Equal as scores are, tempos to the microsecond a quarter."""
    assert back.ticks_per_quarter == score.ticks_per_quarter
    assert back.instruments.tolist() == score.instruments.tolist()
    assert np.array_equal(back.notes, score.notes)
    assert np.array_equal(back.meters, score.meters)
    assert np.array_equal(back.tempos["tick"], score.tempos["tick"])
    microseconds = [np.round(60_000_000 / s.tempos["qpm"]) for s in (back, score)]
    assert np.array_equal(*microseconds)


@pytest.fixture
def band() -> Score:
    """Two tracks of one program in unison, drums, a pick-up bar, changes of meter and tempo, a triplet."""
    return Score(
        24,
        [Track(33, name="Баян"), Track(25), Track(0, is_drum=True, name="kit"), Track(33)],
        note_table(
            [
                (0, 0, 24, 40, 90),
                (0, 24, 24, 40, 1),
                (1, 8, 8, 60, 127),
                (1, 16, 8, 62, 64),
                (2, 0, 6, 36, 100),
                (2, 0, 6, 42, 50),
                (3, 0, 24, 40, 80),
                (3, 480, 768, 40, 80),
            ]
        ),
        [(0, 1, 4), (24, 3, 4), (96, 7, 8)],
        [(0, 90.0), (24, 133.7), (25, 320.0), (100, 4.0)],
    )


@pytest.mark.parametrize("read", READERS)
def test_a_band_comes_back(read, band, tmp_path):
    assert write_midi(band, tmp_path / "band.mid") == Counter()
    back = read(tmp_path / "band.mid")
    assert_same_music(back, band)
    assert [track.name for track in back.tracks] == [track.name for track in band.tracks]
    assert len(miditoolkit.MidiFile(tmp_path / "band.mid").instruments) == 4
    assert len(symusic.Score(tmp_path / "band.mid").tracks) == 4


def channels_of(path) -> list[int]:
    """The channel of each track of the file but the first."""
    return [next(e.channel for e in track if e.type == "program_change") for track in mido.MidiFile(path).tracks[1:]]


def test_drums_are_on_channel_10_and_a_program_has_one_channel(band, tmp_path):
    write_midi(band, tmp_path / "band.mid")
    assert channels_of(tmp_path / "band.mid") == [0, 1, 9, 0]
    assert mido.MidiFile(tmp_path / "band.mid").type == 1


def test_a_sixteenth_program_joins_its_family(tmp_path):
    """Fifteen melodic channels are all there are; the sixteenth program used to land on the drums or on a piano."""
    programs = [8 * family for family in range(15)] + [43, 127, 43]  # no program of the last family has a channel
    score = Score(24, [Track(p) for p in programs], note_table([(i, 0, 9, 60, 64) for i in range(len(programs))]))
    path = tmp_path / "many.mid"
    assert write_midi(score, path) == Counter(channel_shared=3)
    channels = channels_of(path)
    assert channels[:15] == [c for c in range(16) if c != 9]
    assert channels[15:] == [channels[5], channels[14], channels[5]]
    back = read_score(path)
    assert [track.program for track in back.tracks][15:] == [40, 112, 40]  # each sounds as the channel does
    assert back.num_notes == score.num_notes


def test_a_note_ends_where_the_same_pitch_begins_again(tmp_path):
    """Held notes under repeated ones: a note-off would end the wrong one."""
    score = Score(
        24, [Track(0)], note_table([(0, 0, 96, 60, 1), (0, 24, 96, 60, 2), (0, 24, 10, 60, 3), (0, 50, 5, 61, 4)])
    )
    assert write_midi(score, tmp_path / "cut.mid") == Counter(overlap_cut=1, duplicate_dropped=1)
    back = read_score(tmp_path / "cut.mid").notes[["onset", "duration", "pitch", "velocity"]]
    assert back.tolist() == [(0, 24, 60, 1), (24, 96, 60, 2), (50, 5, 61, 4)]


def test_the_file_ends_with_the_last_bar(tmp_path):
    """A quantized score may end with empty bars, and they are part of its length."""
    score = Score(24, [Track(0)], note_table([(0, 0, 24, 60, 64)]), num_bars=4, quantized=True)
    write_midi(score, tmp_path / "long.mid")
    assert sum(event.time for event in mido.MidiFile(tmp_path / "long.mid").tracks[0]) == 4 * 96


def test_kits_agree_on_their_channel(tmp_path):
    """Channel 10 can have one kit at a time, whatever order a player takes the tracks in."""
    score = Score(24, [Track(25, True), Track(0, True)], note_table([(0, 0, 9, 36, 64), (1, 0, 9, 38, 64)]))
    write_midi(score, tmp_path / "kits.mid")
    assert [track.program for track in read_score(tmp_path / "kits.mid").tracks] == [25, 25]


def test_an_empty_score_is_a_file(tmp_path):
    write_midi(Score(480), tmp_path / "empty.mid")
    assert read_score(tmp_path / "empty.mid") == Score(480)


@pytest.mark.parametrize(
    "score, reason",
    [
        (Score(40000), "ticks per quarter"),
        (Score(24, meters=[(0, 4, 3)]), "4/3"),
        (Score(24, meters=[(0, 0, 4)]), "0/4"),
        (Score(24, tempos=[(0, 0.0)]), "tempo"),
        (Score(24, [Track(0)], note_table([(0, -1, 5, 60, 64)])), "before tick 0"),
        (Score(24, [Track(0)], note_table([(0, 0, 5, 200, 64)])), "pitch"),
        (Score(24, [Track(0)], note_table([(0, 0, 5, 60, 0)])), "velocity"),
        (Score(24, [Track(0)], note_table([(1, 0, 5, 60, 64)])), "track"),
        (Score(24, [Track(128)], note_table([(0, 0, 5, 60, 64)])), "program"),
        (Score(24, [Track(0)], note_table([(0, MAX_DELTA + 1, 5, 60, 64)])), "silence"),
    ],
)
def test_what_midi_cannot_hold_is_refused_and_nothing_is_left(score, reason, tmp_path):
    with pytest.raises(MidiError, match=reason) as caught:
        write_midi(score, tmp_path / "bad.mid")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path, band):
    with pytest.raises(MidiError, match="cannot be written"):
        write_midi(band, tmp_path / "none" / "band.mid")


def without_overlaps(notes: np.ndarray) -> np.ndarray:
    """What the writer promises to keep, note by note: the longest of a unison, up to the next of its pitch."""
    strings: dict[tuple[int, int], list[list[int]]] = {}
    for note in notes[np.argsort(notes["duration"], kind="stable")].tolist():
        strings.setdefault((note[0], note[3]), []).append(list(note))
    kept = []
    for string in strings.values():
        by_onset = {note[1]: note for note in string}  # the last, the longest, stays
        onsets = sorted(by_onset)
        for onset, following in zip(onsets, [*onsets[1:], None]):
            note = by_onset[onset]
            if following is not None:
                note[2] = min(note[2], following - onset)
            kept.append(tuple(note))
    return note_table(kept)


def test_real_files_come_back(real_midi, tmp_path):
    path, kept, cut = tmp_path / "back.mid", 0, 0
    for source in readable_sample(real_midi, share=0.06):
        try:
            score = read_score(source)
        except MidiError:
            continue
        counts = write_midi(score, path)
        if counts["channel_shared"]:
            continue
        if counts["overlap_cut"] or counts["duplicate_dropped"]:
            score.notes = without_overlaps(score.notes)
            cut += 1
        assert_same_music(read_with_symusic(path), score)
        if kept % 8 == 0:  # mido is slow
            assert_same_music(read_with_miditoolkit(path), score)
        kept += 1
    assert kept > cut
