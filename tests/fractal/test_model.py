"""The whole recursion: no leak through its levels, a loss without bias, files that say what they are."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from meloformer.errors import UserError
from meloformer.fractal.config import FractalModel
from meloformer.fractal.model import FractalMIDI
from meloformer.fractal.problems import PADDING, nest, pad_roll, pose, unnest
from meloformer.fractal.velocity import class_of
from meloformer.model import MeloFormer
from meloformer.pretrained import family_of
from tests.fractal.small import SIZES, as_batch, random_roll, small_model

KINDS = [("ar", "ar", "ar"), ("mar", "mar", "mar"), ("ar", "mar", "mar"), ("mar", "ar", "ar")]


@pytest.mark.parametrize("kind", ["mar", "ar"])
def test_the_default_model_has_as_many_parameters_as_documented(kind):
    with torch.device("meta"):
        model = FractalMIDI(FractalModel(generator_types=[kind] * 4))
    assert model.num_parameters() == {"mar": 46_985_536, "ar": 46_986_432}[kind]
    assert 46e6 < model.num_parameters() < 51e6


def test_a_fresh_model_gives_every_velocity_the_same_and_silence_most():
    nats, cells, metrics = FractalMIDI(FractalModel(**SIZES)).eval().training_loss(as_batch(random_roll(32)))
    assert cells == 128 * 32
    assert metrics["nats"].sum().item() == pytest.approx(nats.item(), rel=1e-5)
    share = (random_roll(32) > 0).mean()
    expected = -np.log(0.95) * (1 - share) - np.log(0.05 / 255) * share
    assert nats.item() / cells == pytest.approx(expected, rel=0.3)  # masks are drawn: half of the cells are seen


# --- nested patches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[128, 16, 4, 1], [128, 16, 1], [128, 32, 8, 2, 1]])
def test_nesting_is_undone_exactly(sizes):
    roll = random_roll(2 * sizes[1], batch=3).astype(np.int64)
    nested = nest(roll, sizes)
    assert unnest(nested, sizes, roll.shape[2]).tolist() == roll.tolist()


def test_patches_hold_the_cells_that_stand_together():
    """By hand: the second 4 x 4 patch of the first 16 x 16 patch holds rows 0-3, columns 4-7."""
    roll = np.arange(128 * 32).reshape(1, 128, 32)
    nested = nest(roll, [128, 16, 4, 1])
    assert nested.shape == (1, 8 * 2, 16, 16)
    assert nested[0, 0, 1].tolist() == roll[0, 0:4, 4:8].reshape(-1).tolist()
    assert nested[0, 3, 4].tolist() == roll[0, 20:24, 16:20].reshape(-1).tolist()


# --- leaks ------------------------------------------------------------------------------------------------------


def nats_by_cell(model, batch) -> np.ndarray:
    """Nats of every chosen cell at its place in the roll (128, T); nan where a mask left it out."""
    inputs = model.prepare(batch)
    problems = pose(batch, model.config, exact=not model.training)
    with torch.no_grad():
        conditions = None
        for i, (level, given) in enumerate(zip(model.levels, inputs.levels)):
            states = level.states(given.cells, given.masked, given.valid, conditions)
            conditions = model.conditions(i, states, given.chosen, given.valid)
        nats = torch.nn.functional.cross_entropy(model.head(conditions), inputs.targets, reduction="none")
    width = pad_roll(batch["roll"], batch["valid"], 16).shape[2]
    sizes = model.config.img_size_list
    where = nest(np.arange(128 * width).reshape(1, 128, width), sizes)
    here = np.zeros(1, dtype=int)
    for level, posed in enumerate(problems):
        n = where.shape[level + 1]
        here = (here[:, None] * n + np.arange(n)).reshape(-1)[posed.chosen]
    found = np.full(128 * width, np.nan)
    found[where.reshape(-1)[here]] = nats.numpy()
    return found.reshape(128, width)


def when(row: int, column: int, width: int, order: str) -> tuple[int, ...]:
    """When an all-ar model generates a cell, level by level."""
    grids = [((row // 16, column // 16), (8, width // 16))]
    grids += [((row % 16 // 4, column % 16 // 4), (4, 4)), ((row % 4, column % 4), (4, 4))]
    return tuple(r * w + c if order == "row_major" else c * h + r for (r, c), (h, w) in grids)


@pytest.mark.parametrize("order", ["row_major", "column_major"])
def test_an_ar_model_predicts_no_cell_from_one_that_comes_later(order):
    model = small_model("ar", "ar", "ar", scan_order=order)
    roll = random_roll(32)
    before = nats_by_cell(model, as_batch(roll))
    for row, column in [(37, 9), (60, 16), (100, 31), (64, 15)]:
        other = roll.copy()
        other[0, row, column] = 0 if roll[0, row, column] else 90
        moved = np.argwhere(nats_by_cell(model, as_batch(other)) != before)
        assert len(moved) > 1, "what comes later should depend on it"
        limit = when(row, column, 32, order)
        assert all(when(r, c, 32, order) >= limit for r, c in moved.tolist())


def test_a_mar_model_predicts_a_masked_cell_from_none_that_is_masked():
    """A cell that is its own target, and stands unmasked anywhere on the way down, would be predicted for nothing."""
    model = small_model("mar", "mar", "mar")
    roll = random_roll(32)
    before = nats_by_cell(model, as_batch(roll))
    for row, column in np.argwhere(~np.isnan(before))[:: max(1, (~np.isnan(before)).sum() // 12)].tolist():
        other = roll.copy()
        other[0, row, column] = 0 if roll[0, row, column] else 90
        moved = np.argwhere((nats_by_cell(model, as_batch(other)) != before) & ~np.isnan(before))
        assert moved.tolist() == [[row, column]]


# --- the loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", KINDS)
def test_masks_and_silent_patches_left_out_do_not_change_the_expected_loss(kinds):
    """With a model that says the same of every cell, each draw is an estimate of one number that is known."""
    torch.manual_seed(0)
    settings = {**SIZES, "generator_types": [*kinds, "mar"], "silent_fraction": 0.3}
    model = FractalMIDI(FractalModel(**settings))  # training, its head is a constant
    roll = random_roll(20, share=0.03)
    valid = np.ones((1, 20), dtype=bool)
    valid[0, 13:] = False
    cells = class_of(roll)[:, :, :13]
    constant = -torch.log_softmax(model.head.out.bias.detach(), -1).numpy()
    expected = constant[cells].sum()
    drawn = []
    for seed in range(60):
        problems = pose(as_batch(roll, valid, seed), model.config)
        last = problems[-1]
        targets = last.cells.reshape(-1)[last.chosen]
        assert (targets >= 0).all()
        drawn.append((constant[targets] * last.weight).sum())
    nats, count, _ = model.training_loss(as_batch(roll, valid, 59))
    assert nats.item() == pytest.approx(drawn[-1], rel=1e-5) and count == 128 * 13
    error = np.std(drawn) / np.sqrt(len(drawn))
    assert abs(np.mean(drawn) - expected) < 4 * error + 1e-6
    if "mar" not in kinds:
        exact = pose(as_batch(roll, valid), model.config, exact=True)[-1]
        assert (exact.weight == 1).all() and len(exact.chosen) == 128 * 13


def test_mask_ratios_follow_the_truncated_normal():
    config = FractalModel(**SIZES, mask_ratio_loc=0.9, mask_ratio_scale=0.3)
    shares = [pose(as_batch(random_roll(128), seed=seed), config)[0].masked.mean() for seed in range(300)]
    assert max(shares) <= 0.91 and min(shares) >= 1 / 64
    rng = np.random.default_rng(0)
    expected = 0.9 - np.abs(rng.normal(0, 0.3, 20000))
    expected = expected[expected > 0]
    assert np.mean(shares) == pytest.approx(expected.mean(), abs=0.03)
    assert np.std(shares) == pytest.approx(expected.std(), abs=0.03)


def test_at_least_one_patch_is_masked():
    config = FractalModel(**SIZES, mask_ratio_loc=0.001, mask_ratio_scale=0.5)
    for posed in pose(as_batch(random_roll(32)), config):
        assert (posed.masked.sum(-1) == 1).all()


def test_a_roll_has_the_same_masks_in_any_batch():
    model = small_model("mar", "ar", "mar").train()
    batch = as_batch(random_roll(32, batch=3))
    together, count, _ = model.training_loss(batch)
    apart = [model.training_loss({name: values[i : i + 1] for name, values in batch.items()}) for i in range(3)]
    assert together.item() == pytest.approx(sum(nats.item() for nats, *_ in apart), rel=1e-5)
    assert count == sum(cells for _, cells, _ in apart)


@pytest.mark.parametrize("kinds", KINDS[:2])
def test_padding_carries_no_loss_and_is_not_seen(kinds):
    """20 columns are padded to 32 inside, and a short piece to its crop; neither changes a number."""
    model = small_model(*kinds)
    roll = random_roll(32)
    valid = np.ones((1, 32), dtype=bool)
    valid[0, 20:] = False
    nats, count, _ = model.training_loss(as_batch(roll, valid))
    assert count == 128 * 20
    other = roll.copy()
    other[:, :, 20:] = 99
    assert model.training_loss(as_batch(other, valid))[0].item() == nats.item()
    assert model.training_loss(as_batch(roll[:, :, :20]))[0].item() == pytest.approx(nats.item(), rel=1e-6)
    cells = pad_roll(roll, valid, 16)
    assert (cells[:, :, 20:] == PADDING).all() and (cells[:, :, :20] >= 0).all()


def test_every_parameter_has_a_gradient_and_checkpointing_changes_none():
    for kinds in KINDS:
        model = small_model(*kinds).train()
        batch = as_batch(random_roll(32, batch=2))
        gradients = []
        for checkpointing in (False, True):
            model.gradient_checkpointing = checkpointing
            model.zero_grad()
            model.training_loss(batch)[0].backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        for name, gradient in gradients[0].items():
            assert torch.equal(gradient, gradients[1][name]), name


def test_a_roll_is_learnt_by_heart():
    torch.manual_seed(0)
    model = FractalMIDI(FractalModel(**SIZES, generator_types=["ar"] * 3))
    batch = as_batch(random_roll(16, share=0.02))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(25):
        nats, count, _ = model.training_loss(batch)
        (nats / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(nats.item() / count)
    assert losses[-1] < 0.7 * losses[0]


# --- files ------------------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back(tmp_path):
    model = small_model("mar", "ar", "mar", scan_order="column_major")
    model.save_pretrained(tmp_path)
    found = FractalMIDI.from_pretrained(tmp_path)
    assert found.config == model.config and found.crop_length == 32 and not found.training
    batch = as_batch(random_roll(32))
    assert found.training_loss(batch)[0].item() == model.training_loss(batch)[0].item()
    assert family_of(tmp_path) == "fractal"


def test_a_checkpoint_of_the_other_family_is_one_line(tmp_path):
    small_model("mar", "mar", "mar").save_pretrained(tmp_path / "rolls")
    with pytest.raises(UserError, match="a model of the family fractal, and meloformer is wanted"):
        MeloFormer.from_pretrained(tmp_path / "rolls")
    (tmp_path / "streams").mkdir()
    (tmp_path / "streams" / "config.json").write_text(json.dumps({"format": 1, "model": {}, "vocabulary": {}}))
    with pytest.raises(UserError, match="a model of the family meloformer, and fractal is wanted"):
        FractalMIDI.from_pretrained(tmp_path / "streams")


def test_weights_of_another_generator_type_are_one_line(tmp_path):
    small_model("ar", "ar", "ar").save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    about["model"]["generator_types"] = ["mar"] * 4
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="not the weights of a mar,mar,mar model"):
        FractalMIDI.from_pretrained(tmp_path)
