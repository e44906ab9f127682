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
from dataclasses import asdict, dataclass, field
from pathlib import Path

from meloformer.errors import UserError
from meloformer.pretrained import find_pretrained
from meloformer.settings import Settings
from meloformer.training import checkpoint
from meloformer.training.logging import METRICS

CONFIG, LOCK = "config.yaml", ".lock"
# May differ between a run and its resumption, and so may what a family names: they change where and how fast, and what
# is written, not the losses. batch_size and gradient_accumulation_steps are compared by their product, data by a hash.
FREE = (
    *("output_dir", "resume", "init_from", "device", "num_workers", "batch_size", "gradient_accumulation_steps"),
    *("val_interval", "val_max_rows", "patience", "sample_interval", "save_interval", "keep_last", "log_interval"),
    *("max_nonfinite_steps", "gradient_checkpointing"),
)


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
    ranking: list[list] = field(default_factory=list)  # [score, step] of the checkpoints kept for it, the best first
    waited: int = 0  # validations since the best one
    validation_due: bool = False  # at this step; the run was stopped before it

    @property
    def best_score(self) -> float | None:
        return self.ranking[0][0] if self.ranking else None

    @property
    def best_step(self) -> int | None:
        return self.ranking[0][1] if self.ranking else None

    def is_finished(self, fixed: Fixed) -> bool:
        return self.step >= fixed.max_steps and not self.validation_due

    def rank(self, score: float, keep: int) -> None:
        """Take this step's checkpoint into the ranking, which holds `keep` at most; of equals the earlier first."""
        self.ranking = sorted([*self.ranking, [score, self.step]])[:keep]


@dataclass(frozen=True)
class Fixed:
    """What the first start decided for the whole run."""

    max_steps: int
    rows_per_step: int  # G = world size x batch size x accumulation steps
    precision: str
    data_hash: str


def find_start(run: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, None for a fresh start; UserError where neither is right. Asked under the lock of
    a folder that holds a run: whoever still works there may be about to save."""
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
        if (checkpoints / "latest").exists():
            raise UserError(
                f"{checkpoints / 'latest'}: names a checkpoint that is not there, and there is no other; put it back, "
                f"or remove {checkpoints} to begin anew"
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


def holds_a_run(run: Path) -> bool:
    return any((run / name).exists() for name in (CONFIG, METRICS, "checkpoints"))


def refuse_a_run(run: Path) -> None:
    if holds_a_run(run):
        raise UserError(f"{run}: holds a run; go on with --resume auto, or give another --output_dir")


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Make the run's folder and keep every other process out of it; UserError where one is at work there. What a kill
    left between two renames is put right first."""
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
        checkpoint.restore(run / "checkpoints")
        yield


def parse_state(folder: Path, state: dict) -> tuple[Fixed, Progress, dict]:
    """(Fixed, Progress, the config as a nested dict) of what a checkpoint's state.json says."""
    try:
        return Fixed(**state["fixed"]), Progress(**state["progress"]), state["config"]
    except (KeyError, TypeError) as error:
        raise checkpoint.CheckpointError(f"{folder / checkpoint.STATE}: not a run's state ({error})") from None


def saved_config(path: str) -> dict:
    """The config of the run that a model comes from, a nested dict; empty where its state.json did not come along."""
    folder = find_pretrained(path)
    return checkpoint.read_state(folder).get("config", {}) if (folder / checkpoint.STATE).is_file() else {}


def state_dict(fixed: Fixed, progress: Progress, config: Settings) -> dict:
    """What `parse_state` reads back."""
    return {"fixed": asdict(fixed), "progress": asdict(progress), "config": config.to_dict()}


def refuse_changes(
    folder: Path, fixed: Fixed, saved: dict, config: Settings, rows_per_step: int, free: dict[str, tuple[str, ...]]
) -> None:
    """UserError for the first setting that would make the resumed run another one. `free` ones, by section, may."""
    remedy = "give the old value, or start a new run in another --output_dir"
    family = saved.get("family", "meloformer")
    if config.family != family:
        raise UserError(f"family is {config.family!r}, and {folder} was trained with {family!r}; {remedy}")
    remedy += ", with --init_from to begin with these weights"
    for section, values in config.to_dict().items():
        allowed = {*free.get(section, ()), *(FREE if section == "training" else ())}
        for name, value in values.items() if isinstance(values, dict) else ():
            before = saved.get(section, {}).get(name, value)
            if name in allowed or before == value or (name == "precision" and value in ("auto", fixed.precision)):
                continue
            raise UserError(f"{section}.{name} is {value!r}, and {folder} was trained with {before!r}; {remedy}")
    if rows_per_step != fixed.rows_per_step:
        raise UserError(
            f"processes x batch_size x gradient_accumulation_steps is {rows_per_step} rows a step, and {folder} was "
            f"trained with {fixed.rows_per_step}; choose them so that the product is {fixed.rows_per_step} again"
        )


def refuse_other_data(folder: Path, fixed: Fixed, data_hash: str, data_from: str) -> None:
    if data_hash != fixed.data_hash:
        raise UserError(
            f"{data_from}: its data hash is {data_hash}, and {folder} was trained on {fixed.data_hash}; "
            f"give the {data_from.split()[0]} it was trained on, or start a new run in another --output_dir"
        )


def enter(run: Path, folder: Path, progress: Progress) -> None:
    """Make `folder` the run's newest checkpoint: `latest` and `best` as they stood when it was saved."""
    checkpoints = run / "checkpoints"
    later = [step for step in checkpoint.all_steps(checkpoints) if step > progress.step]
    if later:
        print(f"checkpoints after step {progress.step} are left behind and removed at the next save: {later}")
    # Going back to before a better one was found and this one removed: the next validation is the best again.
    kept = checkpoint.all_steps(checkpoints)
    progress.ranking = [entry for entry in progress.ranking if entry[1] in kept]
    checkpoint.write_pointer(checkpoints, "latest", progress.step)
    checkpoint.write_pointer(checkpoints, "best", progress.best_step)
