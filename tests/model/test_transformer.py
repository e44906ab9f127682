"""The model as a whole: size, loss, padding, pieces side by side, and what is written to disk."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from meloformer.config import ModelConfig
from meloformer.errors import UserError
from meloformer.hid import Family, Vocabulary
from meloformer.model import MeloFormer
from meloformer.model.attention import Visibility, attend
from meloformer.model.layers import Rotary, rotate
from tests.hid.streams import VOCABULARY, random_stream
from tests.model.music import batch_of, rich_stream, tiny_model

VARIANTS = [{}, {"summary_ff": "shared"}, {"summaries": False}, {"pattern": "full_causal"}]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("size, millions", [("small", 17), ("base", 85), ("large", 200), ("xlarge", 450)])
def test_parameter_counts_are_within_three_percent(size, millions, variant):
    with torch.device("meta"):
        model = MeloFormer(ModelConfig(size=size, **variant), VOCABULARY)
    assert model.num_parameters() == pytest.approx(millions * 1e6, rel=0.03)
    assert model.config.d_model == 64 * model.config.n_head


@pytest.mark.parametrize("size", ["small", "base"])
def test_the_loss_starts_near_that_of_guessing(size):
    """A tied table of unit scale would start a wide model at twenty nats, each token predicting itself."""
    torch.manual_seed(0)
    model = MeloFormer(ModelConfig(size=size, n_layer=2), VOCABULARY)
    with torch.no_grad():
        nats, count, _ = model.training_loss(batch_of([rich_stream(3, 300)]))
    assert nats.item() / count == pytest.approx(math.log(VOCABULARY.size), abs=0.35)


def test_the_loss_is_the_cross_entropy_of_the_logits_at_the_targets():
    model = tiny_model()
    batch = batch_of([random_stream(1, 90), random_stream(2, 60)], [random_stream(3, 120)], max_seq_len=180)
    with torch.no_grad():
        inputs = model.prepare(batch)
        nats, count, metrics = model.training_loss(batch)
        targets = torch.from_numpy(batch["targets"].astype(np.int64))
        each = F.cross_entropy(model(inputs).transpose(1, 2), targets.clamp(min=0), reduction="none")
    wanted = targets >= 0
    assert count == int(wanted.sum())
    torch.testing.assert_close(nats, each[wanted].sum(), rtol=1e-5, atol=0)
    family = torch.from_numpy(VOCABULARY.family_of.astype(np.int64))[targets.clamp(min=0)]
    for f in Family:
        here = wanted & (family == f)
        assert metrics["count"][f] == here.sum()
        torch.testing.assert_close(metrics["nats"][f], each[here].sum(), rtol=1e-4, atol=1e-4)
    assert model(inputs).shape == (*batch["tokens"].shape, VOCABULARY.size)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_padding_is_harmless_and_every_parameter_learns(variant):
    """A row of padding sees nothing at all; and a parameter without a gradient would stall distributed training."""
    model = tiny_model(**variant).train()
    nats, count, _ = model.training_loss(batch_of([rich_stream(1, 120)], [], max_seq_len=150))
    (nats / count).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_a_batch_of_padding_alone_has_a_loss_of_zero():
    nats, count, _ = tiny_model().training_loss(batch_of([], max_seq_len=32, max_segments=4))
    assert (nats.item(), count) == (0.0, 0)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_pieces_in_one_row_are_as_if_alone(variant):
    model, documents = tiny_model(**variant), [rich_stream(seed, 100) for seed in (1, 2, 3)]
    with torch.no_grad():
        together = model(model.prepare(batch_of(documents, max_seq_len=320)))[0]
    start = 0
    for tokens in documents:
        alone = model.logits(tokens)
        torch.testing.assert_close(together[start : start + len(tokens)], alone, atol=1e-5, rtol=0)
        start += len(tokens)


def test_logits_of_a_prefix_are_the_first_logits():
    model, tokens = tiny_model(), rich_stream(5, 150)
    whole = model.logits(tokens)
    for length in (1, 2, len(tokens) // 2, len(tokens) - 1):
        torch.testing.assert_close(model.logits(tokens[:length]), whole[:length], atol=1e-5, rtol=0)


def test_the_summaries_are_read():
    """With bars of other instruments out of sight, an earlier track reaches a later one through summaries only."""
    v = VOCABULARY
    note = [v.BAR, v.time(0), v.pitch(60), v.duration(24), v.velocity(90)]
    head = [v.BOS, v.CONDUCTOR, v.BAR, v.meter(4, 4), v.tempo(120)]
    tokens = np.array([*head, v.instrument(0), *note, v.instrument(1), *note, v.EOS])
    changed = np.where(tokens == v.pitch(60), v.pitch(65), tokens)
    changed[-6:] = tokens[-6:]  # the first track's pitch alone
    for summaries in (True, False):
        model = tiny_model(cross_bar_offsets=[], summaries=summaries)
        moved = (model.logits(tokens)[11:] - model.logits(changed)[11:]).abs().max()
        assert (moved > 1e-4) == summaries


def test_two_tracks_of_one_instrument_differ_by_their_ordinal():
    v = VOCABULARY
    bar = [v.BAR, v.MASK]
    head = [v.BOS, v.CONDUCTOR, v.BAR, v.meter(4, 4), v.tempo(120)]
    tokens = np.array([*head, v.instrument(0), *bar, v.instrument(0), *bar, v.FILL, v.FILL, v.EOS])
    model = tiny_model(rotary_axes=1)
    with torch.no_grad():
        x = model.joint(model.prepare(batch_of([tokens], max_segments=1)))[0][0, 1:]
    assert (x[-3] - x[-2]).abs().max() > 1e-3  # the two FILLs


def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 6, 2, 8, requires_grad=True) for _ in range(3))
    mask = torch.rand(2, 6, 6) < 0.5
    mask[0, 2] = mask[1] = False
    out = attend(q, k, v, Visibility(mask, torch.float32))
    assert out[0, 2].abs().max() == out[1].abs().max() == 0
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() and x.grad[1].abs().max() == 0 for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(8)
    expected = scores.masked_fill(~mask[:, None], -1e30).softmax(-1) @ v.transpose(1, 2)
    torch.testing.assert_close(out[0, 0], expected[0, :, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("axes", [1, 2])
def test_rotary_depends_on_distances_alone(axes):
    rotary, rng = Rotary(64, axes, 24), torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 64, generator=rng) for _ in range(2))

    def product(position, time):
        angles = [rotary(torch.tensor([[p]]), torch.tensor([[t]])) for p, t in zip(position, time)]
        return (rotate(q, *angles[0]) * rotate(k, *angles[1])).sum().item()

    near = product((30, 10), (48, 0))
    assert product((20_030, 20_010), (180_048, 180_000)) == pytest.approx(near, abs=1e-3)
    assert abs(product((31, 10), (48, 0)) - near) > 1e-2
    assert (abs(product((30, 10), (50, 0)) - near) > 1e-2) == (axes == 2)


def test_dropout_acts_in_training_only():
    batch = batch_of([random_stream(1, 100)])
    model = tiny_model(dropout=0.5)
    first, again = (model.training_loss(batch)[0].item() for _ in range(2))
    assert first == again
    model.train()
    assert model.training_loss(batch)[0].item() != model.training_loss(batch)[0].item()


def test_bfloat16_autocast_stays_close():
    model, batch = tiny_model(), batch_of([rich_stream(1, 200)])
    nats, count, _ = model.training_loss(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _, metrics = model.training_loss(batch)
    assert rough.dtype == metrics["nats"].dtype == torch.float32
    assert rough.item() / count == pytest.approx(nats.item() / count, abs=0.05)


# --- files --------------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_the_same(tmp_path):
    model, tokens = tiny_model(cross_bar_offsets=[0, 3]), random_stream(1, 100)
    model.save_pretrained(tmp_path / "m")
    again = MeloFormer.from_pretrained(tmp_path / "m", VOCABULARY)
    assert again.config == model.config and again.vocabulary == VOCABULARY
    assert torch.equal(again.logits(tokens), model.logits(tokens))
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


def test_a_run_gives_its_best_checkpoint_and_else_its_latest(tmp_path):
    checkpoints, model = tmp_path / "checkpoints", tiny_model()
    for step in (10, 20):
        with torch.no_grad():
            model.token.weight[0, 0] = step
        model.save_pretrained(checkpoints / f"step_{step:08d}")
    (checkpoints / "latest").write_text("step_00000020\n")
    assert MeloFormer.from_pretrained(tmp_path).token.weight[0, 0] == 20
    (checkpoints / "best").write_text("step_00000010\n")
    assert MeloFormer.from_pretrained(tmp_path).token.weight[0, 0] == 10


def test_what_cannot_be_loaded_says_why_in_one_line(tmp_path):
    def refusal(vocabulary=None):
        with pytest.raises(UserError) as caught:
            MeloFormer.from_pretrained(tmp_path, vocabulary)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no model there" in refusal()
    tiny_model().save_pretrained(tmp_path)
    assert "trained on vocabulary" in refusal(Vocabulary(resolution=12))
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    good = weights.read_bytes()
    weights.write_bytes(good[: len(good) // 2])
    assert "cannot be loaded" in refusal()
    weights.unlink()
    assert "cannot be loaded" in refusal()
    weights.write_bytes(good)
    about = json.loads(config.read_text())
    config.write_text(json.dumps({**about, "model": {**about["model"], "n_layer": 2}}))
    assert "cannot be loaded" in refusal()
    config.write_text(json.dumps({**about, "model": {**about["model"], "n_layers": 2}}))
    assert "n_layers is not a key" in refusal()
    config.write_text(json.dumps({**about, "vocabulary": {**about["vocabulary"], "hash": "0" * 16}}))
    assert "another vocabulary" in refusal()
    config.write_text("{")
    assert "unreadable" in refusal()
