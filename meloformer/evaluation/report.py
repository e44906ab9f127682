"""report.json as one page that needs nothing else: tables, similarity curves and distributions as inline SVG.

`html_report(report)` takes what `evaluation.compare` writes to report.json and returns a str.

>>> "<svg" in line_chart("title", {"generated": [1.0, 0.5, None]}, None)
True

What surprises: the plots are written by hand, for a page of forty lines and bars needs no plotting library, and so the
report is there without matplotlib too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from meloformer.evaluation.similarity import VIEWS

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 28, 30
BINS = 24
# colour, width, dashes
STYLES = {
    "generated": ("#c8375b", 2.4, ""),
    "real": ("#2f6db5", 1.8, ""),
    "second half": ("#2e9e6b", 1.4, ""),
    "shuffled bars": ("#8b9098", 1.1, "5 3"),
    "bars of other songs": ("#8a5cc2", 1.1, "2 3"),
    "loop of four bars": ("#b8a01f", 1.1, "8 3"),
}
VIEW_NAMES = {"pitched": "pitched tracks together", "drums": "drums", "tracks": "single tracks"}
HALVES = (
    "<p>The reference is cut at random into two halves. <b>real</b> is the one that everything is compared with; "
    "<b>second half</b> is real music compared with it in the same way, and so shows how far apart music of one kind "
    "lies. The last columns are controls, the second half spoilt on purpose, and have to be further away.</p>"
)
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #2b2d33; background: #fff; margin: 2rem auto; max-width: 1180px;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
p, ul { max-width: 56rem; margin: .4rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #e3e5e9; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td.outside { color: #b3203f; font-weight: 600; } td.inside { color: #1d7a50; } td.not { color: #70757d; }
.plots { display: flex; flex-wrap: wrap; gap: .8rem 1.2rem; }
svg { font: 11px system-ui, sans-serif; max-width: 100%; height: auto; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: 13px; margin: .4rem 0; }
"""


def html_report(report: Mapping) -> str:
    """The page."""
    counts = report["pieces"]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>Generated beside real music</title><style>{STYLE}</style></head><body>",
        "<h1>Generated beside real music</h1>",
        f"<p>{counts['generated']} pieces of <b>{escape(report['generated'])}</b> beside two halves, {counts['real']} "
        f"and {counts['second half']} pieces, of <b>{escape(report['reference'])}</b>. Closer to real music is better, "
        "not higher. A figure is inside where it differs from the real pieces by no more than 95 % of their random "
        "halves differ from each other; it is not measured where too few pieces on either side have it, such as peaks, "
        "which need 18 bars.</p>",
        "<h2>How much a piece is like itself, so many bars later</h2>",
        _legend(STYLES),
        "<p>The grey band is how far random halves of the real pieces lie from each other. Peaks at multiples of four "
        "are phrases.</p>",
        "<div class='plots'>",
    ]
    for view in VIEWS:
        curves = {name: report["curves"][name][view] for name in STYLES}
        parts.append(line_chart(f"similarity, {VIEW_NAMES[view]}", curves, report["curve_bands"][view]))
    parts += ["</div>", "<h2>All figures</h2>", HALVES, _numbers(report), _verdicts(report)]
    if report["memorisation"]:
        parts += ["<h2>Copies of the training music</h2>", _memory(report["memorisation"])]
    parts += [
        "<h2>Distributions over pieces</h2>",
        _legend(("generated", "real", "second half")),
        "<div class='plots'>",
    ]
    for key in report["distributions"]["generated"]:
        values = {name: report["distributions"][name][key] for name in ("real", "second half", "generated")}
        areas = [_number(report["overlapped_area"][name][key]) or "unknown" for name in ("generated", "second half")]
        parts.append(histogram(f"{_words(key)}; overlapped area {areas[0]}, second half {areas[1]}", values))
    parts.append("</div></body></html>")
    return "\n".join(parts)


# --- tables -----------------------------------------------------------------------------------------------------


def _numbers(report: Mapping) -> str:
    heads = ["", "generated", "is", "real", "second half", "band of real halves", *list(STYLES)[3:]]
    html = ["<div class='scroll'><table><thead><tr>", *(f"<th>{escape(head)}</th>" for head in heads), "</tr></thead>"]
    for key in report["numbers"]["generated"]:
        low, high = report["bands"][key]
        verdict = "outside" if key in report["outside"]["generated"] else "inside"
        verdict = "not measured" if key in report["not_measured"]["generated"] else verdict
        band = f"{_number(low)} to {_number(high)}" if low is not None and high is not None else "unknown"
        cells = {name: f"<td>{_number(report['numbers'][name][key])}</td>" for name in STYLES}
        cells["generated"] += f"<td class='{verdict.split()[0]}'>{verdict}</td>"
        cells["second half"] += f"<td>{band}</td>"
        html.append(f"<tr><td>{escape(_words(key))}</td>{''.join(cells.values())}</tr>")
    return "".join(html) + "</table></div>"


def _verdicts(report: Mapping) -> str:
    """What each control failed; a control that passes says that the reference is too small."""
    lines = []
    for name, outside in report["outside"].items():
        if name in ("generated", "second half"):
            continue
        text = (
            f"fails, as it should: {', '.join(map(_words, outside))}"
            if outside
            else "passes: the reference is too small"
        )
        lines.append(f"<li>control, {escape(name)}: {escape(text)}</li>")
    return f"<ul>{''.join(lines)}</ul>"


def _memory(memory: Mapping) -> str:
    """Copied runs, and the pieces with most of them."""
    html = [
        f"<p>Runs of five bars or more that are in the {memory['pieces']:,} training pieces of "
        f"<b>{escape(memory['training'])}</b> too, in any key. Held-out real music is the measure: songs quote each "
        "other.</p><div class='scroll'><table><thead><tr><th></th><th>tracks with a copied run</th><th>of</th>"
        "<th>longest, bars</th><th>pieces, jointly</th><th>of</th><th>longest, bars</th>"
        "<th>nearest piece: mean share of bars</th><th>largest</th></tr></thead>"
    ]
    for name in ("generated", "held out"):
        entry = memory[name]
        cells = [f"{entry[how][what]}" for how in ("tracks", "jointly") for what in ("copied", "judged", "longest")]
        cells += [f"{entry['nearest'][what]:.1%}" for what in ("mean", "largest")]
        html.append(f"<tr><td>{name}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    html.append("</table></div><p>The generated pieces nearest to a training piece:</p><div class='scroll'><table>")
    html.append(
        "<thead><tr><th>piece</th><th>training piece</th><th>share of its bars</th><th>longest run</th></tr></thead>"
    )
    for row in sorted(memory["generated"]["by_piece"], key=lambda row: -row["share"])[:10]:
        html.append(
            f"<tr><td>{escape(row['piece'])}</td><td>{escape(row['nearest'])}</td><td>{row['share']:.1%}</td>"
            f"<td>{row['longest']}</td></tr>"
        )
    return "".join(html) + "</table></div>"


def _words(key: str) -> str:
    """ "polyphony tracks" -> "polyphony, track by track"."""
    name, _, scope = key.replace("_", " ").rpartition(" ")
    if scope in ("all", "tracks") and not name.startswith(("error", "peaks")):
        return name if scope == "all" else f"{name}, track by track"
    if scope in VIEW_NAMES:
        word = {"error": "similarity error, %", "peaks": "similarity peaks, %"}[name]
        return f"{word}, {VIEW_NAMES[scope]}"
    return key.replace("_", " ")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _legend(names) -> str:
    items = []
    for name in names:
        colour, width, dashes = STYLES[name]
        line = (
            f"<line x1='0' y1='6' x2='26' y2='6' stroke='{colour}' stroke-width='{width}' stroke-dasharray='{dashes}'/>"
        )
        items.append(f"<span><svg width='28' height='12'>{line}</svg> {escape(name)}</span>")
    return f"<div class='legend'>{''.join(items)}</div>"


# --- plots ------------------------------------------------------------------------------------------------------


def line_chart(title: str, curves: Mapping[str, Sequence], band: Sequence[Sequence] | None) -> str:
    """Curves over 1, 2, 3, .. with a band behind them; None is a gap."""
    # A loop is at 1 wherever it comes round, and would press the others flat: it may leave the picture.
    shown = [values for name, values in curves.items() if not name.startswith("loop")]
    known = [v for values in [*shown, *(band or [])] for v in values if v is not None]
    length = max((len(values) for values in curves.values()), default=1)
    x = _Axis(1, max(length, 2), LEFT, WIDTH - RIGHT)
    y = _Axis(0, _ceiling(max(known, default=1.0)), HEIGHT - BOTTOM, TOP)
    inside = f"<rect x='{LEFT}' y='{TOP}' width='{WIDTH - RIGHT - LEFT}' height='{HEIGHT - BOTTOM - TOP}'/>"
    clip = "".join(letter if letter.isalnum() else "-" for letter in title)
    parts = [f"<clipPath id='{clip}'>{inside}</clipPath>", *_frame(title, y)]
    for tick in range(4, length + 1, 4):
        parts.append(
            f"<line x1='{x(tick):.1f}' x2='{x(tick):.1f}' y1='{TOP}' y2='{HEIGHT - BOTTOM}' stroke='#eceef1'/>"
        )
        parts.append(f"<text x='{x(tick):.1f}' y='{HEIGHT - BOTTOM + 14}' text-anchor='middle'>{tick}</text>")
    parts.append(f"<text x='{WIDTH - RIGHT}' y='{HEIGHT - 3}' text-anchor='end'>bars apart</text>")
    if band:
        pairs = [(i + 1, low, high) for i, (low, high) in enumerate(zip(*band)) if low is not None and high is not None]
        edge = [f"{x(t):.1f},{y(high):.1f}" for t, _, high in pairs]
        edge += [f"{x(t):.1f},{y(low):.1f}" for t, low, _ in reversed(pairs)]
        parts.append(f"<polygon points='{' '.join(edge)}' fill='#d5d8de' opacity='.7'/>")
    for name in reversed(list(curves)):  # the first one in front
        colour, width, dashes = STYLES[name]
        path, pen = [], "M"
        for i, value in enumerate(curves[name]):
            if value is not None:
                path.append(f"{pen}{x(i + 1):.1f} {y(value):.1f}")
            pen = "M" if value is None else "L"
        parts.append(
            f"<path d='{' '.join(path)}' fill='none' stroke='{colour}' stroke-width='{width}' "
            f"stroke-dasharray='{dashes}' clip-path='url(#{clip})'><title>{escape(name)}</title></path>"
        )
    return _svg(parts)


def histogram(title: str, values: Mapping[str, Sequence]) -> str:
    """Shares of the pieces in equal bins, one outline for each set; NaN and None are left out."""
    sets = {name: np.array([v for v in found if v is not None], dtype=float) for name, found in values.items()}
    everything = np.concatenate(list(sets.values()))
    if not len(everything):
        return ""
    low, high = (float(q) for q in np.quantile(everything, [0.005, 0.995]))
    if not high > low:  # all the same; a rate has no negative half
        low = max(low - 0.5, 0.0) if low >= 0 else low - 0.5
        high = low + 1
    edges = np.linspace(low, high, BINS + 1)
    shares = {
        name: np.histogram(np.clip(found, low, high), edges)[0] / max(len(found), 1) for name, found in sets.items()
    }
    x = _Axis(low, high, LEFT, WIDTH - RIGHT)
    y = _Axis(0, _ceiling(max(float(share.max()) for share in shares.values())), HEIGHT - BOTTOM, TOP)
    parts = _frame(title, y, percent=True)
    step = _step((high - low) / 5)
    for tick in np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step:
        parts.append(f"<text x='{x(tick):.1f}' y='{HEIGHT - BOTTOM + 14}' text-anchor='middle'>{tick:.3g}</text>")
    for name, share in shares.items():
        colour, width, _ = STYLES[name]
        points = [f"{x(low):.1f},{y(0):.1f}"]
        for left, right, height in zip(edges, edges[1:], share):
            points += [f"{x(left):.1f},{y(height):.1f}", f"{x(right):.1f},{y(height):.1f}"]
        points.append(f"{x(high):.1f},{y(0):.1f}")
        parts.append(
            f"<polyline points='{' '.join(points)}' fill='{colour}' fill-opacity='.10' stroke='{colour}' "
            f"stroke-width='{width}'><title>{escape(name)}</title></polyline>"
        )
    return _svg(parts)


class _Axis:
    """Values low .. high to pixels start .. end."""

    def __init__(self, low: float, high: float, start: float, end: float):
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)


def _step(least: float) -> float:
    """The next round number from `least` on, for ticks so far apart.

    >>> _step(0.093), _step(7)
    (0.1, 8.0)
    """
    if not least > 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(least))
    quarters = (2.5,) if unit >= 0.1 else ()  # a quarter, but not 2.5 %, which would be shown as 2 %
    multiples = sorted((1, 2, *quarters, 3, 4, 5, 6, 8, 10))
    return next(round(m * unit, 12) for m in multiples if m * unit >= least * (1 - 1e-9))


def _ceiling(value: float) -> float:
    """Four round steps that reach `value`."""
    return 4 * _step(value / 4)


def _frame(title: str, y: _Axis, percent: bool = False) -> list[str]:
    parts = [f"<text x='{LEFT}' y='16' font-weight='600'>{escape(title)}</text>"]
    for i in range(5):
        value = y.low + (y.high - y.low) * i / 4
        label = f"{value:.0%}" if percent else f"{value:.2f}"
        parts.append(
            f"<line x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y(value):.1f}' y2='{y(value):.1f}' stroke='#e3e5e9'/>"
        )
        parts.append(f"<text x='{LEFT - 6}' y='{y(value) + 4:.1f}' text-anchor='end'>{label}</text>")
    return parts


def _svg(parts: Sequence[str]) -> str:
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' height='{HEIGHT}' role='img'>{''.join(parts)}</svg>"
