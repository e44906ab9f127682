"""What tests of going on from a file share: samples of an untrained model, and what of a file is kept and new."""

from __future__ import annotations

import numpy as np
import torch

from meloformer.generation import generate
from meloformer.generation.engine import Sample
from meloformer.generation.request import ConstrainedState
from meloformer.hid import Family, Tokenizer
from meloformer.midi import read_score
from tests.hid.streams import VOCABULARY
from tests.model.music import tiny_model

TOKENIZER = Tokenizer(VOCABULARY)


def one_sample(task, **settings):
    torch.manual_seed(0)
    (sample,) = generate(tiny_model(), task.request, max_length=900, **{"seed": 1, **settings})
    TOKENIZER.validate(sample.tokens)
    return sample


def kept_and_new(prompt, task, path):
    """Notes of the source that are not in the written file, and notes of the file that are not in the source."""
    old, back = prompt.source.score, read_score(path)

    def rows(score):
        instruments = score.instruments[score.notes["track"]].tolist()
        return {(i, *note[1:]) for i, note in zip(instruments, score.notes.tolist())}

    return rows(old) - rows(back), rows(back) - rows(old)


def terse(task, seed=0):
    """A sample with a note a bar, which an untrained model does not think of: its bars have no end."""
    state, rng = ConstrainedState(VOCABULARY, task.request, task.max_length), np.random.default_rng(seed)
    ends = [VOCABULARY.FILL, VOCABULARY.EOS, *range(*VOCABULARY.ids(Family.INSTRUMENT).indices(VOCABULARY.size))]
    while not state.is_finished:
        allowed = np.flatnonzero(state.allowed())
        wanted = [VOCABULARY.BAR] if VOCABULARY.BAR in allowed else np.intersect1d(allowed, ends)
        if len(wanted) and state.state.family == Family.VELOCITY:
            allowed = wanted
        elif len(allowed) > 1:
            allowed = np.setdiff1d(allowed, [*ends, VOCABULARY.BAR])
        state.push(int(rng.choice(allowed)))
    tokens = np.array(state.tokens, dtype=np.uint16)
    return Sample(0, tokens, TOKENIZER.decode(tokens), state.hit_limit, np.zeros(0, dtype=np.int64))
