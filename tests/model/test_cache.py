"""Cached logits equal the full forward pass at every position, whatever stage each stream of the batch is at."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meloformer.hid import Annotations, Tokenizer
from meloformer.model import DecodingSession, cache
from tests.hid.streams import VOCABULARY, random_stream
from tests.model.music import batch_of, real_streams, rich_stream, tiny_model, with_deferred_bars

TOLERANCE = 1e-4


class Feeder:
    """Feeds given streams to a session and compares every logit with the full pass."""

    def __init__(self, model, streams, room=0):
        self.streams = streams
        self.expected = [model.logits(tokens) for tokens in streams]
        self.annotations = [Tokenizer(VOCABULARY).annotate(tokens) for tokens in streams]
        longest = max(map(len, streams))
        self.session = DecodingSession(model, len(streams), longest, room or longest // 4)
        self.rows = list(range(len(streams)))
        self.steps = 0

    def prefill(self, lengths):
        out = self.session.prefill(batch_of(*[[s[:n]] for s, n in zip(self.streams, lengths)]))
        for row, n in enumerate(lengths):
            torch.testing.assert_close(out[row], self.expected[row][n - 1], atol=TOLERANCE, rtol=0)

    def step(self, wanted):
        at = self.session.length.copy()
        active = np.array([w and at[i] < len(self.streams[r]) for i, (r, w) in enumerate(zip(self.rows, wanted))])
        here = [min(n, len(self.streams[r]) - 1) for r, n in zip(self.rows, at)]
        tokens = np.array([self.streams[r][n] for r, n in zip(self.rows, here)])
        fields = [[getattr(self.annotations[r], f)[n] for r, n in zip(self.rows, here)] for f in Annotations._fields]
        out = self.session.step(tokens, Annotations(*map(np.array, fields)), active)
        for i in np.flatnonzero(active):
            torch.testing.assert_close(out[i], self.expected[self.rows[i]][at[i]], atol=TOLERANCE, rtol=0)
        self.steps += active.sum()
        return active.any()

    def run(self, rng, idle=0.3):
        """Random streams wait at every step."""
        while (
            self.step(rng.random(len(self.rows)) >= idle)
            or (self.session.length < [len(self.streams[r]) for r in self.rows]).any()
        ):
            pass


@pytest.mark.parametrize(
    "config",
    [{}, {"pattern": "full_causal"}, {"summaries": False}, {"same_bar_offsets": [0, 1], "rotary_axes": 1}],
    ids=str,
)
def test_from_the_first_token_on_random_streams(config):
    streams = [rich_stream(seed, 120) for seed in range(5)]
    feeder = Feeder(tiny_model(**config), streams)
    feeder.run(np.random.default_rng(0))
    assert feeder.steps == sum(map(len, streams))


def test_prompts_that_end_anywhere():
    """Inside a note, behind a BAR, in a bar that the next token closes: an open segment's summary is not kept."""
    rng = np.random.default_rng(1)
    for seed in range(6):
        streams = [rich_stream(10 * seed + i, 120) for i in range(4)]
        feeder = Feeder(tiny_model(), streams)
        feeder.prefill([int(rng.integers(1, len(s))) for s in streams])
        feeder.run(rng)


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_prompts_are_read_in_chunks(monkeypatch, chunk):
    """A segment may begin in one chunk and end in another; its summary belongs to the one where it ends."""
    monkeypatch.setattr(cache, "PREFILL_CHUNK", chunk)
    streams = [rich_stream(seed, 120) for seed in (1, 3, 4)]
    feeder = Feeder(tiny_model(), streams)
    feeder.prefill([len(s) - 20 - i for i, s in enumerate(streams)])
    feeder.run(np.random.default_rng(0))


def test_a_branch_leaves_its_session_as_it_was():
    streams = [rich_stream(3, 120)]
    feeder = Feeder(tiny_model(), streams, room=40)
    feeder.prefill([60])
    root = feeder.session
    for _ in range(2):
        feeder.session, feeder.rows = root.branch([0, 0]), [0, 0]
        feeder.run(np.random.default_rng(0), idle=0)
    assert root.length.tolist() == [60]


@pytest.mark.parametrize("config", [{}, {"visible": None}, {"same_bar_offsets": [0, 1], "summaries": False}], ids=str)
def test_streams_that_branched_off_one_prompt_read_it_together(config, monkeypatch):
    """Each at its own pace, from a prompt that ends anywhere; some end, one branches again."""
    monkeypatch.setattr(cache, "SHARED_FROM", 1)
    model, tokens = tiny_model(**config), rich_stream(1)
    for length in (1, len(tokens) // 3, len(tokens) // 2 + 3):
        feeder, rng = Feeder(model, [tokens]), np.random.default_rng(length)
        feeder.prefill([length])
        feeder.session = feeder.session.branch([0] * 6)
        feeder.rows = [0] * 6
        for _ in range(60):
            feeder.step(rng.random(6) < np.linspace(0.2, 1, 6))
        assert feeder.session.common
        feeder.session.keep([5, 1, 2, 5])
        feeder.rows = [0] * 4
        assert all(
            common.readers.max() <= 3 for common in feeder.session.common.values()
        )  # those that left see nothing
        feeder.run(rng)


def test_on_real_pieces_and_their_deferred_bars(real_midi):
    rng = np.random.default_rng(2)
    pieces = real_streams(real_midi, 2, 500)
    feeder = Feeder(tiny_model(), [*pieces, *(with_deferred_bars(p, rng) for p in pieces)])
    feeder.prefill([len(p) // 2 for p in feeder.streams])
    feeder.run(rng, idle=0.1)


def test_the_scale_of_a_real_model():
    """float32 within 1e-4 also where logits and activations have the size of a trained model's."""
    model = tiny_model(d_model=128, n_head=2, d_ff=256, n_layer=4)
    with torch.no_grad():
        model.output_norm.weight.mul_(20)
    feeder = Feeder(model, [rich_stream(seed, 200) for seed in (3, 4)])
    assert max(e.abs().max() for e in feeder.expected) > 5
    feeder.run(np.random.default_rng(0), idle=0)


def test_some_streams_go_on_and_one_branches():
    streams = [rich_stream(seed, 120) for seed in range(3)]
    feeder = Feeder(tiny_model(), streams, room=40)
    feeder.prefill([len(s) // 3 for s in streams])
    feeder.rows = [2, 0, 2]
    feeder.session.keep(feeder.rows)
    feeder.run(np.random.default_rng(0))


def test_a_stream_does_not_depend_on_its_batch_mates():
    model, tokens = tiny_model(), rich_stream(7, 120)
    alone, together = Feeder(model, [tokens]), Feeder(model, [random_stream(8, 120), tokens, random_stream(9, 60)])
    for feeder in (alone, together):
        feeder.run(np.random.default_rng(0))


def test_a_full_session_says_so():
    model, tokens = tiny_model(), rich_stream(7, 120)
    session = DecodingSession(model, 1, 10, 0)
    annotations = Tokenizer(VOCABULARY).annotate(tokens)
    with pytest.raises(ValueError, match="holds 10 tokens"):
        for i, token in enumerate(tokens):
            session.step(token[None], Annotations(*(values[i : i + 1] for values in annotations)))


def test_prefill_wants_an_empty_session_and_one_document_a_row():
    model = tiny_model()
    for rows in ([[random_stream(1, 60)]], [[random_stream(1, 60)], [random_stream(1, 60), random_stream(2, 60)]]):
        with pytest.raises(ValueError, match="one document"):
            DecodingSession(model, 2, 200, 50).prefill(batch_of(*rows))
