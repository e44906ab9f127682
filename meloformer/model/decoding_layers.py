"""The layers once more, laid out for a few rows at a time: what decoding runs for each token.

    layers = DecodingLayers(model)                      # a copy of the weights, for sessions of this model
    hidden = layers(x, m, position, time, attend)       # x (N, d_model) embedded, the first m of them summaries
    logits = layers.head(hidden)                        # (N - m, V) of the regular tokens

`attend(i, q, k, v)`: attention of layer i, (N, H, D) each to (N, H * D). Both equal `MeloFormer.run_layers` and
`MeloFormer.head` up to rounding.

At one row the time goes into reading weights and into calls, so: one product for q, k and v; weights stand (in, out),
which on a CPU takes 0.56 of the time of (out, in) at one row of float32; the weights of the norms are multiplied into
the products behind them, and those of heads into the table of rotations. A CPU's library gives a product of one row to
one thread, and a batch of them to all: so large weights stand in `parts` of columns or rows, one for each thread.

The surprise: the copy is made once, and follows neither the weights nor the number of threads when they change.
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

SHARED = 2**18  # entries from which on a weight is shared between threads: 1 MB, 30 us of one core


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
        self.head_product = _Columns(_behind(model.output_norm, model.token.weight))

    def __call__(self, x: Tensor, m: int, position: Tensor, time: Tensor, attend: Callable) -> Tensor:
        """x (N, d_model), m summaries first, positions and ticks (N,) -> (N - m, d_model) for `head`."""
        x = unit(x) * self.input_norm
        cos, sin = self.rotary(position, time)  # (N, D / 2)
        # A plane is (a, b) = (x[i], x[i + D/2]): turned it is (a, b) cos + (b, a) (-sin, sin).
        cos = torch.cat([cos, cos], dim=-1)[:, None, None] * self.scales  # (layer, N, 2, 1, D)
        sin = torch.cat([-sin, sin], dim=-1)[:, None, None] * self.swapped_scales
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(unit(x)).unflatten(-1, (3, self.n_head, -1))  # (N, 3, H, D)
            qk, v = unit(qkv[:, :2]), qkv[:, 2]
            qk = torch.addcmul(qk * cos[i], qk.unflatten(-1, (2, -1)).flip(-2).flatten(-2), sin[i]).to(v.dtype)
            x = layer.out(x, attend(i, qk[:, 0], qk[:, 1], v))
            if i == len(self.layers) - 1:
                x, m = x[m:], 0
            x = layer.feed_forward(x, m)
        return x

    def head(self, hidden: Tensor) -> Tensor:
        return self.head_product(unit(hidden))


class _Layer:
    def __init__(self, layer: Layer):
        self.qkv = _Columns(_behind(layer.norm, torch.cat([layer.query.weight, layer.key_value.weight])))
        self.out = _Rows(layer.out.weight.t())
        self.regular = _FeedForward(layer.feed_forward)
        summary = layer.summary_feed_forward
        self.summary = None if summary is None else _FeedForward(summary)

    def feed_forward(self, x: Tensor, m: int) -> Tensor:
        if m == 0 or self.summary is None:
            return self.regular(x)
        return torch.cat([self.summary(x[:m]), self.regular(x[m:])])


class _FeedForward:
    def __init__(self, part: FeedForward):
        gate_up, out = _behind(part.norm, part.gate_up.weight), part.out.weight.t()
        parts = parts_of(out, out.shape[0])
        # Behind each other: the parts of the gate, those of what it opens.
        self.gate_up = _split(gate_up, 1 if parts == 1 else 2 * parts, dim=1)
        self.out = _split(out, parts, dim=0)

    def __call__(self, x: Tensor) -> Tensor:
        h = unit(x)
        if len(self.gate_up) == 1:
            gate, up = (h @ self.gate_up[0])[None].chunk(2, dim=-1)
        else:
            gate, up = torch.bmm(h.expand(len(self.gate_up), *h.shape), self.gate_up).chunk(2)
        return _add_parts(x, F.silu(gate).mul_(up), self.out)


class _Columns:
    """x (N, in) -> x @ weight (N, out)."""

    def __init__(self, weight: Tensor):
        self.parts = parts_of(weight, weight.shape[1])
        self.weight = _split(weight, self.parts, dim=1)

    def __call__(self, x: Tensor) -> Tensor:
        if self.parts == 1:
            return x @ self.weight[0]
        return torch.bmm(x.expand(self.parts, *x.shape), self.weight).transpose(0, 1).flatten(1)


class _Rows:
    """x (N, out), h (N, in) -> x + h @ weight."""

    def __init__(self, weight: Tensor):
        self.parts = parts_of(weight, weight.shape[0])
        self.weight = _split(weight, self.parts, dim=0)

    def __call__(self, x: Tensor, h: Tensor) -> Tensor:
        return _add_parts(x, h.unflatten(1, (self.parts, -1)).transpose(0, 1), self.weight)


def _add_parts(x: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    """x + the sum of the products of h (parts, N, in / parts) and weight (parts, in / parts, out)."""
    if len(weight) == 1:
        return torch.addmm(x, h[0], weight[0])
    return torch.bmm(h, weight).sum(dim=0).add_(x)


def parts_of(weight: Tensor, size: int) -> int:
    """Into how many parts a dimension of `size` is split: one for each thread, as far as that divides it.

    One where the threads would wait for each other longer than for the weight, and on a GPU.
    """
    if weight.device.type != "cpu" or weight.numel() < SHARED:
        return 1
    return max(n for n in range(1, torch.get_num_threads() + 1) if size % n == 0)


def _split(weight: Tensor, parts: int, dim: int) -> Tensor:
    """(parts, in, out) of weight (in, out), one dimension of it divided."""
    return torch.stack(weight.chunk(parts, dim))


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
