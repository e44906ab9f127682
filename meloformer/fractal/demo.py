"""The last page of `make demo-fractal`: how good the model is, where its rolls are, what to do next.

In: a run with evaluation.json (evaluate.py writes it) and a folder of generated rolls. Out: a short page on stdout.

    python -m meloformer.fractal.demo runs/fractal-demo out/fractal-demo

The surprise: it measures nothing itself. A number that is not in the files is not on the page.
"""

from __future__ import annotations

import json
from pathlib import Path

from meloformer.demo import print_page, this_python
from meloformer.errors import UserError, exit_cleanly
from meloformer.generated import REPORT, earlier_runs

MODEL, UNIGRAM = "nats_per_cell", "unigram_nats_per_cell"


def likelihood_lines(run: Path) -> list[str]:
    """The model's held-out nats per cell beside the entropy of the same rolls' cells."""
    path = run / "evaluation.json"
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        model, unigram = float(evaluation[MODEL]), float(evaluation[UNIGRAM])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; write it with evaluate.py --checkpoint {run}") from None
    except (ValueError, KeyError, TypeError) as error:
        reason = "" if isinstance(error, ValueError) else f" ({error})"
        raise UserError(f"{path}: not an evaluation{reason}; write it with evaluate.py --checkpoint {run}") from None
    return [
        f"  this model                              {model:7.4f}",
        f"  how often each velocity occurs, alone   {unigram:7.4f}",
        f"  the model has {model / unigram:.2f} of it",
    ]


def roll_lines(folder: Path) -> list[str]:
    """A line for each roll: what it holds, and its files."""
    entries = [sample for run in earlier_runs(folder) for sample in run["samples"]]
    if not entries:
        raise UserError(f"{folder}: no {REPORT}; write some rolls with generate.py --output {folder}")
    lines = []
    for entry in entries:
        files = "  ".join(str(folder / file) for file in entry["files"])
        lines.append(f"  {entry['notes']:4} notes, {entry['sounding_share']:5.1%} sounds   {files}")
    return lines


def summary(run: Path, generated: Path) -> str:
    """The whole page."""
    python = this_python()
    return "\n".join(
        [
            "",
            "Held-out nats per cell, lower is better:",
            *likelihood_lines(run),
            "",
            "New rolls (.mid to hear, .png to see, .gif to watch how it came about):",
            *roll_lines(generated),
            "",
            "Go on with:",
            f"  {python} generate.py --checkpoint {run} --output out/more --num_samples 8 --seed 1 --gif \\",
            "      --temperature 0.95 --sparsity_bias -0.2",
            f"  {python} generate.py --checkpoint {run} --output out/more --mode inpainting --prompt SONG.mid \\",
            "      --mask_start 64 --mask_end 128",
            f"  {python} -m meloformer.fractal.lists --input YOUR_MIDI_FOLDER --output lists/mine",
            f"  {python} train.py --family fractal --train_data lists/mine/train.txt --val_data lists/mine/valid.txt",
            "",
        ]
    )


def main() -> None:
    print_page("meloformer.fractal.demo", __doc__.splitlines()[0], summary)


if __name__ == "__main__":
    exit_cleanly(main)
