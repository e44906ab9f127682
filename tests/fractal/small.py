"""Models and rolls so small that a test of them takes a fraction of a second."""

from __future__ import annotations

import numpy as np
import torch

from meloformer.fractal.config import FractalModel
from meloformer.fractal.model import FractalMIDI

SIZES = {"embed_dim_list": [16, 16, 16, 16], "num_blocks_list": [2, 1, 1, 1], "num_heads_list": [2, 2, 2, 2]}


def small_model(*kinds: str, seed: int = 0, **settings) -> FractalMIDI:
    """A model whose head is no longer uniform: every state moves its logits."""
    torch.manual_seed(seed)
    model = FractalMIDI(FractalModel(**{**SIZES, "generator_types": list(kinds), **settings}), crop_length=32)
    torch.nn.init.normal_(model.head.out.weight, std=0.5)
    return model.eval()


def random_roll(width: int, batch: int = 1, share: float = 0.1, seed: int = 0) -> np.ndarray:
    """uint8 (batch, 128, width), that share of it sounding."""
    rng = np.random.default_rng(seed)
    loud = rng.integers(1, 128, (batch, 128, width))
    return np.where(rng.random(loud.shape) < share, loud, 0).astype(np.uint8)


def as_batch(roll: np.ndarray, valid: np.ndarray | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    batch, _, width = roll.shape
    keys = np.arange(1, batch + 1, dtype=np.uint64) + np.uint64(1000 * seed)
    return {"roll": roll, "valid": np.ones((batch, width), dtype=bool) if valid is None else valid, "key": keys}
