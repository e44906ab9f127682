"""From a batch of rolls to the problems of every level: what is masked, what is gone into, and with which weight.

    nest(cells, sizes)            (B, 128, T) -> (B, N0, N1, ..): patches within patches, `unnest` is the inverse
    pose(batch, config, exact)    rolls -> one `Problems` a level, numpy, all of them; no value depends on its batch

A problem is a patch cut into smaller ones, which its level predicts. One of these is *gone into* when its own cells
become a problem of the next level, or at the last level when the velocity head predicts it. A roll's random numbers
come from its own `key`, so that a step is the same however it is cut into micro-batches.

The loss is a sum over all cells that are no padding, estimated without bias: of a mar level the masked patches count,
each with the weight (patches / masked ones), and with `silent_fraction` p a silent patch is gone into with the
probability p and counts 1 / p times. So the number of cells that the loss is divided by is known beforehand.

What surprises: with `exact` the number of masked patches is uniform, from 1 to all. Then the expected loss is the mean
negative log-likelihood of generating the patches one at a time in a random order: nats that may be compared with the
entropy of the rolls. In training the number is drawn from the truncated normal distribution of the settings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from meloformer.fractal.config import FractalModel
from meloformer.fractal.velocity import class_of

PADDING = -1


@dataclass
class Problems:
    """Those of one level: K of them with N patches each; S patches are gone into."""

    cells: np.ndarray  # (K, N, cells of a patch) int64, classes, PADDING where there is no music
    valid: np.ndarray | None  # (K, N) bool, None where all are
    masked: np.ndarray  # (K, N) bool
    chosen: np.ndarray  # (S,) int64 into K * N, ascending
    weight: np.ndarray  # (S,) float64, what each counts in the sum


def grid(sizes: list[int], level: int, width: int) -> tuple[int, int]:
    """(rows, columns) of a level's problem, in a roll of `width` columns."""
    rows = sizes[level] // sizes[level + 1]
    return rows, width // sizes[1] if level == 0 else rows


def nest(cells: np.ndarray, sizes: list[int]) -> np.ndarray:
    """(B, 128, T) -> (B, N0, N1, ..), T a multiple of sizes[1].

    >>> nest(np.arange(8).reshape(1, 2, 4), [2, 2, 1]).tolist()
    [[[0, 1, 4, 5], [2, 3, 6, 7]]]
    """
    batch, _, width = cells.shape
    grids = [grid(sizes, level, width) for level in range(len(sizes) - 1)]
    rows, columns = zip(*grids)
    count = len(grids)
    split = cells.reshape(batch, *rows, *columns)
    axes = [axis for level in range(count) for axis in (1 + level, 1 + count + level)]
    return split.transpose(0, *axes).reshape(batch, *(r * c for r, c in grids))


def unnest(nested: np.ndarray, sizes: list[int], width: int) -> np.ndarray:
    """The inverse of `nest`: (B, N0, N1, ..) -> (B, 128, width)."""
    grids = [grid(sizes, level, width) for level in range(len(sizes) - 1)]
    count = len(grids)
    split = nested.reshape(len(nested), *(side for pair in grids for side in pair))
    axes = [1 + 2 * level + axis for axis in (0, 1) for level in range(count)]
    return split.transpose(0, *axes).reshape(len(nested), sizes[0], width)


def pad_roll(roll: np.ndarray, valid: np.ndarray, multiple: int) -> np.ndarray:
    """uint8 (B, 128, T) and bool (B, T) -> classes (B, 128, T'), T' a multiple, PADDING where nothing is valid."""
    cells = np.where(valid[:, None], class_of(roll), PADDING)
    return np.pad(cells, ((0, 0), (0, 0), (0, -roll.shape[2] % multiple)), constant_values=PADDING)


def pose(batch: dict[str, np.ndarray], config: FractalModel, exact: bool = False) -> list[Problems]:
    """The problems of a batch (roll, valid, key), level by level. `exact`: every cell, uniform counts of masks."""
    nested = nest(pad_roll(batch["roll"], batch["valid"], config.img_size_list[1]), config.img_size_list)
    generators = [np.random.Generator(np.random.Philox(key=int(key))) for key in batch["key"]]
    levels: list[Problems] = []
    problems = np.arange(len(nested))  # indices into the axes before the level's own, flattened
    weight = np.ones(len(nested))
    for level, kind in enumerate(config.kinds):
        shape = nested.shape[: level + 2]

        def numbers(*shape: int) -> np.ndarray:
            return np.stack([generator.random(shape) for generator in generators])

        cells = nested.reshape(-1, shape[-1], int(np.prod(nested.shape[level + 2 :])))[problems]
        valid = (cells != PADDING).any(-1)
        masked = valid
        if kind == "mar":
            drawn = numbers(*shape[1:-1]).reshape(-1)[problems]
            order = numbers(*shape[1:]).reshape(-1, shape[-1])[problems]
            patches = valid.sum(-1)
            count = 1 + np.floor(drawn * patches) if exact else np.ceil(_ratio(drawn, config) * patches)
            count = np.clip(count, 1, np.maximum(patches, 1))
            masked = valid & (np.where(valid, order, 2.0).argsort(-1).argsort(-1) < count[:, None])
            weight = weight * patches / count
        entered, weights = masked, np.broadcast_to(weight[:, None], masked.shape)
        if config.silent_fraction < 1 and not exact and cells.shape[-1] > 1:
            kept = numbers(*shape[1:]).reshape(-1, shape[-1])[problems] < config.silent_fraction
            silent = (cells <= 0).all(-1)
            entered = masked & (kept | ~silent)
            weights = np.where(silent, weights / config.silent_fraction, weights)
        chosen = np.flatnonzero(entered)
        weight = weights.reshape(-1)[chosen]
        levels.append(Problems(cells, None if valid.all() else valid, masked, chosen, weight))
        problems = (problems[:, None] * shape[-1] + np.arange(shape[-1])).reshape(-1)[chosen]
    return levels


def _ratio(uniform: np.ndarray, config: FractalModel) -> np.ndarray:
    """Numbers in [0, 1) -> shares in (0, loc], of a normal distribution around loc cut off there and at 0."""
    loc, scale = config.mask_ratio_loc, config.mask_ratio_scale
    lowest = torch.special.ndtr(torch.tensor(-loc / scale, dtype=torch.float64)).item()
    quantile = torch.from_numpy(lowest + (0.5 - lowest) * (1 - uniform))
    return loc + scale * torch.special.ndtri(quantile).numpy()
