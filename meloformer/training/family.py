"""What the training loop asks of a model family: `ModelFamily`. The loop itself knows none of them.

There are two: meloformer.training.streams (token streams, MeloFormer) and meloformer.fractal.family (piano rolls,
FractalMIDI). A third takes four parts, and tests/training/test_family.py is one, whole, in a hundred lines:

- a config: a settings.Settings with `family` (its name) and the sections `model`, `data` and `training`. The loop reads
  `training`, a loop_config.LoopConfig, and of the model `dropout` alone;
- a model: a torch.nn.Module with what `ModelFamily.build` lists;
- a plan of rows, with what `ModelFamily.plan` lists;
- a `ModelFamily` that brings them together, and an entry in meloformer.families.FAMILIES, by which train.py finds
  config and family; generate.py and evaluate.py find theirs in it too, where the family has them.

    family = open_family(config)
    plan = family.open_data(epoch)                  # rows, for meloformer.data.loader.batches; family.data_hash
    plan = family.plan(epoch + 1)
    model = family.build()                          # training_loss(batch) -> (sum of nats, number of targets, metrics)
    result = family.evaluate(model, precision, ranks)
    family.score(result)                            # lower is better: what `best` means

What surprises: a family may turn a resumption into a run of its own that begins with the checkpoint's weights
(`begin`), because which settings may not change while a run goes on is the family's to say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from meloformer.data.loader import Step
from meloformer.settings import Settings
from meloformer.training.distributed import Ranks


@dataclass
class Preview:
    """What a model writes now: files, and pictures (H, W, 3) uint8 for TensorBoard by their tag."""

    files: list[Path] = field(default_factory=list)
    images: dict[str, np.ndarray] = field(default_factory=dict)


class ModelFamily(ABC):
    """Everything about a run that is not the loop's."""

    unit: str  # what has a loss, in the plural: tokens
    keep_best = 1  # checkpoints that are kept for their validation
    # Settings by section that a resumed run may change, beside the loop's own
    free: ClassVar[dict[str, tuple[str, ...]]] = {}
    board_tags: ClassVar[dict[str, str]] = {}  # TensorBoard's name of a number, where it is another than kind/name

    def __init__(self, config: Settings):
        self.config, self.settings = config, config.training

    def begin(self) -> tuple[str, str | None]:
        """(resume, init_from): what the run goes on from, or begins with. Asked on the main rank, first of all."""
        return self.settings.resume, self.settings.init_from

    # --- data -------------------------------------------------------------------------------------------------

    @abstractmethod
    def open_data(self, epoch: int) -> Any:
        """Read what the plans need; the first plan. UserError where there is nothing to train on, or nothing held out
        for `patience`. Sets `data_hash` (str), `data_from` (the flag that names it), and `validation`, the plan of what
        is held out."""

    data_hash: str
    data_from: str
    validation: Any
    hold_out_more: ClassVar[str]  # what a user does to have more held out

    @property
    @abstractmethod
    def num_held_out(self) -> int:
        """Pieces that are held out."""

    @abstractmethod
    def plan(self, epoch: int) -> Any:
        """The rows of an epoch: an object with

        - `num_rows`;
        - `row(i)` -> (dict of numpy arrays, where they come from): arrays of the same names and shapes for every row,
          which are stacked to batches; always the same for the same i, so that a run can be resumed;
        - `empty_row()` -> a row of padding, for the last step of an epoch;
        - `num_targets(batch)` -> how many targets a batch has: what the loss is divided by.
        """

    @abstractmethod
    def coordinates(self, step: Step) -> str:
        """Where a step's rows come from, in words."""

    # --- model ------------------------------------------------------------------------------------------------

    @abstractmethod
    def build(self) -> nn.Module:
        """The model of the config, fresh, with

        - `prepare(batch)`: a batch of rows as tensors on its `device`;
        - `training_loss(prepared)` -> (sum of nats, 0-d tensor; number of targets; {name: tensor to be added up});
        - `save_pretrained(folder)`: writes model.safetensors, its state_dict, and config.json, which names the family;
        - `config`, the Settings that it was made of, `num_parameters()`, and the switch `gradient_checkpointing`.
        """

    @abstractmethod
    def open_pretrained(self, path: str) -> nn.Module:
        """The model of `init_from`, on the CPU; UserError where its weights cannot be this run's."""

    @abstractmethod
    def adopt(self, saved: dict[str, Any], where: str) -> None:
        """Make config.model that of the weights taken over from `where`; UserError where the user said otherwise."""

    def adopt_data(self, saved: dict[str, Any], where: str) -> None:
        """Let what config.data leaves open follow the run that the weights come from; `saved` is its config.data, empty
        where `where` does not say. Asked before `open_data`."""
        return None

    def ready(self, model: nn.Module) -> None:
        """Turn on what the settings ask for, before the first step."""
        model.gradient_checkpointing = self.settings.gradient_checkpointing

    # --- what it says -----------------------------------------------------------------------------------------

    def statistics(self, metrics: dict[str, Tensor], ranks: Ranks) -> dict[str, Any]:
        """More of a step for the log, out of this rank's sums of what the model said; every rank asks."""
        return {}

    @abstractmethod
    def evaluate(self, model: nn.Module, precision: torch.dtype, ranks: Ranks) -> dict[str, Any]:
        """How well the model predicts what is held out; every rank has a share of it."""

    @abstractmethod
    def score(self, result: dict[str, Any]) -> float:
        """The number of an evaluation that is lowest for the best checkpoint."""

    @abstractmethod
    def score_words(self, score: float) -> str:
        """A score with its unit."""

    @abstractmethod
    def validation_line(self, result: dict[str, Any]) -> str:
        """An evaluation in a line."""

    def checkpoint_name(self, step: int, score: float | None) -> str:
        """Name of a checkpoint's folder; `score` where the model was evaluated at this step."""
        return f"step_{step:08d}"

    @abstractmethod
    def preview(self, model: nn.Module, folder: Path, step: int) -> Preview:
        """Generate something with the model as it is, into the run's folder."""

    @abstractmethod
    def about_model(self) -> str:
        """The config's model in words."""

    @abstractmethod
    def about_data(self, plan: Any) -> list[tuple[str, str]]:
        """Rows of the table before the first step."""

    @abstractmethod
    def about_step(self, plan: Any, rows: int) -> str:
        """How much music `rows` rows are."""


def adopt_settings(
    given: dict[str, Any], default: dict[str, Any], saved: dict[str, Any], free: set[str]
) -> tuple[dict[str, Any], str | None]:
    """(settings of a model whose weights are taken over, the first that contradicts them or None).

    A setting at its default follows the saved one; another that differs contradicts it. `free` ones hold no weights,
    and stay as they are given.
    """
    values, wrong = dict(given), None
    for name in values.keys() - free:
        if values[name] not in (saved[name], default[name]):
            wrong = min(wrong or name, name)
        values[name] = saved[name]
    return values, wrong
