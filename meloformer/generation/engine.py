"""The decoding engine: a batch of constrained streams, one token a step, over the model's KV cache.

>>> from meloformer.model import MeloFormer                                # doctest: +SKIP
>>> model = MeloFormer.from_pretrained("runs/base")                        # doctest: +SKIP
>>> samples = generate(model, Request(bars=8, instruments=[128, 33, 0]))   # doctest: +SKIP
>>> write_midi(samples[0].score, "new.mid")                                # doctest: +SKIP

The surprise: sample i draws from the random stream (seed, i), one number a token, so the same sample comes out
whatever else is in its batch, up to float rounding of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from meloformer.errors import UserError
from meloformer.generation.request import ConstrainedState, Request
from meloformer.generation.sampling import Sampling, choose
from meloformer.hid import Annotations, Tokenizer
from meloformer.hid.rows import make_row, stack_rows
from meloformer.midi.score import Score
from meloformer.model import MeloFormer
from meloformer.model.cache import DecodingSession

SEGMENT_LENGTH = 5  # BAR T P L V: the fewest tokens of a bar with a note, so of a summary


@dataclass
class Sample:
    """One generated piece. `index` is its number among the request's samples; `hit_limit`: max_length cut it."""

    index: int
    tokens: np.ndarray
    score: Score
    hit_limit: bool


def generate(
    model: MeloFormer,
    request: Request,
    num_samples: int = 1,
    sampling: Sampling | None = None,
    seed: int = 0,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Sample]:
    """`num_samples` pieces, `batch_size` at once.

    max_length: tokens a piece at most, default the longest stream the model was trained on. progress is called after
    each step with how many tokens and how many bars of parts it has written. UserError where the request cannot be
    honoured.
    """
    sampling = sampling or Sampling()
    max_length = max_length or model.max_seq_len
    samples = []
    for first in range(0, num_samples, batch_size):
        indices = list(range(first, min(first + batch_size, num_samples)))
        samples += _generate_batch(model, request, indices, sampling, seed, max_length, progress)
    return samples


def _generate_batch(
    model: MeloFormer,
    request: Request,
    indices: list[int],
    sampling: Sampling,
    seed: int,
    max_length: int,
    progress: Callable[[int, int], None] | None,
) -> list[Sample]:
    tokenizer = Tokenizer(model.vocabulary)
    streams = [ConstrainedState(model.vocabulary, request, max_length) for _ in indices]
    draws = [np.random.default_rng([seed, index]) for index in indices]
    session = DecodingSession(model, len(indices), max_length, max_length // SEGMENT_LENGTH + 1)
    prompts = [stream.forced_prefix() for stream in streams]
    rows = [
        make_row([np.array(p)], model.vocabulary, len(p), max_segments=1 + len(p) // SEGMENT_LENGTH) for p in prompts
    ]
    logits = session.prefill(stack_rows(rows)).cpu().numpy()

    active = list(range(len(indices)))  # the streams that the session's rows belong to
    while active:
        tokens, annotations, bars = [], [], 0
        for row, i in enumerate(active):
            try:
                token = choose(logits[row], streams[i].allowed(), draws[i].random(), sampling)
            except ValueError as error:
                raise UserError(f"{error}: the checkpoint is damaged or diverged; take an earlier one") from None
            annotations.append(streams[i].push(token))
            tokens.append(token)
            bars += int(token == model.vocabulary.BAR and streams[i].state.track >= 0)
        if progress:
            progress(len(tokens), bars)
        going_on = [row for row, i in enumerate(active) if not streams[i].is_finished]
        if len(going_on) < len(active):
            session.keep(going_on)
            active = [active[row] for row in going_on]
            tokens = [tokens[row] for row in going_on]
            annotations = [annotations[row] for row in going_on]
        if active:
            logits = session.step(np.array(tokens), Annotations(*np.array(annotations).T)).cpu().numpy()

    samples = []
    for index, stream in zip(indices, streams):
        written = np.array(stream.tokens, dtype=np.uint16)
        samples.append(Sample(index, written, tokenizer.decode(written), stream.hit_limit))
    return samples
