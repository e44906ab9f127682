"""What guessing without a network reaches on the same held-out windows: the numbers that a model has to beat.

    unigram      how often each token occurs
    bigram       which token follows which, smoothed towards the unigram
    repeat_bar   the track's previous bar with notes, played again: a pointer runs along it and predicts the token that
                 followed there; mixed with the bigram

In: a corpus and its DataConfig. Counts and weights come from the training split, un-augmented; the figures from the
rows of the validation split, over the targets that a model has. Out: for each name what `Likelihood.result` gives.

>>> evaluate_baselines(corpus, config.data)["bigram"]["nats_per_note"]   # doctest: +SKIP
10.6

The surprise: a mixture that trusts the copy more where the *answer* is a pitch would be cheating, since the answer is
not known yet. The weight goes by the family of the token that the pointer predicts, and by whether it predicted the
last token right.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np

from meloformer.config import DataConfig
from meloformer.data import Corpus, Document, RowPlan
from meloformer.evaluation.likelihood import Likelihood
from meloformer.hid import Family, Vocabulary

MAX_TRAINING_TOKENS = 2_000_000
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)  # of the unigram within the bigram, in counts
EM_STEPS = 40
NOTHING = -1  # the pointer has nothing to say


class Bigram:
    """How often each token follows each other one, smoothed with `strength` counts of the unigram."""

    def __init__(self, previous: np.ndarray, target: np.ndarray, size: int):
        counts = np.bincount(target, minlength=size)
        self.unigram = (counts + 0.5) / (len(target) + 0.5 * size)
        self.pairs = np.bincount(previous * size + target, minlength=size * size).reshape(size, size)
        self.contexts = self.pairs.sum(axis=1)

    def probability(self, previous: np.ndarray, target: np.ndarray, strength: float) -> np.ndarray:
        return (self.pairs[previous, target] + strength * self.unigram[target]) / (self.contexts[previous] + strength)

    def best_strength(self, previous: np.ndarray, target: np.ndarray) -> float:
        """The strength that makes these pairs, which should not be among the counted ones, likeliest."""
        return max(STRENGTHS, key=lambda strength: np.log(self.probability(previous, target, strength)).sum())


def repeat_bar(tokens: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """For each position of a stream, (T,): the token that the previous bar has next (NOTHING where there is none), and
    whether the pointer stands there because it predicted this position's token.

    After a token that it did not predict, the pointer goes on if the token was of the predicted family (another
    pitch), and otherwise finds its place again at the next T.
    """
    family = vocabulary.family_of.tolist()  # plain integers: this loop sees every token
    kinds = vocabulary.family_of[tokens].tolist()
    families = (Family.BAR, Family.TIME, Family.VELOCITY, Family.INSTRUMENT, Family.EOS)
    bar_line, onset, velocity, instrument, end = (int(f) for f in families)
    predicted, matched = [NOTHING] * len(kinds), [False] * len(kinds)
    previous: list[int] = []  # tokens of the last bar with notes, from its BAR to the BAR that came next
    onsets: list[int] = []  # its T tokens, and where they stand
    places: list[int] = []
    bar: list[int] = []
    pointer, resume, in_track = NOTHING, NOTHING, False
    for i, (token, kind) in enumerate(zip(tokens.tolist(), kinds)):
        if kind in (instrument, end):
            in_track, previous, bar = kind == instrument, [], []
            pointer = resume = NOTHING
        if not in_track or kind == instrument:
            continue
        expected = previous[pointer + 1] if pointer >= 0 and pointer + 1 < len(previous) else NOTHING
        matched[i] = token == expected
        if kind == bar_line:
            if len(bar) > 1:
                previous = [*bar, token]
                places = [j for j, t in enumerate(previous) if family[t] == onset]
                onsets = [previous[j] for j in places]
            bar = []
            pointer, resume = (0 if previous else NOTHING), NOTHING
        elif matched[i]:
            pointer += 1
        elif kind == onset and previous:
            later = bisect_right(onsets, token)
            found = later > 0 and onsets[later - 1] == token
            pointer = places[later - 1] if found else NOTHING
            resume = (places[later] if later < len(places) else len(previous) - 1) - 1
        elif expected != NOTHING and family[expected] == kind:
            pointer += 1
        else:  # an added note, or one missing: wait for the note to end, then expect the next onset
            pointer = resume if kind == velocity else NOTHING
        if kind == onset and matched[i]:
            later = bisect_right(onsets, token)
            resume = (places[later] if later < len(places) else len(previous) - 1) - 1
        bar.append(token)
        if pointer >= 0 and pointer + 1 < len(previous):
            predicted[i] = previous[pointer + 1]
    return np.array(predicted, dtype=np.int64), np.array(matched)


def copy_group(predicted: np.ndarray, matched: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """(T,) which mixture weight a position uses: the predicted token's family, twice over; 0 without a prediction."""
    family = np.where(predicted >= 0, vocabulary.family_of[predicted], 0)
    return family * 2 + (matched & (predicted >= 0))


def fit_weights(hit: np.ndarray, bigram: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(2 x families,) weight of the copy in each group, by expectation maximisation."""
    num_groups = 2 * len(Family)
    weights = np.full(num_groups, 0.5)
    size = np.maximum(np.bincount(group, minlength=num_groups), 1)
    for _ in range(EM_STEPS):
        w = weights[group]
        responsible = np.where(hit, w / (w + (1 - w) * bigram), 0.0)
        # Never certain: a group that always hit in training may miss once held out.
        weights = ((np.bincount(group, responsible, num_groups)) / (size + 1)).clip(0, 1 - 1e-3)
    weights[:2] = 0.0
    return weights


def _rows(plan: RowPlan, max_tokens: int | None = None) -> Iterator[tuple[dict[str, np.ndarray], list[Document]]]:
    """All rows of a plan with their documents, or as many as have max_tokens together, spread evenly over it."""
    count = plan.num_rows
    if max_tokens is not None:
        count = max(1, min(count, max_tokens // plan.data.max_seq_len))
    for i in range(count):
        yield plan.row((2 * i + 1) * plan.num_rows // (2 * count))


def _copies(row: dict[str, np.ndarray], vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """`repeat_bar` of every document of a row, end to end, (N,)."""
    predicted, matched = np.full(len(row["tokens"]), NOTHING), np.zeros(len(row["tokens"]), dtype=bool)
    for document in range(int(row["document"].max()) + 1):
        here = row["document"] == document
        predicted[here], matched[here] = repeat_bar(row["tokens"][here], vocabulary)
    return predicted, matched


def _split_in_two(piece: np.ndarray) -> np.ndarray:
    """(n,) True for the targets of every other piece, or of the second half if there is one piece only."""
    pieces, place = np.unique(piece, return_inverse=True)
    return place % 2 == 1 if len(pieces) > 1 else np.arange(len(piece)) >= len(piece) // 2


def evaluate_baselines(
    corpus: Corpus, data: DataConfig, max_training_tokens: int = MAX_TRAINING_TOKENS
) -> dict[str, dict]:
    """{"unigram", "bigram", "repeat_bar"}: `Likelihood.result` of each on the validation split."""
    vocabulary = corpus.vocabulary
    columns: list[tuple[np.ndarray, ...]] = []
    for row, documents in _rows(RowPlan(corpus, data, split="train", augment=False), max_training_tokens):
        at = row["targets"] >= 0
        predicted, matched = _copies(row, vocabulary)
        piece = np.array([document.piece for document in documents])[row["document"][at]]
        columns.append((row["tokens"][at], row["targets"][at], predicted[at], matched[at], piece))
    previous, target, predicted, matched, piece = (np.concatenate(parts).astype(np.int64) for parts in zip(*columns))

    # Smoothing and weights by the music of other pieces: a piece repeats itself, and would vouch for its own counts.
    other = _split_in_two(piece)
    half = Bigram(previous[~other], target[~other], vocabulary.size)
    strength = half.best_strength(previous[other], target[other])
    follows = half.probability(previous[other], target[other], strength)
    group = copy_group(predicted[other], matched[other].astype(bool), vocabulary)
    weights = fit_weights(predicted[other] == target[other], follows, group)
    bigram = Bigram(previous, target, vocabulary.size)

    sums = {name: Likelihood() for name in ("unigram", "bigram", "repeat_bar")}
    for row, _ in _rows(RowPlan(corpus, data, split="validation")):
        at = row["targets"] >= 0
        previous, target = row["tokens"][at], row["targets"][at]
        predicted, matched = (values[at] for values in _copies(row, vocabulary))
        follows = bigram.probability(previous, target, strength)
        weight = weights[copy_group(predicted, matched, vocabulary)]
        mixed = weight * (predicted == target) + (1 - weight) * follows
        family = vocabulary.family_of[target]
        count = np.bincount(family, minlength=len(Family))
        for name, probability in (("unigram", bigram.unigram[target]), ("bigram", follows), ("repeat_bar", mixed)):
            sums[name].add(row, np.bincount(family, -np.log(probability), len(Family)), count)
    return {name: likelihood.result() for name, likelihood in sums.items()}
