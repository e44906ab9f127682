"""The baselines are honest: proper probabilities, learnt from the training split, and the copy copies."""

import numpy as np
import pytest

from meloformer.config import DataConfig, PreprocessConfig
from meloformer.data import Corpus
from meloformer.data.preprocess import preprocess
from meloformer.evaluation.baselines import (
    NOTHING,
    STRENGTHS,
    Bigram,
    copy_group,
    evaluate_baselines,
    fit_weights,
    repeat_bar,
)
from meloformer.hid import Family, Vocabulary
from meloformer.midi import Score, Track, note_table, write_midi

V = Vocabulary()


def note(pitch: int, velocity: int = 80) -> list[int]:
    return [V.pitch(pitch), V.duration(12), V.velocity(velocity)]


def stream(*bars: list[int], program: int = 0) -> list[int]:
    head = [V.BOS, V.CONDUCTOR, V.BAR, V.meter(4, 4), V.tempo(120), *[V.BAR] * (len(bars) - 1)]
    return [*head, V.instrument(program), *(token for bar in bars for token in (V.BAR, *bar)), V.EOS]


def predictions(*bars: list[int]) -> list[str]:
    """What the pointer expects after each token of the last bar, its BAR included."""
    tokens = np.array(stream(*bars))
    predicted, _ = repeat_bar(tokens, V)
    return [V.name(p) if p >= 0 else "-" for p in predicted[-len(bars[-1]) - 2 : -1]]


FIRST = [V.time(0), *note(60), V.time(24), *note(62), *note(65), V.time(48), *note(64)]


def test_a_repeated_bar_is_predicted_to_its_end():
    assert predictions(FIRST, FIRST) == [V.name(token) for token in [*FIRST, V.BAR]]


def test_an_empty_bar_between_does_not_matter():
    assert predictions(FIRST, [], FIRST) == [V.name(token) for token in [*FIRST, V.BAR]]


def test_the_first_bar_of_a_track_has_nothing_to_repeat():
    tokens = np.array([*stream(FIRST, FIRST)[:-1], V.instrument(5), V.BAR, *FIRST, V.EOS])
    predicted, matched = repeat_bar(tokens, V)
    assert (predicted[-len(FIRST) - 2 :] == NOTHING).all() and not matched[-len(FIRST) - 2 :].any()
    first = tokens.tolist().index(V.instrument(0))
    assert (predicted[: first + len(FIRST) + 2] == NOTHING).all()


def test_another_pitch_is_passed_over():
    other = [V.time(0), *note(61), *FIRST[4:]]
    assert predictions(FIRST, other)[:5] == ["T_0", "P_60", "L_12", "V_20", "T_24"]


def test_an_added_note_and_a_missing_onset_are_waited_out():
    added = [V.time(0), *note(60), *note(67), V.time(24)]
    assert predictions(FIRST, added) == ["T_0", "P_60", "L_12", "V_20", "T_24", "-", "-", "T_24", "P_62"]
    missing = [V.time(24), *note(62), *note(65)]
    assert predictions(FIRST, missing) == ["T_0", "P_62", "L_12", "V_20", "P_65", "L_12", "V_20", "T_48"]
    unheard = [V.time(36), *note(60), V.time(48)]
    assert predictions(FIRST, unheard) == ["T_0", "-", "-", "-", "T_48", "P_64"]


def test_a_stream_without_tracks_predicts_nothing():
    predicted, matched = repeat_bar(np.array([V.BOS, V.CONDUCTOR, V.BAR, V.meter(4, 4), V.tempo(120), V.EOS]), V)
    assert (predicted == NOTHING).all() and not matched.any()


def test_what_is_predicted_never_depends_on_what_comes():
    rng = np.random.default_rng(0)
    tokens = np.array(stream(FIRST, FIRST, [V.time(24), *note(62)], FIRST))
    whole = repeat_bar(tokens, V)
    for end in rng.integers(1, len(tokens), 20):
        for full, prefix in zip(whole, repeat_bar(tokens[:end], V)):
            np.testing.assert_array_equal(full[:end], prefix)


def test_probabilities_sum_to_one():
    rng = np.random.default_rng(0)
    previous, target = rng.integers(0, 30, 5000), rng.integers(0, 30, 5000)
    bigram = Bigram(previous, target, 40)
    every = np.arange(40)
    assert bigram.unigram.sum() == pytest.approx(1)
    for context in (0, 7, 39):  # 39 was never seen
        follows = bigram.probability(np.full(40, context), every, 3.0)
        assert follows.sum() == pytest.approx(1) and (follows > 0).all()
        mixed = 0.4 * (every == 11) + 0.6 * follows
        assert mixed.sum() == pytest.approx(1)


def test_smoothing_goes_by_music_that_was_not_counted():
    """Pieces repeat themselves: by its own notes, or those of its neighbours, a bigram needs no smoothing at all."""
    rng = np.random.default_rng(1)
    previous, target = rng.integers(0, 30, 300), rng.integers(0, 30, 300)
    bigram = Bigram(previous, target, 30)
    assert bigram.best_strength(previous, target) == min(STRENGTHS)
    assert bigram.best_strength(rng.integers(0, 30, 300), rng.integers(0, 30, 300)) >= 100


def test_weights_are_the_likeliest():
    rng = np.random.default_rng(2)
    group = copy_group(np.full(4000, V.pitch(60)), np.zeros(4000, dtype=bool), V)
    bigram = rng.uniform(0.01, 0.2, 4000)
    hit = rng.random(4000) < 0.6
    weight = fit_weights(hit, bigram, group)[2 * Family.PITCH]

    def likelihood(w: float) -> float:
        return np.log(w * hit + (1 - w) * bigram).sum()

    assert likelihood(weight) > max(likelihood(weight - 0.02), likelihood(weight + 0.02))
    assert (fit_weights(hit, bigram, group)[:2] == 0).all(), "no prediction, no weight"


def test_music_that_repeats_is_cheaper_to_repeat(tmp_path):
    rng = np.random.default_rng(3)
    (tmp_path / "midi").mkdir()
    for i in range(12):
        bar = [(int(t), int(rng.integers(40, 90)), int(rng.integers(1, 8)) * 16) for t in range(0, 1920, 240)]
        notes = [(0, 1920 * b + t, 120, pitch, velocity) for b in range(10) for t, pitch, velocity in bar]
        write_midi(Score(480, [Track(0)], note_table(notes)), tmp_path / "midi" / f"{i}.mid")
    preprocess(PreprocessConfig(input=str(tmp_path / "midi"), output=str(tmp_path / "out")))
    config = DataConfig(data_dir=str(tmp_path / "out"), max_seq_len=512, validation_fraction=0.3)
    result = evaluate_baselines(Corpus(tmp_path / "out"), config)
    nats = {name: line["nats_per_note"] for name, line in result.items()}
    assert nats["repeat_bar"] < nats["bigram"] / 2 and nats["bigram"] < nats["unigram"]
    assert len({line["notes"] for line in result.values()}) == 1 and result["bigram"]["notes"] > 0
    # A tenth of the notes stand in first bars, where nothing can be repeated: never free.
    assert nats["repeat_bar"] > 0.1
