"""The grammar, the request and the sampling as tensors say what the plain ones say, at every step, of every stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meloformer.errors import UserError
from meloformer.generation import Request, Sampling
from meloformer.generation.request import ConstrainedState
from meloformer.generation.sampling import choose, choose_batch
from meloformer.generation.tensor_state import TensorState
from meloformer.hid import Annotations, Family
from tests.generation.test_generate import requests
from tests.hid.streams import VOCABULARY, random_stream
from tests.model.music import with_deferred_bars


def follow(start: ConstrainedState, seed: int) -> int:
    """Random samples of one start, all the way, as tensors and one by one; how many were closed by the limit."""
    rng, plain = np.random.default_rng(seed), [start.branch() for _ in range(3)]
    state = TensorState(start, len(plain), "cpu")
    while not all(stream.is_finished for stream in plain):
        masks = state.allowed().numpy()
        tokens = []
        for stream, mask in zip(plain, masks):
            if stream.is_finished:
                assert np.flatnonzero(mask).tolist() == [VOCABULARY.PAD]
                tokens.append(VOCABULARY.PAD)
                continue
            expected = stream.allowed()
            assert np.array_equal(mask, expected), [VOCABULARY.name(i) for i in np.flatnonzero(mask != expected)]
            # Long bars and parts, or short ones: any allowed token, or any allowed family.
            choices = np.flatnonzero(mask)
            families = VOCABULARY.family_of[choices]
            tokens.append(int(rng.choice(choices[families == rng.choice(np.unique(families))])))
        said = state.push(torch.tensor(tokens)).numpy()
        for stream, token, column in zip(plain, tokens, said.T.tolist()):
            if not stream.is_finished:
                expected = stream.push(token)
                assert column == [*expected[:6], -1, expected.time], VOCABULARY.name(token)
    for row, stream in enumerate(plain):
        assert state.is_finished[row]
        assert bool(state.hit_limit[row]) == stream.hit_limit
        assert state.tokens[row, : int(state.length[row])].tolist() == stream.tokens
    return sum(stream.hit_limit for stream in plain)


@given(requests, st.integers(0, 2**32 - 1), st.integers(0, 150))
@settings(max_examples=60, deadline=None)
def test_masks_and_annotations_from_nothing(request, seed, spare):
    shortest = 7 + (request.bars or 1) + 6 * len(request.instruments or [0])
    start = ConstrainedState(VOCABULARY, request, shortest + spare)
    start.forced_prefix()
    follow(start, seed)


@given(st.integers(0, 2**32 - 1), st.none() | st.lists(st.sampled_from([0, 0, 33, 128]), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_masks_and_annotations_behind_a_prompt_with_deferred_bars(seed, instruments):
    rng = np.random.default_rng(seed)
    stream = with_deferred_bars(random_stream(seed % 1000, 100), rng) if seed % 3 else random_stream(seed % 1000, 100)
    fills = np.flatnonzero(stream == VOCABULARY.FILL)
    head = stream[: fills[0] if len(fills) else -1]
    # Chords of the conductor and controls of bars may be given; they are never written.
    try:
        start = ConstrainedState(VOCABULARY, Request(instruments=instruments, given=head), len(head) + 30 + seed % 100)
    except UserError:  # nothing is masked and no part is to be added, or there is no room
        return
    start.forced_prefix()
    if not start.is_finished:
        follow(start, seed)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0),
        Sampling(temperature=1.7, top_k=7, top_p=0.8),
        Sampling(top_k=5, top_p=1.0),
        Sampling(temperature=0.6, min_p=0.1),
        Sampling(by_family={Family.PITCH: 0.3, Family.TIME: 0.0}),
        Sampling(temperature=0, by_family={Family.PITCH: 1.0}),
    ],
    ids=str,
)
def test_a_batch_of_tensors_draws_the_same_tokens(sampling):
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((200, VOCABULARY.size))).astype(np.float32)
    logits[::5] = logits[::5].round()  # ties
    allowed = rng.random(logits.shape) < rng.choice([0.002, 0.05, 0.9], size=(200, 1))
    allowed[:, 700] = True
    uniform = rng.random(200)
    found, is_bad = choose_batch(
        *(torch.from_numpy(x) for x in (logits, allowed, uniform)), sampling, torch.from_numpy(VOCABULARY.family_of)
    )
    plain = [choose(logits[i], allowed[i], uniform[i], sampling, VOCABULARY.family_of) for i in range(200)]
    assert found.tolist() == plain
    assert not is_bad.any()


def test_logits_that_are_not_finite_are_told_where_they_matter():
    logits = torch.zeros(3, VOCABULARY.size)
    logits[:, 5] = torch.nan
    allowed = torch.zeros(3, VOCABULARY.size, dtype=torch.bool)
    allowed[0, [5, 6]] = allowed[1, 5] = allowed[2, [6, 7]] = True
    family_of = torch.from_numpy(VOCABULARY.family_of)
    tokens, is_bad = choose_batch(logits, allowed, torch.full((3,), 0.1, dtype=torch.float64), Sampling(), family_of)
    assert is_bad.tolist() == [True, False, False]
    assert tokens[1:].tolist() == [5, 6]
    assert allowed[0, tokens[0]]


def test_annotations_come_in_their_order():
    assert Annotations._fields == ("bar", "track", "instrument", "ordinal", "type", "onset", "segment", "time")
