"""Each stated rule on a hand-made score; then every real file against a slow reading of the same rules."""

from __future__ import annotations

import sys
from collections import Counter
from fractions import Fraction
from math import floor

import numpy as np
import pytest

from meloformer.hid import Tokenizer, Vocabulary, quantize
from meloformer.hid.tokenizer import canonical_order, mean_polyphony, reorder_tracks
from meloformer.midi import MidiError, Score, Track, note_table, read_score
from tests.midi.real_files import readable_sample

V = Vocabulary()
TOKENIZER = Tokenizer(V)


def score_of(*notes, tracks=1, tpq=24, **kwargs) -> Score:
    """Notes as (onset, duration, pitch[, track])."""
    rows = [(n[3] if len(n) > 3 else 0, n[0], n[1], n[2], 64) for n in notes]
    return Score(tpq, [Track(0) for _ in range(tracks)], note_table(rows), **kwargs)


def columns(score: Score) -> list[tuple]:
    return [(int(n["onset"]), int(n["duration"]), int(n["pitch"])) for n in score.notes]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    ("program", "row", "message"),
    [
        (200, (0, 0, 24, 60, 90), "a program outside 0..127"),
        (0, (0, 0, 24, 200, 90), "a pitch outside 0..127"),
        (0, (0, 0, 24, 60, 200), "a velocity outside 0..127"),
        (0, (1, -96, 24, 60, 90), "a note before tick 0"),
        (0, (2, 0, 24, 60, 90), "a note of a track that is not there: the score has 2"),
    ],
)
def test_what_no_stream_can_hold_is_refused(program, row, message, quantized):
    """Pitch 200 was written as L_576 and program 200 as T_71, streams that nothing decodes; write_midi refused them."""
    notes = note_table([(0, 0, 24, 64, 90), row])
    score = Score(24, [Track(program), Track(33)], notes, quantized=quantized, num_bars=1 if quantized else None)
    with pytest.raises(MidiError, match=message):
        TOKENIZER.encode(score)


def test_halves_round_up_and_notes_last_at_least_a_tick():
    score = quantize(score_of((10, 1, 60), (30, 19, 62), tpq=480), V)  # 0.5 ticks -> 1; 1.5 -> 2, end 2.45 -> 2
    assert columns(score) == [(1, 1, 60), (2, 1, 62)]


def test_a_repeated_pitch_ends_the_note_before_it():
    score = quantize(score_of((0, 100, 60), (24, 24, 60)), V)
    assert columns(score) == [(0, 24, 60), (24, 24, 60)]
    assert score.counts["overlaps"] == 1


def test_a_long_note_never_rounds_up_into_its_repetition():
    """57 ticks is nearest to 59, but the pitch comes again after 57."""
    score = quantize(score_of((0, 57, 60), (57, 24, 60), (0, 57, 40)), V)
    assert columns(score) == [(0, 59, 40), (0, 53, 60), (57, 24, 60)]
    assert score.counts["durations_rounded"] == 2


def test_of_a_note_struck_twice_the_longer_stays():
    score = quantize(score_of((0, 24, 60), (0, 48, 60), (0, 12, 60)), V)
    assert columns(score) == [(0, 48, 60)]
    assert score.counts["duplicate_notes"] == 2


def test_stray_notes_beyond_a_long_gap_are_dropped():
    notes = [(24 * i, 12, 60) for i in range(200)]
    far = 96 * 27_663
    score = quantize(score_of(*notes, (far, 24, 60)), V)
    assert score.num_bars == 50 and score.counts["stray_notes"] == 1
    kept = quantize(score_of(*notes[:50], (far, 24, 60)), V)  # two in a hundred are no strays
    assert kept.num_bars == 27_664 and not kept.counts["stray_notes"]


def test_a_piece_of_a_million_bars_is_refused_in_one_line():
    with pytest.raises(MidiError, match=r"1,000,001 bars"):
        quantize(score_of((96 * 1_000_000, 24, 60)), V)


def test_meters_that_the_table_does_not_hold():
    def meters(n, d):
        score = quantize(score_of((0, 24, 60), (24 * 130, 24, 60), meters=[(0, n, d)]), V)
        return [tuple(m)[1:] for m in score.meters.tolist()], +score.counts

    assert meters(8, 32) == ([(1, 4)], Counter(meters_rewritten=1))
    assert meters(1, 1) == ([(4, 4)], Counter(meters_rewritten=1))
    assert meters(65, 4) == ([(5, 4)], Counter(meters_split=1))
    assert meters(12, 2) == ([(4, 2)], Counter(meters_split=1))
    assert meters(97, 4) == ([(4, 4)], Counter(meters_replaced=1))
    assert meters(0, 4) == ([(4, 4)], Counter(meters_replaced=1))
    assert meters(17, 16) == ([(17, 16)], Counter())
    assert meters(1, 4) == ([(4, 4)], Counter(meter_quarter_throughout=1))


def test_a_meter_change_inside_a_bar_cuts_it_to_a_sixteenth():
    score = quantize(score_of((0, 24, 60), (400, 24, 60), meters=[(0, 4, 4), (96 + 38, 3, 4)]), V)
    # the change stands 38 ticks into the second bar, which is nearest to 6 sixteenths
    assert score.meters.tolist() == [(0, 4, 4), (96, 3, 8), (132, 3, 4)]
    assert score.counts["bars_cut"] == 1
    # a cut bar takes the place of a meter that did not last for a whole bar
    score = quantize(score_of((0, 24, 60), (400, 24, 60), meters=[(0, 4, 4), (96, 3, 2), (96 + 48, 3, 4)]), V)
    assert score.meters.tolist() == [(0, 4, 4), (96, 1, 2), (144, 3, 4)]
    restated = quantize(score_of((0, 24, 60), (400, 24, 60), meters=[(0, 4, 4), (134, 4, 4)]), V)
    assert restated.meters.tolist() == [(0, 4, 4)]


def test_meters_that_last_for_no_bar_are_counted():
    """A real file's 3/4 for five ticks, and its 7/8 behind the last note, went without a trace."""
    notes, meters = (
        [(24 * i, 24, 60) for i in range(16)],
        [(0, 4, 4), (96, 3, 4), (97, 5, 4), (1300, 7, 8), (1400, 7, 8)],
    )
    score = quantize(score_of(*notes, meters=meters), V)
    assert score.meters.tolist() == [(0, 4, 4), (96, 5, 4)]
    assert score.counts["meters_dropped"] == 2  # the second 7/8 restates the first
    assert not quantize(score_of(*notes, meters=[*meters[:1], (1300, 4, 4)]), V).counts["meters_dropped"]
    # a meter in the gap before a stray note goes with it
    notes = [(24 * i, 24, 60) for i in range(200)]
    score = quantize(score_of(*notes, (96 * 500, 24, 60), meters=[(0, 4, 4), (96 * 300, 3, 4)]), V)
    assert score.counts["stray_notes"] == score.counts["meters_dropped"] == 1


def test_a_pick_up_bar_keeps_its_length():
    score = quantize(score_of((0, 24, 60), (24, 24, 60), (120, 24, 60), meters=[(0, 1, 4), (24, 4, 4)]), V)
    assert score.bar_lines().tolist() == [0, 24, 120, 216]


def test_small_tempo_changes_are_carried_forward_and_seconds_are_kept():
    rng = np.random.default_rng(0)
    qpm = 120 * np.exp(np.cumsum(rng.normal(0, 0.01, 400)))
    tempos = [(24 * i, float(q)) for i, q in enumerate(qpm)]
    score = score_of(*[(24 * i, 24, 60) for i in range(400)], tempos=tempos)
    grid = quantize(score, V)
    assert 1 < len(grid.tempos) < 80
    assert np.isin(grid.tempos["tick"], grid.bar_lines()).all()
    lines = grid.bar_lines()[:-1]
    drift = np.abs(grid.seconds_at(lines) - score.seconds_at(lines))
    assert drift.max() < 0.25, "the written tempos run away from the played ones"
    assert (np.abs(np.diff(grid.tempos["qpm"]) / grid.tempos["qpm"][:-1]) > 0.03).all()


def test_one_steady_tempo_is_written_once_whatever_its_fraction():
    score = quantize(score_of(*[(24 * i, 24, 60) for i in range(900)], tempos=[(0, 133.4), (960, 133.4)]), V)
    assert score.tempos.tolist() == [(0, 133.0)]


def test_tracks_without_notes_go_and_the_order_is_accompaniment_first():
    tracks = [Track(73), Track(0), Track(48), Track(33), Track(0, is_drum=True), Track(0)]
    notes = [(0, 0, 24, 72, 64), (2, 0, 24, 60, 64), (2, 0, 24, 64, 64), (3, 0, 24, 33, 64), (4, 0, 6, 36, 64)]
    score = quantize(Score(24, tracks, note_table([*notes, (5, 0, 24, 40, 64)])), V)
    assert score.counts["empty_tracks"] == 1
    ordered = reorder_tracks(score, canonical_order(score))
    assert ordered.instruments.tolist() == [128, 0, 33, 48, 73]  # the low piano is a bass by its pitch


def test_mean_polyphony_counts_sounding_time_only():
    notes = note_table([(0, 0, 24, 60, 64), (0, 12, 12, 64, 64), (0, 480, 24, 60, 64)])
    assert mean_polyphony(notes, np.array([0, len(notes)])) == pytest.approx([60 / 48])


def crowded(seed: int) -> Score:
    """Few pitches and onsets, so that notes are struck twice, run into each other, and lie between two grid ticks."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 400))
    rows = [rng.integers(0, high, n) for high in (3, 300, 2000, 4)] + [rng.integers(0, 128, n)]
    rows[1] *= int(rng.choice([1, 7, 20]))
    rows[3] += 60
    tracks = [Track(0), Track(0), Track(33)]
    return Score(int(rng.choice([24, 96, 100, 480])), tracks, note_table([tuple(row) for row in np.stack(rows, 1)]))


@pytest.mark.parametrize("seed", range(25))
def test_the_note_rules_on_crowded_music(seed, monkeypatch):
    """The fast way against `slow_notes`; and the way of numbers too large to be packed, which no real file needs."""
    score = crowded(seed)
    grid = quantize(score, V)
    numbers = np.unique(score.notes["track"]).tolist()
    if not grid.counts["stray_notes"]:
        assert grid.notes.tolist() == [(numbers.index(t), *rest) for t, *rest in slow_notes(score)]
    monkeypatch.setattr(sys.modules[quantize.__module__], "_num_bits", lambda column: 64)
    wide = quantize(score, V)
    assert wide == grid and wide.counts == grid.counts


def test_notes_given_as_columns_in_any_order_are_the_same_piece():
    score = crowded(3)
    mixed = score.columns.take(np.random.default_rng(0).permutation(score.num_notes))
    assert quantize(Score(score.ticks_per_quarter, score.tracks, mixed), V) == quantize(score, V)
    assert Score(score.ticks_per_quarter, score.tracks, mixed).notes.dtype == score.notes.dtype
    lazy = Score(score.ticks_per_quarter, score.tracks, score.columns)
    assert lazy.num_notes == score.num_notes and lazy.end_tick == score.end_tick and lazy == score
    lazy.notes["onset"] += 5  # whoever looked at the table may change it, and the columns follow
    assert (lazy.columns.onset == score.columns.onset + 5).all()


# --- every real file -----------------------------------------------------------------------------------------


def slow_notes(score: Score) -> list[tuple]:
    """The note rules, one note at a time with exact fractions: (track, onset, duration, pitch, velocity)."""
    by_pitch: dict[tuple, list] = {}
    for track, onset, duration, pitch, velocity in score.notes.tolist():
        start = floor(Fraction(onset * V.resolution, score.ticks_per_quarter) + Fraction(1, 2))
        end = floor(Fraction((onset + duration) * V.resolution, score.ticks_per_quarter) + Fraction(1, 2))
        by_pitch.setdefault((track, pitch), []).append((start, max(end - start, 1), velocity))
    out = []
    durations = V.durations.tolist()
    for (track, pitch), notes in by_pitch.items():
        best: dict[int, tuple] = {}
        for start, length, velocity in notes:
            best[start] = max(best.get(start, (0, 0)), (length, velocity))
        starts = sorted(best)
        for start, following in zip(starts, [*starts[1:], None]):
            length, velocity = best[start]
            room = following - start if following is not None else 10**12
            length = min(length, room)
            nearest = min(durations, key=lambda d: (abs(d - length), -d))
            if nearest > room:
                nearest = max(d for d in durations if d <= room)
            out.append((track, start, nearest, pitch, max(velocity, 1) // 4 * 4 + 2))
    return sorted(out, key=lambda n: (n[0], n[1], n[3]))


def test_every_real_file_survives_the_round_trip(real_midi):
    """decode(encode(score)) equals the score after the documented quantisation; notes also against `slow_notes`."""
    checked = 0
    for number, path in enumerate(readable_sample(real_midi, share=0.06)):
        try:
            score = read_score(path)
            grid = TOKENIZER.quantize(score)
        except MidiError:
            continue
        tokens = TOKENIZER.encode(score, order="given")
        assert TOKENIZER.decode(tokens) == grid, path
        assert TOKENIZER.decode(TOKENIZER.encode(score)) == reorder_tracks(grid, canonical_order(grid)), path
        if number % 10 == 0 and not grid.counts["stray_notes"] and score.num_notes < 20_000:
            numbers = np.unique(score.notes["track"]).tolist()
            slow = [(numbers.index(t), *rest) for t, *rest in slow_notes(score)]
            assert grid.notes.tolist() == slow, path
        checked += 1
    assert checked > 50
