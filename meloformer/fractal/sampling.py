"""Drawing rolls: all problems of a level at once, with whatever cells are known held fixed at every level.

In: `known` uint8 (B, 128, T) and `keep` bool (B, T) or (B, 128, T), T a multiple of 4. Out: uint8 (B, 128, T), equal to
`known` where `keep` is set. With nothing kept a roll comes from nothing, with its first columns kept it is continued,
with all but some columns it is inpainted: one function for the three.

>>> sample(model, np.zeros((2, 128, 256), np.uint8), np.zeros((2, 256), bool), (8, 4, 2, 1))   # doctest: +SKIP

A mar level takes `num_iter_list[level]` rounds, each fills in a random part of the unknown patches, more of them the
later it is (cosine, as in MaskGIT: Chang et al. 2022, arXiv 2202.04200); an ar level takes its patches one after the
other. A patch that is filled in is a problem of the next level, and those of one round, of all rolls, are one batch
there.

What surprises: every cell's random number, and every patch's place in the random order, is drawn beforehand from
(seed, number of the roll). So a roll does not depend on its batch, and filling in leaf by leaf gives the same roll:
`leaf_by_leaf` is that, and is what the tests and the benchmark compare with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from meloformer.data import draws
from meloformer.errors import UserError
from meloformer.fractal.levels import ArLevel
from meloformer.fractal.model import FractalMIDI
from meloformer.fractal.problems import PADDING, nest, unnest
from meloformer.fractal.velocity import class_of, draw, velocity_of

OnStep = Callable[[np.ndarray, np.ndarray], None]
DEFAULT_ROUNDS = (12, 8, 4, 1)
PREVIEW_ROUNDS = (8, 4, 2, 1)  # the first ones, where there are fewer levels; 1 of further ones
# Problems of the last level in one pass. Nothing is kept for a gradient, so fewer than in training fill a cache.
CHUNK = {"cpu": 64, "cuda": 16384}


def preview_rounds(num_levels: int) -> list[int]:
    """Rounds of a preview, a number for each level."""
    return [*PREVIEW_ROUNDS, *[1] * num_levels][:num_levels]


def sample(
    model: FractalMIDI,
    known: np.ndarray,
    keep: np.ndarray,
    num_iter_list: Sequence[int] = DEFAULT_ROUNDS,
    temperature: float = 1.0,
    sparsity_bias: float = 0.0,
    seed: int = 0,
    first: int = 0,
    on_step: OnStep | None = None,
    leaf_by_leaf: bool = False,
) -> np.ndarray:
    """Fill in what is not kept. Roll i of the batch owns the random numbers of (seed, first + i).

    `on_step(roll uint8 (B, 128, T), known bool (B, 128, T))` sees copies: at the start and after every round (mar) or
    patch (ar) of level 0. `leaf_by_leaf` runs a level once a round too, but goes into one patch after the other, down
    to the cell (and ar levels have no cache): slow and obvious, the same rolls. UserError for a width that is no
    multiple of 4, or too few numbers of rounds.
    """
    sampler = (_LeafByLeaf if leaf_by_leaf else _Sampler)(model, known, keep, num_iter_list, seed, first)
    return sampler.run(partial(draw, temperature=temperature, sparsity_bias=sparsity_bias), on_step)


def remaining(unknown: np.ndarray | int, done: int, rounds: int) -> np.ndarray:
    """How many of `unknown` patches are still masked after `done` of `rounds`; at least one goes in each round.

    >>> [int(remaining(16, done, 4)) for done in range(5)]
    [16, 14, 11, 6, 0]
    """
    if done == rounds:
        return np.zeros_like(unknown)
    share = np.floor(np.asarray(unknown) * math.cos(math.pi / 2 * done / rounds)).astype(np.int64)
    return np.maximum(np.minimum(share, unknown - done), 0)


class _Sampler:
    """One call. The arrays are nested (problems.nest): (B, N0, N1, ..), flattened up to a level by `_at`."""

    def __init__(
        self,
        model: FractalMIDI,
        known: np.ndarray,
        keep: np.ndarray,
        num_iter_list: Sequence[int],
        seed: int,
        first: int,
    ):
        self.model = model
        self.sizes = model.config.img_size_list
        self.rounds = list(num_iter_list)
        if len(self.rounds) < len(model.levels) or min(self.rounds) < 1:
            raise UserError(
                f"num_iter_list is {' '.join(map(str, num_iter_list))}, must be {len(model.levels)} or "
                f"{len(model.levels) + 1} numbers from 1 on, one for each level; 12 8 4 1 is the default"
            )
        known = np.asarray(known, dtype=np.uint8)
        batch, _, self.width = known.shape
        if self.width % 4 or self.width < 4:
            raise UserError(f"the width is {self.width} columns, must be a multiple of 4; 256 are 16 bars of 4/4")
        keep = np.broadcast_to(keep if keep.ndim == 3 else keep[:, None], known.shape)
        pad = ((0, 0), (0, 0), (0, -self.width % self.sizes[1]))
        cells = np.pad(np.where(keep, class_of(known), 0), pad, constant_values=PADDING)
        shape = cells.shape
        # Padding is no music: it is neither filled in nor seen.
        self.known = nest(np.pad(keep, pad, constant_values=True), self.sizes)
        self.valid = nest(cells != PADDING, self.sizes)
        self.all_valid = bool(self.valid.all())
        self.cells = torch.from_numpy(nest(cells, self.sizes)).contiguous().to(model.device)
        self.padded_width = shape[2]
        generators = [draws.generator(seed, 0, "sample", first + i) for i in range(batch)]

        def numbers(shape: tuple[int, ...]) -> np.ndarray:
            return np.stack([generator.random(shape) for generator in generators])

        self.order = [numbers(self.known.shape[1 : level + 2]) for level in range(len(model.levels))]
        self.uniform = torch.from_numpy(numbers(self.known.shape[1:])).to(model.device)
        self.finite = torch.ones((), dtype=torch.bool, device=model.device)

    @torch.inference_mode()
    def run(self, draw_cells: Callable[[Tensor, Tensor], Tensor], on_step: OnStep | None) -> np.ndarray:
        """`draw_cells` takes logits (S, 256) and numbers (S,) to classes (S,)."""
        self.draw_cells, self.on_step = draw_cells, on_step
        was_training = self.model.training
        self.model.eval()
        try:
            self._show()
            self.solve(0, np.arange(len(self.known)), None)
        finally:
            self.model.train(was_training)
        if not self.finite:
            raise UserError(
                "the model's logits are not finite, so it says nothing; its training diverged, take another"
            )
        return self._roll()

    # --- the arrays -------------------------------------------------------------------------------------------

    def _at(self, array, level: int):
        """A nested array as (problems of the level, N, cells of a patch)."""
        return array.reshape(-1, array.shape[level + 1], math.prod(array.shape[level + 2 :]))

    def _content(self, level: int, problems: np.ndarray) -> Tensor:
        return self._at(self.cells, level)[torch.from_numpy(problems).to(self.model.device)]

    def _roll(self) -> np.ndarray:
        cells = np.maximum(self.cells.cpu().numpy(), 0)
        return velocity_of(unnest(cells, self.sizes, self.padded_width))[..., : self.width]

    def _show(self) -> None:
        if self.on_step is not None:
            known = unnest(self.known, self.sizes, self.padded_width)[..., : self.width]
            self.on_step(self._roll(), known.copy())

    # --- filling in -------------------------------------------------------------------------------------------

    def solve(self, level: int, problems: np.ndarray, conditions: Tensor | None) -> None:
        """Fill in the unknown cells of these problems (K,) of a level, conditions (K, 5, D)."""
        chunk = CHUNK.get(self.model.device.type, CHUNK["cuda"])
        solve = self._solve_mar
        if isinstance(self.model.levels[level], ArLevel):
            solve = self._solve_ar
            chunk *= self.known.shape[level + 1]  # for it takes one patch of each at a time
        if level < len(self.model.levels) - 1 or len(problems) <= chunk:
            solve(level, problems, conditions)
            return
        for start in range(0, len(problems), chunk):
            part = slice(start, start + chunk)
            solve(level, problems[part], None if conditions is None else conditions[part])

    def _solve_mar(self, level: int, problems: np.ndarray, conditions: Tensor | None) -> None:
        valid = self._at(self.valid, level)[problems].any(-1)
        open_ = valid & ~self._at(self.known, level)[problems].all(-1)  # (K, N): still to be filled in
        order = self.order[level].reshape(-1, open_.shape[1])[problems]
        rank = np.where(open_, order, 2.0).argsort(-1).argsort(-1)  # the open ones first, in a random order
        unknown = open_.sum(-1)
        rounds = self.rounds[level]
        for done in range(rounds):
            left, fewer = (remaining(unknown, i, rounds) for i in (done, done + 1))
            now = open_ & (rank >= (unknown - left)[:, None]) & (rank < (unknown - fewer)[:, None])
            active = np.flatnonzero(now.any(-1))
            if len(active) == 0:
                continue
            masked = open_ & (rank >= (unknown - left)[:, None])
            every = len(active) == len(problems)
            self.fill_mar(
                level,
                problems[active],
                masked[active],
                valid[active],
                now[active],
                conditions if every or conditions is None else conditions[torch.from_numpy(active).to(self.device)],
            )
            if level == 0:
                self._show()

    def fill_mar(self, level, problems, masked, valid, now, conditions) -> None:
        """One round: of problems (K,) fill in the patches `now` (K, N), the others of `masked` being unknown."""
        seen = None if self.all_valid else self._send(valid)
        states = self.model.levels[level].states(self._content(level, problems), self._send(masked), seen, conditions)
        chosen = np.flatnonzero(now)
        children = (problems[:, None] * now.shape[1] + np.arange(now.shape[1])).reshape(-1)[chosen]
        self.descend(level, children, self.model.conditions(level, states, self._send(chosen), seen))

    def _solve_ar(self, level: int, problems: np.ndarray, conditions: Tensor | None) -> None:
        generator = self.model.levels[level]
        valid = self._at(self.valid, level)[problems].any(-1)
        open_ = valid & ~self._at(self.known, level)[problems].all(-1)
        count, patches = open_.shape
        columns = patches // generator.rows
        seen = None if self.all_valid else self._send(valid)
        walk = generator.begin(count, columns, seen, conditions)
        where = torch.from_numpy(problems).to(self.device)
        contents, before = self._at(self.cells, level), None
        states = torch.zeros(count, patches, generator.width, device=self.device, dtype=generator.row.dtype)
        scan = generator.scan(columns, torch.device("cpu")).tolist()
        last = max((i for i, place in enumerate(scan) if open_[:, place].any()), default=-1)
        for place in scan[: last + 1]:
            states[:, place] = walk.step(before)
            fill = np.flatnonzero(open_[:, place])
            if len(fill):
                chosen = self._send(fill * patches + place)
                children = problems[fill] * patches + place
                self.descend(level, children, self.model.conditions(level, states, chosen, seen))
                if level == 0:
                    self._show()
            before = contents[where, place]

    def descend(self, level: int, children: np.ndarray, conditions: Tensor) -> None:
        """Fill in patches of a level: problems of the next one, or single cells."""
        if level + 1 < len(self.model.levels):
            self.solve(level + 1, children, conditions)
        else:
            cells = self._send(children)
            logits = self.model.head(conditions)
            self.finite &= logits.isfinite().all()  # looked at once, when all is written
            uniform = self.uniform.view(-1)[cells]
            self.cells.view(-1)[cells] = self.draw_cells(logits, uniform)
        self._at(self.known, level).reshape(-1, self._at(self.known, level).shape[-1])[children] = True

    @property
    def device(self) -> torch.device:
        return self.model.device

    def _send(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


class _LeafByLeaf(_Sampler):
    """Every problem in a pass of its own, once a round, and every patch gone into alone, down to the single cell."""

    def fill_mar(self, level, problems, masked, valid, now, conditions) -> None:
        for i in range(len(problems)):
            one = slice(i, i + 1)
            part = None if conditions is None else conditions[one]
            super().fill_mar(level, problems[one], masked[one], valid[one], now[one], part)

    def descend(self, level: int, children: np.ndarray, conditions: Tensor) -> None:
        for i in range(len(children)):
            super().descend(level, children[i : i + 1], conditions[i : i + 1])

    def _solve_ar(self, level: int, problems: np.ndarray, conditions: Tensor | None) -> None:
        for i in range(len(problems)):
            self._solve_problem(level, problems[i : i + 1], None if conditions is None else conditions[i : i + 1])

    def _solve_problem(self, level: int, problem: np.ndarray, conditions: Tensor | None) -> None:
        """The whole level anew for every patch, without a cache."""
        generator = self.model.levels[level]
        valid = self._at(self.valid, level)[problem].any(-1)
        open_ = valid & ~self._at(self.known, level)[problem].all(-1)
        seen = None if self.all_valid else self._send(valid)
        patches = open_.shape[1]
        for patch in generator.scan(patches // generator.rows, torch.device("cpu")).tolist():
            if open_[0, patch]:
                states = generator.states(self._content(level, problem), self._send(open_), seen, conditions)
                handed = self.model.conditions(level, states, self._send(np.array([patch])), seen)
                self.descend(level, problem * patches + patch, handed)
                if level == 0:
                    self._show()
