"""From logits to one token: temperature, top-k, top-p, min-p, over the allowed tokens only.

`choose(logits, allowed, uniform, sampling)` is deterministic: the randomness is one number in [0, 1) a token, from
the sample's own stream, so nothing of a sample depends on its batch-mates.

>>> logits = np.log([0.5, 0.3, 0.15, 0.05])
>>> [choose(logits, np.ones(4, bool), u, Sampling(top_p=1.0)) for u in (0.0, 0.4, 0.6, 0.99)]
[0, 0, 1, 3]
>>> choose(logits, np.array([False, False, True, True]), 0.9, Sampling(temperature=0))
2

`choose_batch` does the same for a batch of tensors on any device, and asks the host for nothing.

`by_family` gives families of tokens a temperature of their own: which family comes next is drawn at `temperature`,
which of its tokens at the family's.

Filters see the distribution that is left after the grammar has spoken, in the order temperature, top-k, top-p (Holtzman
et al. 2020, arXiv 1904.09751, section 3.1), min-p (Nguyen et al. 2024, arXiv 2407.01082, section 3).

The surprise: what ends a bar counts as one event. Where the model is sure that a part is over and expects a guitar, and
a violin was asked for, the violin gets the guitar's share; left to the notes, that share would fill the end of the bar
with whatever note is the least unlikely.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from meloformer.errors import UserError
from meloformer.hid.vocabulary import ENDS_CELL, Family
from meloformer.model.static_session import any_of

_CLOSES = np.isin(np.arange(len(Family)), ENDS_CELL)


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token; top_k 0, top_p 1 and min_p 0 are off; by_family is {family: its own
    temperature}. UserError for a number that means nothing, such as a temperature below 0.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.98
    min_p: float = 0.0
    by_family: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self):
        for name, value, good, accepted in (
            *(("temperature", t, t >= 0, "at least 0") for t in (self.temperature, *self.by_family.values())),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
        ):
            if not good:
                raise UserError(f"{name} is {value}, must be {accepted}")


class NonFiniteLogits(ValueError):
    """Logits of tokens to choose from are inf or nan."""


def choose(
    logits: np.ndarray,
    allowed: np.ndarray,
    uniform: float,
    sampling: Sampling,
    family_of: np.ndarray | None = None,
) -> int:
    """One allowed token of (V,) logits; NonFiniteLogits where the logits of the allowed tokens are not finite.

    family_of: (V,), the vocabulary's. Without it nothing closes a bar, and there are no temperatures by family.
    """
    choices = np.flatnonzero(allowed)
    if len(choices) == 1:
        return int(choices[0])
    scores = logits[choices].astype(np.float64)
    if not np.isfinite(scores).all():
        raise NonFiniteLogits("the model's logits are not finite")
    if family_of is not None:
        closes = _CLOSES[family_of]
        may_close = closes[choices]
        if may_close.any():
            scores[may_close] += _total(logits[closes & np.isfinite(logits)]) - _total(scores[may_close])
    scores = _tempered(scores, sampling, None if family_of is None else family_of[choices])
    order = np.argsort(-scores, kind="stable")
    if sampling.temperature == 0 and not sampling.by_family:
        return int(choices[order[0]])
    probabilities = np.exp(scores[order] - scores[order[0]])
    if sampling.top_k:
        probabilities = probabilities[: sampling.top_k]
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:  # the fewest likeliest tokens that hold the share
        keep = int(np.searchsorted(np.cumsum(probabilities), sampling.top_p)) + 1
        probabilities = probabilities[:keep]
    if sampling.min_p:
        probabilities = probabilities[probabilities >= sampling.min_p * probabilities[0]]
    cumulative = np.cumsum(probabilities)
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return int(choices[order[min(index, len(probabilities) - 1)]])


def _tempered(scores: np.ndarray, sampling: Sampling, families: np.ndarray | None) -> np.ndarray:
    """(n,) logarithms, up to a constant, of what the temperatures make of logits; at temperature 0 only the best."""
    tempered = _at(scores, sampling.temperature)
    if not sampling.by_family:
        return tempered
    for family in np.unique(families).tolist():
        here = families == family
        own = sampling.by_family.get(family, sampling.temperature)
        if own != sampling.temperature:
            tempered[here] = _total(tempered[here]) + _at(scores[here], own) - _total(_at(scores[here], own))
    return tempered


def _at(scores: np.ndarray, temperature: float) -> np.ndarray:
    best = scores.max()
    if temperature == 0:
        kept = np.full(len(scores), -np.inf)
        kept[scores.argmax()] = 0.0
        return kept
    return (scores - best) / temperature


def _total(scores: np.ndarray) -> float:
    """log of the sum of exponentials, in float64."""
    scores = scores.astype(np.float64)
    best = scores.max()
    return float(best + np.log(np.exp(scores - best).sum())) if np.isfinite(best) else -np.inf


def choose_batch(
    logits: Tensor, allowed: Tensor, uniform: Tensor, sampling: Sampling, family_of: Tensor
) -> tuple[Tensor, Tensor]:
    """One allowed token a row of (B, V) logits, and (B,) bool: a row whose logits of several allowed tokens are not all
    finite, which gets any token that is allowed. uniform (B,) float64; family_of (V,)."""
    several = allowed.sum(dim=1) > 1
    is_bad = several & (allowed & ~logits.isfinite()).any(dim=1)
    usable = several & ~is_bad
    scores = torch.where(usable[:, None], logits.double(), 0.0).masked_fill(~allowed, -torch.inf)
    scores = _close_alike(scores, logits, family_of)
    probabilities = _tempered_batch(scores, sampling, family_of).softmax(dim=1)
    # Ties stand in the order of their ids, as a stable sort leaves them.
    probabilities, order = probabilities.sort(dim=1, descending=True, stable=True)
    if sampling.temperature == 0 and not sampling.by_family:
        return order[:, 0], is_bad
    if sampling.top_k:
        probabilities[:, sampling.top_k :] = 0
        probabilities = probabilities / probabilities.sum(dim=1, keepdim=True)
    if sampling.top_p < 1:
        before = probabilities.cumsum(dim=1).roll(1, dims=1)
        before[:, 0] = 0
        probabilities = probabilities * (before < sampling.top_p)
    probabilities = probabilities * (probabilities >= sampling.min_p * probabilities[:, :1])
    cumulative = probabilities.cumsum(dim=1)
    index = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(dim=1)
    last = (probabilities > 0).sum(dim=1) - 1
    return order.gather(1, torch.minimum(index, last)[:, None])[:, 0], is_bad


def _close_alike(scores: Tensor, logits: Tensor, family_of: Tensor) -> Tensor:
    """What ends a bar gets the share of all that does, for (B, V) scores, -inf where a token is not allowed."""
    closes = any_of(family_of, ENDS_CELL)
    whole = logits.double().masked_fill(~(closes & logits.isfinite()), -torch.inf).logsumexp(dim=1, keepdim=True)
    left = scores.masked_fill(~closes, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.where(closes & left.isfinite() & whole.isfinite(), scores + (whole - left), scores)


def _tempered_batch(scores: Tensor, sampling: Sampling, family_of: Tensor) -> Tensor:
    """`_tempered` for (B, V) scores, -inf where a token is not allowed."""
    tempered = _at_batch(scores, sampling.temperature)
    for family, own in sampling.by_family.items():
        if own != sampling.temperature:
            here = family_of == family
            its = _at_batch(scores.masked_fill(~here, -torch.inf), own)
            share = tempered.masked_fill(~here, -torch.inf).logsumexp(dim=1, keepdim=True)
            cooled = share + its - its.logsumexp(dim=1, keepdim=True)
            tempered = torch.where(here & scores.isfinite(), cooled, tempered)
    return tempered


def _at_batch(scores: Tensor, temperature: float) -> Tensor:
    best, index = scores.max(dim=1, keepdim=True)
    if temperature == 0:
        kept = torch.full_like(scores, -torch.inf).scatter(1, index, 0.0)
        return kept.masked_fill(scores == -torch.inf, -torch.inf)
    return torch.where(scores == -torch.inf, scores, (scores - best) / temperature)
