"""The settings of the training loop, which every family's runs share; a family adds to them, and may name flags anew.

>>> LoopConfig(learning_rate=1e-3).min_lr
0.0001

The surprise: `max_steps` None means all epochs, and is worked out when the run starts, not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from meloformer.settings import Settings, option

FAMILY_HELP = (
    "meloformer (token streams) or fractal (piano rolls); each has flags of its own, see --family fractal --help"
)


@dataclass(kw_only=True)
class LoopConfig(Settings):
    """What the training loop takes, whatever it trains: how long, how fast, and what is kept."""

    output_dir: str | None = option(None, "folder of the run: checkpoints, logs, config", shown="runs/<model_size>")
    resume: str = option(
        "never", "auto goes on from output_dir's latest checkpoint if it has one; or the path of one of its checkpoints"
    )
    init_from: str | None = option(
        None, "fine-tune: begin with the weights (and the model settings) of this run or checkpoint"
    )
    epochs: int = option(100, "passes over the training pieces")
    max_steps: int | None = option(None, "stop after this many optimizer steps", shown="all epochs")
    batch_size: int = option(4, "rows on each GPU in one pass")
    gradient_accumulation_steps: int = option(8, "passes to an optimizer step")
    optimizer: Literal["adamw", "muon"] = option("adamw", "muon: Muon for the hidden matrices, AdamW for the rest")
    learning_rate: float = option(3e-4, "highest learning rate, after the warm-up")
    min_lr: float | None = option(None, "learning rate at the end of the cosine", shown="a tenth of learning_rate")
    warmup_steps: int = option(500, "steps of linear warm-up, at most a tenth of the run")
    weight_decay: float = option(0.1, "decay of matrices; norms and embeddings have none")
    beta1: float = option(0.9, "AdamW's average of gradients")
    beta2: float = option(0.95, "AdamW's average of squared gradients")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    max_nonfinite_steps: int = option(10, "stop after this many skipped updates in a row (nan or infinite loss)")
    precision: Literal["auto", "bf16", "fp32"] = option("auto", "auto is bf16 on hardware that has it, else fp32")
    device: str = option("auto", "auto, cpu, cuda or cuda:1")
    seed: int = option(0, "initial weights, order and variations")
    num_workers: int = option(2, "threads that build rows ahead of need; 0 builds them when they are needed")
    gradient_checkpointing: bool = option(
        False, "compute activations again in the backward pass: less memory, a quarter more time"
    )
    val_interval: int = option(500, "steps between validations")
    val_max_rows: int = option(256, "held-out rows in a validation while training; evaluate.py takes all")
    patience: int = option(0, "stop after this many validations without a better one; 0 never does")
    sample_interval: int = option(0, "steps between pieces written to the run's samples/ to listen to; 0 writes none")
    save_interval: int = option(500, "steps between checkpoints")
    keep_last: int = option(3, "checkpoints kept besides the best")
    log_interval: int = option(10, "steps between lines of metrics.jsonl")
    fast_dev_run: bool = option(
        False, "three steps, a validation, a checkpoint, and a sample if the run would write any; nothing is kept"
    )

    def __post_init__(self):
        if self.min_lr is None:
            self.min_lr = self.learning_rate / 10
        if self.fast_dev_run:
            self.max_steps = self.val_interval = self.save_interval = 3
            self.log_interval = 1
            self.val_max_rows = self.batch_size
            self.sample_interval = min(self.sample_interval, 3)

    def validate(self) -> None:
        at_least_one = ("epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "max_nonfinite_steps")
        for name in (*at_least_one, "val_interval", "val_max_rows", "save_interval", "keep_last", "log_interval"):
            value = getattr(self, name)
            self.require(value is None or value >= 1, f"training.{name}", value, "at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            self.require(value > 0, f"training.{name}", value, "above 0")
        not_negative = ("min_lr", "warmup_steps", "weight_decay", "num_workers", "patience")
        for name in (*not_negative, "sample_interval"):
            value = getattr(self, name)
            self.require(value >= 0, f"training.{name}", value, "at least 0")
        self.require_seed("training.seed", self.seed)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            self.require(0 <= value < 1, f"training.{name}", value, "from 0 to below 1")
        self.require(
            self.min_lr <= self.learning_rate,
            "training.min_lr",
            self.min_lr,
            f"at most learning_rate ({self.learning_rate})",
            "lower it",
        )
