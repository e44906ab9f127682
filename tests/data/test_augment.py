"""Augmentation: always a valid stream within the budget, and always known what was done."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meloformer.config import DataConfig
from meloformer.data.augment import (
    Deferral,
    augment,
    deferred_length,
    deferred_share,
    draw_cells,
    draw_deferral,
    fit_cells,
    growth_bound,
    num_cells,
    scale_velocity,
    track_slices,
    transpose,
    transpositions,
)
from meloformer.data.draws import generator, key, uniform
from meloformer.hid import Family, Tokenizer
from meloformer.hid.controls import strip
from meloformer.midi import DRUMS, Score, Track, note_table
from tests.data.music import make_score
from tests.hid.streams import VOCABULARY, random_stream

TOKENIZER = Tokenizer(VOCABULARY)
CONFIG = DataConfig(
    data_dir="x",
    transpose_probability=0.8,
    velocity_probability=0.8,
    drop_track_probability=0.5,
    shuffle_tracks_probability=0.5,
)
OFF = replace(CONFIG, **{name: 0.0 for name in vars(CONFIG) if name.endswith("_probability")})


def pitches(tokens: np.ndarray, drums: bool) -> list[int]:
    a = TOKENIZER.annotate(tokens)
    at = (a.type == Family.PITCH) & ((a.instrument == DRUMS) == drums)
    return VOCABULARY.value_of[tokens][at].tolist()


def written(tokens: np.ndarray) -> np.ndarray:
    return np.array([int((track == VOCABULARY.BAR).sum()) for track in track_slices(tokens, VOCABULARY)[1]])


def test_transposition_moves_every_pitch_but_the_drums():
    tokens = TOKENIZER.encode(make_score(0))
    up = transpose(tokens, 3, VOCABULARY)
    TOKENIZER.validate(up)
    assert pitches(up, drums=False) == [p + 3 for p in pitches(tokens, drums=False)]
    assert pitches(up, drums=True) == pitches(tokens, drums=True)
    np.testing.assert_array_equal(transpose(up, -3, VOCABULARY), tokens)


def test_transposition_never_leaves_the_keyboard():
    notes = note_table([(0, 0, 24, 2, 80), (0, 24, 24, 126, 80), (1, 0, 24, 0, 80)])
    tokens = TOKENIZER.encode(Score(24, [Track(0), Track(0, is_drum=True)], notes))
    assert transpositions(tokens, 5, VOCABULARY).tolist() == [-2, -1, 1]
    with pytest.raises(ValueError, match=r"0\.\.127"):
        transpose(tokens, 2, VOCABULARY)


def test_keys_and_chords_move_with_the_pitches():
    v = VOCABULARY
    names = {"KEY_B_minor": "KEY_C_minor", "CHORD_A_min7": "CHORD_Bb_min7", "CHORD_NONE": "CHORD_NONE"}
    head = [v.BOS, v.names.index("KEY_B_minor"), v.CONDUCTOR, v.BAR, v.meter(4, 4), v.tempo(120)]
    chords = [v.time(0), v.names.index("CHORD_A_min7"), v.time(48), v.names.index("CHORD_NONE")]
    up = transpose(np.array([*head, *chords, v.EOS]), 1, v)
    TOKENIZER.validate(up)
    assert [v.name(up[i]) for i in (1, 7, 9)] == list(names.values())


def test_velocities_stay_in_their_bins():
    tokens = TOKENIZER.encode(make_score(1))
    kind = VOCABULARY.family_of[tokens]
    for factor in (0.01, 0.5, 1.0, 1.3, 50.0):
        out = scale_velocity(tokens, factor, VOCABULARY)
        TOKENIZER.validate(out)
        np.testing.assert_array_equal(out[kind != Family.VELOCITY], tokens[kind != Family.VELOCITY])
        np.testing.assert_array_equal(VOCABULARY.family_of[out], kind)
    np.testing.assert_array_equal(scale_velocity(tokens, 1.0, VOCABULARY), tokens)


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 100_000), st.sampled_from(Deferral), st.floats(0, 0.999), st.integers(0, 60))
def test_an_augmented_stream_is_valid_and_within_the_budget(seed, deferral, level, room):
    tokens = random_stream(seed, max_length=250, masks=False)
    before = tokens.copy()
    budget = len(tokens) + room
    out, done = augment(tokens, TOKENIZER, CONFIG, generator(seed, 0, "test", 1), deferral, level, budget)
    TOKENIZER.validate(out)
    assert len(out) <= budget and out.dtype == np.uint16
    np.testing.assert_array_equal(tokens, before)
    head, tracks, end = track_slices(before, VOCABULARY)
    if len(done.tracks) < len(tracks):
        head = strip(head, ("density", "bar_density"), VOCABULARY)  # of fewer tracks they would be false
    plain = np.concatenate([head, *(tracks[i] for i in done.tracks), end])
    # Undo what is said to have been done: what is left is the window, but for loudness.
    back = transpose(TOKENIZER.undefer(out), -done.transpose, VOCABULARY)
    louder = scale_velocity(plain, done.loudness, VOCABULARY)
    np.testing.assert_array_equal(back, louder)
    assert int((out == VOCABULARY.MASK).sum()) == len(done.cells)


def test_with_every_probability_at_zero_a_window_stays_as_it_is():
    tokens = TOKENIZER.encode(make_score(2))
    out, done = augment(tokens, TOKENIZER, OFF, generator(0, 0, "test"), Deferral.NONE, 0.5, 10_000)
    np.testing.assert_array_equal(out, tokens)
    assert (done.transpose, done.loudness, done.deferral) == (0, 1.0, Deferral.NONE)


def test_at_least_half_of_the_tracks_stay_and_all_orders_come():
    tokens = TOKENIZER.encode(make_score(4))
    seen, counts = set(), Counter()
    for i in range(200):
        config = replace(OFF, drop_track_probability=1.0, shuffle_tracks_probability=1.0)
        _, done = augment(tokens, TOKENIZER, config, generator(0, 0, "test", i), Deferral.NONE, 0.0, 10_000)
        counts[len(done.tracks)] += 1
        seen.add(done.tracks[:1])
    assert set(counts) == {3, 4} and len(seen) == 5


# --- deferral -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 10_000), st.sampled_from(list(Deferral)), st.floats(0, 0.999), st.integers(1, 9), st.integers(1, 40)
)
def test_cells_are_as_many_as_the_plan_was_told(seed, deferral, level, num_tracks, num_bars):
    cells = draw_cells(deferral, level, num_tracks, num_bars, np.random.default_rng(seed))
    count = int(num_cells(deferral, level, num_tracks, num_bars))
    assert len({tuple(cell) for cell in cells.tolist()}) == len(cells) <= count
    if deferral != Deferral.RECTANGLES:
        assert len(cells) == count
    if len(cells):
        assert cells.min() >= 0 and cells[:, 0].max() < num_tracks and cells[:, 1].max() < num_bars
    if deferral == Deferral.CONTINUATION:
        assert (np.bincount(cells[:, 0]) == num_bars - cells[:, 1].min()).all()
        assert num_bars == 1 or cells[:, 1].min() >= 1
    if deferral == Deferral.TRACKS:
        assert (np.bincount(cells[:, 0])[np.unique(cells[:, 0])] == num_bars).all()
        assert num_tracks == 1 or len(np.unique(cells[:, 0])) < num_tracks


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 100_000), st.sampled_from(list(Deferral)), st.floats(0, 0.999))
def test_the_length_of_a_deferred_stream_is_known_beforehand(seed, deferral, level):
    tokens = random_stream(seed, max_length=250, masks=False, tracks=True)
    bars = written(tokens)
    num_bars = int((track_slices(tokens, VOCABULARY)[0] == VOCABULARY.BAR).sum())
    cells = draw_cells(deferral, level, len(bars), num_bars, np.random.default_rng(seed))
    moved = TOKENIZER.defer(tokens, [tuple(cell) for cell in cells.tolist()])
    assert len(moved) == deferred_length(len(tokens), bars, cells)
    assert len(moved) <= len(tokens) + growth_bound(deferral, level, len(bars), num_bars, bars.sum())
    segments = TOKENIZER.annotate(tokens).segment.max(initial=-1)
    assert TOKENIZER.annotate(moved).segment.max(initial=-1) == segments, "deferring makes no segments"


def test_no_more_cells_are_given_up_than_it_takes():
    tokens = TOKENIZER.encode(make_score(5))
    bars = written(tokens)
    cells = draw_cells(Deferral.CONTINUATION, 0.2, len(bars), 12, np.random.default_rng(0))
    full = deferred_length(len(tokens), bars, cells)
    for budget in range(len(tokens), full + 1, 3):
        kept = fit_cells(cells, len(tokens), bars, budget)
        assert deferred_length(len(tokens), bars, kept) <= budget
        if len(kept) < len(cells):
            one_more = cells[len(cells) - len(kept) - 1 :]
            assert deferred_length(len(tokens), bars, one_more) > budget
    np.testing.assert_array_equal(fit_cells(cells, len(tokens), bars, full), cells)
    # Given up from the front: what is left is still "all tracks from a bar on", but for one bar.
    kept = fit_cells(cells, len(tokens), bars, (len(tokens) + full) // 2)
    assert (np.diff(kept[:, 1]) >= 0).all() and kept[-1, 1] == 11


def test_cells_do_not_depend_on_the_notes():
    """Choosing what to defer by what is in it would tell the model something about the hidden bars."""
    v = VOCABULARY
    head = [v.BOS, v.CONDUCTOR, v.BAR, v.meter(4, 4), v.tempo(120), *[v.BAR] * 7]

    def stream(pitch: int, full: bool) -> np.ndarray:
        note = [v.time(0), v.pitch(pitch), v.duration(12), v.velocity(80)]
        bars = [token for bar in range(7) for token in (v.BAR, *(note if full or bar == 3 else []))]
        tracks = [token for i in range(3) for token in (v.instrument(i), *bars, v.BAR, *note)]
        return np.array([*head, *tracks, v.EOS], dtype=np.uint16)

    for deferral in list(Deferral)[1:]:
        for i in range(10):
            done = [
                augment(tokens, TOKENIZER, CONFIG, generator(0, 0, "test", i), deferral, i / 10, 10_000)[1]
                for tokens in (stream(60, True), stream(72, False))
            ]
            np.testing.assert_array_equal(done[0].cells, done[1].cells)


def test_tasks_come_as_often_as_the_design_says():
    config = DataConfig(data_dir="x")
    draws = uniform(0, 0, "deferral", np.arange(100_000))
    kinds = draw_deferral(
        [
            config.defer_rectangle_probability,
            config.defer_continuation_probability,
            config.defer_track_probability,
            config.defer_scattered_probability,
        ],
        draws,
    )
    shares = np.bincount(kinds, minlength=5) / len(kinds)
    np.testing.assert_allclose(shares, [0.25, 0.30, 0.25, 0.10, 0.10], atol=0.01)
    assert (draw_deferral([0, 0, 0, 0], draws) == 0).all()
    assert (draw_deferral([0.5, 0.5, 0, 0], draws) > 0).all()


def test_the_share_of_cells_is_about_right():
    for deferral in Deferral:
        for level in (0.05, 0.5, 0.95):
            cells = int(num_cells(deferral, level, 40, 400))
            assert abs(cells / (40 * 400) - float(deferred_share(np.array(deferral), level))) < 0.03


# --- counters -------------------------------------------------------------------------------------------------


def test_draws_are_uniform_and_independent_of_each_other():
    draws = uniform(1, 2, "x", np.arange(200_000))
    assert draws.min() >= 0 and draws.max() < 1
    np.testing.assert_allclose(np.histogram(draws, 20, (0, 1))[0] / len(draws), 0.05, atol=0.003)
    for other in (uniform(2, 2, "x", np.arange(200_000)), uniform(1, 3, "x", np.arange(200_000)), draws[::-1]):
        assert abs(np.corrcoef(draws, other)[0, 1]) < 0.01
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.01


def test_draws_are_the_same_on_every_machine():
    assert int(key(0, 0, "shuffle", 5)) == 15510784118153670347
    assert int(generator(0, 0, "augment", 7, 1).integers(1 << 62)) == 570456112900582536
