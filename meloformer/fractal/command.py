"""generate.py's work for a FractalMIDI checkpoint: from a `FractalGenerateConfig` to .mid, .png, .gif, generation.json.

Sample i of seed s is `unconditional_seed{s}_{i:03d}.mid`, after a prompt `{prompt}_conditional_64_seed{s}_{i:03d}` or
`{prompt}_inpainting_64-192_seed{s}_{i:03d}`; a file of an earlier, finished run is never written over.

>>> run(FractalGenerateConfig(checkpoint="runs/fractal", output="out", num_samples=10, gif=True))   # doctest: +SKIP

Every known cell of a prompt's roll stays as it is, bit for bit; tempo and meter are the prompt's. What surprises: an
inpainted piece is written whole, however long it is. The model sees `target_width` columns of it, around the mask.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from meloformer.device import choose_device
from meloformer.errors import UserError
from meloformer.files import new_folder
from meloformer.fractal.model import FractalMIDI
from meloformer.fractal.pictures import can_draw, require_pictures, write_gif, write_png
from meloformer.fractal.request import FractalGenerateConfig
from meloformer.fractal.roll import COLUMNS_PER_BAR, NUM_PITCHES, onsets, read_roll, write_roll
from meloformer.fractal.sampling import DEFAULT_ROUNDS, sample
from meloformer.generated import earlier_runs, refuse_taken, write_report
from meloformer.midi import Score
from meloformer.wording import counted

MAX_FRAMES = 100  # of a GIF: 20 seconds


@dataclass
class Task:
    """What is asked for, for every sample alike.

    roll: (128, W) uint8, the piece with its known cells; columns [first, first + width) of it are the model's, and of
    these it writes those where `keep` (width,) is False.
    """

    roll: np.ndarray
    first: int
    keep: np.ndarray
    name: str
    like: Score | None = None
    note: str = ""

    @property
    def window(self) -> np.ndarray:
        return self.roll[:, self.first : self.first + len(self.keep)]

    def finish(self, window: np.ndarray) -> np.ndarray:
        """(128, W): the piece with a window in its place."""
        roll = self.roll.copy()
        roll[:, self.first : self.first + len(self.keep)] = window
        return roll


def run(config: FractalGenerateConfig) -> None:
    """Generate and write; UserError before anything is written where something is wrong."""
    config.validate()
    output = Path(config.output)
    runs = earlier_runs(output)
    if config.gif:
        require_pictures()
    model = FractalMIDI.from_pretrained(config.checkpoint)
    levels, given = len(model.levels), config.num_iter_list
    if len(given) not in (levels, levels + 1):
        raise UserError(
            f"--num_iter_list {' '.join(map(str, given))}: {len(given)} numbers, and {config.checkpoint} has {levels} "
            f"levels; give {levels}, or {levels + 1} (the last selects nothing)"
        )
    idle = [str(i + 1) for i, kind in enumerate(model.config.kinds) if kind == "ar"]
    if idle and given != list(DEFAULT_ROUNDS):  # these may not have been given
        which = f"number {idle[0]} chooses" if len(idle) == 1 else f"numbers {', '.join(idle)} choose"
        print(f"--num_iter_list {' '.join(map(str, given))}: {which} nothing, ar levels go patch by patch")
    task = plan(config, config.target_width or model.crop_length)
    names = [f"{task.name}_seed{config.seed}_{i:03d}" for i in range(config.num_samples)]
    refuse_taken(output, runs, names)
    model = model.to(choose_device(config.device)).eval()
    if task.note:
        print(task.note)
    if not can_draw():
        print("no pictures: they need matplotlib and Pillow (pip install matplotlib pillow)")
    record = {"settings": config.to_dict(), "prompt": config.prompt, "note": task.note, "samples": []}
    seconds = 0.0
    rounds = rounds_of(model, config, len(task.keep))
    total = rounds * -(-len(names) // config.batch_size)
    bar = tqdm(total=total, unit="round", desc="generating", disable=not sys.stderr.isatty(), leave=False)
    with new_folder(output), bar:
        for first in range(0, len(names), config.batch_size):
            here = names[first : first + config.batch_size]
            started = time.perf_counter()
            windows, frames = generate(model, task, config, first, len(here), rounds, bar)
            seconds += time.perf_counter() - started
            for i, name in enumerate(here):
                roll = task.finish(windows[i])
                entry = write(roll, task, output / name, config, [frame[i] for frame in frames])
                record["samples"].append(entry)
                tqdm.write(f"{output / entry['file']}: {describe(entry)}")
    columns = len(names) * int((~task.keep).sum())
    record |= {"seconds": round(seconds, 2), "columns_per_second": round(columns / seconds, 1)}
    write_report(output, [*runs, record])
    print(f"{counted(len(names), 'roll')} in {seconds:.1f} s ({columns / seconds:.0f} columns/s): {output}")


def generate(
    model: FractalMIDI, task: Task, config: FractalGenerateConfig, first: int, number: int, rounds: int, bar: tqdm
) -> tuple[np.ndarray, list[np.ndarray]]:
    """(number, 128, width) uint8 windows of samples `first`, ...; where a GIF is wanted, frames of the same shape."""
    known = np.repeat(np.where(task.keep, task.window, 0)[None], number, axis=0).astype(np.uint8)
    keep = np.repeat(task.keep[None], number, axis=0)
    frames: list[np.ndarray] = []
    calls, every = 0, -(-rounds // MAX_FRAMES)

    def on_step(roll: np.ndarray, known: np.ndarray) -> None:
        nonlocal calls
        if config.gif and calls % every == 0:
            frames.append(np.where(known, roll, 0).astype(np.uint8))
        calls += 1
        bar.update(min(calls - 1, 1))  # the first call shows what is known before the first round

    rolls = sample(
        model,
        known,
        keep,
        num_iter_list=config.num_iter_list,
        temperature=config.temperature,
        sparsity_bias=config.sparsity_bias,
        seed=config.seed,
        first=first,
        on_step=on_step,
    )
    written = np.where(rolls < config.velocity_threshold, 0, rolls)
    rolls = np.where(keep[:, None], known, written).astype(np.uint8)
    if config.gif:
        frames.append(rolls)
    return rolls, frames


def rounds_of(model: FractalMIDI, config: FractalGenerateConfig, width: int) -> int:
    """Rounds of level 0 in a batch: the steps of the progress bar and of a GIF."""
    if model.config.kinds[0] == "mar":
        return config.num_iter_list[0]
    side = model.config.img_size_list[1]
    return NUM_PITCHES // side * -(-width // side)


def write(
    roll: np.ndarray, task: Task, path: Path, config: FractalGenerateConfig, frames: list[np.ndarray]
) -> dict[str, object]:
    """The files of a sample (`path` without a suffix); its entry in generation.json."""
    files = [path.with_name(f"{path.name}.mid")]
    write_roll(roll, files[0], config.tempo, task.like)
    if can_draw():
        files.append(path.with_name(f"{path.name}.png"))
        new = np.zeros(roll.shape[1], dtype=bool)
        new[task.first : task.first + len(task.keep)] = ~task.keep
        write_png(roll, files[-1], config.stacked, None if new.all() else new)
    if frames:
        files.append(path.with_name(f"{path.name}.gif"))
        write_gif(frames, files[-1])
    written = roll[:, task.first : task.first + len(task.keep)][:, ~task.keep]
    return {
        "file": files[0].name,
        "files": [file.name for file in files],
        "columns": roll.shape[1],
        "columns_written": written.shape[1],
        "notes": int(onsets(roll).sum()),
        "sounding_share": round(float((written > 0).mean()), 5),
    }


def describe(entry: dict) -> str:
    """A sample's entry in a line for people."""
    bars, new, share = entry["columns"] / COLUMNS_PER_BAR, entry["columns_written"], entry["sounding_share"]
    return f"{bars:g} bars, {entry['notes']} notes; {new} columns written, {share:.1%} of their cells sound"


def plan(config: FractalGenerateConfig, width: int) -> Task:
    """The task of the flags; `width` columns are the model's. UserError names the flag that does not fit the prompt."""
    if config.mode == "unconditional":
        return Task(np.zeros((NUM_PITCHES, width), np.uint8), 0, np.zeros(width, bool), "unconditional")
    piece, loss, score = read_roll(config.prompt)
    if not piece.any():
        raise UserError(f"--prompt {config.prompt}: no pitched notes, so nothing of it can be kept")
    stem, length = Path(config.prompt).stem, piece.shape[1]
    note = f"{config.prompt}: {length} columns; {loss.lost} of {loss.notes} pitched notes do not fit the roll"
    if loss.drums:
        note += f", {loss.drums} drum notes are left out"
    if config.mode == "conditional":
        kept = width // 2 if config.condition_length is None else config.condition_length
        if not kept < width:
            raise UserError(f"--condition_length is {kept}, must be below target_width ({width}); lower it")
        if kept > length:
            raise UserError(f"--condition_length is {kept}, and {config.prompt} has {length} columns; lower it")
        roll = np.zeros((NUM_PITCHES, width), np.uint8)
        roll[:, :kept] = piece[:, :kept]
        return Task(roll, 0, np.arange(width) < kept, f"{stem}_conditional_{kept}", score, note)
    start, end = config.mask_start, config.mask_end
    total = max(-(-length // 4) * 4, width)
    if end > total:
        raise UserError(f"--mask_end is {end}, and the roll has {total} columns ({config.prompt}: {length}); lower it")
    if end - start > width:
        raise UserError(
            f"--mask_start {start} --mask_end {end} are {end - start} columns, and target_width is {width}; "
            "raise --target_width, or write it anew in parts"
        )
    first = min(max((start + end - width) // 2, 0), total - width)
    columns = np.arange(first, first + width)
    roll = np.pad(piece, ((0, 0), (0, total - length)))
    return Task(roll, first, (columns < start) | (columns >= end), f"{stem}_inpainting_{start}-{end}", score, note)
