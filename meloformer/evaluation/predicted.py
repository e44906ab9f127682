"""How well a model predicts the conditions that it learnt to write itself (`--predict_conditions`).

In: a corpus and its data settings. Out, over the held-out pieces, for each of those conditions:

>>> predicted = Predicted(corpus, config.data)                # doctest: +SKIP
>>> predicted.evaluate(model, batch_size=4, max_rows=32)      # doctest: +SKIP
{"key": {"nats_per_token": 2.6, "nats": 83.2, "tokens": 32}, "chords": {"nats_per_token": 2.9, ..}}

They stand beside the other types in `by_type` and enter no sum: nats a note are measured on streams without conditions,
as for a model that predicts none. Such a model still pays about a nat a stream there, for predicting that none comes.

What surprises: a condition is predicted knowing all that stand before it in the stream, so a chord knows every chord so
far. The cost of a chord includes that of its T, which says when it begins. And each cost includes the chance that the
condition is given at all, as training has it: by default 0.6 of the pieces get conditions, each with 0.8, so 0.48.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import numpy as np
import torch

from meloformer.config import DataConfig
from meloformer.data import Corpus, RowPlan
from meloformer.evaluation.likelihood import Likelihood, measure, split_batches
from meloformer.hid import Family
from meloformer.hid.controls import CONDITIONS


class Predicted:
    """The held-out rows with every condition that is predicted; planned when they are first asked for."""

    def __init__(self, corpus: Corpus, data: DataConfig, split: str = "validation"):
        self.corpus, self.data, self.split = corpus, data, split
        wanted = data.predict_conditions or [] if corpus.has_conditions else []
        self.names = [name for name in CONDITIONS if name in wanted]

    @cached_property
    def plan(self) -> RowPlan:
        return RowPlan(
            self.corpus, self.data, split=self.split, augment=False, conditions=self.names, predicts_them=True
        )

    def evaluate(
        self,
        model,
        batch_size: int,
        max_rows: int | None = None,
        precision: torch.dtype = torch.float32,
        rank: int = 0,
        world_size: int = 1,
        sum_arrays: Callable[..., list[np.ndarray]] | None = None,
    ) -> dict[str, dict[str, float]]:
        """The numbers of the module's docstring, of at most `max_rows` rows; empty where nothing is predicted.
        Processes as in `evaluate_likelihood`."""
        if not self.names:
            return {}
        batches = map(only_conditions, split_batches(self.plan, batch_size, max_rows, rank, world_size))
        found = measure(model, batches, precision, sum_arrays)
        return {name: entry for name in self.names if (entry := _entry(found, CONDITIONS[name])) is not None}


def _entry(found: Likelihood, family: Family) -> dict[str, float] | None:
    nats, tokens = float(found.nats[family]), int(found.count[family])
    if family == Family.CHORD:
        nats += float(found.nats[Family.TIME])
    return {"nats_per_token": nats / tokens, "nats": nats, "tokens": tokens} if tokens else None


def only_conditions(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with the targets of conditions alone, and of the T of each chord."""
    kind, track = batch["type"][:, 1:], batch["track"][:, 1:]
    targets = np.full_like(batch["targets"], -1)
    is_condition = (kind >= Family.KEY) | ((kind == Family.TIME) & (track < 0))
    targets[:, :-1] = np.where(is_condition, batch["targets"][:, :-1], -1)
    return {**batch, "targets": targets}
