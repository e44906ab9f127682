"""What conditions are worth: held-out nats of the same music with and without them.

In: a model, a corpus with conditions, its data settings, and subsets of the conditions' names. Out, for every subset,
what `Likelihood.result` gives:

>>> worth_of(model, corpus, data, "validation", subsets(["each"]))      # doctest: +SKIP
{"none": {"nats_per_note": 4.40, ..}, "key": {"nats_per_note": 4.37, ..}, ..., "all": {"nats_per_note": 4.21, ..}}

What surprises: "none" is not the likelihood that evaluate.py shows by itself. Given conditions take room in a row, so
for all subsets alike the pieces are cut into windows that would hold every condition that is asked for anywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from meloformer.config import DataConfig
from meloformer.data import Corpus, RowPlan
from meloformer.errors import UserError
from meloformer.evaluation.likelihood import evaluate_likelihood, split_batches
from meloformer.hid.controls import CONDITIONS

NONE, EACH, ALL = "none", "each", "all"


def subsets(names: Sequence[str], known: Sequence[str] = tuple(CONDITIONS)) -> dict[str, tuple[str, ...]]:
    """The subsets to compare, by what they are called; UserError for a name that is no condition, or none of those
    that the model was trained with (`known`).

    >>> list(subsets(["key", "chords"]))
    ['none', 'key+chords']
    >>> list(subsets(["each"]))
    ['none', 'key', 'chords', 'tag', 'density', 'polyphony', 'role', 'bar_density', 'all']
    """
    found: dict[str, tuple[str, ...]] = {NONE: ()}
    for name in names:
        if name not in (*CONDITIONS, NONE, EACH, ALL):
            raise UserError(f"conditions is {name!r}, must be of {', '.join(CONDITIONS)}, or all, each or none")
        if not known:
            raise UserError("conditions: the model was trained without any, so there are none to give")
        if name in CONDITIONS and name not in known:
            raise UserError(f"conditions: the model was trained without {name} and knows {', '.join(known)}")
    alone = [name for name in names if name in CONDITIONS]
    if alone:
        found["+".join(alone)] = tuple(alone)
    if EACH in names:
        found |= {name: (name,) for name in known}
    if ALL in names or EACH in names:
        found[ALL] = tuple(known)
    return found


def worth_of(
    model,
    corpus: Corpus,
    data: DataConfig,
    split: str,
    given: Mapping[str, Collection[str]],
    batch_size: int = 1,
    precision: torch.dtype = torch.float32,
    max_rows: int | None = None,
) -> dict[str, dict]:
    """Likelihood of the split under every subset in `given`; of `max_rows` of its rows, spread over it."""
    if not corpus.has_conditions:
        raise UserError(f"{corpus.path}: holds no conditions; preprocess the MIDI files again without --no-conditions")
    room = {name for names in given.values() for name in names}
    found = {}
    for called, names in given.items():
        plan = RowPlan(corpus, data, split=split, augment=False, conditions=names, room=room)
        found[called] = evaluate_likelihood(model, split_batches(plan, batch_size, max_rows), precision)
    return found


def report(found: Mapping[str, dict]) -> str:
    """The table in text: nats a note, and what giving the conditions takes off."""
    without = found[NONE]["nats_per_note"]
    lines = [f"{'conditions':20}{'nats a note':>12}{'gain':>10}"]
    for called, result in found.items():
        gain = "" if called == NONE else f"{without - result['nats_per_note']:10.3f}"
        lines.append(f"{called:20}{result['nats_per_note']:12.3f}{gain}")
    return "\n".join(lines)
