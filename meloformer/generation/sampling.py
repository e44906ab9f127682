"""From logits to one token: temperature, top-k, top-p, min-p, over the allowed tokens only.

`choose(logits, allowed, uniform, sampling)` is deterministic: the randomness is one number in [0, 1) a token, from
the sample's own stream, so nothing of a sample depends on its batch-mates.

>>> logits = np.log([0.5, 0.3, 0.15, 0.05])
>>> [choose(logits, np.ones(4, bool), u, Sampling(top_p=1.0)) for u in (0.0, 0.4, 0.6, 0.99)]
[0, 0, 1, 3]
>>> choose(logits, np.array([False, False, True, True]), 0.9, Sampling(temperature=0))
2

The surprise: filters see the distribution that is left after the grammar has spoken, in the order temperature, top-k,
top-p (Holtzman et al. 2020, arXiv 1904.09751, section 3.1), min-p (Nguyen et al. 2024, arXiv 2407.01082, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token; top_k 0, top_p 1 and min_p 0 are off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.98
    min_p: float = 0.0


def choose(logits: np.ndarray, allowed: np.ndarray, uniform: float, sampling: Sampling) -> int:
    """One allowed token of (V,) logits; ValueError where the logits of the allowed tokens are not finite."""
    choices = np.flatnonzero(allowed)
    if len(choices) == 1:
        return int(choices[0])
    scores = logits[choices].astype(np.float64)
    if not np.isfinite(scores).all():
        raise ValueError("the model's logits are not finite")
    if sampling.temperature == 0:
        return int(choices[scores.argmax()])
    order = np.argsort(-scores, kind="stable")
    scores = (scores[order] - scores[order[0]]) / sampling.temperature
    probabilities = np.exp(scores)
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
