"""The last page of `make demo`: what was made, how good it is, what to do next.

In: a run with evaluation.json (evaluate.py writes it) and a folder of generated pieces. Out: a short table on stdout.

    python -m meloformer.demo runs/demo out/demo

The surprise: it measures nothing itself. A number that is not in the files is not in the table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meloformer.command_line import Parser
from meloformer.errors import UserError, exit_cleanly
from meloformer.midi import read_score

BASELINES = {
    "repeat_bar": "repeats the track's previous bar",
    "bigram": "counts of token pairs",
    "unigram": "counts of tokens",
}


def read_evaluation(run: Path) -> dict[str, Any]:
    """The run's evaluation.json; UserError where evaluate.py has not written one."""
    path = run / "evaluation.json"
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; write it with evaluate.py --checkpoint {run}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); write it again with evaluate.py --checkpoint {run}") from None
    if not isinstance(evaluation, dict) or "nats_per_note" not in evaluation:
        raise UserError(f"{path}: nats_per_note is missing; write it again with evaluate.py --checkpoint {run}")
    return evaluation


def likelihood_lines(evaluation: dict[str, Any]) -> list[str]:
    """The model's held-out nats per note and, below it, those of the baselines on the same split."""
    rows = [("this model", evaluation["nats_per_note"])]
    for name, baseline in evaluation.get("baselines", {}).items():
        rows.append((f"{name.replace('_', ' ')} ({BASELINES.get(name, 'baseline')})", baseline["nats_per_note"]))
    rows[1:] = sorted(rows[1:], key=lambda row: row[1])
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {nats:6.2f}" for name, nats in rows]


def piece_lines(folder: Path) -> list[str]:
    """One line a MIDI file: its length, its tracks and notes, and its piano roll where there is one."""
    pieces = sorted(folder.glob("*.mid"))
    if not pieces:
        raise UserError(f"{folder}: holds no .mid file; write some with generate.py --output {folder}")
    lines = []
    for piece in pieces:
        score = read_score(piece)
        minutes, seconds = divmod(round(float(score.seconds_at(score.end_tick))), 60)
        roll = piece.with_suffix(".png")
        shown = f"  piano roll {roll}" if roll.exists() else ""
        lines.append(f"  {piece}  {minutes}:{seconds:02d}, {len(score.tracks)} tracks, {score.num_notes} notes{shown}")
    return lines


def this_python() -> Path:
    """The interpreter as one would type it: `.venv/bin/python` in the project's folder."""
    python = Path(sys.executable)
    return python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python


def summary(run: Path, generated: Path) -> str:
    """The whole page."""
    python = this_python()
    return "\n".join(
        [
            "",
            "Held-out nats per note, lower is better:",
            *likelihood_lines(read_evaluation(run)),
            "",
            "New pieces:",
            *piece_lines(generated),
            "",
            "Go on with:",
            f"  {python} generate.py --checkpoint {run} --output out/more --num_samples 8 --seed 1 --plot",
            f"  {python} preprocess_data.py --input YOUR_MIDI_FOLDER --output processed/mine",
            f"  {python} train.py --data_dir processed/mine --model_size small",
            f"  {python} generate.py --checkpoint runs/small --output out/mine",
            "",
        ]
    )


def print_page(module: str, description: str, summary: Callable[[Path, Path], str]) -> None:
    """The command line of a demo's last page."""
    parser = Parser(prog=f"python -m {module}", description=description)
    parser.add_argument("run", type=Path, help="folder of the run, with evaluation.json")
    parser.add_argument("generated", type=Path, help="folder of what was generated")
    arguments = parser.parse_args()
    print(summary(arguments.run, arguments.generated))


def main() -> None:
    print_page("meloformer.demo", __doc__.splitlines()[0], summary)


if __name__ == "__main__":
    exit_cleanly(main)
