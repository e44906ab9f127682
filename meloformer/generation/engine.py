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
import torch
from torch import Tensor

from meloformer.errors import UserError
from meloformer.generation.guidance import GuidedSession, begin_guided, has_conditions
from meloformer.generation.on_device import DIVERGED, write_on_device
from meloformer.generation.request import ConstrainedState, Request
from meloformer.generation.sampling import NonFiniteLogits, Sampling, choose
from meloformer.generation.tensor_state import covers
from meloformer.hid import Annotations, Tokenizer
from meloformer.hid.rows import make_row, stack_rows
from meloformer.midi.score import Score
from meloformer.model import MeloFormer
from meloformer.model.cache import DecodingSession

SEGMENT_LENGTH = 5  # BAR T P L V: the fewest tokens of a bar with a note, so of a summary


@dataclass
class Sample:
    """One generated piece. `index` is its number among the request's samples; `hit_limit`: max_length cut it;
    `chosen`: (n,) tokens of the conditions that the model wrote itself (`generation.chosen`)."""

    index: int
    tokens: np.ndarray
    score: Score
    hit_limit: bool
    chosen: np.ndarray


def generate(
    model: MeloFormer,
    request: Request,
    num_samples: int = 1,
    sampling: Sampling | None = None,
    seed: int = 0,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    guidance: float = 1.0,
) -> list[Sample]:
    """`num_samples` pieces, `batch_size` at once.

    max_length: tokens a piece at most, default the longest stream the model was trained on. progress is called after
    each step with how many tokens and how many bars of parts it has written. guidance: above 1, the conditions weigh
    more (`generation.guidance`), for twice the work. UserError where the request cannot be honoured, by anyone or by a
    model that was trained without a condition that it names.
    """
    sampling = sampling or Sampling()
    max_length = model.max_seq_len if max_length is None else max_length
    start = begin(model, request, max_length, guidance)
    prompt = np.array(start.forced_prefix())
    # Every sample begins alike: what they share is read once, and each batch branches off it.
    room = max_length, max_length // SEGMENT_LENGTH + 1
    if guidance == 1:
        session = DecodingSession(model, 1, *room)
        row = make_row([prompt], model.vocabulary, len(prompt), max_segments=1 + len(prompt) // SEGMENT_LENGTH)
        logits = session.prefill(stack_rows([row]))
    else:
        session, logits = begin_guided(model, prompt, *room, guidance, start.is_choosing)
    tokenizer = Tokenizer(model.vocabulary)
    write = write_on_device if guidance == 1 and stays_on_device(model.device, request) else _write
    samples = []
    for first in range(0, num_samples, batch_size):
        indices = list(range(first, min(first + batch_size, num_samples)))
        for index, (tokens, hit_limit) in zip(
            indices, write(session, start, logits, [(seed, i) for i in indices], sampling, progress)
        ):
            chosen = chosen_of(start, tokens)
            tokens = np.array(tokens, dtype=np.uint16)
            samples.append(Sample(index, tokens, tokenizer.decode(tokens), hit_limit, chosen))
    return samples


def begin(model: MeloFormer, request: Request, max_length: int, guidance: float = 1.0) -> ConstrainedState:
    """The state that a request's streams begin in; UserError where the request cannot be honoured."""
    request.steering.require_known(model.conditions)
    state = ConstrainedState(model.vocabulary, request, max_length, model.tags, model.predicted)
    if guidance != 1 and not has_conditions(request, model.vocabulary) and not state.chosen:
        raise UserError(
            "guidance needs a condition to go by, such as --key, --chords or --density; give one, or leave it out"
        )
    return state


def chosen_of(start: ConstrainedState, tokens: list[int]) -> np.ndarray:
    """(n,) conditions that the model wrote itself in a stream that went on from `start`."""
    if not start.chosen:
        return np.zeros(0, dtype=np.int64)
    state = start.branch()
    for token in tokens[len(start.tokens) :]:
        state.push(token)
    return np.array(tokens, dtype=np.int64)[state.chosen_at]


def stays_on_device(device: torch.device, request: Request) -> bool:
    """Whether the grammar runs as tensors. On a CPU it is slower at every batch size (docs/log.md)."""
    return device.type == "cuda" and covers(request)


def _write(
    root: DecodingSession | GuidedSession,
    start: ConstrainedState,
    logits: Tensor,
    seeds: list[tuple[int, int]],
    sampling: Sampling,
    progress: Callable[[int, int], None] | None,
) -> list[tuple[list[int], bool]]:
    """Tokens and `hit_limit` of a stream for each seed, all written on from `start`, where the root's one stream
    stands; logits (1, V) of what follows."""
    if start.is_finished:
        return [(start.tokens, start.hit_limit) for _ in seeds]
    session, streams = root.branch([0] * len(seeds)), [start.branch() for _ in seeds]
    logits = logits.cpu().numpy().repeat(len(seeds), axis=0)
    draws = [np.random.default_rng(seed) for seed in seeds]
    vocabulary = streams[0].vocabulary
    cell_openers, family_of = (vocabulary.BAR, vocabulary.FILL), vocabulary.family_of
    active = list(range(len(streams)))  # the streams that the session's rows belong to
    while active:
        tokens, annotations, bars = [], [], 0
        for row, i in enumerate(active):
            try:
                token = choose(logits[row], streams[i].allowed(), draws[i].random(), sampling, family_of)
            except NonFiniteLogits:
                raise UserError(DIVERGED) from None
            annotations.append(streams[i].push(token))
            tokens.append(token)
            bars += token in cell_openers and streams[i].state.track >= 0
        if progress:
            progress(len(tokens), bars)
        going_on = [row for row, i in enumerate(active) if not streams[i].is_finished]
        if len(going_on) < len(active):
            session.keep(going_on)
            active = [active[row] for row in going_on]
            tokens = [tokens[row] for row in going_on]
            annotations = [annotations[row] for row in going_on]
        if active:
            logits = session.step(np.array(tokens), Annotations(*np.array(annotations).T))
            if isinstance(session, GuidedSession):
                logits = session.unguided(logits, np.array([streams[i].is_choosing for i in active]))
            logits = logits.cpu().numpy()
    return [(stream.tokens, stream.hit_limit) for stream in streams]
