"""Large products on a CPU go through oneDNN: the same numbers as nn.Linear's, and nothing else may notice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from meloformer.model import linear
from meloformer.model.linear import Linear

needs_onednn = pytest.mark.skipif(linear.ONEDNN is None, reason="torch was built without oneDNN")


def layer(bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    return Linear(128, 320, bias=bias).to(dtype)


@pytest.fixture
def calls(monkeypatch):
    """How often oneDNN was asked."""
    made, really = [], linear.ONEDNN
    monkeypatch.setattr(linear, "ONEDNN", lambda *arguments: made.append(1) or really(*arguments))
    return made


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (8, 21, 128), (2, 3, 50, 128)])
def test_the_product_is_the_same(calls, bias, shape):
    fast = layer(bias)
    x = torch.randn(shape)
    part = torch.randn(*shape[:-1], 256)[..., ::2]  # no contiguous memory
    with torch.no_grad():
        for given in (x, part):
            exact = nn.functional.linear(given.double(), fast.weight.double(), fast.bias.double() if bias else None)
            assert torch.allclose(fast(given).double(), exact, atol=1e-5)
    assert len(calls) == 2


@needs_onednn
def test_what_onednn_cannot_do_or_does_slower_stays_with_torch(calls):
    x = torch.randn(64, 128)
    layer()(x).sum().backward()  # it has no gradient: one call here and training would stand still
    with torch.no_grad():
        layer()(x[:7])
        layer(dtype=torch.float64)(x.double())
        layer(dtype=torch.bfloat16)(x.bfloat16())
        layer()(x[:0])
        with torch.autocast("cpu", torch.bfloat16):
            assert layer()(x).dtype == torch.bfloat16
    assert not calls


def test_parameters_have_the_names_they_had():
    """A checkpoint written with nn.Linear is read."""
    assert list(layer(bias=True).state_dict()) == ["weight", "bias"] and isinstance(layer(), nn.Linear)
