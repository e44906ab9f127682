"""A run's folder: whether it may be started in, what it goes on from, and what must not have changed meanwhile.

    runs/base/config.yaml      every setting, defaults resolved; `--config runs/base/config.yaml` starts the like
    runs/base/metrics.jsonl    meloformer.training.logging
    runs/base/checkpoints/     meloformer.training.checkpoint

>>> find_start(Path("runs/base"), "auto")    # doctest: +SKIP
PosixPath('runs/base/checkpoints/step_00000500')

What surprises: `max_steps` is worked out at the first start and stored, so that the schedule never moves:
a resumed run takes it from the checkpoint, and a config that asks for another is refused.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from meloformer.config import Config
from meloformer.errors import UserError
from meloformer.training import checkpoint
from meloformer.training.logging import METRICS

CONFIG = "config.yaml"
# May differ between a run and its resumption: they change where and how fast, and what is written, not the losses.
# batch_size and gradient_accumulation_steps are compared by their product, data_dir by the data's hash.
FREE = {
    "training": (
        *("output_dir", "resume", "device", "num_workers", "batch_size", "gradient_accumulation_steps"),
        *("val_interval", "val_max_rows", "save_interval", "keep_last", "log_interval", "max_nonfinite_steps"),
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
        if any((run / name).exists() for name in (CONFIG, METRICS, "checkpoints")):
            raise UserError(f"{run}: holds a run; go on with --resume auto, or give another --output_dir")
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


def read_start(folder: Path) -> tuple[Fixed, Progress, dict]:
    """(Fixed, Progress, the config as a nested dict) of a checkpoint."""
    state = checkpoint.read_state(folder)
    try:
        return Fixed(**state["fixed"]), Progress(**state["progress"]), state["config"]
    except (KeyError, TypeError) as error:
        raise checkpoint.CheckpointError(f"{folder / checkpoint.STATE}: not a run's state ({error})") from None


def state_dict(fixed: Fixed, progress: Progress, config: Config) -> dict:
    """What `read_start` reads back."""
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
            f"batch_size x gradient_accumulation_steps is {rows_per_step} rows a step, and {folder} was trained with "
            f"{fixed.rows_per_step}; {remedy}"
        )


def refuse_other_data(folder: Path, fixed: Fixed, data_hash: str, data_dir: str) -> None:
    if data_hash != fixed.data_hash:
        raise UserError(
            f"{data_dir}: its data hash is {data_hash}, and {folder} was trained on {fixed.data_hash}; "
            "give the --data_dir it was trained on, or start a new run in another --output_dir"
        )


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
