"""The layers laid out for decoding say what the model's say, in one part or in one for each thread."""

from __future__ import annotations

import pytest
import torch

from meloformer.model import decoding_layers
from meloformer.model.attention import Visibility, attend
from meloformer.model.decoding_layers import DecodingLayers
from tests.model.music import tiny_model


@pytest.fixture(params=[1, 2, 4, 7])
def threads(request, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(decoding_layers, "SHARED", 0)
    yield request.param
    torch.set_num_threads(before)


def test_a_weight_is_split_as_far_as_the_threads_divide_it(threads):
    weight = torch.zeros(6, 12)
    assert decoding_layers.parts_of(weight, 12) == {1: 1, 2: 2, 4: 4, 7: 6}[threads]
    assert decoding_layers.parts_of(weight, 13) == 1


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("summary_ff", ["separate", "shared"])
def test_parts_give_what_the_whole_gives(threads, summary_ff, rows):
    """A product of one row was left to one thread; the parts that share it must add up to it, summaries too."""
    model = tiny_model(summary_ff=summary_ff).double()
    torch.manual_seed(1)
    for part in model.modules():
        if hasattr(part, "EPS"):  # weights of norms that are not 1
            torch.nn.init.uniform_(part.weight, 0.5, 2)
    x, m = torch.randn(rows, model.config.d_model, dtype=torch.float64), rows // 2
    position, time = torch.arange(rows), 10 * torch.arange(rows)
    visibility = Visibility(torch.ones(1, rows, rows, dtype=torch.bool).tril(), x.dtype)

    def flat(i, q, k, v):
        return attend(q[None], k[None], v[None], visibility)[0].flatten(1)

    def last(i, q, k, v):  # the model's last layer asks for the regular rows alone
        mask = torch.ones(1, rows, rows, dtype=torch.bool).tril()[:, rows - q.shape[1] :]
        return attend(q, k, v, Visibility(mask, x.dtype))

    layers = DecodingLayers(model)
    if threads > 1:
        assert len(layers.layers[0].regular.out) > 1
    with torch.no_grad():
        expected = model.run_layers(x[None], m, position[None], time[None], last)
        found = layers(x, m, position, time, flat)
        torch.testing.assert_close(layers.head(found), model.head(expected)[0])
