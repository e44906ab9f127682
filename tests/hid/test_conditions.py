"""Conditions of music whose key, chords, density and roles are known by construction."""

from __future__ import annotations

import random

import numpy as np
import pytest

from meloformer.errors import UserError
from meloformer.hid import Tokenizer
from meloformer.hid.conditions import (
    CHORD_TONES,
    CONDITIONS,
    KEY_TONES,
    chord_name,
    derive,
    insert,
    key_name,
    parse_chord,
    parse_key,
    parse_role,
)
from meloformer.hid.conditions.derivation import chord_fit, key_fit, measure
from meloformer.hid.vocabulary import ROLES
from meloformer.midi import Score, Track, note_table, read_score
from tests.data.music import make_score
from tests.hid.streams import VOCABULARY
from tests.midi.real_files import midi_files

TOKENIZER = Tokenizer(VOCABULARY)
PIANO = Track(0)


def score_of(rows, tracks=(PIANO,), num_bars=None, meters=((0, 4, 4),)) -> Score:
    """A quantized score of (track, onset, duration, pitch, velocity) rows in ticks of the grid."""
    notes = note_table(rows)
    last = int(notes["onset"].max()) if len(notes) else 0
    length = 96 * meters[0][1] // meters[0][2]
    return Score(24, list(tracks), notes, meters=meters, num_bars=num_bars or last // length + 1, quantized=True)


def chords_of(score: Score) -> list[tuple[int, int, str]]:
    return [(bar, tick, chord_name(chord)) for bar, tick, chord in derive(score).chords.tolist()]


def block(names: str, length: int, track=0, octave=48) -> list[tuple]:
    """One block chord after another, each so many ticks long, the root doubled below."""
    rows = []
    for i, name in enumerate(names.split()):
        chord = parse_chord(name)
        if chord < 96:
            root = chord // 8
            tones = [octave - 12 + root] + [
                octave + root + step for step in range(12) if CHORD_TONES[chord, (root + step) % 12]
            ]
            rows += [(track, i * length, length, pitch, 80) for pitch in tones]
    return rows


# --- names --------------------------------------------------------------------------------------------------------


def test_every_key_and_chord_has_a_name_that_is_read_back():
    assert [parse_key(key_name(key)) for key in range(24)] == list(range(24))
    assert [parse_chord(chord_name(chord)) for chord in range(97)] == list(range(97))
    assert [parse_role(role.upper()) for role in ROLES] == list(range(6))
    for chord in range(96):  # names agree with the vocabulary's, and tones with the names
        root, quality = VOCABULARY.name(VOCABULARY.token(CONDITIONS["chords"], chord)).split("_")[1:]
        assert parse_chord(root + {"maj": "", "min": "m", "min7": "m7"}.get(quality, quality)) == chord
        assert CHORD_TONES[chord, chord // 8] and CHORD_TONES[chord].sum() in (3, 4)
    for key in range(24):
        pitch, mode = VOCABULARY.name(VOCABULARY.token(CONDITIONS["key"], key)).split("_")[1:]
        assert parse_key(f"{pitch} {mode}") == key and KEY_TONES[key, key % 12]


def test_other_spellings():
    assert {parse_key(text) for text in ("A minor", "Am", "a min", "a moll", "A  Minor")} == {21}
    assert {parse_key(text) for text in ("Db", "C# major", "c#", "D♭ maj")} == {1}
    assert parse_key("Cb") == 11 and parse_key("B#") == 0
    assert [parse_key(text) for text in ("CM", "Cm", "A M", "f#M")] == [0, 12, 9, 6]  # CM was C minor
    spelled = {"CM7": "Cmaj7", "Cmin7": "Cm7", "C-": "Cm", "C+": "Caug", "Co": "Cdim", "Csus": "Csus4", "N.C.": "N"}
    assert all(parse_chord(text) == parse_chord(name) for text, name in spelled.items())


@pytest.mark.parametrize(
    ("parse", "text", "said"),
    [
        (parse_key, "H minor", "key 'H minor': a pitch with"),
        (parse_key, "A lydian", "the nearest is A"),
        (parse_key, "H minor", "H is called B here, so B minor"),  # it was G minor
        (parse_key, "h moll", "H is called B here, so B minor"),
        (parse_chord, "H7", "H is called B here, so B7"),
        (parse_chord, "Hm", "H is called B here, so Bm"),
        (parse_key, "", "key ''"),
        (parse_chord, "Xm7", "chord 'Xm7'"),
        (parse_chord, "Am9", "the nearest is Am"),
        (parse_role, "lead", "drums, bass, chords, melody, pad, other"),
    ],
)
def test_unknown_names_are_one_line_with_the_nearest(parse, text, said):
    with pytest.raises(UserError) as error:
        parse(text)
    assert said in str(error.value) and "\n" not in str(error.value)


# --- key and chords -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", range(12))
def test_the_key_of_a_cadence_in_every_key(root):
    for mode, steps in (
        ("major", ((0, 4, 7), (5, 9, 12), (7, 11, 14), (0, 4, 7))),
        ("minor", ((0, 3, 7), (5, 8, 12), (7, 11, 14), (0, 3, 7))),
    ):
        rows = [(0, 48 * i, 48, 48 + root + step, 80) for i, chord in enumerate(steps) for step in chord]
        assert key_name(derive(score_of(rows)).key) == key_name(root + 12 * (mode == "minor"))


def test_drums_say_nothing_about_key_and_chords():
    rows = block("Am Dm E Am", 96)
    drums = [(1, 24 * i, 24, 36 + i % 12, 120) for i in range(16)]
    alone, both = derive(score_of(rows)), derive(score_of(rows + drums, (Track(0), Track(0, is_drum=True))))
    assert key_name(alone.key) == "A minor" and both.key == alone.key
    np.testing.assert_array_equal(both.chords, alone.chords)
    nothing = derive(score_of([(0, *row[1:]) for row in drums], (Track(0, is_drum=True),)))
    assert nothing.key is None and nothing.chords.tolist() == [[0, 0, 96]] and nothing.density == 0


def test_every_chord_is_known_by_its_tones():
    for chord in range(96):
        name = chord_name(chord)
        assert chords_of(score_of(block(name, 96)))[0] == (0, 0, name)


def test_chords_stand_at_half_bars_where_they_change():
    rows = block("Am F C G", 48)  # two bars, two chords in each
    assert chords_of(score_of(rows)) == [(0, 0, "Am"), (0, 48, "F"), (1, 0, "C"), (1, 48, "G")]
    rows = block("Am Am F F G G G G", 48)
    assert chords_of(score_of(rows)) == [(0, 0, "Am"), (1, 0, "F"), (2, 0, "G")]
    rows = block("C F G", 72)  # bars of 3/4 are not halved
    assert chords_of(score_of(rows, meters=((0, 3, 4),))) == [(0, 0, "C"), (1, 0, "F"), (2, 0, "G")]
    rows = block("C F G C", 36)  # halves of 6/8
    found = chords_of(score_of(rows, meters=((0, 6, 8),)))
    assert found == [(0, 0, "C"), (0, 36, "F"), (1, 0, "G"), (1, 36, "C")]


def test_a_chord_lasts_as_long_as_its_notes_sound():
    rows = [(0, 0, 288, pitch, 80) for pitch in (48, 52, 55)]  # three bars
    assert chords_of(score_of(rows, num_bars=5)) == [(0, 0, "C"), (3, 0, "N")]


def test_silence_and_a_single_pitch_are_no_chord():
    rows = [*block("C N N G", 96), (0, 4 * 96, 96, 60, 80)]
    assert chords_of(score_of(rows)) == [(0, 0, "C"), (1, 0, "N"), (3, 0, "G"), (4, 0, "N")]


def test_a_bare_fifth_takes_the_third_of_the_piece():
    minor, major = "Am Dm Am Em Am", "A D A E A"
    for names, chord in ((minor, "Am"), (major, "A")):
        rows = block(names, 96) + [(0, 5 * 96, 96, pitch, 80) for pitch in (45, 52, 57)]
        assert chords_of(score_of(rows))[-1][2] == chord


def test_a_passing_note_does_not_split_a_bar():
    rows = block("C", 96) + [(1, 24 * i, 24, pitch, 80) for i, pitch in enumerate((72, 74, 76, 77))]
    assert chords_of(score_of(rows, (Track(0), Track(73)))) == [(0, 0, "C")]


# --- density, polyphony, roles --------------------------------------------------------------------------------------


def test_densities_count_notes_to_a_quarter():
    rows = [(0, 24 * i, 24, 60, 80) for i in range(4)]  # bar 1: one a quarter
    rows += [(1, 96 * 2 + 6 * i, 6, 36, 80) for i in range(16)]  # bar 3: four a quarter, bar 2 is empty
    score = score_of(rows, (Track(73), Track(0, is_drum=True)), num_bars=4)
    m, found = measure(score), derive(score)
    assert m.bar_density.tolist() == [1, 0, 4, 0] and m.track_density.tolist() == [1, 4]
    assert m.density == 20 / 16
    assert found.bar_density.tolist() == [1, 0, 2, 0]
    assert found.density == 0 and found.track_density.tolist() == [3, 9]
    assert found.polyphony.tolist() == [0, -1]


def test_polyphony_is_of_the_time_that_sounds():
    rows = [(0, 0, 48, pitch, 80) for pitch in (60, 64, 67)] + [(0, 48, 24, 60, 80)]
    assert measure(score_of(rows, num_bars=8)).polyphony.tolist() == [(3 * 48 + 24) / 72]
    assert derive(score_of(rows, num_bars=8)).polyphony.tolist() == [4]


def test_roles_of_a_band():
    beat = [(0, 24 * i, 12, 36, 90) for i in range(8)]
    bass = [(1, 48 * i, 48, 33, 90) for i in range(4)]
    low_tuba = [(2, 48 * i, 48, 40, 90) for i in range(4)]
    comping = [(3, 24 * i, 24, pitch, 90) for i in range(8) for pitch in (55, 60, 64)]
    strings = [(4, 0, 192, pitch, 60) for pitch in (60, 64, 67)]
    flute = [(5, 24 * i, 24, 72 + i, 90) for i in range(8)]
    inner = [(6, 24 * i, 24, 50, 90) for i in range(8)]
    seashore = [(7, 0, 192, 60, 90)]
    tracks = [Track(0, is_drum=True), *(Track(program) for program in (33, 58, 0, 48, 73, 60, 122))]
    score = score_of(beat + bass + low_tuba + comping + strings + flute + inner + seashore, tracks)
    roles = ["drums", "bass", "bass", "chords", "pad", "melody", "other", "other"]
    assert [ROLES[role] for role in derive(score).role] == roles


def test_an_empty_score_has_nothing_to_say():
    found = derive(score_of([], (), num_bars=2))
    assert (found.key, found.density, len(found.role)) == (None, None, 0)
    assert [row[3] for row in found.rows(VOCABULARY).tolist()] == [
        VOCABULARY.token(CONDITIONS["bar_density"], 0),
        VOCABULARY.token(CONDITIONS["chords"], 96),
        VOCABULARY.token(CONDITIONS["bar_density"], 0),
    ]


def slow_weights(score: Score) -> np.ndarray:
    """The weights of every half bar, note by note and tick by tick."""
    m = measure(score)
    edges = np.append(score.bar_lines()[m.half_bar] + m.half_tick, score.bar_lines()[-1])
    out = np.zeros((len(m.half_bar), 12))
    for track, onset, duration, pitch, _ in score.notes.tolist():
        if score.tracks[track].is_drum:
            continue
        for tick in range(onset, min(onset + duration, int(edges[-1]))):
            out[np.searchsorted(edges, tick, side="right") - 1, pitch % 12] += 1
    return out


@pytest.mark.parametrize("seed", range(4))
def test_the_weights_are_those_of_the_obvious_loop(seed):
    score = TOKENIZER.quantize(make_score(seed))
    np.testing.assert_allclose(measure(score).weights, slow_weights(score), atol=1e-6)
    few = score_of([(0, 700, 400, 60, 80), (0, 5000, 10, 61, 80)])  # long and thin: the other way to find a half bar
    np.testing.assert_allclose(measure(few).weights, slow_weights(few), atol=1e-6)


def test_rows_are_sorted_and_stand_where_they_belong():
    score = TOKENIZER.quantize(make_score(1))
    rows = derive(score, tag=5).rows(VOCABULARY).tolist()
    assert rows == sorted(rows) and len(rows) > 30
    tokens = insert(TOKENIZER.encode(score, order="given"), rows, VOCABULARY)
    assert [list(control) for control in TOKENIZER.decode(tokens).controls] == rows
    only = derive(score, tag=5).rows(VOCABULARY, ("key", "role"))
    families = {CONDITIONS[name] for name in ("key", "role")}
    assert [row for row in rows if VOCABULARY.family_of[row[3]] in families] == only.tolist()


def test_music21_agrees_where_both_are_sure(real_midi):
    """Keys of whole pieces and chords of block harmonies, on some of the chorales, folk tunes and game music."""
    music21 = pytest.importorskip("music21", reason="music21 is not installed")
    files = [path for path in midi_files(real_midi) if path.parent.name in ("bach_m21", "nottingham", "freedoom")]
    keys = sure = chords = named = 0
    for path in random.Random(0).sample(files, 8):
        score = TOKENIZER.quantize(read_score(path))
        total = measure(score).weights.sum(axis=0)
        fit = np.sort(key_fit(total))
        stream = music21.stream.Stream()
        pitched = [n for n in score.notes.tolist() if not score.tracks[n[0]].is_drum]
        for _, _, duration, pitch, _ in pitched:
            stream.append(music21.note.Note(pitch, quarterLength=duration / 24))
        theirs = music21.analysis.discrete.KrumhanslKessler(stream).getSolution(stream)
        second = theirs.alternateInterpretations[0].correlationCoefficient
        if fit[-1] - fit[-2] > 0.05 and theirs.correlationCoefficient - second > 0.05:
            sure += 1
            keys += parse_key(f"{theirs.tonic.name.replace('-', 'b')} {theirs.mode}") == derive(score).key
        m = measure(score)
        for weights, fits in list(zip(m.weights, chord_fit(m.weights)))[:40]:
            tones = np.flatnonzero(weights > 0.2 * weights.max())
            if fits.max() < 0.9 or len(tones) < 3:
                continue
            chord = music21.chord.Chord([60 + int(tone) for tone in tones])
            if chord.commonName not in ("major triad", "minor triad"):
                continue
            named += 1
            mode = "m" if chord.quality == "minor" else ""
            chords += parse_chord(chord.root().name.replace("-", "b") + mode) == int(fits.argmax())
    assert sure >= 3 and keys / sure >= 0.9, f"{keys} of {sure} keys"
    assert named >= 40 and chords / named >= 0.95, f"{chords} of {named} chords"
