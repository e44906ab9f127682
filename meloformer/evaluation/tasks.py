"""How well a model fills in deferred bars, for each way of deferring them.

In: a corpus and its data settings. Out: {"rectangle": nats a note, "continuation": .., "track": .., "scattered": ..},
over the held-out pieces. Only what stands in the fills counts: the rest is context.

>>> tasks = Tasks(corpus, config.data)                   # doctest: +SKIP
>>> tasks.evaluate(model, batch_size=4, max_rows=32)     # doctest: +SKIP
{'rectangle': 3.1, 'continuation': 4.0, 'track': 3.4, 'scattered': 2.8}

What surprises: the cells are drawn by the counters of seed 0, epoch 0, so each validation of each run on the same
data asks for the same bars.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from meloformer.config import DataConfig
from meloformer.data import Corpus, RowPlan
from meloformer.evaluation.likelihood import evaluate_likelihood, split_batches
from meloformer.hid import Family

TASKS = ("rectangle", "continuation", "track", "scattered")


class Tasks:
    """The held-out rows of every task; planned when they are first asked for."""

    def __init__(self, corpus: Corpus, data: DataConfig):
        self.corpus, self.data = corpus, data

    @cached_property
    def plans(self) -> dict[str, RowPlan]:
        off = {name: 0.0 for name in vars(self.data) if name.endswith("_probability")}
        return {
            task: RowPlan(
                self.corpus,
                replace(self.data, **{**off, f"defer_{task}_probability": 1.0}),
                split="validation",
                augment=True,
            )
            for task in TASKS
        }

    def evaluate(
        self,
        model,
        batch_size: int,
        max_rows: int,
        precision: torch.dtype = torch.float32,
        rank: int = 0,
        world_size: int = 1,
        sum_arrays: Callable[..., list[np.ndarray]] | None = None,
    ) -> dict[str, float]:
        """Nats a note in the fills of at most `max_rows` rows of each task; processes as in `evaluate_likelihood`."""
        found = {}
        for task, plan in self.plans.items():
            batches = map(only_fills, split_batches(plan, batch_size, max_rows, rank, world_size))
            found[task] = evaluate_likelihood(model, batches, precision, sum_arrays)["nats_per_note"]
        return found


def only_fills(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with the targets of fills alone: those from a document's first FILL on."""
    position = batch["position"]
    first = np.full(position.shape, np.iinfo(position.dtype).max, dtype=position.dtype)
    for row, at in np.argwhere(batch["type"] == Family.FILL):
        mine = batch["document"][row] == batch["document"][row, at]
        first[row, mine] = np.minimum(first[row, mine], position[row, at])
    return {**batch, "targets": np.where(position >= first, batch["targets"], -1).astype(batch["targets"].dtype)}
