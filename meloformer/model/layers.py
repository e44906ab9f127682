"""Building blocks: RMSNorm, SwiGLU, two-axis rotary positions. No biases anywhere.

RMSNorm: Zhang and Sennrich 2019, arXiv 1910.07467. SwiGLU: Shazeer 2020, arXiv 2002.05202. Rotary positions: Su et al.
2021, arXiv 2104.09864; here half the planes of a head turn with the place in the stream and half with musical time.

Shapes: x (B, T, d_model); q and k (B, T, H, D), D the head size, `d_model / n_head`.

>>> rotary = Rotary(64, axes=2, resolution=24)
>>> cos, sin = rotary(torch.tensor([[0, 1]]), torch.tensor([[0, 24]]))
>>> cos.shape, round(float(cos[0, 1, 17]), 4)       # wavelengths on the axis of time: 1/2, 1, 2, 4 .. quarter notes
(torch.Size([1, 2, 32]), 1.0)

The surprise: the waves of musical time are octaves of an eighth note (for heads of 64), so notes that are a beat, a bar
of 4/4 or eight bars apart stand in phase on all waves up to that length.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meloformer.model.linear import Linear

# (shortest, longest) wavelength: in tokens, from 1 radian a token to beyond a row of 25k; in quarter notes.
POSITION_WAVES = (2 * math.pi, 2.0**17)
TIME_WAVES = (0.5, 2.0**15)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in the dtype of x."""

    EPS = 1e-6

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.EPS)


class FeedForward(nn.Module):
    """RMSNorm and SwiGLU: w_out(silu(gate) * up)."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.gate_up = Linear(d_model, 2 * d_ff, bias=False)
        self.out = Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class Rotary:
    """Angles of the rotation of queries and keys: D / 2 planes, shared between the axes."""

    def __init__(self, head_size: int, axes: int, resolution: int):
        planes = head_size // 2 // axes
        self.position_rates = 1 / _geometric(*POSITION_WAVES, planes)  # turns a token
        self.time_rates = 1 / (_geometric(*TIME_WAVES, planes) * resolution) if axes == 2 else None  # turns a tick

    def __call__(self, position: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, T, D / 2) float32 for stream positions and ticks (B, T)."""
        if self.position_rates.device != position.device:  # sent once: what decodes must not wait for the host
            self.move(position.device)
        # In float64 and reduced to one turn before float32: a late tick turns thousands of times.
        turns = position[..., None].double() * self.position_rates
        if self.time_rates is not None:
            turns = torch.cat([turns, time[..., None].double() * self.time_rates], dim=-1)
        angle = (2 * math.pi * (turns - turns.floor())).float()
        return angle.cos(), angle.sin()

    def move(self, device: torch.device) -> None:
        """The rates to where the positions will be; compiled layers that moved them would be compiled twice."""
        self.position_rates = self.position_rates.to(device)
        self.time_rates = None if self.time_rates is None else self.time_rates.to(device)


def _geometric(first: float, last: float, count: int) -> Tensor:
    """`count` numbers from `first` on, at the ratio that would reach `last` one step after the end."""
    return first * (last / first) ** (torch.arange(count, dtype=torch.float64, device="cpu") / count)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the planes (x[i], x[i + D/2]) of x (B, T, H, D) by the angles (B, T, D / 2)."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    a, b = x.chunk(2, dim=-1)
    # The products run in float32 whatever x is: bfloat16 would blur neighbouring positions.
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)
