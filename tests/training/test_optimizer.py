"""Parameter groups, their state by name, and the schedule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from meloformer.errors import UserError
from meloformer.training.describe import num_moments
from meloformer.training.optimizer import (
    build_optimizers,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
    split_parameters,
)
from meloformer.training.schedule import learning_rate


class Tiny(nn.Module):
    """A tied embedding, a table of positions, a hidden matrix, a norm: one of each kind."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.token = nn.Embedding(5, width)
        self.position = nn.Parameter(torch.zeros(5, width))
        self.hidden = nn.Linear(width, width, bias=False)
        self.norm = nn.RMSNorm(width)

    def forward(self, tokens):
        return self.norm(self.hidden(self.token(tokens) + self.position)) @ self.token.weight.T


def update(model, optimizers):
    loss = nn.functional.cross_entropy(model(torch.arange(5)), torch.arange(5).roll(1))
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def build(name, model):
    return build_optimizers(model, name, 1e-2, 0.1, (0.9, 0.95))


def test_only_hidden_matrices_decay():
    """FractalMIDI's learned positions decayed too, and Muon turned them as it turns matrices."""
    model = Tiny()
    matrices, rest = split_parameters(model)
    assert [p is model.hidden.weight for p in matrices] == [True] and len(rest) == 3
    (optimizer,) = build("adamw", model)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    muon, adamw = build("muon", model)
    assert muon.param_groups[0]["params"] == matrices
    assert {id(p) for p in adamw.param_groups[0]["params"]} == {id(p) for p in rest}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_memory_that_is_announced_is_that_of_the_moments(name):
    """Embeddings are two-dimensional too, and AdamW's: they were counted as Muon's."""
    model = Tiny()
    optimizers = build(name, model)
    update(model, optimizers)
    moments = sum(t.numel() for key, t in optimizer_tensors(model, optimizers).items() if not key.endswith("/step"))
    assert num_moments(model, name) == moments


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_goes_through_named_tensors_and_back_without_a_trace(name):
    torch.manual_seed(0)
    straight = Tiny()
    optimizers = build(name, straight)
    for _ in range(3):
        update(straight, optimizers)

    resumed = Tiny()
    resumed.load_state_dict(straight.state_dict())
    others = build(name, resumed)
    tensors = {key: value.clone() for key, value in optimizer_tensors(straight, optimizers).items()}
    load_optimizer_tensors(resumed, others, tensors, "optimizer.safetensors")
    for step in range(3):
        for each in (optimizers, others):
            set_learning_rate(each, 1e-2 / (step + 1))
        assert update(straight, optimizers) == update(resumed, others)


def test_state_of_another_optimizer_or_model_is_refused():
    model = Tiny()
    adamw = build("adamw", model)
    update(model, adamw)
    tensors = optimizer_tensors(model, adamw)
    with pytest.raises(UserError, match=r"here: the state of hidden\.weight is not what"):
        load_optimizer_tensors(model, build("muon", model), dict(tensors), "here")
    with pytest.raises(UserError, match="is not what this model"):
        other = Tiny(width=8)
        load_optimizer_tensors(other, build("adamw", other), dict(tensors), "here")
    with pytest.raises(UserError, match=r"which this model does not have"):
        load_optimizer_tensors(model, adamw, {**tensors, "extra/step": torch.zeros(())}, "here")


def test_schedule():
    rates = [learning_rate(step, 1.0, 0.1, 10, 110) for step in range(120)]
    assert rates[0] == pytest.approx(0.1)  # not 0: the first step does something
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[35] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + 2**-0.5))
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[110] == rates[119] == pytest.approx(0.1)
    assert learning_rate(0, 1.0, 0.1, 0, 1) == 1.0  # no warm-up, one step
