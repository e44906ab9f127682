"""The ablation's results as a table and a picture.

    summarise(results, about, reference)   one dict for each finished run -> {variant: {"mean": .., "difference": ..}}
    show(table)                            text, best first
    picture(table, path)                   PNG

>>> print(show(summarise(results, {"bar_sparse": "the default rule"}, "bar_sparse")))   # doctest: +SKIP

The surprise: a difference is taken seed by seed, on the seeds that both have, so its spread is not that of the values.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from meloformer.evaluation.by_piece import bootstrap_interval


def summarise(results: list[dict], about: dict[str, str], reference_name: str) -> dict[str, dict]:
    """By variant: mean and spread over seeds, and the difference to the reference on the seeds that both have.

    about: what each variant is, in words.
    """
    by_variant: dict[str, dict[int, dict]] = {}
    for result in results:
        by_variant.setdefault(result["variant"], {})[result["seed"]] = result
    reference = by_variant.get(reference_name, {})
    table = {}
    for name, runs in by_variant.items():
        value = {seed: run["test"]["nats_per_note"] for seed, run in runs.items()}
        common = [seed for seed in sorted(value) if seed in reference]
        difference = [value[seed] - reference[seed]["test"]["nats_per_note"] for seed in common]
        sides = [run["sides"] for run in runs.values() if "sides" in run]
        table[name] = {
            "about": about[name],
            "is_reference": name == reference_name,
            "seeds": sorted(value),
            "nats_per_note": [value[seed] for seed in sorted(value)],
            "mean": float(np.mean(list(value.values()))),
            "spread": float(np.std(list(value.values()), ddof=1)) if len(value) > 1 else None,
            "difference": float(np.mean(difference)) if difference else None,
            "difference_spread": float(np.std(difference, ddof=1)) if len(difference) > 1 else None,
            "difference_interval": _over_pieces([(runs[seed], reference[seed]) for seed in common]),
            "parameters": next(iter(runs.values()))["parameters"],
            "processor_seconds": float(np.mean([run["processor_seconds"] for run in runs.values()])),
            "seconds": float(np.mean([run["seconds"] for run in runs.values()])),
            "sides": {side: float(np.mean([s[side] for s in sides])) for side in sides[0]} if sides else None,
        }
    return table


def _over_pieces(pairs: list[tuple[dict, dict]]) -> list[float] | None:
    """95 % bootstrap interval, over the test pieces, of the difference in nats a note; seeds are averaged first."""
    if not pairs:
        return None
    nats = [[np.array(run["test"]["by_piece"]["nats"]) for run in pair] for pair in pairs]
    notes = np.array(pairs[0][0]["test"]["by_piece"]["notes"])  # all read the same pieces
    return bootstrap_interval(np.mean([one - other for one, other in nats], axis=0), notes)


def show(table: dict[str, dict]) -> str:
    """The table as text, best first."""

    def number(value: float | None, form: str = "+.3f") -> str:
        return "" if value is None else format(value, form)

    lines = [
        f"{'variant':22}{'seeds':>6}{'nats a note':>13}{'spread':>9}{'difference':>12}{'spread':>9}{'over pieces':>18}"
        f"{'processor s':>13}"
    ]
    for name, row in sorted(table.items(), key=lambda item: item[1]["mean"]):
        low, high = row["difference_interval"] or (None, None)
        interval = f"{number(low)} to {number(high)}" if low is not None and not row["is_reference"] else ""
        lines.append(
            f"{name:22}{len(row['seeds']):6}{row['mean']:13.3f}{number(row['spread'], '.3f'):>9}"
            f"{number(row['difference']):>12}{number(row['difference_spread'], '.3f'):>9}{interval:>18}"
            f"{row['processor_seconds']:13.0f}  {row['about']}"
        )
        if row["sides"]:
            lines.append("".join(f"      {side.replace('_', ' ')} {value:.3f}" for side, value in row["sides"].items()))
    return "\n".join(lines)


def picture(table: dict[str, dict], path: Path) -> None:
    """A dot for each seed's difference to the default rule, a bar for the mean; best on top."""
    from matplotlib.figure import Figure

    rows = sorted((row["mean"], name) for name, row in table.items() if row["difference"] is not None)
    reference = next(row for row in table.values() if row["is_reference"])
    base = dict(zip(reference["seeds"], reference["nats_per_note"]))
    figure = Figure(figsize=(7, 0.36 * len(rows) + 1.1), layout="constrained")
    axes = figure.subplots()
    for place, (_, name) in enumerate(reversed(rows)):
        row = table[name]
        dots = [value - base[seed] for seed, value in zip(row["seeds"], row["nats_per_note"]) if seed in base]
        axes.barh(place, row["difference"], color="#9ecae1" if row["difference"] >= 0 else "#fdae6b", height=0.6)
        axes.plot(dots, [place] * len(dots), "o", color="#08306b", markersize=4)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [table[name]["about"] for _, name in reversed(rows)])
    axes.set_xlabel("held-out nats a note more (dots: seeds)")
    figure.savefig(path, dpi=110)
