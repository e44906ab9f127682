"""Rolls that are drawn: the batched sampler against the one that goes leaf by leaf, and what must not change."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from meloformer.errors import UserError
from meloformer.fractal import sampling
from meloformer.fractal.sampling import remaining, sample
from tests.fractal.small import as_batch, random_roll, small_model

KINDS = [("mar", "mar", "mar"), ("ar", "mar", "mar"), ("mar", "ar", "mar"), ("mar", "mar", "ar")]
ROUNDS = (3, 2, 2, 1)


def nothing(width, batch=1):
    return np.zeros((batch, 128, width), dtype=np.uint8), np.zeros((batch, width), dtype=bool)


@pytest.mark.parametrize(("kinds", "order"), [*zip(KINDS, ["row_major", "row_major", "column_major", "column_major"])])
def test_all_at_once_is_leaf_by_leaf(kinds, order):
    """20 columns, so 12 are padding inside; two rolls in which other cells are known, columns and bands of pitches.

    In double precision: single cells are drawn at 256 borders each, and rounding would now and then cross one.
    """
    model = small_model(*kinds, scan_order=order).double()
    model.head.out.bias.data[0] = 7.0
    known, keep = random_roll(20, batch=2), np.zeros((2, 128, 20), dtype=bool)
    keep[:, 20:] = True
    keep[1, :, :9] = True
    keep[1, 10:15] = True
    together = sample(model, known, keep, ROUNDS)
    assert np.array_equal(together, sample(model, known, keep, ROUNDS, leaf_by_leaf=True))
    assert np.array_equal(sample(model, known[1:], keep[1:], ROUNDS, first=1)[0], together[1])
    assert np.array_equal(together[1][keep[1]], known[1][keep[1]])
    assert 0.05 < (together[~keep] > 0).mean() < 0.99


def test_an_all_ar_model_too():
    """Few cells are left open: leaf by leaf it takes a pass for each."""
    model = small_model("ar", "ar", "ar").double()
    known, keep = random_roll(16), np.ones((1, 128, 16), dtype=bool)
    keep[0, 62:66, 3:7] = False
    drawn = sample(model, known, keep, ROUNDS)
    assert np.array_equal(drawn, sample(model, known, keep, ROUNDS, leaf_by_leaf=True))
    assert np.array_equal(drawn[keep], known[keep]) and not np.array_equal(drawn, known)


def test_chunks_of_the_last_level_do_not_change_a_cell(monkeypatch):
    model = small_model("mar", "mar", "ar").double()
    whole = sample(model, *nothing(32), ROUNDS)
    monkeypatch.setitem(sampling.CHUNK, "cpu", 37)
    assert np.array_equal(sample(model, *nothing(32), ROUNDS), whole)


def test_seeds_are_other_rolls_and_the_same_ones_again():
    model = small_model("mar", "mar", "mar").double()
    rolls = sample(model, *nothing(16, batch=2), ROUNDS, seed=5)
    assert not np.array_equal(rolls[0], rolls[1])
    assert np.array_equal(sample(model, *nothing(16), ROUNDS, seed=5, first=1)[0], rolls[1])
    assert not np.array_equal(sample(model, *nothing(16), ROUNDS, seed=6)[0], rolls[0])


def test_what_is_kept_is_kept_bit_for_bit_though_all_else_is_silent():
    model = small_model("mar", "mar", "mar")
    known = random_roll(36)
    keep = np.ones((1, 36), dtype=bool)
    keep[0, 13:22] = False
    drawn = sample(model, known, keep, ROUNDS, sparsity_bias=1e6)
    assert np.array_equal(drawn[:, :, keep[0]], known[:, :, keep[0]])
    assert not drawn[:, :, ~keep[0]].any()
    everything = sample(model, known, np.ones((1, 36), dtype=bool), ROUNDS)
    assert np.array_equal(everything, known)


def test_what_is_kept_is_heard():
    """With the lowest temperature two continuations differ for what they go on from alone."""
    model = small_model("mar", "mar", "mar")
    keep = np.zeros((2, 32), dtype=bool)
    keep[:, :16] = True
    known = random_roll(32, batch=2, share=0.3)
    a = sample(model, known[:1], keep[:1], ROUNDS, temperature=0.0)
    b = sample(model, known[1:], keep[1:], ROUNDS, temperature=0.0)
    assert not np.array_equal(a[:, :, 16:], b[:, :, 16:])


@pytest.mark.parametrize("kinds", [("mar", "mar", "mar"), ("ar", "mar", "mar")])
def test_every_step_shows_more_of_the_roll(kinds):
    model = small_model(*kinds)
    seen = []
    roll = sample(model, *nothing(32), ROUNDS, on_step=lambda roll, known: seen.append((roll, known)))
    known = [int(mask.sum()) for _, mask in seen]
    assert known[0] == 0 and known[-1] == roll.size and known == sorted(known)
    assert len(seen) == 1 + (3 if kinds[0] == "mar" else 16)
    assert not seen[0][0].any() and np.array_equal(seen[-1][0], roll)
    for (before, mask), (after, _) in pairwise(seen):
        assert np.array_equal(before[mask], after[mask])


def test_rounds_are_a_cosine_with_one_patch_at_least_in_each():
    assert [int(remaining(64, done, 8)) for done in range(9)] == [64, 62, 59, 53, 45, 35, 24, 12, 0]
    assert [int(remaining(3, done, 8)) for done in range(9)] == [3, 2, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("width", [0, 6, 130])
def test_a_width_that_is_no_multiple_of_4_is_one_line(width):
    with pytest.raises(UserError, match=rf"the width is {width} columns, must be a multiple of 4"):
        sample(small_model("mar", "mar", "mar"), *nothing(width))


@pytest.mark.parametrize("rounds", [(8, 4), (8, 0, 1, 1), ()])
def test_rounds_that_do_not_fit_are_one_line(rounds):
    with pytest.raises(UserError, match=r"num_iter_list is .*must be 3 or 4 numbers from 1 on"):
        sample(small_model("mar", "mar", "mar"), *nothing(16), rounds)


def test_a_model_whose_training_diverged_writes_nothing():
    """Of logits that are no numbers the last class was drawn everywhere, and 127 is a velocity like another."""
    model = small_model("mar", "mar", "mar")
    with torch.no_grad():
        model.head.out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="the model's logits are not finite"):
        sample(model, *nothing(16), [1, 1, 1])


@pytest.mark.parametrize("kinds", [("ar", "ar", "ar"), ("mar", "ar", "ar")])
def test_drawn_rolls_are_as_likely_as_their_likelihood_says(kinds):
    """The chain of states, heads and draws is the one that is trained: with temperature 1, the mean nats of drawn rolls
    under the model equal the model's entropy, which the mean over other drawn rolls estimates as well; a draw from
    shifted conditions would be unlikely under its own model."""
    model = small_model(*kinds)
    model.head.out.bias.data[0] = 4.0
    rolls = sample(model, *nothing(16), ROUNDS)
    shuffled = np.random.default_rng(0).permuted(rolls, axis=2)
    own, other = (model.training_loss(as_batch(r))[0].item() for r in (rolls, shuffled))
    assert own < other


def test_the_mode_of_the_model_is_left_as_it_was():
    model = small_model("mar", "mar", "mar").train()
    sample(model, *nothing(16), ROUNDS)
    assert model.training and torch.is_grad_enabled()
