"""Batches of a plan, in order, from any step on: what the training loop iterates over.

    corpus = Corpus(data_dir)                                       # vocabulary, hash, num_pieces, meta
    plan = RowPlan(corpus, config.data, seed, epoch, "train")       # num_rows, fill, skipped
    for step in batches(plan, first_step=0, rows_per_step=32, micro_batch=4, num_workers=2):
        step.index                      # step of this epoch
        step.micro_batches              # list of dicts of numpy arrays (micro_batch, N) and (micro_batch, M)
        step.documents                  # [micro-batch][row] -> list[Document]: where each document came from
        step.num_targets                # targets of this rank in this step; step.targets: of each micro-batch

`steps_in(plan, rows_per_step)` is the number of steps in an epoch. N = data.max_seq_len, M = data.max_segments: every
micro-batch has one shape. rows_per_step G = world_size x micro_batch x accumulation steps. Row i of a step goes to
rank i % world_size, so ranks share out evenly what an uneven last step has; where rows run out, padding rows stand
(document -1, targets -1), and every rank gets the same number of micro-batches.

The surprise: `num_workers` threads build rows ahead of need, and have no say in what a batch holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from meloformer.data.corpus import Corpus
from meloformer.data.packing import Document, RowPlan, num_targets
from meloformer.hid.rows import stack_rows

__all__ = ["Corpus", "Document", "RowPlan", "Step", "batches", "num_targets", "steps_in"]

STEPS_AHEAD = 2  # steps whose rows are being built while one is consumed


class Step(NamedTuple):
    """One rank's share of one optimizer step."""

    index: int
    micro_batches: list[dict[str, np.ndarray]]
    documents: list[list[list[Document]]]
    targets: list[int]

    @property
    def num_targets(self) -> int:
        return sum(self.targets)


def steps_in(plan: RowPlan, rows_per_step: int) -> int:
    """Optimizer steps in one pass over the plan; the last may have fewer rows."""
    return -(-plan.num_rows // rows_per_step)


def rows_of(plan: RowPlan, step: int, rows_per_step: int, rank: int, world_size: int) -> list[int]:
    """Rows of the plan that a rank takes in a step; -1 is padding.

    >>> class Plan: num_rows = 7
    >>> [rows_of(Plan, 1, 4, rank, 2) for rank in (0, 1)]
    [[4, 6], [5, -1]]
    """
    first = step * rows_per_step
    mine = range(first + rank, first + rows_per_step, world_size)
    return [row if row < plan.num_rows else -1 for row in mine]


def batches(
    plan: RowPlan,
    first_step: int = 0,
    rows_per_step: int = 1,
    rank: int = 0,
    world_size: int = 1,
    micro_batch: int = 1,
    num_workers: int = 0,
) -> Iterator[Step]:
    """Steps first_step, first_step + 1, ... to the end of the plan; nothing is read for the steps before.

    `num_workers` threads prefetch; 0 builds each step when it is asked for.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, must be from 0 to {world_size - 1}")
    if rows_per_step % (world_size * micro_batch):
        raise ValueError(
            f"rows_per_step is {rows_per_step}, must be a multiple of world_size ({world_size}) "
            f"x micro_batch ({micro_batch})"
        )
    indices = range(first_step, steps_in(plan, rows_per_step))
    wanted = ((index, rows_of(plan, index, rows_per_step, rank, world_size)) for index in indices)
    if num_workers == 0:
        for index, rows in wanted:
            yield _assemble(plan, index, [_build(plan, row) for row in rows], micro_batch)
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="rows")
    pending: deque[tuple[int, list[Future]]] = deque()
    try:
        for index, rows in wanted:
            pending.append((index, [pool.submit(_build, plan, row) for row in rows]))
            if len(pending) > STEPS_AHEAD:
                index, futures = pending.popleft()
                yield _assemble(plan, index, [future.result() for future in futures], micro_batch)
        while pending:
            index, futures = pending.popleft()
            yield _assemble(plan, index, [future.result() for future in futures], micro_batch)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _build(plan: RowPlan, row: int) -> tuple[dict[str, np.ndarray], list[Document]]:
    return plan.row(row) if row >= 0 else (plan.empty_row(), [])


def _assemble(plan: RowPlan, index: int, built: list, micro_batch: int) -> Step:
    groups = [built[i : i + micro_batch] for i in range(0, len(built), micro_batch)]
    micro_batches = [stack_rows([row for row, _ in group]) for group in groups]
    documents = [[documents for _, documents in group] for group in groups]
    return Step(index, micro_batches, documents, [plan.num_targets(batch) for batch in micro_batches])
