"""Held-out likelihood, piece by piece: how sure the mean is, and how it changes as a piece goes on.

In: a model and a `RowPlan`. Out: all that `likelihood.Likelihood.result` gives, and

    nats_per_note_interval   [low, high]: 95 % of bootstrap samples of the pieces lie between
    first_tokens             {"1024": {"perplexity", "nats_per_token", "tokens", "pieces"}, "5120": .., "10240": ..}
    by_bar                   [{"bars": "1-4", "nats_per_note", "notes"}, ..]: by the bar of the piece
    tokens_per_second        of the forward passes, targets or not, padding left out
    by_piece                 {"piece": [..], "nats": [..], "tokens": [..], "notes": [..], "bars": [..]}

>>> evaluate_pieces(model, RowPlan(corpus, config.data, split="validation"), 4)["by_bar"][0]   # doctest: +SKIP
{'bars': '1-4', 'nats_per_note': 4.4, 'notes': 9120}

What surprises: HID writes one instrument after another, so the first 1,024 tokens of a stream are its conductor and
the beginning of its first instrument, not its first bars. They are counted in pieces whose first window holds them (or
the whole piece); where rows are too short for that, fewer pieces count, and `pieces` says how many.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from meloformer.data import Corpus, Document, RowPlan
from meloformer.device import autocast
from meloformer.evaluation.likelihood import Likelihood, spread
from meloformer.hid import Family
from meloformer.hid.rows import stack_rows

FIRST_TOKENS = (1024, 5120, 10240)  # of a piece, as Museformer reports (arXiv 2210.10349, Table 1)
FIRST_BARS = (0, 4, 8, 16, 32, 64, 128)  # where the groups of `by_bar` begin
DRAWS = 2000

Labelled = tuple[dict[str, np.ndarray], list[list[Document]]]


class PieceTally:
    """Sums over rows in stream order; `result` turns them into numbers. One process."""

    def __init__(self, corpus: Corpus, pieces: np.ndarray):
        self.pieces, self.family_of = np.sort(pieces), corpus.vocabulary.family_of
        self.num_bars = corpus.index["num_bars"]
        self.likelihood = Likelihood()
        self.sums = {name: np.zeros(len(pieces)) for name in ("nats", "tokens", "notes", "bars")}
        self.by_bar = np.zeros((2, len(FIRST_BARS)))  # nats, notes
        self.first = {limit: np.zeros((2, len(pieces))) for limit in FIRST_TOKENS}  # nats, tokens
        self.reached = np.zeros(len(pieces), dtype=np.int64)  # tokens in a piece's first window
        self.whole = np.zeros(len(pieces), dtype=bool)  # the first window is the piece

    def add(self, batch: dict[str, np.ndarray], documents: Sequence[Sequence[Document]], nats: np.ndarray) -> None:
        """A batch of rows (B, N), where each row's documents come from, and (B, N) nats of the targets."""
        family = self.family_of[batch["targets"]]
        has_target = batch["targets"] >= 0
        count = np.bincount(family[has_target], minlength=len(Family))
        self.likelihood.add(batch, np.bincount(family[has_target], nats[has_target], len(Family)), count)
        for b, origins in enumerate(documents):
            if origins:
                row = {name: batch[name][b] for name in ("document", "position", "bar", "type", "track")}
                self._add_row(row, origins, nats[b].astype(np.float64), family[b], has_target[b])

    def _add_row(self, row, origins, nats, family, has_target) -> None:
        place = np.searchsorted(self.pieces, [document.piece for document in origins])
        first_bar = np.array([document.first_bar for document in origins])
        inside = row["document"] >= 0
        opener = inside & (row["type"] == Family.BAR) & (row["track"] < 0)
        self._count("bars", place[row["document"][opener]])

        at = np.flatnonzero(has_target)  # what is predicted there stands one further
        document, cost, is_note = row["document"][at], nats[at], family[at] == Family.PITCH
        piece = place[document]
        self._count("nats", piece, cost)
        self._count("tokens", piece)
        self._count("notes", piece[is_note])

        bar = row["bar"][at + 1]
        group = np.searchsorted(FIRST_BARS, bar + first_bar[document], side="right") - 1
        for sums, weight in zip(self.by_bar, (cost, is_note)):
            sums += np.bincount(group[bar >= 0], weight[bar >= 0], len(FIRST_BARS))

        is_first = first_bar[document] == 0
        number = row["position"][at] + 2  # the target's place in the stream, from 1
        for limit, sums in self.first.items():
            early = is_first & (number <= limit)
            sums[0] += np.bincount(piece[early], cost[early], len(self.pieces))
            sums[1] += np.bincount(piece[early], minlength=len(self.pieces))
        for i, (where, origin) in enumerate(zip(place, origins)):
            if origin.first_bar == 0:
                self.reached[where] = int((row["document"] == i).sum())
                self.whole[where] = origin.last_bar == self.num_bars[origin.piece]

    def _count(self, name: str, piece: np.ndarray, weight: np.ndarray | None = None) -> None:
        self.sums[name] += np.bincount(piece, weight, len(self.pieces))

    def result(self) -> dict:
        nats, notes = self.sums["nats"], self.sums["notes"]
        seen = self.sums["tokens"] > 0
        first_tokens = {}
        for limit, (first_nats, first_count) in self.first.items():
            holds = seen & ((self.reached >= limit) | self.whole)
            total = int(first_count[holds].sum())
            mean = float(first_nats[holds].sum()) / total if total else None
            first_tokens[str(limit)] = {
                "perplexity": None if mean is None else math.exp(min(mean, 700.0)),
                "nats_per_token": mean,
                "tokens": total,
                "pieces": int(holds.sum()),
            }
        last = [f"-{end}" for end in FIRST_BARS[1:]] + ["-"]
        by_bar = [
            {"bars": f"{start + 1}{end}", "nats_per_note": float(cost / count), "notes": int(count)}
            for start, end, cost, count in zip(FIRST_BARS, last, *self.by_bar)
            if count
        ]
        return {
            **self.likelihood.result(),
            "nats_per_note_interval": bootstrap_interval(nats[seen], notes[seen]),
            "first_tokens": first_tokens,
            "by_bar": by_bar,
            "by_piece": {
                "piece": self.pieces[seen].tolist(),
                "nats": nats[seen].round(3).tolist(),
                **{name: self.sums[name][seen].astype(int).tolist() for name in ("tokens", "notes", "bars")},
            },
        }


def bootstrap_interval(total: np.ndarray, count: np.ndarray, share: float = 0.95, seed: int = 0) -> list[float] | None:
    """[low, high] of sum(total) / sum(count) over pieces drawn anew with replacement; None for fewer than two pieces.

    The percentile interval of Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    if len(total) < 2:
        return None
    drawn = np.random.default_rng(seed).multinomial(len(total), np.full(len(total), 1 / len(total)), DRAWS)
    ratios = (drawn @ total) / np.maximum(drawn @ count, 1)
    return np.quantile(ratios, [(1 - share) / 2, (1 + share) / 2]).tolist()


def labelled_batches(plan: RowPlan, batch_size: int, max_rows: int | None = None) -> Iterator[Labelled]:
    """Batches as `likelihood.split_batches` gives them, with the documents of every row."""
    rows = spread(plan.num_rows, max_rows)
    for first in range(0, len(rows), batch_size):
        group = [plan.row(row) for row in rows[first : first + batch_size]]
        group += [(plan.empty_row(), [])] * (batch_size - len(group))
        yield stack_rows([row for row, _ in group]), [documents for _, documents in group]


@torch.no_grad()
def evaluate_pieces(
    model,
    plan: RowPlan,
    batch_size: int,
    precision: torch.dtype = torch.float32,
    max_rows: int | None = None,
    progress: Callable[[Iterator[Labelled]], Iterator[Labelled]] = iter,
) -> dict:
    """The numbers of the module's docstring, over the whole plan or `max_rows` of its rows; dropout off.

    progress: wraps the batches, to show how far it is.
    """
    tally = PieceTally(plan.corpus, plan.pieces)
    seconds, num_tokens = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        for batch, documents in progress(labelled_batches(plan, batch_size, max_rows)):
            started = time.perf_counter()
            inputs = model.prepare(batch)
            with autocast(model.device, precision):
                nats = model.token_nats(inputs)
            nats = nats.cpu().numpy()
            seconds += time.perf_counter() - started
            num_tokens += int((batch["document"] >= 0).sum())
            tally.add(batch, documents, nats)
    finally:
        model.train(was_training)
    return {**tally.result(), "tokens_per_second": num_tokens / seconds if seconds else 0.0}
