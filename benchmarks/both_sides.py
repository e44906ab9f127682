"""What a bar costs in its place in the stream, and what the same bar costs when both of its neighbours are known.

`both_sides(model, corpus, data, batch_size, precision, max_rows)` takes held-out windows, defers an eighth of the bars
that stand between two others of their track, and gives nats a note of those bars' notes, twice:

    in_place     in the plain stream: known are the track's earlier bars and the tracks written before
    both_sides   in the fills: known is everything but the bars that are deferred with it

The surprise: only T, P, L and V tokens count, for how a bar ends is said by different tokens in the two streams.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from meloformer.config import DataConfig
from meloformer.data import Corpus, RowPlan
from meloformer.data.draws import generator
from meloformer.evaluation.likelihood import evaluate_likelihood, spread
from meloformer.hid import Family, annotate, find_segments
from meloformer.hid.deferral import defer
from meloformer.hid.rows import NO_TARGET, make_row, stack_rows

SHARE = 1 / 8
CONTENT = (Family.TIME, Family.PITCH, Family.DURATION, Family.VELOCITY)


def inner_cells(tokens: np.ndarray, plan: RowPlan, rng: np.random.Generator) -> list[tuple[int, int]]:
    """An eighth of the sounding (track, bar) cells that have a sounding one before and one after in their track."""
    segments = find_segments(annotate(tokens, plan.corpus.vocabulary))
    inner = np.zeros(len(segments.track), dtype=bool)
    inner[1:-1] = (segments.track[1:-1] == segments.track[:-2]) & (segments.track[1:-1] == segments.track[2:])
    cells = np.flatnonzero(inner)
    chosen = cells[rng.random(len(cells)) < SHARE] if len(cells) else cells
    return list(zip(segments.track[chosen].tolist(), segments.bar[chosen].tolist()))


def only_cells(row: dict[str, np.ndarray], cells: list[tuple[int, int]], in_fills: bool) -> dict[str, np.ndarray]:
    """The row with the notes of these cells as its only targets: those in the fills, or those in their own place."""
    wanted = np.isin(row["type"], CONTENT) & np.isin(row["track"] << 16 | row["bar"], [t << 16 | b for t, b in cells])
    fills = np.maximum.accumulate(row["type"] == Family.FILL)
    wanted &= fills if in_fills else ~fills
    return {**row, "targets": np.where(np.append(wanted[1:], False), row["targets"], NO_TARGET).astype(np.int32)}


def both_sides(
    model,
    corpus: Corpus,
    data: DataConfig,
    batch_size: int,
    precision: torch.dtype = torch.float32,
    max_rows: int | None = None,
) -> dict[str, float]:
    """{"in_place", "both_sides"}: nats a note of the same bars."""
    plan = RowPlan(corpus, data, split="validation")
    room = data.max_seq_len + data.max_seq_len // 6 + 2  # a deferred cell is two tokens more

    def rows(in_fills: bool) -> Iterator[dict[str, np.ndarray]]:
        for window in spread(len(plan.windows), max_rows):
            tokens, origin = plan.document(window)
            cells = inner_cells(tokens, plan, generator(0, 0, "both sides", origin.piece, origin.first_bar))
            if cells:
                stream = defer(tokens, cells, corpus.vocabulary) if in_fills else tokens
                yield only_cells(make_row([stream], corpus.vocabulary, room, data.max_segments), cells, in_fills)

    def batches(in_fills: bool) -> Iterator[dict[str, np.ndarray]]:
        every = list(rows(in_fills))
        empty = make_row([], corpus.vocabulary, room, data.max_segments)
        for first in range(0, len(every), batch_size):
            group = every[first : first + batch_size]
            yield stack_rows(group + [empty] * (batch_size - len(group)))

    return {
        name: evaluate_likelihood(model, batches(in_fills), precision)["nats_per_note"]
        for name, in_fills in (("in_place", False), ("both_sides", True))
    }
