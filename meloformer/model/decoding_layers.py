"""The layers once more, laid out for a few rows at a time: what decoding runs for each token.

    layers = DecodingLayers(model)                      # a copy of the weights, for sessions of this model
    hidden = layers(x, m, position, time, attend)       # x (N, d_model) embedded, the first m of them summaries
    logits = layers.head(hidden)                        # (N - m, V) of the regular tokens

`attend(i, q, k, v)`: attention of layer i, (N, H, D) each to (N, H * D). Both equal `MeloFormer.run_layers` and
`MeloFormer.head` up to rounding.

At one row the time goes into reading weights and into calls, so: one product for q, k and v; weights stand (in, out),
which on a CPU takes 0.56 of the time of (out, in) at one row of float32; the weights of the norms are multiplied into
the products behind them, and those of heads into the table of rotations.

The surprise: the copy is made once and does not follow the model's weights when they change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from meloformer.model.layers import FeedForward, RMSNorm
from meloformer.model.transformer import Layer, MeloFormer


class DecodingLayers:
    """See the module's docstring."""

    @torch.no_grad()
    def __init__(self, model: MeloFormer):
        self.rotary, self.n_head = model.rotary, model.config.n_head
        self.input_norm = _unit_weight(model.input_norm)
        self.layers = [_Layer(layer) for layer in model.layers]
        scales = [torch.stack([_unit_weight(x.query_norm), _unit_weight(x.key_norm)]) for x in model.layers]
        # (layer, 1, q and k, 1, D); turned in float32 at least: bfloat16 would blur neighbouring positions
        self.scales = torch.stack(scales)[:, None, :, None].to(torch.promote_types(scales[0].dtype, torch.float32))
        self.swapped_scales = self.scales.roll(self.scales.shape[-1] // 2, -1)
        self.head_weight = _behind(model.output_norm, model.token.weight)

    def __call__(self, x: Tensor, m: int, position: Tensor, time: Tensor, attend: Callable) -> Tensor:
        """x (N, d_model), m summaries first, positions and ticks (N,) -> (N - m, d_model) for `head`."""
        x = unit(x) * self.input_norm
        cos, sin = self.rotary(position, time)  # (N, D / 2)
        # A plane is (a, b) = (x[i], x[i + D/2]): turned it is (a, b) cos + (b, a) (-sin, sin).
        cos = torch.cat([cos, cos], dim=-1)[:, None, None] * self.scales  # (layer, N, 2, 1, D)
        sin = torch.cat([-sin, sin], dim=-1)[:, None, None] * self.swapped_scales
        for i, layer in enumerate(self.layers):
            qkv = (unit(x) @ layer.qkv).unflatten(-1, (3, self.n_head, -1))  # (N, 3, H, D)
            qk, v = unit(qkv[:, :2]), qkv[:, 2]
            qk = torch.addcmul(qk * cos[i], qk.unflatten(-1, (2, -1)).flip(-2).flatten(-2), sin[i]).to(v.dtype)
            x = torch.addmm(x, attend(i, qk[:, 0], qk[:, 1], v), layer.out)
            if i == len(self.layers) - 1:
                x, m = x[m:], 0
            x = layer.feed_forward(x, m)
        return x

    def head(self, hidden: Tensor) -> Tensor:
        return unit(hidden) @ self.head_weight


class _Layer:
    def __init__(self, layer: Layer):
        self.qkv = _behind(layer.norm, torch.cat([layer.query.weight, layer.key_value.weight]))
        self.out = layer.out.weight.t().contiguous()
        self.regular = _FeedForward(layer.feed_forward)
        summary = layer.summary_feed_forward
        self.summary = None if summary is None else _FeedForward(summary)

    def feed_forward(self, x: Tensor, m: int) -> Tensor:
        if m == 0 or self.summary is None:
            return self.regular(x)
        return torch.cat([self.summary(x[:m]), self.regular(x[m:])])


class _FeedForward:
    def __init__(self, part: FeedForward):
        self.gate_up = _behind(part.norm, part.gate_up.weight)
        self.out = part.out.weight.t().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = (unit(x) @ self.gate_up).chunk(2, dim=-1)
        return torch.addmm(x, F.silu(gate).mul_(up), self.out)


def unit(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + size * eps) over the last dimension: RMSNorm without its weight and the square root of size."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.hypot(length, _floor(x.shape[-1], x.dtype, x.device))


@lru_cache
def _floor(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(math.sqrt(size * RMSNorm.EPS), dtype=dtype, device=device)


def _unit_weight(norm: RMSNorm) -> Tensor:
    """(size,) what `unit` has to be multiplied with to be this norm."""
    return norm.weight * math.sqrt(len(norm.weight))


def _behind(norm: RMSNorm, weight: Tensor) -> Tensor:
    """(in, out) product for `unit(x)` that equals `weight` (out, in) behind the norm."""
    return (weight * _unit_weight(norm)).t().contiguous()
