"""How well a model predicts music that it was not trained on: nats by token type, per note and per bar.

In: a model with `prepare(batch)` and `training_loss(inputs)`, and the batches of a split, each window once. Out:
numbers, ready for JSON:

    nats_per_note   nats of all targets / notes (a note: one P with its L and V)
    nats_per_bar    nats of all targets / bars of music (BARs of the conductors: one counts once however many play)
    nats_per_token, perplexity = exp(nats_per_token), nats, tokens, notes, bars, rows
    by_type         {"T": {"nats_per_token", "nats", "tokens"}, "P": .., "L": .., "V": .., "structure": .., ...}

>>> evaluate_likelihood(model, batches)["nats_per_note"]   # doctest: +SKIP
3.62

What surprises: per note and per bar divide everything that is predicted, bar lines and tempi too, so two
models compare whatever their tokens are; per token does not have that property.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from meloformer.device import autocast
from meloformer.hid import Family
from meloformer.hid.rows import stack_rows

# Families in the report's words. What is given (MASK, conditions) has no targets and no line here; conditions that are
# predicted have theirs from evaluation.predicted.
TYPES = {
    "T": (Family.TIME,),
    "P": (Family.PITCH,),
    "L": (Family.DURATION,),
    "V": (Family.VELOCITY,),
    "instrument": (Family.INSTRUMENT,),
    "structure": (Family.BAR, Family.CONDUCTOR, Family.FILL, Family.EOS),
    "meter": (Family.METER,),
    "tempo": (Family.TEMPO,),
}


class Likelihood:
    """Running sums over batches: `nats` and `count` by Family of the target, in float64, and bars of music."""

    def __init__(self):
        self.nats = np.zeros(len(Family))
        self.count = np.zeros(len(Family), dtype=np.int64)
        self.bars = self.rows = 0

    def add(self, batch: Mapping[str, np.ndarray], nats: np.ndarray, count: np.ndarray) -> None:
        """One batch of rows, and nats and number of its targets by Family."""
        self.nats += nats
        self.count += np.asarray(count).astype(np.int64)
        self.bars += count_bars(batch)
        self.rows += int((batch["document"] >= 0).any(axis=-1).sum())

    def combine(self, sum_arrays: Callable[..., list[np.ndarray]]) -> None:
        """Make these the sums of all processes."""
        self.nats, self.count, totals = sum_arrays(self.nats, self.count, np.array([self.bars, self.rows]))
        self.bars, self.rows = totals.tolist()

    def result(self) -> dict:
        nats, tokens, notes = float(self.nats.sum()), int(self.count.sum()), int(self.count[Family.PITCH])
        by_type = {}
        for name, families in TYPES.items():
            type_nats, type_tokens = float(self.nats[list(families)].sum()), int(self.count[list(families)].sum())
            if type_tokens:
                by_type[name] = {"nats_per_token": type_nats / type_tokens, "nats": type_nats, "tokens": type_tokens}
        return {
            "nats_per_note": nats / max(notes, 1),
            "nats_per_bar": nats / max(self.bars, 1),
            "nats_per_token": nats / max(tokens, 1),
            "perplexity": math.exp(min(nats / max(tokens, 1), 700.0)),  # e^709 is the last float
            "nats": nats,
            "tokens": tokens,
            "notes": notes,
            "bars": self.bars,
            "rows": self.rows,
            "by_type": by_type,
        }


def count_bars(batch: Mapping[str, np.ndarray]) -> int:
    """Bars of music in the batch's rows: BAR tokens of the conductors."""
    return int(((batch["type"] == Family.BAR) & (batch["track"] < 0)).sum())


def evaluate_likelihood(
    model,
    batches: Iterable[Mapping[str, np.ndarray]],
    precision: torch.dtype = torch.float32,
    sum_arrays: Callable[..., list[np.ndarray]] | None = None,
) -> dict:
    """Likelihood of every target in `batches`, dropout off; leaves the model in the mode it was in.

    Where several processes have a share of the batches each, `sum_arrays` adds up theirs (training.distributed.Ranks).
    """
    return measure(model, batches, precision, sum_arrays).result()


@torch.no_grad()
def measure(
    model,
    batches: Iterable[Mapping[str, np.ndarray]],
    precision: torch.dtype = torch.float32,
    sum_arrays: Callable[..., list[np.ndarray]] | None = None,
) -> Likelihood:
    """The sums that `evaluate_likelihood` makes numbers of."""
    likelihood = Likelihood()
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            inputs = model.prepare(batch)
            with autocast(model.device, precision):
                _, _, metrics = model.training_loss(inputs)
            likelihood.add(batch, metrics["nats"].cpu().double().numpy(), metrics["count"].cpu().numpy())
    finally:
        model.train(was_training)
    if sum_arrays is not None:
        likelihood.combine(sum_arrays)
    return likelihood


def split_batches(
    plan, batch_size: int, max_rows: int | None = None, rank: int = 0, world_size: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Every row of a plan once, in batches of one shape; or `max_rows` of them, spread evenly over the plan.

    Of `world_size` processes each gets its share of the rows, the process `rank` those from `rank` on.
    """
    rows = spread(plan.num_rows, max_rows)[rank::world_size]
    for first in range(0, len(rows), batch_size):
        group = [plan.row(row)[0] for row in rows[first : first + batch_size]]
        group += [plan.empty_row()] * (batch_size - len(group))
        yield stack_rows(group)


def spread(num_rows: int, max_rows: int | None) -> Sequence[int]:
    """All rows of a plan, or `max_rows` of them.

    Rows lie from long pieces to short ones: the first ones alone would not speak for the split.
    """
    if max_rows is None or num_rows <= max_rows:
        return range(num_rows)
    return [(2 * i + 1) * num_rows // (2 * max_rows) for i in range(max_rows)]
