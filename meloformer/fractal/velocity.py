"""The leaf of the recursion: one cell's velocity, out of 256 classes.

A MIDI velocity v (0..127, 0 is silence) is the class round(255 v / 127), and a class is the nearest velocity, so every
velocity comes back exactly. The network sees a class as 2 c / 255 - 1, in [-1, 1], -1 being silence.

>>> class_of(np.array([0, 1, 64, 127])), velocity_of(np.array([0, 2, 129, 255]))
(array([  0,   2, 129, 255]), array([  0,   1,  64, 127], dtype=uint8))

What surprises: half of the 256 classes are no velocity of MIDI. A model learns within a few steps not to use them, and
where it does the nearest velocity is meant.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from meloformer.model.layers import FeedForward, RMSNorm
from meloformer.model.linear import Linear

CLASSES = 256
RARE = 1e-7  # share of a class that is no velocity of MIDI, in a new head


def class_of(velocity: np.ndarray) -> np.ndarray:
    """Velocities 0..127 of any shape -> classes 0..255, int64."""
    return (np.asarray(velocity, dtype=np.int64) * 255 + 63) // 127


def velocity_of(classes: np.ndarray) -> np.ndarray:
    """Classes 0..255 of any shape -> velocities 0..127, uint8."""
    return ((np.asarray(classes, dtype=np.int64) * 127 + 127) // 255).astype(np.uint8)


def probabilities(logits: Tensor, temperature: float = 1.0, sparsity_bias: float = 0.0) -> Tensor:
    """(.., 256) logits -> (.., 256) float64 probabilities, finite for any finite logits and any temperature from 0 on.

    `sparsity_bias` is added to the logit of silence. The clamp at -20 is below the maximum alone, so it makes no ties
    with it: at temperature 0 the likeliest class has all but 1e-6 of the mass.
    """
    logits = logits.double()
    if sparsity_bias:
        logits = torch.cat([logits[..., :1] + sparsity_bias, logits[..., 1:]], dim=-1)
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-8)
    shares = scaled.clamp(min=-20.0).softmax(dim=-1) + 1e-10
    return shares / shares.sum(dim=-1, keepdim=True)


def draw(logits: Tensor, uniform: Tensor, temperature: float = 1.0, sparsity_bias: float = 0.0) -> Tensor:
    """Classes (..) for (.., 256) logits: the one in whose share of [0, 1) the number `uniform` (..) lies."""
    below = probabilities(logits, temperature, sparsity_bias).cumsum(dim=-1)
    # Scaled to the last sum, which rounding may leave at 1 - 1e-16: no number lies beyond it.
    chosen = torch.searchsorted(below, (uniform.double() * below[..., -1])[..., None], right=True)[..., 0]
    return chosen.clamp(max=CLASSES - 1)


class VelocityHead(nn.Module):
    """Cross-entropy over the classes, from the state of a cell and those of its four neighbours.

    The cell's own state is the query, all five are keys: `num_blocks` blocks of attention and a feed-forward.
    """

    def __init__(self, cond_width: int, width: int, num_blocks: int, num_heads: int, d_ff: int, slots: int = 5):
        super().__init__()
        self.project = Linear(cond_width, width, bias=False)
        self.slot = nn.Parameter(torch.empty(slots, width))
        self.blocks = nn.ModuleList(VelocityBlock(width, num_heads, d_ff) for _ in range(num_blocks))
        self.norm = RMSNorm(width)
        self.out = Linear(width, CLASSES, bias=True)

    def begin_at(self, counts: np.ndarray) -> None:
        """Before the first step, say how often each velocity (128,) stands in the music, whatever the conditions.

        Learning it would take steps by the hundred: of a bias, AdamW moves no logit further than the learning rate.
        """
        logits = np.full(CLASSES, math.log(RARE))
        logits[class_of(np.arange(len(counts)))] = np.log((counts + 1) / (counts.sum() + len(counts)))
        with torch.no_grad():
            self.out.weight.zero_()
            self.out.bias.copy_(torch.from_numpy(logits))

    def forward(self, conditions: Tensor) -> Tensor:
        """(S, 5, width), projected states: own first -> logits (S, 256). `project` and `slot` come before."""
        conditions = conditions + self.slot
        x = conditions[:, 0]
        for block in self.blocks:
            x = block(x, conditions)
        return self.out(self.norm(x))


class VelocityBlock(nn.Module):
    """One query attends to the conditions; a feed-forward."""

    def __init__(self, width: int, num_heads: int, d_ff: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm, self.condition_norm = RMSNorm(width), RMSNorm(width)
        self.query = Linear(width, width, bias=False)
        self.key_value = Linear(width, 2 * width, bias=False)
        self.out = Linear(width, width, bias=False)
        self.feed_forward = FeedForward(width, d_ff)

    def forward(self, x: Tensor, conditions: Tensor) -> Tensor:
        """x (S, width), conditions (S, 5, width) -> (S, width)."""
        q = self.query(self.norm(x)).unflatten(-1, (1, self.num_heads, -1))  # (S, 1, H, D)
        k, v = self.key_value(self.condition_norm(conditions)).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        # By hand: five keys, and cells by the ten thousand, of which a GPU's fused kernels take 65,535 at most.
        weights = ((q * k).sum(dim=-1, keepdim=True) * q.shape[-1] ** -0.5).softmax(dim=1)  # (S, 5, H, 1)
        x = x + self.out((weights * v).sum(dim=1).flatten(1))
        return x + self.feed_forward(x)
