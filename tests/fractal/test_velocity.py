"""The velocity sampler. The first public one gave silence everywhere, for want of care with large logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meloformer.fractal.velocity import CLASSES, VelocityHead, class_of, draw, probabilities, velocity_of


def test_every_velocity_comes_back():
    velocities = np.arange(128, dtype=np.uint8)
    classes = class_of(velocities)
    assert velocity_of(classes).tolist() == velocities.tolist() and velocity_of(classes).dtype == np.uint8
    assert classes[0] == 0 and classes[127] == 255 and len(set(classes.tolist())) == 128
    nearest = np.abs(np.arange(256)[:, None] * 127 / 255 - velocities).argmin(1)
    assert velocity_of(np.arange(256)).tolist() == nearest.tolist()


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 0.2, 1.0, 100.0])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_probabilities_are_finite_and_keep_their_order(temperature, scale):
    logits = torch.linspace(-1, 1, CLASSES)[torch.randperm(CLASSES, generator=torch.Generator().manual_seed(0))] * scale
    shares = probabilities(logits, temperature)
    assert torch.isfinite(shares).all() and shares.sum().item() == pytest.approx(1, abs=1e-12)
    assert shares.argmax() == logits.argmax()
    order = shares[logits.argsort()]
    assert (order.diff() >= 0).all()
    if temperature <= 1e-9:
        assert shares.max() > 1 - 1e-5  # no tie between the largest and the clamped ones
    if scale * 2 / max(temperature, 1e-8) < 20:  # nothing is clamped
        torch.testing.assert_close(shares, (logits.double() / temperature).softmax(-1), rtol=1e-6, atol=1e-9)


def test_two_large_logits_are_not_made_equal():
    """Clamping from above, before the maximum is subtracted, would make a tie of 10000 and 9990."""
    logits = torch.full((CLASSES,), -1e4)
    logits[3], logits[7] = 1e4, 9990.0
    shares = probabilities(logits)
    assert shares[3] > 0.9999 and shares[7] == pytest.approx(np.exp(-10), rel=1e-3)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 100.0])
def test_classes_are_drawn_as_often_as_they_should_be(temperature):
    logits = torch.full((CLASSES,), -50.0)
    logits[[0, 9, 200]] = torch.tensor([1.0, 0.5, 0.0])
    uniform = (torch.arange(20000) + 0.5) / 20000
    drawn = draw(logits.expand(20000, -1), uniform, temperature)
    counts = torch.bincount(drawn, minlength=CLASSES) / 20000
    torch.testing.assert_close(counts.double(), probabilities(logits, temperature), rtol=0, atol=1e-4)


def test_the_last_class_is_the_last():
    logits = torch.zeros(1, CLASSES)
    assert draw(logits, torch.tensor([1 - 1e-12], dtype=torch.float64)).item() == CLASSES - 1
    assert draw(logits, torch.tensor([0.0])).item() == 0


def test_sparsity_bias_is_added_to_silence_alone():
    logits = torch.zeros(CLASSES)
    shares = probabilities(logits, sparsity_bias=np.log(255.0))
    assert shares[0].item() == pytest.approx(0.5, rel=1e-6) and shares[1].item() == pytest.approx(0.5 / 255, rel=1e-6)


def test_a_new_head_says_how_often_each_velocity_stands_in_the_music():
    counts = np.zeros(128, dtype=np.int64)
    counts[[0, 64, 127]] = 9000, 900, 100
    head = VelocityHead(8, 16, 1, 2, 32)
    for parameter in head.parameters():  # a model initialises all of its parts together; alone they hold anything
        torch.nn.init.normal_(parameter)
    head.begin_at(counts)
    shares = head(torch.randn(2, 5, 16)).softmax(-1)
    assert torch.equal(shares[0], shares[1])
    assert shares[0, class_of(np.array([0, 64, 127]))].tolist() == pytest.approx([0.9, 0.09, 0.01], rel=0.02)
    assert set(shares[0].argsort()[:128].tolist()) == set(range(256)) - set(class_of(np.arange(128)).tolist())


def test_the_head_reads_all_five_conditions():
    torch.manual_seed(0)
    head = VelocityHead(8, 16, 1, 2, 32)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    conditions = torch.randn(1, 5, 16, requires_grad=True)
    head(conditions).square().sum().backward()
    assert (conditions.grad.abs().sum(-1) > 0).all()
