"""No future leaks: the logits at position i do not change when any token after i changes.

One summary per bar shared by all instruments, with the instruments in sequence, carries later tracks' notes back to
earlier ones; one summary per (instrument, bar), readable once its segment has ended, does not. Equality is exact:
float32, dense backend, CPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meloformer.hid import Family, Tokenizer
from meloformer.hid.conditions import derive, insert
from meloformer.model import masks
from tests.data.music import make_score
from tests.hid.streams import VOCABULARY
from tests.model.music import (
    another_tail,
    batch_of,
    first_bars,
    real_streams,
    rich_stream,
    tiny_model,
    with_deferred_bars,
)

BYSTANDER = rich_stream(0, 100)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def logits(model, documents, room):
    """(N, V) of one row of a fixed shape."""
    with torch.no_grad():
        return model(model.prepare(batch_of(documents, max_seq_len=room, max_segments=room // 5)))[0]


def same_family(tokens, i, rng):
    """The stream with another token of the same family at i; None where the family has one token only."""
    ids = VOCABULARY.ids(Family(int(VOCABULARY.family_of[tokens[i]])))
    choices = [token for token in range(ids.start, ids.stop) if token != tokens[i]]
    if not choices:
        return None
    changed = tokens.copy()
    changed[i] = rng.choice(choices)
    return changed


def assert_no_leak(model, tokens, rng, positions=10):
    """The bystander stands first, then the stream, then the bystander again; returns how often a later logit moved."""
    edge, room = len(BYSTANDER), 2 * len(BYSTANDER) + 2 * len(tokens)
    before = logits(model, [BYSTANDER, tokens, BYSTANDER], room)
    moved = 0
    for i in rng.integers(3, len(tokens) - 1, positions).tolist():
        changed = same_family(tokens, i, rng)
        if changed is not None:
            after = logits(model, [BYSTANDER, changed, BYSTANDER], room)
            assert torch.equal(before[: edge + i], after[: edge + i]), f"token {i}: an earlier logit moved"
            end = edge + len(tokens)
            assert torch.equal(before[end:], after[end:]), f"token {i}: a logit of the piece behind moved"
            moved += not torch.equal(before[edge + i : end], after[edge + i : end])
        changed = another_tail(tokens, i, rng, len(tokens))
        after = logits(model, [BYSTANDER, changed], room)
        assert torch.equal(before[: edge + i], after[: edge + i]), f"tail from {i}: an earlier logit moved"
    return moved


VARIANTS = [{}, {"visible": None}, {"summary_ff": "shared"}, {"pattern": "full_causal"}]


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_on_random_streams(config):
    model, rng = tiny_model(**config), np.random.default_rng(0)
    moved = sum(assert_no_leak(model, rich_stream(seed, 150), rng, 5) for seed in range(6))
    assert moved > 10  # the model does read its tokens


def test_on_real_pieces_with_several_tracks_of_one_instrument(real_midi):
    model, rng = tiny_model(), np.random.default_rng(1)
    for tokens in real_streams(real_midi, 2):
        assert assert_no_leak(model, tokens, rng, 10) > 3


def test_on_real_pieces_with_deferred_bars(real_midi):
    model, rng = tiny_model(), np.random.default_rng(2)
    for tokens in real_streams(real_midi, 2):
        assert assert_no_leak(model, with_deferred_bars(tokens, rng), rng, 10) > 3


def test_on_pieces_with_their_conditions():
    """Chords and densities of the conductor speak of later bars, as a musician does: given, they are no leak."""
    model, rng = tiny_model(), np.random.default_rng(3)
    tokenizer = Tokenizer(VOCABULARY)
    for seed in range(2):
        score = first_bars(tokenizer.quantize(make_score(seed)), 3)
        tokens = insert(tokenizer.encode(score, "given"), derive(score, tag=2).rows(VOCABULARY), VOCABULARY)
        assert len(tokens) < 700
        assert assert_no_leak(model, tokens, rng, 12) > 3
        assert assert_no_leak(model, with_deferred_bars(tokens, rng), rng, 6) > 1


def test_a_summary_that_is_read_too_early_is_caught(monkeypatch):
    """The test itself must be able to fail: here a summary is visible from the first token of its own segment on."""
    monkeypatch.setattr(masks, "has_ended", lambda q, k: k.position < q.position)
    model, rng = tiny_model(), np.random.default_rng(0)
    with pytest.raises(AssertionError, match="an earlier logit moved"):
        for seed in range(6):
            assert_no_leak(model, rich_stream(seed, 150), rng, 5)
