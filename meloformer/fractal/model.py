"""FractalMIDI: generators within generators over a piano roll, down to a velocity head for single cells.

After Li et al. 2025, Fractal Generative Models (arXiv 2502.17437); mar levels after Li et al. 2024 (arXiv 2406.11838).

    prepare(batch)        rolls (numpy: roll (B, 128, T), valid (B, T), key (B,)) -> Inputs on the model's device
    training_loss(batch)  -> (sum of nats, number of cells, {"nats": .., "count": .., "masked": .., "patches": ..})

>>> model = FractalMIDI.from_pretrained("runs/fractal")   # doctest: +SKIP
>>> sample(model, known, keep)                            # of meloformer.fractal.sampling   # doctest: +SKIP

The state that a generator computes for a patch, and those of its four neighbours, condition the next level's generator
for that patch; the last level's states condition the velocity head. All problems of a level are one batch.

What surprises: the loss is a sum over all cells of the batch although a mar level computes some of them only; the
others' share is in the weights (meloformer.fractal.problems). After `eval()` it is the likelihood, exact for ar levels
and for mar levels the mean over random orders, drawn once from each roll's key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meloformer.errors import UserError
from meloformer.files import write_atomic
from meloformer.fractal.config import FractalModel
from meloformer.fractal.dataset import num_cells
from meloformer.fractal.levels import ArLevel, Level, MarLevel, neighbourhood
from meloformer.fractal.problems import Problems, pose
from meloformer.fractal.velocity import CLASSES, VelocityHead
from meloformer.model.masks import send
from meloformer.pretrained import CONFIG, WEIGHTS, find_pretrained, read_about

FORMAT = 1
FAMILY = "fractal"
FEED_FORWARD = 3.25  # d_ff by width: with SwiGLU this gives 48M parameters at the default sizes
SILENT = 0.95  # of a roll's cells, before anything is learnt
CHUNK = {"cpu": 512, "cuda": 16384}  # problems of the last level in one pass: what a cache, or a GPU, holds well


@dataclass
class LevelInputs:
    """`problems.Problems` on the model's device."""

    cells: Tensor
    valid: Tensor | None
    masked: Tensor
    chosen: Tensor


@dataclass
class Inputs:
    """A batch on its device. `bounds` are the chunks of the last level: where its problems and chosen cells begin."""

    levels: list[LevelInputs]
    targets: Tensor  # (S,) classes of the last level's chosen cells
    weight: Tensor  # (S,) float32
    bounds: list[tuple[int, int]]
    num_cells: int
    statistics: dict[str, np.ndarray]


class FractalMIDI(nn.Module):
    """The model of one config; float32 parameters, initialised from torch's global generator.

    crop_length: columns of the rolls that it was trained on last; it takes any width.
    """

    def __init__(self, config: FractalModel, crop_length: int = 256):
        super().__init__()
        config.validate()
        self.config, self.crop_length = config, crop_length
        sizes, widths = config.img_size_list, config.embed_dim_list
        levels = []
        for i, kind in enumerate(config.kinds):
            rows = sizes[i] // sizes[i + 1]
            shape = (widths[i], config.num_blocks_list[i], config.num_heads_list[i], feed_forward(widths[i]))
            place = (sizes[i + 1], rows, None if i == 0 else rows, None if i == 0 else widths[i - 1])
            options = {"scan_order": config.scan_order} if kind == "ar" else {}
            levels.append((ArLevel if kind == "ar" else MarLevel)(*shape, config.dropout, *place, **options))
        self.levels: nn.ModuleList[Level] = nn.ModuleList(levels)
        self.head = VelocityHead(
            widths[-2], widths[-1], config.num_blocks_list[-1], config.num_heads_list[-1], feed_forward(widths[-1])
        )
        self._gradient_checkpointing = False
        self._initialise()

    def _initialise(self) -> None:
        """Unit-variance linear maps, branches scaled so that the stream's variance does not grow with depth."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                continue
            if name.endswith(("out.bias", "head.out.weight")):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2 and name.endswith(".weight") and "velocity" not in name:
                depth = len(self.levels[int(name.split(".")[1])].blocks) if name.startswith("levels") else 1
                branch = (2 * depth) ** -0.5 if name.endswith("out.weight") else 1.0
                nn.init.normal_(parameter, std=branch * parameter.shape[1] ** -0.5)
            else:
                nn.init.normal_(parameter, std=0.5)
        with torch.no_grad():  # where every roll soon is: at a loss near 0.4, not at ln 256
            self.head.out.bias[0] = math.log(SILENT / (1 - SILENT) * (CLASSES - 1))

    @property
    def gradient_checkpointing(self) -> bool:
        """Keep only what enters each block, and each chunk of the last level, and compute the rest twice."""
        return self._gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self._gradient_checkpointing = value
        for level in self.levels[:-1] if len(self.levels) > 1 else self.levels:
            level.gradient_checkpointing = value

    @property
    def device(self) -> torch.device:
        return self.head.slot.device

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    # --- the loss -------------------------------------------------------------------------------------------

    def prepare(self, batch: Mapping[str, np.ndarray]) -> Inputs:
        """The problems of every level as tensors. In `eval()` every cell counts and the number of masks is uniform."""
        problems = pose(batch, self.config, exact=not self.training)
        last = problems[-1]

        def sent(values: np.ndarray | None) -> Tensor | None:
            return None if values is None else send(values, self.device)

        chunk = CHUNK.get(self.device.type, CHUNK["cuda"])
        count, patches = last.masked.shape
        starts = range(0, count, chunk)
        firsts = np.searchsorted(last.chosen, np.array([*starts, count]) * patches).tolist()
        return Inputs(
            levels=[LevelInputs(sent(p.cells), sent(p.valid), sent(p.masked), sent(p.chosen)) for p in problems],
            targets=sent(last.cells.reshape(-1)[last.chosen]),
            weight=sent(last.weight.astype(np.float32)),
            bounds=list(zip([*starts, count], firsts)),
            num_cells=num_cells(batch),
            statistics=statistics(problems),
        )

    def training_loss(self, batch: Mapping[str, np.ndarray] | Inputs) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Sum of nats over the cells that are no padding, their number, and the parts of both; no synchronisation.

        metrics: `nats` and `count` of silent and of sounding cells (2,); `masked` and `patches` of each level.
        """
        inputs = batch if isinstance(batch, Inputs) else self.prepare(batch)
        conditions = None
        for i, (level, given) in enumerate(zip(self.levels[:-1], inputs.levels)):
            states = level.states(given.cells, given.masked, given.valid, conditions)
            conditions = self.conditions(i, states, given.chosen, given.valid)
        nats = []
        last, leaf = inputs.levels[-1], self._leaf_nats
        for (first, first_cell), (end, end_cell) in zip(inputs.bounds, inputs.bounds[1:]):
            part = slice(first, end)
            arguments = (
                None if conditions is None else conditions[part],
                last.cells[part],
                last.masked[part],
                None if last.valid is None else last.valid[part],
                last.chosen[first_cell:end_cell] - first * last.cells.shape[1],
                inputs.targets[first_cell:end_cell],
            )
            if self.gradient_checkpointing and torch.is_grad_enabled():
                nats.append(checkpoint(leaf, *arguments, use_reentrant=False))
            else:
                nats.append(leaf(*arguments))
        # A batch whose masks and padding left nothing has no chunk at all
        weighed = torch.cat(nats) * inputs.weight if nats else self.head.out.bias.sum() * inputs.weight
        with torch.no_grad():
            sounding = (inputs.targets > 0).long()
            zeros = torch.zeros(2, device=self.device)
            metrics = {
                "nats": zeros.index_add(0, sounding, weighed.detach()),
                "count": zeros.index_add(0, sounding, inputs.weight),
                **{name: send(values, self.device) for name, values in inputs.statistics.items()},
            }
        return weighed.sum(), inputs.num_cells, metrics

    def _leaf_nats(self, conditions, cells, masked, valid, chosen, targets) -> Tensor:
        """(S,) nats of the chosen cells of some problems of the last level."""
        states = self.levels[-1].states(cells, masked, valid, conditions)
        logits = self.head(self.conditions(len(self.levels) - 1, states, chosen, valid))
        return F.cross_entropy(logits.float(), targets, reduction="none")

    def conditions(self, i: int, states: Tensor, chosen: Tensor, valid: Tensor | None) -> Tensor:
        """What level i's states (K, N, D) hand down to the chosen patches (S,): (S, 5, D).

        For the velocity head they are projected first: it is narrower, and there are five of them for each cell.
        """
        level = self.levels[i]
        if i == len(self.levels) - 1:
            states = self.head.project(states)
        columns = states.shape[1] // level.rows
        return neighbourhood(states, columns, chosen, valid, level.is_causal)

    # --- files ------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}
        write_atomic(folder / WEIGHTS, save_tensors(state))
        about = {"family": FAMILY, "format": FORMAT, "model": self.config.to_dict(), "crop_length": self.crop_length}
        write_atomic(folder / CONFIG, json.dumps(about, indent=1).encode())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> FractalMIDI:
        """The model of a checkpoint's folder, or of a run's; UserError where there is none of this family."""
        folder = find_pretrained(folder)
        about = read_about(folder / CONFIG, FAMILY, {"model", "crop_length"}, FORMAT)
        config = FractalModel.from_dict(about["model"], f"{folder / CONFIG}: model")
        model = cls(config, about["crop_length"])
        try:
            model.load_state_dict(load_tensors((folder / WEIGHTS).read_bytes()))
        except (OSError, SafetensorError, RuntimeError) as error:
            kinds = ",".join(config.kinds)
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{folder / WEIGHTS}: not the weights of a {kinds} model ({reason})") from None
        return model.eval()


def feed_forward(width: int) -> int:
    """The inner width of a feed-forward."""
    return max(1, round(FEED_FORWARD * width))


def statistics(problems: list[Problems]) -> dict[str, np.ndarray]:
    """By level: patches that were masked, all of them, and problems that were computed."""
    counts = [(p.masked.sum(), p.masked.size if p.valid is None else p.valid.sum(), len(p.masked)) for p in problems]
    return dict(zip(("masked", "patches", "problems"), np.array(counts, dtype=np.float32).reshape(-1, 3).T.copy()))
