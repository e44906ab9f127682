"""Saved models as files: where the one that a path means is, and which family it is of. No torch here.

    find_pretrained("runs/base")                       a run: its best checkpoint, else its latest
    find_pretrained("runs/base/checkpoints/latest")    a pointer, also written latest.ckpt, best.ckpt
    find_pretrained("runs/base/checkpoints/step_00000500")
    family_of("runs/base")                             "meloformer" or "fractal"

What surprises: a config.json that names no family is MeloFormer's; it was there first.
"""

from __future__ import annotations

import json
from pathlib import Path

from meloformer.errors import UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
POINTERS = ("best", "latest")


def follow_pointer(path: Path) -> Path | None:
    """The folder that `checkpoints/latest` or `checkpoints/best` names, with or without .ckpt; None for other paths."""
    pointer = path.with_suffix("") if path.suffix == ".ckpt" else path
    if pointer.name not in POINTERS or not pointer.is_file():
        return None
    return pointer.parent / pointer.read_text(encoding="utf-8").strip()


def find_pretrained(folder: str | Path) -> Path:
    """The folder of the model that `folder` means; UserError where there is none."""
    folder = Path(folder)
    candidates = [folder, follow_pointer(folder), folder.with_suffix("") if folder.suffix == ".ckpt" else None]
    candidates += [follow_pointer(where / name) for where in (folder / "checkpoints", folder) for name in POINTERS]
    for candidate in candidates:
        if candidate is not None and (candidate / CONFIG).is_file():
            return candidate
    raise UserError(f"{folder}: no model there; give a run's folder or one of its checkpoints ({CONFIG}, {WEIGHTS})")


def read_about(path: Path, family: str, keys: set[str], model_format: int) -> dict:
    """A model's config.json; UserError where it is another family's, another format's, or none."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable ({error}); take another checkpoint") from None
    found = about.get("family", "meloformer") if isinstance(about, dict) else family
    if found != family:
        raise UserError(f"{path}: a model of the family {found}, and {family} is wanted; give --family {found}")
    if not isinstance(about, dict) or not {"format", *keys} <= about.keys():
        raise UserError(f"{path}: not a model's config (keys format, {', '.join(sorted(keys))} expected)")
    if about["format"] != model_format:
        raise UserError(f"{path}: model format {about['format']!r}, this code reads {model_format}")
    return about


def family_of(folder: str | Path) -> str:
    """The family of the model that `folder` means; UserError where there is no model."""
    path = find_pretrained(folder) / CONFIG
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable ({error}); take another checkpoint") from None
    return about.get("family", "meloformer") if isinstance(about, dict) else "meloformer"
