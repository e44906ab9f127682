"""A run's folder: whether it may be started in, what it goes on from, and what must not have changed meanwhile.

    runs/base/config.yaml      every setting, defaults resolved; `--config runs/base/config.yaml` starts the like
    runs/base/metrics.jsonl    meloformer.training.logging
    runs/base/checkpoints/     meloformer.training.checkpoint
    runs/base/.lock            held by the process that writes here; the kernel lets go of it however that one ends

>>> find_start(Path("runs/base"), "auto")    # doctest: +SKIP
PosixPath('runs/base/checkpoints/step_00000500')

What surprises: `max_steps` is worked out at the first start and stored, so that the schedule never moves:
a resumed run takes it from the checkpoint, and a config that asks for another is refused.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from meloformer.config import Config, ModelConfig
from meloformer.errors import UserError
from meloformer.training import checkpoint
from meloformer.training.logging import METRICS

CONFIG, LOCK = "config.yaml", ".lock"
# May differ between a run and its resumption: they change where and how fast, and what is written, not the losses.
# batch_size and gradient_accumulation_steps are compared by their product, data_dir by the data's hash.
FREE = {
    "training": (
        *("output_dir", "resume", "init_from", "device", "num_workers", "batch_size", "gradient_accumulation_steps"),
        *("val_interval", "val_max_rows", "val_task_rows", "patience", "sample_interval", "save_interval", "keep_last"),
        *("log_interval", "max_nonfinite_steps", "gradient_checkpointing", "compile"),
    ),
    "data": ("data_dir",),
    "model": ("backend",),
}


@dataclass
class Progress:
    """Where a run stands; all of it is in state.json."""

    step: int = 0  # optimizer steps done, skipped ones included
    epoch: int = 0
    step_in_epoch: int = 0  # the next step takes rows [step_in_epoch * G, (step_in_epoch + 1) * G) of this epoch's plan
    skipped: int = 0  # updates skipped because a loss or gradient was not finite
    skipped_in_a_row: int = 0
    nats: float = 0.0  # since the last line of metrics.jsonl, so that its mean comes out the same after resuming
    targets: int = 0
    best_step: int | None = None
    best_nats_per_note: float | None = None
    waited: int = 0  # validations since the best one


@dataclass(frozen=True)
class Fixed:
    """What the first start decided for the whole run."""

    max_steps: int
    rows_per_step: int  # G = world size x batch size x accumulation steps
    precision: str
    data_hash: str


def find_start(run: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, None for a fresh start; UserError where neither is right."""
    checkpoints = run / "checkpoints"
    if resume == "never":
        refuse_a_run(run)
        return None
    if resume == "auto":
        folders = checkpoint.committed(checkpoints)
        for folder in folders:
            try:
                checkpoint.check(folder)
            except checkpoint.CheckpointError as error:
                print(f"passed over: {error}")
                continue
            return folder
        if folders:
            raise UserError(
                f"{checkpoints}: none of its {len(folders)} checkpoints is whole; start in another --output_dir"
            )
        return None
    folder = checkpoint.find(resume)
    checkpoint.check(folder)
    if folder.resolve().parent != checkpoints.resolve():
        raise UserError(
            f"--resume {resume}: a checkpoint of another run than --output_dir {run}; "
            f"give --output_dir {folder.parent.parent}"
        )
    return folder


def refuse_a_run(run: Path) -> None:
    if any((run / name).exists() for name in (CONFIG, METRICS, "checkpoints")):
        raise UserError(f"{run}: holds a run; go on with --resume auto, or give another --output_dir")


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Make the run's folder and keep every other process out of it; UserError where one is at work there."""
    run.mkdir(parents=True, exist_ok=True)
    with open(run / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"{run}: {file.read().strip() or 'another process'} is training there; "
                "wait for it, stop it, or give another --output_dir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield


def parse_state(folder: Path, state: dict) -> tuple[Fixed, Progress, dict]:
    """(Fixed, Progress, the config as a nested dict) of what a checkpoint's state.json says."""
    try:
        return Fixed(**state["fixed"]), Progress(**state["progress"]), state["config"]
    except (KeyError, TypeError) as error:
        raise checkpoint.CheckpointError(f"{folder / checkpoint.STATE}: not a run's state ({error})") from None


def state_dict(fixed: Fixed, progress: Progress, config: Config) -> dict:
    """What `parse_state` reads back."""
    return {"fixed": asdict(fixed), "progress": asdict(progress), "config": config.to_dict()}


def refuse_changes(folder: Path, fixed: Fixed, saved: dict, config: Config, rows_per_step: int) -> None:
    """UserError for the first setting that would make the resumed run another one."""
    remedy = "give the old value, or start a new run in another --output_dir"
    for section, values in config.to_dict().items():
        for name, value in values.items():
            before = saved.get(section, {}).get(name, value)
            if name in FREE[section] or before == value or (name == "precision" and value in ("auto", fixed.precision)):
                continue
            raise UserError(f"{section}.{name} is {value!r}, and {folder} was trained with {before!r}; {remedy}")
    if rows_per_step != fixed.rows_per_step:
        raise UserError(
            f"processes x batch_size x gradient_accumulation_steps is {rows_per_step} rows a step, and {folder} was "
            f"trained with {fixed.rows_per_step}; choose them so that the product is {fixed.rows_per_step} again"
        )


def refuse_other_data(folder: Path, fixed: Fixed, data_hash: str, data_dir: str) -> None:
    if data_hash != fixed.data_hash:
        raise UserError(
            f"{data_dir}: its data hash is {data_hash}, and {folder} was trained on {fixed.data_hash}; "
            "give the --data_dir it was trained on, or start a new run in another --output_dir"
        )


def adopt(model: ModelConfig, saved: dict, where: str) -> ModelConfig:
    """The settings of a model whose weights are taken over from `where`.

    A setting at its default follows the saved one; another that differs is refused. Dropout and the backend hold no
    weights, and stay as they are given.
    """
    default = {**asdict(ModelConfig(size=model.size)), "size": ModelConfig().size}
    default["d_ff"] = replace(model, d_ff=None).d_ff  # its default depends on other settings
    values = asdict(model)
    for name in values.keys() - {"dropout", "backend"}:
        if values[name] not in (saved[name], default[name]):
            raise UserError(
                f"model.{name} is {values[name]!r}, and {where} was trained with {saved[name]!r}; leave it out"
            )
        values[name] = saved[name]
    return ModelConfig(**values)


def enter(run: Path, folder: Path, progress: Progress) -> None:
    """Make `folder` the run's newest checkpoint: `latest` and `best` as they stood when it was saved."""
    checkpoints = run / "checkpoints"
    later = [step for step in checkpoint.all_steps(checkpoints) if step > progress.step]
    if later:
        print(f"checkpoints after step {progress.step} are left behind and removed at the next save: {later}")
    if progress.best_step is not None and not (checkpoints / checkpoint.step_folder(progress.best_step)).is_dir():
        # Going back to before a better one was found and this one removed: the next validation is the best again.
        progress.best_step = progress.best_nats_per_note = None
    checkpoint.write_pointer(checkpoints, "latest", progress.step)
    checkpoint.write_pointer(checkpoints, "best", progress.best_step)
