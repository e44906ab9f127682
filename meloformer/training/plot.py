"""Curves of one run or several: loss and held-out likelihood by step, side by side in one picture.

    python -m meloformer.training.plot runs/base                     # writes runs/base/curves.png
    python -m meloformer.training.plot runs/a runs/b --output ab.png

Four panels: training loss (smoothed, with the raw values faint behind it), validation in nats a note (of piano rolls: a
cell), validation by token type (of one run; of several, the last value of each), learning rate and gradient norm. Needs
matplotlib.

What surprises: a run that is still going on can be drawn; a last line that is not finished yet is left out.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np

from meloformer.command_line import Parser
from meloformer.errors import UserError, exit_cleanly
from meloformer.evaluation.plots import COLOURS, INK, RULE, require_matplotlib
from meloformer.files import require_file, write_atomic
from meloformer.training.logging import METRICS
from meloformer.wording import type_word

SMOOTHING = 0.03  # of a curve's length: the width of its moving average
FEW = 30  # points that are also drawn as points, for one alone makes no line
CURVES = "curves.png"
HELD_OUT = ("nats_per_note", "nats_per_cell")  # of the two families


def read_metrics(run: Path) -> dict[str, list[dict]]:
    """Records of a run's metrics.jsonl by kind; UserError where there are none."""
    path = run / METRICS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run}: no run there ({METRICS} is missing); give the folder of a run") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the folder of a run, such as runs/base") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no record of a run, byte {error.start} is not text") from None
    records: dict[str, list[dict]] = {"train": [], "validation": []}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.setdefault(record["kind"], []).append(record)
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise UserError(f"{path}: line {number} is no record of a run") from None
    if not records["train"]:
        raise UserError(f"{path}: holds no step yet; wait for the first --log_interval")
    return records


def column(records: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the records that have a number there."""
    pairs = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], dtype=float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Moving average, narrower at both ends, so that it begins and ends with the curve.

    >>> smooth(np.array([1.0, 3.0])).tolist()
    [1.0, 3.0]
    """
    half = int(len(values) * SMOOTHING / 2)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    centre = np.arange(len(values))
    reach = np.minimum(half, np.minimum(centre, len(values) - 1 - centre))
    return (sums[centre + reach + 1] - sums[centre - reach]) / (2 * reach + 1)


def plot(runs: list[Path], output: Path) -> None:
    """Draw the curves of `runs` into a PNG, whole or absent; UserError where one is none, or nothing can be written."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    metrics = [read_metrics(run) for run in runs]
    require_file(output)
    figure = Figure(figsize=(13, 8), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    (loss, held_out), (types, rate) = figure.subplots(2, 2)
    norm = rate.twinx()
    for run, records, colour in zip(runs, metrics, COLOURS * (1 + len(runs) // len(COLOURS))):
        steps, values = column(records["train"], "loss")
        marker = "." if len(records["train"]) < FEW else None
        loss.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
        loss.plot(steps, smooth(values), color=colour, marker=marker, label=str(run))
        names = [name for name in HELD_OUT if any(name in record for record in records["validation"])]
        steps, values = column(records["validation"], names[0] if names else HELD_OUT[0])
        held_out.plot(steps, values, color=colour, marker=".", label=str(run))
        if len(values):
            best = int(values.argmin())
            held_out.annotate(
                f"{values[best]:.3f}",
                (steps[best], values[best]),
                xytext=(0, -5),  # below its point, for the curve comes from above, and inwards of it
                textcoords="offset points",
                va="top",
                ha="right" if 2 * steps[best] > steps[0] + steps[-1] else "left",
                color=colour,
                fontsize=8,
            )
        rate.plot(*column(records["train"], "lr"), color=colour, marker=marker)
        norm.plot(*column(records["train"], "grad_norm"), color=colour, marker=marker, alpha=0.3, linewidth=0.8)
    _draw_types(types, runs, metrics)
    titles = {
        loss: "training loss, nats a token or cell",
        held_out: "validation, nats a note or cell",
        types: "validation by type, nats a token",
        rate: "learning rate (bold), gradient norm (faint)",
    }
    for ax, title in titles.items():
        ax.set_title(title, fontsize=10, color=INK, loc="left")
        ax.grid(color=RULE, linewidth=0.6)
        ax.tick_params(labelsize=8, labelcolor=INK)
        ax.margins(y=0.1)
        if ax is not types or len(runs) == 1:
            ax.set_xlabel("step", fontsize=8, color=INK)
            ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    for ax in (loss, held_out, rate, norm):  # else a power of ten stands above the axis, in the title
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    norm.tick_params(labelsize=8, labelcolor=INK)
    _legend(loss)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    write_atomic(output, buffer.getvalue())


def _legend(ax, **options) -> None:
    """A folder's name may hold dollar signs, and is no formula."""
    for text in ax.legend(frameon=False, fontsize=8, **options).get_texts():
        text.set_parse_math(False)


def _draw_types(ax, runs: list[Path], metrics: list[dict[str, list[dict]]]) -> None:
    """One run: a curve for each type. Several: bars of their last validation, beside each other."""
    validations = [records["validation"] for records in metrics]
    names = list(
        dict.fromkeys(name for records in validations for record in records for name in record.get("by_type", {}))
    )
    if len(runs) == 1:
        for name, colour in zip(names, COLOURS * (1 + len(names) // len(COLOURS))):
            shown = [{"step": r["step"], **r.get("by_type", {}).get(name, {})} for r in validations[0]]
            ax.plot(*column(shown, "nats_per_token"), color=colour, marker=".", label=type_word(name))
        if names:
            _legend(ax, ncols=2)
        return
    width = 0.8 / len(runs)
    for i, (records, colour) in enumerate(zip(validations, COLOURS * (1 + len(runs) // len(COLOURS)))):
        last = records[-1].get("by_type", {}) if records else {}
        heights = [last.get(name, {}).get("nats_per_token", 0.0) for name in names]
        ax.bar(np.arange(len(names)) + i * width, heights, width, color=colour)
    ax.set_xticks(np.arange(len(names)) + 0.4 - width / 2, [type_word(name) for name in names])


def main() -> None:
    parser = Parser(prog="python -m meloformer.training.plot", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument("--output", type=Path, help=f"picture to write (default: {CURVES} in the first run's folder)")
    arguments = parser.parse_args()
    output = arguments.output or arguments.runs[0] / CURVES
    plot(arguments.runs, output)
    print(output)


if __name__ == "__main__":
    exit_cleanly(main)
