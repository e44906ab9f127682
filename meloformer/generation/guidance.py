"""Classifier-free guidance: the same model reads every stream twice, with its conditions and without them.

    session, logits = begin_guided(model, prompt, max_length, max_summaries, guidance=2.0)   # logits (1, V)
    batch = session.branch([0] * B)
    logits = batch.step(tokens, annotations)                                          # (B, V)

A `GuidedSession` takes the place of a `DecodingSession`: it holds one of twice the batch, and its logits are
`without + guidance * (with - without)`, Ho & Salimans 2022 (arXiv 2207.12598, section 3.2, equation 6, where
guidance = 1 + w). 1 is the model as it is, 0 the model that was told nothing; above 1 the conditions weigh more than
they do in real music. What the grammar and the request forbid is taken out afterwards, and one token is drawn for both.

>>> v = Vocabulary()
>>> tokens = np.array([v.BOS, v.token(Family.KEY, 0), v.CONDUCTOR, v.BAR, v.meter(4, 4), v.tempo(90), v.time(0)])
>>> [v.name(token) for token in without_conditions(np.append(tokens, v.token(Family.CHORD, 0)), v)]
['BOS', 'CONDUCTOR', 'BAR', 'METER_4/4', 'TEMPO_90']

Conditions that the model writes itself are drawn without guidance, and are given from then on.

The surprise: PIECE_BEGIN and PIECE_END stay in both. They are facts about the stream that training never leaves out,
so a stream without them does not say "unknown", it says "not the end".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from meloformer.generation.request import Request
from meloformer.hid import Annotations, Family, Vocabulary
from meloformer.hid.rows import make_row, stack_rows
from meloformer.model import MeloFormer
from meloformer.model.cache import DecodingSession


def is_condition(type: np.ndarray, track: np.ndarray) -> np.ndarray:
    """(T,) bool of annotated tokens: conditions, and the T that a chord of the conductor stands at."""
    return (type >= Family.KEY) | ((type == Family.TIME) & (track < 0))


def without_conditions(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """The stream, or the beginning of one, without its conditions: still a valid one."""
    kind = vocabulary.family_of[tokens]
    in_tracks = np.cumsum(kind == Family.INSTRUMENT) > 0
    return tokens[~is_condition(kind, np.where(in_tracks, 0, -1))]


def has_conditions(request: Request, vocabulary: Vocabulary) -> bool:
    """Whether anything is given that could be guided by."""
    given = np.array([] if request.given is None else request.given, dtype=np.int64)
    return bool(request.steering.names()) or len(without_conditions(given, vocabulary)) < len(given)


def begin_guided(
    model: MeloFormer,
    prompt: np.ndarray,
    max_length: int,
    max_summaries: int,
    guidance: float,
    is_choosing: bool = False,
) -> tuple[GuidedSession, Tensor]:
    """A session of one stream that has read `prompt` (T,), and the logits (1, V) behind it. is_choosing: what comes
    next may be a condition that the model writes."""
    session = GuidedSession(DecodingSession(model, 2, max_length, max_summaries), guidance)
    bars = int(np.isin(prompt, (model.vocabulary.BAR, model.vocabulary.FILL)).sum())
    pair = (prompt, without_conditions(prompt, model.vocabulary))
    rows = [make_row([tokens], model.vocabulary, len(prompt), bars) for tokens in pair]
    logits = session.combine(session.inner.prefill(stack_rows(rows)))
    return session, session.unguided(logits, np.array([is_choosing]))


class GuidedSession:
    """B streams in a session of 2 B: rows 0 .. B - 1 are given the conditions, rows B .. 2 B - 1 are not."""

    def __init__(self, inner: DecodingSession, guidance: float):
        self.inner, self.guidance = inner, guidance
        # (B, V) each, the last logits with and without conditions
        self.given: Tensor | None = None
        self.free: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return self.inner.batch_size // 2

    def step(self, tokens: np.ndarray, annotations: Annotations) -> Tensor:
        """Append one token to every stream; guided logits (B, V). A condition is read by the rows that are given it.

        The annotations of a stream serve for both its rows: only the numbers of onsets would differ, and of those
        nothing but their being different is read.
        """
        waits = is_condition(np.asarray(annotations.type), np.asarray(annotations.track))
        active = np.concatenate([np.ones_like(waits), ~waits])
        both = Annotations(*(np.tile(values, 2) for values in annotations))
        return self.combine(self.inner.step(np.tile(tokens, 2), both, active), waits)

    def combine(self, logits: Tensor, waits: np.ndarray | None = None) -> Tensor:
        """(2 B, V) -> (B, V); the rows without conditions that wait keep the logits they had."""
        given, free = logits.chunk(2)
        if waits is not None and waits.any():
            free = torch.where(torch.from_numpy(waits).to(free.device)[:, None], self.free, free)
        self.given, self.free = given, free
        return free + self.guidance * (given - free)

    def unguided(self, logits: Tensor, rows: np.ndarray) -> Tensor:
        """Logits (B, V), with those of the model as it is in the `rows` (B,) that choose a condition themselves: the
        stream without conditions cannot be asked which one comes next."""
        if not rows.any():
            return logits
        return torch.where(torch.from_numpy(rows).to(logits.device)[:, None], self.given, logits)

    def keep(self, rows: Sequence[int]) -> None:
        """`DecodingSession.keep`, of streams."""
        both, index = self._rows(rows)
        self.inner.keep(both)
        self.given, self.free = self.given[index], self.free[index]

    def branch(self, rows: Sequence[int]) -> GuidedSession:
        """`DecodingSession.branch`, of streams."""
        both, index = self._rows(rows)
        twin = GuidedSession(self.inner.branch(both), self.guidance)
        twin.given, twin.free = self.given[index], self.free[index]
        return twin

    def _rows(self, rows: Sequence[int]) -> tuple[np.ndarray, Tensor]:
        """Rows of the session, and of `free`, that these streams are."""
        rows = np.asarray(rows, dtype=np.int64)
        return np.concatenate([rows, rows + self.batch_size]), torch.from_numpy(rows).to(self.free.device)
