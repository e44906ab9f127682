"""Generated music beside held-out real music: every metric with its noise floor, and controls that must fail.

In: an `EvaluateConfig` with `generated`, `reference` and perhaps `training` (folders of MIDI, shards or runs). Out: a
table on screen, and report.json and report.html in `output` (default: the generated folder).

Real music differs from real music, so each figure of the generated pieces stands beside one half of the reference, the
other half, and a band: what lies outside differs from real music by more than random halves of it differ from one
another, in 95 % of the splits. The controls are made of the second half: its bars
shuffled, its pitched bars taken from other songs, a loop of four bars. Where a control passes, the reference is too
small, or too odd, to tell.

>>> compare(EvaluateConfig(generated="out/", reference="held_out/", training="runs/base"))   # doctest: +SKIP

What surprises: the band narrows with the number of reference pieces, and it is that of halves. Have about twice as
many reference pieces as generated ones, on the same kinds of instruments.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from meloformer.command_config import EvaluateConfig
from meloformer.errors import UserError
from meloformer.evaluation.bars import Bars, bars_of_others, loop, shuffled_bars
from meloformer.evaluation.memorisation import Copies, Library
from meloformer.evaluation.metrics import METRICS, measure
from meloformer.evaluation.music import load_music, music
from meloformer.evaluation.report import html_report
from meloformer.evaluation.similarity import VIEWS, curve, peaks, repeats, similarity_error, similarity_sums
from meloformer.files import write_atomic

REPORT, PAGE = "report.json", "report.html"
HALVES = 400  # random halves that the bands come from
BAND = (0.025, 0.975)
MIN_REFERENCE = 4
STRUCTURE = (*(f"{kind} {view}" for view in VIEWS for kind in ("error", "peaks")), "repeat_rate")


class Measured:
    """The numbers of each piece of a set, kept apart so that any subset's are a sum or a mean away."""

    def __init__(self, pieces: Sequence[Bars]):
        self.pieces = pieces
        sums = [similarity_sums(bars) for bars in pieces]
        self.sums = {view: np.stack([s[view] for s in sums]) for view in VIEWS}  # (pieces, distances, 2)
        found = [measure(bars) for bars in pieces]
        self.values = {
            f"{name} {scope}": np.array([m[scope][name] for m in found])
            for scope in ("all", "tracks")
            for name in METRICS
        }
        counts = np.array([repeats(bars) for bars in pieces], dtype=float)
        self.values["repeat_rate"] = np.divide(
            counts[:, 0], counts[:, 1], out=np.full(len(pieces), np.nan), where=counts[:, 1] > 0
        )

    def curves(self, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """{view: (.., distances)} of the set, or of the subsets that the rows of `weights` (.., pieces) count."""
        weights = np.ones(len(self.pieces)) if weights is None else weights
        return {view: curve(np.tensordot(weights, sums, axes=1)) for view, sums in self.sums.items()}

    def means(self, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """{metric: (..)} means over the pieces that have the metric."""
        weights = np.ones(len(self.pieces)) if weights is None else weights
        out = {}
        for name, values in self.values.items():
            known = ~np.isnan(values)
            count = weights[..., known].sum(axis=-1)
            total = weights[..., known] @ values[known]
            out[name] = np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)
        return out

    def numbers(self, base: dict[str, np.ndarray], weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Means, and similarity errors to the curves `base` and peaks of each view, of the set or its subsets."""
        curves = self.curves(weights)
        out = self.means(weights)
        for view in VIEWS:
            out[f"error {view}"] = similarity_error(curves[view], base[view])
            out[f"peaks {view}"] = peaks(curves[view])
        return out


def halves(pieces: int, count: int, seed: int = 0) -> np.ndarray:
    """(count, pieces) of 0 and 1: random halves, rounded down."""
    rng = np.random.default_rng(seed)
    out = np.zeros((count, pieces))
    for row in out:
        row[rng.permutation(pieces)[: pieces // 2]] = 1
    return out


def bands(reference: Measured) -> tuple[dict[str, list[float | None]], dict[str, np.ndarray]]:
    """{metric: [low, high]} and {view: (2, distances)} around the real pieces' own value: how far one random half lies
    from the other, in 95 % of the splits. Errors are of one half against the other: 0 to the 95th percentile.

    Two halves and not a half and the whole, which shares its pieces: generated pieces share none with the real ones.
    """
    chosen = halves(len(reference.pieces), HALVES)
    one, other, whole = (reference.curves(weights) for weights in (chosen, 1 - chosen, None))
    found, complement = reference.numbers(other, chosen), reference.numbers(one, 1 - chosen)
    scalar = {
        name: _plain_list(value + _quantiles(found[name] - complement[name]))
        for name, value in reference.numbers(whole).items()
    }
    for view in VIEWS:  # an error cannot be too small
        scalar[f"error {view}"] = [0.0, _plain(_quantiles(found[f"error {view}"], (0.95,))[0])]
    return scalar, {view: whole[view] + _quantiles(one[view] - other[view]) for view in VIEWS}


def _quantiles(values: np.ndarray, at: Sequence[float] = BAND) -> np.ndarray:
    """Over the first axis, of what is known; NaN where nothing is."""
    known = np.where(np.isnan(values).all(axis=0), 0.0, values)
    return np.where(np.isnan(values).all(axis=0), np.nan, np.nanquantile(known, at, axis=0))


def overlapped_area(one: np.ndarray, other: np.ndarray) -> float | None:
    """Overlap of the Gaussian-kernel densities of the distances inside a set and of those between two sets, 0 to 1.

    Yang and Lerch, On the evaluation of generative models in music, Neural Computing and Applications 32 (2020),
    4773-4784, overlapped area of intra-set and inter-set distances; bandwidth by Scott's rule. None where a set has
    fewer than three values or nothing varies.
    """
    one, other = one[~np.isnan(one)], other[~np.isnan(other)]
    if min(len(one), len(other)) < 3:
        return None
    inside = np.abs(one[:, None] - one)[np.triu_indices(len(one), 1)]
    between = np.abs(one[:, None] - other).reshape(-1)
    if inside.std() == 0 or between.std() == 0:
        return None
    low, high = min(inside.min(), between.min()), max(inside.max(), between.max())
    margin = (high - low) * 0.5
    grid = np.linspace(low - margin, high + margin, 512)
    return float(np.minimum(_density(inside, grid), _density(between, grid)).sum() * (grid[1] - grid[0]))


def _density(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Gaussian kernels at the values, binned to the grid first: the sums of thousands of them are few."""
    width = values.std(ddof=1) * len(values) ** -0.2
    step = grid[1] - grid[0]
    place = np.rint((values - grid[0]) / step).astype(int)
    counts = np.bincount(place, minlength=len(grid))[: len(grid)]
    reach = np.arange(-len(grid) + 1, len(grid)) * step
    kernel = np.exp(-0.5 * (reach / width) ** 2) / (width * np.sqrt(2 * np.pi))
    return np.convolve(counts, kernel, mode="valid")[: len(grid)] / len(values)


CONTROLS: dict[str, Callable[[Bars, Sequence[Bars], np.random.Generator], Bars]] = {
    "shuffled bars": lambda bars, pool, rng: shuffled_bars(bars, rng),
    "bars of other songs": bars_of_others,
    "loop of four bars": lambda bars, pool, rng: loop(bars),
}


def compare(config: EvaluateConfig) -> dict:
    """Measure, print the table, write report.json and report.html; returns what report.json holds."""
    if not Path(config.generated).is_dir():
        raise UserError(f"--generated {config.generated}: no such folder; give one of MIDI files, of shards, or a run")
    output = Path(config.output) if config.output else Path(config.generated)
    if not output.is_dir():
        raise UserError(f"--output {output}: no such folder; make it first, or leave --output out")
    started = time.process_time()
    generated = Measured(load_music(config.generated, "validation", config.max_pieces))
    pieces = load_music(config.reference, "validation", config.max_pieces)
    if len(pieces) < MIN_REFERENCE:
        raise UserError(f"{config.reference}: {len(pieces)} pieces; a noise floor needs at least {MIN_REFERENCE}")
    reference = Measured(pieces)
    first = halves(len(pieces), 1, seed=1)[0] == 1
    real = Measured([p for p, is_first in zip(pieces, first) if is_first])
    other = Measured([p for p, is_first in zip(pieces, first) if not is_first])
    base = real.curves()
    rng = np.random.default_rng(0)
    sets = {"generated": generated, "real": real, "second half": other}
    for name, control in CONTROLS.items():
        sets[name] = Measured([control(bars, pieces, rng) for bars in other.pieces])
    scalar_bands, curve_bands = bands(reference)
    numbers = {name: {key: _plain(x) for key, x in m.numbers(base).items()} for name, m in sets.items()}
    verdicts = {
        name: {key: _verdict(values[key], scalar_bands[key]) for key in (STRUCTURE if name in CONTROLS else values)}
        for name, values in numbers.items()
        if name != "real"
    }
    report = {
        "generated": config.generated,
        "reference": config.reference,
        "pieces": {name: len(m.pieces) for name, m in sets.items()},
        "numbers": numbers,
        "bands": scalar_bands,
        "outside": {name: _keys(found, "outside") for name, found in verdicts.items()},
        "not_measured": {name: _keys(found, "not measured") for name, found in verdicts.items()},
        "curves": {name: {v: _plain_list(c) for v, c in m.curves().items()} for name, m in sets.items()},
        "curve_bands": {view: [_plain_list(row) for row in rows] for view, rows in curve_bands.items()},
        "curve_outside": {
            name: {view: _share_outside(c, curve_bands[view]) for view, c in m.curves().items()}
            for name, m in sets.items()
        },
        "overlapped_area": {
            name: {key: overlapped_area(m.values[key], real.values[key]) for key in m.values}
            for name, m in sets.items()
            if name in ("generated", "second half")
        },
        "distributions": {
            name: {key: _plain_list(values) for key, values in sets[name].values.items()}
            for name in ("generated", "real", "second half")
        },
        "memorisation": _memorisation(config, sets) if config.training else None,
    }
    report["processor_seconds"] = time.process_time() - started
    write_atomic(output / REPORT, json.dumps(report, indent=1, allow_nan=False).encode())
    write_atomic(output / PAGE, html_report(report).encode())
    print(text_report(report))
    print(f"written to {output / REPORT} and {output / PAGE}")
    return report


def _memorisation(config: EvaluateConfig, sets: dict[str, Measured]) -> dict:
    """Copied runs and nearest pieces of the generated and of all held-out pieces."""
    library = Library(music(config.training, "train"))
    if not library.names:
        raise UserError(
            f"{config.training}: holds no piece of music that can be read; --training is what was learnt from"
        )
    found = {"training": config.training, "pieces": len(library.names)}
    held_out = [*sets["real"].pieces, *sets["second half"].pieces]
    for name, pieces in (("generated", sets["generated"].pieces), ("held out", held_out)):
        copies = [library.copies(bars) for bars in pieces]
        nearest = [library.nearest(bars) for bars in pieces]
        entry: dict = {}
        for how in ("tracks", "jointly"):
            total = sum((c[how] for c in copies), Copies(0, 0, 0))
            entry[how] = {**total._asdict(), "rate": total.copied / total.judged if total.judged else None}
        shares = np.array([share for _, share in nearest])
        closest = int(shares.argmax())
        entry["nearest"] = {
            "mean": float(shares.mean()),
            "largest": float(shares[closest]),
            "piece": pieces[closest].name,
            "training_piece": nearest[closest][0],
        }
        longest = int(np.argmax([c["tracks"].longest for c in copies]))
        entry["longest"] = {"piece": pieces[longest].name, "bars": copies[longest]["tracks"].longest}
        entry["by_piece"] = [
            {"piece": p.name, "longest": c["tracks"].longest, "nearest": n, "share": share}
            for p, c, (n, share) in zip(pieces, copies, nearest)
        ]
        found[name] = entry
    return found


def text_report(report: dict) -> str:
    """The table: generated, two halves of real music, the band, the controls; then what was copied."""
    numbers, counts = report["numbers"], report["pieces"]
    shown = ("generated", "real", "second half", *CONTROLS)
    lines = [
        f"{counts['generated']} pieces of {report['generated']} beside {counts['real']} + {counts['second half']} of "
        f"{report['reference']}",
        "",
        f"{'':30}{'generated':>10}{'real':>9}{'2nd half':>9}{'band of real halves':>21}{'shuffled':>10}{'others':>9}"
        f"{'loop':>9}",
    ]
    for key in numbers["generated"]:
        cells = [_cell(numbers[name][key]) for name in shown]
        low, high = report["bands"][key]
        band = f"{_cell(low)} to {_cell(high)}"
        mark = " *" if key in report["outside"]["generated"] else ""
        mark = " ?" if key in report["not_measured"]["generated"] else mark
        lines.append(
            f"{key.replace('_', ' '):30}{cells[0]:>10}{cells[1]:>9}{cells[2]:>9}{band:>21}"
            f"{cells[3]:>10}{cells[4]:>9}{cells[5]:>9}{mark}"
        )
    lines += ["", "* differs from the real pieces by more than 95 % of their random halves differ from each other"]
    if report["not_measured"]["generated"]:
        lines.append("? not measured: too few pieces, here or of the real ones, have it (peaks need 18 bars)")
    for name in CONTROLS:
        if not report["outside"][name]:
            lines.append(f"warning: the control '{name}' passes for music: the reference is too small to tell")
    memory = report["memorisation"]
    if memory:
        lines += ["", f"copied runs of five bars or more, against {memory['pieces']} training pieces"]
        for name in ("generated", "held out"):
            entry = memory[name]
            for how in ("tracks", "jointly"):
                e = entry[how]
                lines.append(
                    f"{name + ', ' + how:30}{e['copied']:6} of {e['judged']:6}, the longest {e['longest']} bars"
                )
            near = entry["nearest"]
            lines.append(
                f"{name + ', nearest piece':30}{near['mean']:7.1%} of the bars on average, at most "
                f"{near['largest']:.1%}: {near['piece']} of {near['training_piece']}"
            )
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _verdict(value: float | None, band: Sequence[float | None]) -> str:
    """ "inside", "outside" or "not measured", where there is no value or no band."""
    if value is None or None in band:
        return "not measured"
    return "inside" if band[0] <= value <= band[1] else "outside"


def _keys(verdicts: dict[str, str], verdict: str) -> list[str]:
    return [key for key, found in verdicts.items() if found == verdict]


def _share_outside(values: np.ndarray, band: np.ndarray) -> float | None:
    """Share of the distances at which a curve leaves the band."""
    known = ~(np.isnan(values) | np.isnan(band).any(axis=0))
    inside = (values[known] >= band[0][known]) & (values[known] <= band[1][known])
    return float(1 - inside.mean()) if known.any() else None


def _plain(value: np.ndarray) -> float | None:
    return None if np.isnan(value) else float(value)


def _plain_list(values: np.ndarray) -> list[float | None]:
    return [_plain(value) for value in values]
