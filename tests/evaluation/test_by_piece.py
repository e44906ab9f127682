"""Likelihood by piece, by bar and over first tokens, against sums taken one target at a time; the bootstrap."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from meloformer.data import Corpus, RowPlan
from meloformer.evaluation import by_piece
from meloformer.evaluation.by_piece import FIRST_BARS, bootstrap_interval, evaluate_pieces
from meloformer.evaluation.likelihood import evaluate_likelihood, split_batches
from meloformer.hid import Family, annotate
from meloformer.model import MeloFormer
from tests.training.small import small_config, write_corpus


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """A model with random weights, and a plan whose pieces are cut into windows and packed."""
    torch.set_num_threads(1)
    config = small_config(write_corpus(tmp_path_factory.mktemp("corpus")), tmp_path_factory.mktemp("run"))
    corpus = Corpus(config.data.data_dir)
    torch.manual_seed(0)
    return MeloFormer(config.model, corpus.vocabulary), RowPlan(corpus, config.data, split="train", augment=False)


def slowly(model, plan, limit):
    """Nats by piece, by group of bars and over the first `limit` tokens: every window by itself, target by target."""
    nats, notes, groups, first = defaultdict(float), defaultdict(int), defaultdict(lambda: [0.0, 0]), [0.0, 0]
    v = plan.corpus.vocabulary
    for window in range(len(plan.windows)):
        tokens, origin = plan.document(window)
        cost = -torch.log_softmax(model.logits(tokens).double(), dim=-1)
        a = annotate(tokens, v)
        for i in range(1, len(tokens)):
            family = Family(v.family_of[tokens[i]])
            if family >= Family.PIECE_BEGIN:
                continue
            here, is_note = float(cost[i - 1, int(tokens[i])]), family == Family.PITCH
            nats[origin.piece] += here
            notes[origin.piece] += is_note
            if a.bar[i] >= 0:
                bar = origin.first_bar + int(a.bar[i])
                group = groups[max(start for start in FIRST_BARS if start <= bar)]
                group[0] += here
                group[1] += is_note
            if origin.first_bar == 0 and i + 1 <= limit:
                first[0] += here
                first[1] += 1
    return nats, notes, groups, first


def test_every_sum_is_what_one_target_at_a_time_gives(held_out, monkeypatch):
    model, plan = held_out
    monkeypatch.setattr(by_piece, "FIRST_TOKENS", (100,))
    assert len(plan.windows) > len(plan.pieces), "pieces should be cut, or nothing is tested of places in a piece"
    result = evaluate_pieces(model.eval(), plan, 2)
    nats, notes, groups, first = slowly(model, plan, 100)
    found = result["by_piece"]
    assert found["piece"] == sorted(nats)
    assert found["nats"] == pytest.approx([nats[piece] for piece in found["piece"]], rel=1e-4)
    assert found["notes"] == [notes[piece] for piece in found["piece"]]
    assert [entry["notes"] for entry in result["by_bar"]] == [groups[start][1] for start in sorted(groups)]
    expected = [groups[start][0] / groups[start][1] for start in sorted(groups)]
    assert [entry["nats_per_note"] for entry in result["by_bar"]] == pytest.approx(expected, rel=1e-4)
    assert result["first_tokens"]["100"]["tokens"] == first[1] and result["first_tokens"]["100"]["pieces"] == len(nats)
    assert result["first_tokens"]["100"]["perplexity"] == pytest.approx(math.exp(first[0] / first[1]), rel=1e-4)
    assert result["tokens_per_second"] > 0


def test_the_split_is_exact_and_agrees_with_validation_in_training(held_out):
    model, plan = held_out
    result = evaluate_pieces(model.train(), plan, 3)
    assert model.training, "the model is left in the mode it was in"
    once = evaluate_likelihood(model, split_batches(plan, 4))
    for name in ("tokens", "notes", "bars", "rows"):
        assert result[name] == once[name]
    assert result["nats"] == pytest.approx(once["nats"], rel=1e-5)
    assert sum(result["by_piece"]["bars"]) == result["bars"]
    some = evaluate_pieces(model, plan, 2, max_rows=3)
    assert some["rows"] == 3 and some["nats"] == pytest.approx(
        evaluate_likelihood(model, split_batches(plan, 2, 3))["nats"]
    )


def test_a_piece_whose_window_is_too_short_does_not_count(held_out, monkeypatch):
    """Its first window ends before so many tokens: what would be counted are other tokens than the piece's first."""
    model, plan = held_out
    reach = [len(plan.document(i)[0]) for i in range(len(plan.windows)) if plan.windows["first_bar"][i] == 0]
    limit = max(reach)
    monkeypatch.setattr(by_piece, "FIRST_TOKENS", (limit, 100_000))
    result = evaluate_pieces(model, plan, 2)["first_tokens"]
    assert 0 < result[str(limit)]["pieces"] == reach.count(limit) < len(plan.pieces)
    assert result["100000"] == {"perplexity": None, "nats_per_token": None, "tokens": 0, "pieces": 0}


def test_the_interval_holds_the_mean_and_narrows_with_more_pieces():
    rng = np.random.default_rng(0)
    widths = []
    for pieces in (20, 500):
        notes = rng.integers(50, 500, pieces)
        nats = notes * rng.normal(4.0, 0.5, pieces)
        low, high = bootstrap_interval(nats, notes)
        assert low < nats.sum() / notes.sum() < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3
    # Of a normal mean: 2 x 1.96 standard errors.
    assert widths[1] == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(500), rel=0.25)
    assert bootstrap_interval(np.array([3.0]), np.array([1])) is None
