"""Generated rolls beside real ones: how much sounds, how often notes begin, how wide the pitches lie.

    python -m meloformer.fractal.statistics --generated out/ --real lists/valid.txt --control lists/train.txt

In: a folder of generated .mid files (those that its generation.json lists, where there is one), the list of held-out
files, and if wanted one of other real files, which take the same test. Real rolls are cut into windows as wide as the
generated ones, from the first column on; windows that are silent throughout, and the rest at a piece's end that is
shorter, say nothing and are left out. Out: a table, and with `--output` the same as JSON.

A measure of a set of rolls is inside where its median lies between the lowest and the highest real window; the table
says how many of the rolls do. A silent roll and a full one are counted apart, for a mean hides both. The surprise: not
all of the control lie inside. A few held-out pieces hold no music of all kinds, so what can be asked of generated rolls
is that as many of them lie inside as of other real ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from meloformer.command_line import Parser
from meloformer.errors import UserError, exit_cleanly
from meloformer.files import write_atomic
from meloformer.fractal.dataset import read_list
from meloformer.fractal.roll import COLUMNS_PER_BAR, onsets, read_roll
from meloformer.generated import REPORT, earlier_runs
from meloformer.midi import MidiError

MEASURES = {
    "sounding": "share of cells that sound",
    "onsets": "notes that begin in a bar of 16 columns",
    "range": "semitones from the lowest to the highest note",
}
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


def measure(roll: np.ndarray) -> dict[str, float]:
    """The MEASURES of a (128, T) roll; the range of a silent one is 0."""
    pitches = np.flatnonzero(roll.any(axis=1))
    return {
        "sounding": float((roll > 0).mean()),
        "onsets": float(onsets(roll).sum() * COLUMNS_PER_BAR / roll.shape[1]),
        "range": float(pitches[-1] - pitches[0]) if len(pitches) else 0.0,
    }


def windows(roll: np.ndarray, width: int) -> list[np.ndarray]:
    """Windows of `width` columns that do not overlap and are not silent."""
    starts = range(0, roll.shape[1] - width + 1, width)
    return [part for part in (roll[:, start : start + width] for start in starts) if part.any()]


def compare(generated: list[np.ndarray], real: list[np.ndarray], control: list[np.ndarray] | None = None) -> dict:
    """Quantiles of the sets by measure, how many rolls lie inside the range of the real ones, silent and full ones."""
    sets = {"generated": generated, **({"control": control} if control else {})}
    found = {}
    for name in MEASURES:
        bounds = np.array([measure(roll)[name] for roll in real])
        found[name] = {"real": np.quantile(bounds, QUANTILES).round(5).tolist()}
        for kind, rolls in sets.items():
            values = np.array([measure(roll)[name] for roll in rolls])
            inside = (values >= bounds.min()) & (values <= bounds.max())
            found[name][kind] = np.quantile(values, QUANTILES).round(5).tolist()
            found[name][f"{kind}_inside"] = int(inside.sum())
            found[name][f"{kind}_median_inside"] = bool(bounds.min() <= np.median(values) <= bounds.max())
    return {
        "generated_rolls": len(generated),
        "real_windows": len(real),
        "control_windows": len(control or ()),
        "width": generated[0].shape[1],
        "silent": sum(not roll.any() for roll in generated),
        "full": sum(bool(roll.all()) for roll in generated),
        "measures": found,
    }


def page(result: dict) -> str:
    """The result as a table."""
    sizes = {"generated": result["generated_rolls"], "control": result["control_windows"]}
    lines = [
        f"{sizes['generated']} generated rolls, {result['real_windows']} windows of held-out ones, {result['width']} "
        f"columns each: {result['silent']} silent, {result['full']} full",
        f"{'':46} {'lowest':>8} {'5 %':>8} {'median':>8} {'95 %':>8} {'highest':>8}",
    ]
    for name, what in MEASURES.items():
        found = result["measures"][name]
        digits = 4 if name == "sounding" else 1
        for kind in ("real", "control", "generated"):
            if kind not in found:
                continue
            numbers = " ".join(f"{value:8.{digits}f}" for value in found[kind])
            verdict = "" if kind == "real" else f"  {found[f'{kind}_inside'] / sizes[kind]:.1%} of {sizes[kind]} inside"
            lines.append(f"{what if kind == 'real' else '':46} {numbers}  {kind:9}{verdict}".rstrip())
    return "\n".join(lines)


def read_generated(folder: Path, width: int | None) -> list[np.ndarray]:
    """Rolls of a folder's .mid files, with the silence at their end."""
    entries = [sample for run in earlier_runs(folder) for sample in run["samples"]]
    if entries:
        files = {folder / entry["file"]: entry.get("columns") for entry in entries}
    else:
        files = dict.fromkeys(sorted(folder.glob("*.mid")))
    if not files:
        raise UserError(f"--generated {folder}: no {REPORT} and no .mid file there; write some with generate.py")
    rolls = {file: read_roll(file)[0] for file in files}
    width = width or max(files[file] or roll.shape[1] for file, roll in rolls.items())
    return [np.pad(roll[:, :width], ((0, 0), (0, max(width - roll.shape[1], 0)))) for roll in rolls.values()]


def read_real(path: Path, width: int, flag: str = "real") -> list[np.ndarray]:
    """Windows of the files of a list."""
    found: list[np.ndarray] = []
    for file in read_list(path, flag):
        try:
            found += windows(read_roll(file)[0], width)
        except MidiError as error:
            print(f"left out {error}")
    if not found:
        raise UserError(f"--{flag} {path}: none of its files has {width} columns that sound; lower --width")
    return found


def main() -> None:
    parser = Parser(prog="python -m meloformer.fractal.statistics", description=__doc__.split("\n")[0])
    parser.add_argument("--generated", type=Path, required=True, help="folder of generated .mid files")
    parser.add_argument("--real", type=Path, required=True, help="text file of held-out MIDI files, one path a line")
    parser.add_argument("--control", type=Path, help="text file of other real MIDI files (default: none)")
    parser.add_argument("--width", type=int, help="columns of a roll (default: the generated ones')")
    parser.add_argument("--output", type=Path, help="file for the numbers (default: none)")
    arguments = parser.parse_args()
    if arguments.width is not None and arguments.width < 1:
        raise UserError(f"--width is {arguments.width}, must be at least 1; leave it out for the generated ones'")
    generated = read_generated(arguments.generated, arguments.width)
    width = generated[0].shape[1]
    control = read_real(arguments.control, width, "control") if arguments.control else None
    result = compare(generated, read_real(arguments.real, width), control)
    if arguments.output:
        write_atomic(arguments.output, json.dumps(result, indent=1).encode())
    print(page(result))


if __name__ == "__main__":
    exit_cleanly(main)
