"""How well FractalMIDI predicts rolls that it was not trained on: nats per cell, beside their unigram entropy.

In: a model and the batches of a split, each cell once. Out: numbers, ready for JSON:

    nats_per_cell           nats of all cells that are no padding / their number
    unigram_nats_per_cell   entropy of the velocities of the same cells: what knowing their frequencies alone reaches
    of_unigram              the first divided by the second
    silent, sounding        {"share": of nats_per_cell, "cells": how many}
    cells, rolls

>>> evaluate_likelihood(model, split_batches(plan, 8))["of_unigram"]   # doctest: +SKIP
0.55

What surprises: for mar levels a model has no one likelihood. What is reported is the mean over random orders of
generating one patch at a time, drawn once for each roll, so that every evaluation of the same rolls has the same draw.
For ar levels it is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

from meloformer.device import autocast
from meloformer.fractal.dataset import num_cells
from meloformer.fractal.model import FractalMIDI
from meloformer.fractal.roll import NUM_PITCHES


@torch.no_grad()
def evaluate_likelihood(
    model: FractalMIDI,
    batches: Iterable[Mapping[str, np.ndarray]],
    precision: torch.dtype = torch.float32,
    sum_arrays: Callable[..., list[np.ndarray]] | None = None,
) -> dict:
    """Likelihood of every cell of the batches; leaves the model in the mode it was in.

    Where several processes have a share of the batches each, `sum_arrays` adds up theirs (training.distributed.Ranks).
    """
    nats = np.zeros(2)
    velocities = np.zeros(NUM_PITCHES, dtype=np.int64)
    rolls = np.zeros(1, dtype=np.int64)
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            if num_cells(batch) == 0:
                continue
            inputs = model.prepare(batch)
            with autocast(model.device, precision):
                _, _, metrics = model.training_loss(inputs)
            nats += metrics["nats"].cpu().double().numpy()
            velocities += count_velocities(batch)
            rolls += batch["valid"].any(-1).sum()
    finally:
        model.train(was_training)
    if sum_arrays is not None:
        nats, velocities, rolls = sum_arrays(nats, velocities, rolls)
    cells = int(velocities.sum())
    entropy = unigram_entropy(velocities)
    loss = float(nats.sum()) / max(cells, 1)
    parts = zip(("silent", "sounding"), nats.tolist(), (int(velocities[0]), int(velocities[1:].sum())))
    return {
        "nats_per_cell": loss,
        "unigram_nats_per_cell": entropy,
        "of_unigram": loss / entropy if entropy else float("nan"),
        **{name: {"share": part / max(nats.sum(), 1e-9), "cells": count} for name, part, count in parts},
        "cells": cells,
        "rolls": int(rolls[0]),
    }


def count_velocities(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """(128,) how often each velocity stands in the cells that are no padding."""
    cells = batch["roll"].transpose(0, 2, 1)[batch["valid"]]
    return np.bincount(cells.reshape(-1), minlength=NUM_PITCHES)


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of a distribution given by counts.

    >>> round(unigram_entropy(np.array([2, 2])), 4)
    0.6931
    """
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(shares * np.log(shares)).sum())
