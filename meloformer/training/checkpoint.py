"""Checkpoints that are whole or absent, and the two pointers that name the ones that matter.

    checkpoints/step_00000500/   model.safetensors, config.json   what `MeloFormer.from_pretrained` reads
                                 optimizer.safetensors            one tensor per parameter and moment, by name
                                 state.json                       everything else that resuming needs; numbers and text,
                                                                  and the sha256 of the other files and of itself
    checkpoints/latest, best     text files holding the name of a step's folder and a newline

A folder's name begins with its step; a family may add how good it is (step_00005000-val_loss_0.0234).

A folder is written aside (`.step_00000500.tmp`), synced, and renamed into place; then `latest` is moved to it. `latest`
is the commit point: a folder newer than it is the rest of a save that was killed, or of a branch that was left
by resuming further back, and the next save removes it. A step that is saved again, which a validation that was made up
for does, stands aside meanwhile (`.step_00000500.old`), and `restore` puts it back where a kill came in between. Text
files rather than symlinks, because they survive every file system, archive and copy.

>>> newest(Path("runs/base/checkpoints"))   # doctest: +SKIP
PosixPath('runs/base/checkpoints/step_00000500')

What surprises: the folders of the best validations are never removed, so a run holds up to keep_last + 1 checkpoints,
or as many more as its family ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from meloformer.errors import UserError
from meloformer.files import checksum, sync_directory, write_atomic
from meloformer.pretrained import follow_pointer

FORMAT = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
STEP_FOLDER = re.compile(r"step_(\d{8,})(-val_loss_\d+\.\d+)?")


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or could not be written."""


def step_of(folder: Path) -> int:
    """Step that a checkpoint folder's name states, -1 for any other name."""
    match = STEP_FOLDER.fullmatch(folder.name)
    return int(match.group(1)) if match else -1


def all_folders(checkpoints: Path) -> dict[int, Path]:
    """The folders that are there by step, ascending."""
    if not checkpoints.is_dir():
        return {}
    return dict(sorted((step_of(folder), folder) for folder in checkpoints.iterdir() if step_of(folder) >= 0))


def all_steps(checkpoints: Path) -> list[int]:
    """Their steps."""
    return list(all_folders(checkpoints))


# --- pointers -------------------------------------------------------------------------------------------------


def read_pointer(checkpoints: Path, name: str) -> Path | None:
    """The folder that `latest` or `best` names, or the one of its step where that was saved again under another name;
    None where the pointer or its folder is not there."""
    try:
        target = checkpoints / (checkpoints / name).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    if step_of(target) >= 0 and target.is_dir():
        return target
    return all_folders(checkpoints).get(step_of(target))


def write_pointer(checkpoints: Path, name: str, step: int | None) -> None:
    """Point at a step's folder, or at nothing."""
    if step is None:
        (checkpoints / name).unlink(missing_ok=True)
    else:
        write_atomic(checkpoints / name, f"{all_folders(checkpoints)[step].name}\n".encode())


def committed(checkpoints: Path) -> list[Path]:
    """Folders that were completely saved, newest first: those up to `latest`.

    Where it names none that is there, a user has removed that one, or a copy lacks the pointer: then all, and `check`
    tells the whole ones from the torn.
    """
    folders, latest = all_folders(checkpoints), read_pointer(checkpoints, "latest")
    last = step_of(latest) if latest is not None else max(folders, default=-1)
    return [folder for step, folder in reversed(folders.items()) if step <= last]


def newest(checkpoints: Path) -> Path | None:
    folders = committed(checkpoints)
    return folders[0] if folders else None


# --- writing --------------------------------------------------------------------------------------------------


def save(
    checkpoints: Path,
    name: str,
    save_model: Callable[[Path], None],
    optimizer: dict[str, Tensor],
    state: dict,
    keep_last: int,
    best_steps: list[int],
) -> Path:
    """Write one checkpoint and commit it, then remove what retention no longer wants; returns its folder.

    `name` is the folder's (STEP_FOLDER), `best_steps` are those to keep for their validation, the best first.
    `save_model(folder)` writes the model's own files. Whatever is raised on the way, the checkpoints that were there
    stay whole and `latest` still names one of them.
    """
    target = checkpoints / name
    step, best_step = step_of(target), best_steps[0] if best_steps else None
    aside = checkpoints / f".{target.name}.tmp"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        restore(checkpoints)
        for left_over in checkpoints.glob(".step_*"):
            shutil.rmtree(left_over)
        aside.mkdir()
        save_model(aside)
        save_file(optimizer, aside / OPTIMIZER)
        state = {"format": FORMAT, **state, "sha256": {file.name: checksum(file) for file in sorted(aside.iterdir())}}
        state["sha256"][STATE] = state_checksum(state)
        (aside / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        for file in aside.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        sync_directory(aside)
        before = all_folders(checkpoints).get(step)
        if before is not None:  # `latest` may name it
            os.replace(before, checkpoints / f".{before.name}.old")
        os.replace(aside, target)
        sync_directory(checkpoints)
        write_pointer(checkpoints, "latest", step)
        write_pointer(checkpoints, "best", best_step)
        if before is not None:
            remove(checkpoints / f".{before.name}.old")
        prune(checkpoints, step, keep_last, best_steps)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{target}: the checkpoint could not be written ({error}); the earlier ones are whole: "
            "make room and go on with --resume auto"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        restore(checkpoints)
    return target


def restore(checkpoints: Path) -> None:
    """Put back what stood aside while its step was saved again, if that was not finished."""
    for old in checkpoints.glob(".step_*.old"):
        folder = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if step_of(folder) not in all_folders(checkpoints):
            os.replace(old, folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint. Renamed first: what a kill leaves half removed must not look like a checkpoint."""
    gone = folder.with_name(f".{folder.name.removeprefix('.')}.gone")
    os.replace(folder, gone)
    shutil.rmtree(gone)


def prune(checkpoints: Path, step: int, keep_last: int, best_steps: list[int]) -> None:
    """Remove all but the `keep_last` folders up to `step` and the best; folders beyond `step` are an old branch."""
    folders = all_folders(checkpoints)
    kept = {s for s in folders if s <= step} & {*[s for s in folders if s <= step][-keep_last:], *best_steps}
    for old in set(folders) - kept:
        remove(folders[old])


# --- reading --------------------------------------------------------------------------------------------------


def read_state(folder: Path) -> dict:
    """state.json of a checkpoint."""
    path = folder / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no checkpoint of a training run ({STATE} is missing)") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); resume from another checkpoint") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise CheckpointError(f"{path}: checkpoint format {found!r}, this code reads {FORMAT}")
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: unreadable ({error}); resume from another checkpoint") from None


def state_checksum(state: dict) -> str:
    """sha256 of what state.json says, its own checksum apart; spaces and the order of keys do not count."""
    others = {name: value for name, value in state["sha256"].items() if name != STATE}
    return hashlib.sha256(json.dumps({**state, "sha256": others}, sort_keys=True).encode()).hexdigest()


def check(folder: Path) -> None:
    """CheckpointError, naming the file, where a single byte of a checkpoint is missing or not what was written."""
    state = read_state(folder)
    expected = state.get("sha256")
    if isinstance(expected, dict) and {MODEL, STATE} <= expected.keys() and OPTIMIZER not in expected:
        raise CheckpointError(f"{folder}: an exported model, without its optimizer; begin from it with --init_from")
    names = {MODEL, OPTIMIZER, STATE, *(expected if isinstance(expected, dict) else ())}
    compare(folder, state, names, "resume from another checkpoint, or let --resume auto choose")


def compare(folder: Path, state: dict, names: set[str], remedy: str) -> None:
    """CheckpointError, naming the file, where one of these is missing, not what was written, or has no checksum."""
    expected = state.get("sha256")
    if not isinstance(expected, dict) or not names <= expected.keys():
        raise CheckpointError(f"{folder / STATE}: names no checksums; {remedy}")
    for name in sorted(names):
        sha256 = expected[name]
        try:
            found = state_checksum(state) if name == STATE else checksum(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name}: unreadable ({error.strerror}); {remedy}") from None
        if found != sha256:
            raise CheckpointError(
                f"{folder / name}: damaged (sha256 {found[:12]}, {sha256[:12]} was written); {remedy}"
            )


def find(path: str | Path) -> Path:
    """The checkpoint that `path` names: itself, what `checkpoints/latest` or `best` point at (.ckpt may stand behind
    all of them), or the newest of a run's folder or of its checkpoints folder."""
    path = follow_pointer(Path(path)) or Path(path)
    if path.suffix == ".ckpt" and not path.exists():
        path = path.with_suffix("")
    if step_of(path) >= 0 or (path / STATE).is_file():
        return path
    for checkpoints in (path / "checkpoints", path):
        folder = newest(checkpoints)
        if folder is not None:
            return folder
    raise CheckpointError(f"{path}: no checkpoint there (a run's folder is expected, or its checkpoints/step_...)")
