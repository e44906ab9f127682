"""Writing streams without the host: grammar, masks and sampling are tensors where the model is.

    write_on_device(session, start, logits, seeds, sampling, progress)     # as the engine's loop, token for token

The host looks once every CHUNK tokens: which streams have ended, and whether the attention of a step was wide enough;
if not, the steps since it looked last are done again. On CUDA a step is captured as a graph and played; it is captured
anew when its shapes grow, as they do every SPAN slots.

The surprise: the host loop of `engine.py` stays what defines a sample; this one has to give the same.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from meloformer.errors import UserError
from meloformer.generation.request import ConstrainedState
from meloformer.generation.sampling import Sampling, choose_batch
from meloformer.generation.tensor_state import TensorState
from meloformer.hid import Family
from meloformer.model.cache import DecodingSession
from meloformer.model.static_session import StaticSession

CHUNK = 16  # steps between two looks of the host
SPAN, WIDTH = 1024, 256  # slots that are looked at and keys that are read, to begin with; both grow
DIVERGED = "the model's logits are not finite: the checkpoint is damaged or diverged; take an earlier one"


class DeviceBatch:
    """Streams for `seeds` that go on from `start`; `step` writes a token of each, and waits for nothing."""

    def __init__(
        self,
        session: DecodingSession,
        start: ConstrainedState,
        logits: Tensor,
        seeds: list[tuple[int, int]],
        sampling: Sampling,
    ):
        (stream,), device = session.streams, session.model.device
        self.state = TensorState(start, len(seeds), device)
        self.session = StaticSession(session, len(seeds), len(stream.history) - stream.used)
        self.sampling, self.first = sampling, len(start.tokens)
        left = max(start.max_length - self.first, 1)
        self.uniform = torch.from_numpy(np.stack([np.random.default_rng(seed).random(left) for seed in seeds])).to(
            device
        )
        self.logits = logits.repeat(len(seeds), 1)
        self.bars = torch.zeros((), dtype=torch.int64, device=device)
        self.is_bad = torch.zeros((), dtype=torch.bool, device=device)
        self.rows = list(range(len(seeds)))  # which stream each row is
        self.session.span, self.session.width = 0, WIDTH
        self.reach(self.session.prompt)

    def step(self) -> None:
        state = self.state
        drawn = (state.length - self.first).clamp(max=self.uniform.shape[1] - 1)
        uniform = self.uniform.gather(1, drawn[:, None])[:, 0]
        tokens, is_bad = choose_batch(self.logits, state.allowed(), uniform, self.sampling, state.family_of)
        annotations = state.push(tokens)
        family, track = annotations[4], annotations[1]
        self.is_bad |= is_bad.any()
        self.bars += (((family == Family.BAR) | (family == Family.FILL)) & (track >= 0)).sum()
        self.logits.copy_(self.session.step(tokens, annotations, ~state.is_finished))

    def save(self) -> list[Tensor]:
        return [*self.state.save(), *self.session.save(), self.logits.clone(), self.bars.clone()]

    def restore(self, saved: list[Tensor]) -> None:
        count = len(self.state.save())
        self.state.restore(saved[:count])
        self.session.restore(saved[count:-2])
        self.logits.copy_(saved[-2])
        self.bars.copy_(saved[-1])

    def reach(self, used: int) -> bool:
        """Look at the slots that CHUNK more steps behind `used` slots may take; whether that is more than before."""
        before, needed = self.session.span, used + 2 * CHUNK
        self.session.span = min(max(-(-needed // SPAN) * SPAN, before), self.session.slots)
        return self.session.span != before

    def keep(self, rows: list[int]) -> None:
        index = torch.tensor(rows, dtype=torch.int64, device=self.logits.device)
        self.state.keep(index)
        self.session.keep(index)
        self.uniform, self.logits = self.uniform[index], self.logits[index]
        self.rows = [self.rows[row] for row in rows]


@torch.inference_mode()
def write_on_device(
    session: DecodingSession,
    start: ConstrainedState,
    logits: Tensor,
    seeds: list[tuple[int, int]],
    sampling: Sampling,
    progress: Callable[[int, int], None] | None,
) -> list[tuple[list[int], bool]]:
    """Tokens and `hit_limit` of a stream for each seed, all written on from `start`, where the session's one stream
    stands; logits (1, V) of what follows. UserError where the model's logits are not finite."""
    written: dict[int, tuple[list[int], bool]] = {}
    if start.is_finished:
        return [(start.tokens, start.hit_limit) for _ in seeds]
    batch = DeviceBatch(session, start, logits, seeds, sampling)
    step, tokens, bars = None, batch.first * len(seeds), 0
    while batch.rows:
        saved = batch.save()
        for _ in range(CHUNK):
            if step is None:
                batch.step()
                step = captured(batch.step, batch.logits.device)
            else:
                step()
        state, now = batch.state, batch.session
        finished, lengths = state.is_finished.tolist(), state.length.tolist()
        is_narrow, is_bad = now.has_overflowed.item(), batch.is_bad.item()
        if is_narrow:
            batch.restore(saved)
            now.has_overflowed.zero_()
            now.width *= 2
            step = None
            continue
        if is_bad:
            raise UserError(DIVERGED)
        ended = [row for row, done in enumerate(finished) if done]
        if progress:
            total = sum(lengths) + sum(len(tokens) for tokens, _ in written.values())
            progress(total - tokens, int(batch.bars) - bars)
            tokens, bars = total, int(batch.bars)
        if 2 * len(ended) >= len(finished):  # fewer rows, or none
            for row in ended:
                text = state.tokens[row, : lengths[row]].tolist()
                written[batch.rows[row]] = (text, bool(state.hit_limit[row]))
            batch.keep([row for row, done in enumerate(finished) if not done])
            step = None
        if batch.rows and batch.reach(int(batch.session.used.max())):
            step = None
    return [written[i] for i in range(len(seeds))]


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """On CUDA a graph of `step`, which has run once and leaves its results in place; elsewhere `step`."""
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
