"""What a run says of itself: the table before the first step, and the last line.

>>> print(describe(config.training, family, plan, model, fixed, ranks))    # doctest: +SKIP
  model       small: 6 layers, d_model 256, 4 heads, d_ff 1792
  parameters  17,123,840
  ...

What surprises: `memory` is what parameters, gradients and moments take on each device, which is known; activations
come on top and grow with the rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from meloformer.data import steps_in
from meloformer.loop_config import LoopConfig
from meloformer.training.distributed import Ranks
from meloformer.training.family import ModelFamily
from meloformer.training.logging import table
from meloformer.training.optimizer import split_parameters
from meloformer.training.run import Fixed, Progress
from meloformer.training.signals import name_of
from meloformer.wording import counted

FEW = 5  # held-out pieces: with fewer, one piece's luck is the whole validation


def describe(t: LoopConfig, family: ModelFamily, plan: Any, model: nn.Module, fixed: Fixed, ranks: Ranks) -> str:
    """The table before the first step."""
    per_epoch = steps_in(plan, fixed.rows_per_step)
    device = ranks.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    processes = f"{ranks.world_size} x " if ranks.world_size > 1 else ""
    memory = 4 * (2 * model.num_parameters() + num_moments(model, t.optimizer)) / 2**20
    used = family.about_step(plan, fixed.rows_per_step)
    few, held_out = t.patience and family.num_held_out < FEW, counted(family.num_held_out, "held-out piece")
    warning = f"{held_out} to decide when patience ends the run, which is chance; {family.hold_out_more}"
    return table(
        [
            ("model", family.about_model()),
            ("parameters", f"{model.num_parameters():,}"),
            *family.about_data(plan),
            *([("warning", warning)] if few else []),
            ("memory", f"{memory:,.0f} MiB of weights, gradients and moments, activations apart"),
            ("a step", f"{processes}{t.batch_size} x {t.gradient_accumulation_steps} rows, {used}"),
            ("steps", f"{fixed.max_steps:,}, about {per_epoch:,} an epoch"),
            ("optimizer", f"{t.optimizer}, learning rate {t.learning_rate:g} to {t.min_lr:g}"),
            ("device", f"{processes}{device.type}, {where}, {fixed.precision}"),
            ("run", str(t.output_dir)),
        ]
    )


def num_moments(model: nn.Module, optimizer: str) -> int:
    """Numbers that the optimizer remembers, in float32: two a parameter, of Muon's matrices one."""
    matrices, rest = (sum(p.numel() for p in parameters) for parameters in split_parameters(model))
    return (1 if optimizer == "muon" else 2) * matrices + 2 * rest


def last_words(folder: Path, family: ModelFamily, fixed: Fixed, progress: Progress, signal_number: int) -> str:
    dry_run = family.settings.fast_dev_run  # its folder is gone when this is read
    if signal_number and not progress.is_finished(fixed):
        where = f"at step {progress.step} of {fixed.max_steps}"
        done = f"stopped {where}" if dry_run else f"saved {where}; go on with --resume auto"
        return f"{name_of(signal_number)}: {done}"
    waited = f", {counted(progress.waited, 'validation')} without a better one"
    early = waited if progress.step < fixed.max_steps else ""
    best = ""
    if progress.best_score is not None:
        best = f"; best validation {family.score_words(progress.best_score)}, at step {progress.best_step}"
    generate = f"python generate.py --checkpoint {folder} --output out"
    further = "leave out --fast_dev_run to train" if dry_run else generate
    return f"finished {counted(progress.step, 'step')}{early}{best}\n{further}"
