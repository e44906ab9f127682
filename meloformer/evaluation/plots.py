"""A score as a picture: the piano roll, in systems of bars like a page of music.

>>> piano_roll(read_score("song.mid"), "song.png", title="song")   # doctest: +SKIP

In: a Score, raw or quantized. Out: a PNG, whole or absent. Time runs in quarter notes, ruled and numbered by bars; an
instrument has one colour on the whole page, a louder note is more opaque; drums stand in a lane of their own below,
one row a sound. Needs matplotlib.

The surprise: a page holds at most 128 bars, so a longer piece is drawn up to there and the title says so.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from meloformer.errors import UserError
from meloformer.files import write_atomic
from meloformer.midi.general_midi import instrument_name, percussion_name
from meloformer.midi.score import DRUMS, Score, bar_ticks

MAX_BARS = 128
BARS_IN_SYSTEM = 32
PAGE_INCHES = 16.0
INCHES_PER_SEMITONE, INCHES_PER_SOUND = 0.055, 0.13
MIN_PITCHES = 24  # a narrower range would make fat notes
DRUM_QUARTERS = 0.2  # a stroke is drawn this long: what a drum track states as duration says nothing
DPI = 110
FAINTEST = 0.35  # opacity at velocity 0
PALE = 0.3  # of it, for notes that were there before

INK, PAPER, RULE, SHADE = "#2b2d33", "#ffffff", "#d5d8de", "#f4f5f7"
DRUM_COLOUR = "#4a4e57"
# Neighbours differ in hue and lightness; beyond them the colours come round again, darker
COLOURS = (
    "#2f6db5",
    "#e07b28",
    "#2e9e6b",
    "#c8375b",
    "#8a5cc2",
    "#b8a01f",
    "#1fa5b5",
    "#8c5a3c",
    "#e667a4",
    "#6f8f2a",
    "#5566d6",
    "#d9564a",
)


def require_matplotlib() -> None:
    """UserError unless piano rolls can be drawn; asked before hours of work, not after."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UserError("a piano roll needs matplotlib; pip install matplotlib") from None


def piano_roll(score: Score, path: str | Path, title: str = "", new: np.ndarray | None = None) -> None:
    """Draw `score` to a PNG at `path`; UserError without matplotlib.

    new: (notes,) bool, the notes to show in colour; the others are pale. Default: all.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars, total = _bar_starts(score)
    in_system = _bars_in_system(len(bars) - 1)
    systems = [bars[i : i + in_system + 1] for i in range(0, len(bars) - 1, in_system)]
    instruments = score.instruments[score.notes["track"]] if score.num_notes else np.zeros(0, dtype=np.int32)
    shown = score.notes["onset"] < bars[-1]
    new = np.ones(score.num_notes, dtype=bool) if new is None else new
    is_melodic, is_drum = shown & (instruments != DRUMS), shown & (instruments == DRUMS)
    melodic, drums = score.notes[is_melodic], score.notes[is_drum]
    colours = _colours(score)

    low, high = _pitch_range(melodic["pitch"])
    sounds = np.unique(drums["pitch"])
    heights = []  # of the rows of the page, in inches: a roll and a lane of drums for each system
    for _ in systems:
        heights.append(max((high - low) * INCHES_PER_SEMITONE, 1.3))
        heights.append(max(len(sounds) * INCHES_PER_SOUND, 0.2) if len(sounds) else 0.0)
    legend_columns = 5
    legend_rows = -(-len(colours) // legend_columns)
    top, bottom, gap = 0.75 + 0.24 * legend_rows, 0.35, 0.42
    page = top + bottom + sum(heights) + gap * (len(systems) - 1)
    figure = Figure(figsize=(PAGE_INCHES, page), dpi=DPI, facecolor=PAPER)
    canvas = FigureCanvasAgg(figure)
    left, right = (1.25 if len(sounds) else 0.6) / PAGE_INCHES, 1 - 0.25 / PAGE_INCHES

    quarters = score.ticks_per_quarter
    widest = max(system[-1] - system[0] for system in systems) / quarters
    edge = page - top
    for i, system in enumerate(systems):
        width = (right - left) * ((system[-1] - system[0]) / quarters) / widest
        roll_height, lane_height = heights[2 * i], heights[2 * i + 1]
        roll = figure.add_axes((left, (edge - roll_height) / page, width, roll_height / page))
        _draw_roll(roll, score, melodic, new[is_melodic], system, (low, high), colours)
        axes = [roll]
        if lane_height:
            lane_at = edge - roll_height - lane_height
            axes.append(figure.add_axes((left, lane_at / page, width, lane_height / page)))
            _draw_lane(axes[1], score, drums, new[is_drum], system, sounds, colours)
        for ax in axes:
            _rule(ax, system, quarters)
        _number_bars(axes[0], score, system, 1 + i * in_system)
        edge -= roll_height + lane_height + gap

    _head(figure, score, title, len(bars) - 1, total, page)
    _legend(figure, score, colours, legend_columns, page)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    write_atomic(path, buffer.getvalue())


def _bar_starts(score: Score) -> tuple[np.ndarray, int]:
    """(bars + 1,) ticks of the bar lines to draw, at most MAX_BARS bars, and how many bars there are in all.

    In a raw score a meter may change anywhere; the bar is drawn cut short there, as quantising would have it.
    """
    if score.num_bars:
        lines = score.bar_lines()
        return lines[: MAX_BARS + 1], score.num_bars
    ends = np.append(score.meters["tick"][1:], max(score.end_tick, int(score.meters["tick"][-1]) + 1))
    lines, total = [], 0
    for (tick, numerator, denominator), end in zip(score.meters.tolist(), ends.tolist()):
        length = max(bar_ticks(numerator, denominator, score.ticks_per_quarter), 1)
        bars = -(-(min(end, score.end_tick) - tick) // length)
        if bars <= 0 and total:
            continue
        bars = max(bars, 1)
        lines.extend(tick + length * i for i in range(min(bars, MAX_BARS + 1 - len(lines))))
        total += bars
        last = tick + length * bars
    return np.array([*lines, last][: MAX_BARS + 1], dtype=np.int64), total


def _bars_in_system(bars: int) -> int:
    """Bars on one line, a multiple of four, so that the lines of a page are about equally long."""
    lines = -(-bars // BARS_IN_SYSTEM)
    return -(-bars // (4 * lines)) * 4 if lines > 1 else bars


def _colours(score: Score) -> dict[int, tuple[float, float, float]]:
    """A colour for each instrument that sounds, in the order of the score, drums last."""
    from matplotlib.colors import to_rgb

    sounding = np.unique(score.notes["track"])
    order = list(dict.fromkeys(int(score.instruments[track]) for track in sounding))
    colours = {}
    for i, instrument in enumerate(instrument for instrument in order if instrument != DRUMS):
        shade = 0.72 ** (i // len(COLOURS))
        colours[instrument] = tuple(shade * channel for channel in to_rgb(COLOURS[i % len(COLOURS)]))
    if DRUMS in order:
        colours[DRUMS] = to_rgb(DRUM_COLOUR)
    return colours


def _pitch_range(pitches: np.ndarray) -> tuple[int, int]:
    """Lowest and highest row of the roll, exclusive above, with a little air."""
    if not len(pitches):
        return 60 - MIN_PITCHES // 2, 60 + MIN_PITCHES // 2
    low, high = int(pitches.min()) - 2, int(pitches.max()) + 3
    spare = max(MIN_PITCHES - (high - low), 0)
    return max(low - spare // 2, 0), min(high + spare - spare // 2, 128)


def _rectangles(ax, left, right, bottom, height, colours) -> None:
    """Draw n rectangles at once: edges are (n,) arrays, colours (n, 4)."""
    from matplotlib.collections import PolyCollection

    top = bottom + height
    corners = np.stack(
        [np.stack([left, right, right, left], axis=1), np.stack([bottom, bottom, top, top], axis=1)], axis=2
    )
    ax.add_collection(PolyCollection(corners, facecolors=colours, linewidths=0, zorder=3), autolim=False)


def _opaque(rgb: np.ndarray, velocities: np.ndarray, new: np.ndarray) -> np.ndarray:
    """(n, 3) colours with the opacity of their velocities, (n, 4); those that are not new are pale."""
    alpha = FAINTEST + (1 - FAINTEST) * velocities[:, None] / 127
    alpha = np.where(new[:, None], alpha, PALE * alpha)
    return np.concatenate([rgb, alpha], axis=1)


def _draw_roll(
    ax, score: Score, notes: np.ndarray, new: np.ndarray, system: np.ndarray, pitches: tuple[int, int], colours
) -> None:
    low, high = pitches
    starts, ends = notes["onset"], notes["onset"] + notes["duration"]
    inside = np.flatnonzero((starts < system[-1]) & (ends > system[0]))
    inside = inside[np.argsort(-notes["duration"][inside], kind="stable")]  # short notes in front of held ones
    here = notes[inside]
    if len(here):
        left = np.maximum(here["onset"], system[0]) / score.ticks_per_quarter
        right = np.minimum(here["onset"] + here["duration"], system[-1]) / score.ticks_per_quarter
        rgb = np.array([colours[int(instrument)] for instrument in score.instruments[here["track"]]])
        air = np.minimum(0.04, (right - left) * 0.15)  # so that repeated notes do not run together
        bottom = here["pitch"].astype(float) + 0.05
        _rectangles(ax, left, right - air, bottom, 0.9, _opaque(rgb, here["velocity"], new[inside]))
    ax.set_ylim(low, high)
    octaves = [octave for octave in range(0, 128, 12) if low < octave < high]
    ax.set_yticks([octave + 0.5 for octave in octaves], [f"C{octave // 12 - 1}" for octave in octaves])
    for octave in octaves:
        ax.axhline(octave, color=RULE, linewidth=0.6, zorder=1)


def _draw_lane(
    ax, score: Score, notes: np.ndarray, new: np.ndarray, system: np.ndarray, sounds: np.ndarray, colours
) -> None:
    inside = (notes["onset"] >= system[0]) & (notes["onset"] < system[-1])
    here = notes[inside]
    if len(here):
        left = here["onset"] / score.ticks_per_quarter
        row = np.searchsorted(sounds, here["pitch"]).astype(float)
        rgb = np.tile(colours[DRUMS], (len(here), 1))
        _rectangles(ax, left, left + DRUM_QUARTERS, row + 0.14, 0.72, _opaque(rgb, here["velocity"], new[inside]))
    ax.set_ylim(0, len(sounds))
    ax.set_yticks(np.arange(len(sounds)) + 0.5, [percussion_name(int(pitch)) for pitch in sounds])
    ax.set_facecolor(SHADE)


def _rule(ax, system: np.ndarray, quarters: int) -> None:
    """Bar lines, frame and ticks of one row."""
    ax.set_xlim(system[0] / quarters, system[-1] / quarters)
    for i, tick in enumerate(system):
        heavy = i % 4 == 0
        ax.axvline(tick / quarters, color="#aab0ba" if heavy else RULE, linewidth=0.9 if heavy else 0.6, zorder=2)
    ax.set_xticks([])
    ax.tick_params(axis="y", length=0, labelsize=7, labelcolor=INK, pad=3)
    for spine in ax.spines.values():
        spine.set_color("#aab0ba")
        spine.set_linewidth(0.8)


def _number_bars(ax, score: Score, system: np.ndarray, first: int) -> None:
    """Bar numbers above the system, every bar or every fourth, and the meter where it changes."""
    quarters = score.ticks_per_quarter
    step = 1 if len(system) - 1 <= 16 else 4
    place = ax.get_xaxis_transform()
    for i, tick in enumerate(system[:-1]):
        text = str(first + i) if i % step == 0 else ""
        (at,) = np.nonzero(score.meters["tick"] == tick)
        if len(at):
            _, numerator, denominator = score.meters[at[0]]
            previous = score.meters[at[0] - 1].tolist()[1:] if at[0] else None
            if previous != [numerator, denominator]:
                text = f"{first + i}   {numerator}/{denominator}"
        if text:
            ax.text(tick / quarters, 1.0, f" {text}", transform=place, fontsize=7.5, color=INK, va="bottom", ha="left")


def _head(figure, score: Score, title: str, shown: int, total: int, page: float) -> None:
    tempos = score.tempos["qpm"]
    speed = f"{tempos[0]:.0f}" if np.ptp(tempos) < 1 else f"{tempos.min():.0f}-{tempos.max():.0f}"
    bars = f"bars: {total}" if shown == total else f"bars: 1-{shown} of {total:,}"
    facts = f"{bars}  ·  quarters a minute: {speed}  ·  notes: {score.num_notes:,}"
    left = 0.25 / PAGE_INCHES
    # a file may be called "cash_$_and_$", which is no formula
    figure.text(left, 1 - 0.18 / page, title, fontsize=13, weight="bold", color=INK, va="top", parse_math=False)
    figure.text(1 - left, 1 - 0.22 / page, facts, fontsize=9, color=INK, va="top", ha="right")


def _legend(figure, score: Score, colours, columns: int, page: float) -> None:
    from matplotlib.patches import Patch

    if not colours:
        return
    tracks = [int(score.instruments[track]) for track in np.unique(score.notes["track"])]
    labels = []
    for instrument in colours:
        several = tracks.count(instrument)
        labels.append(instrument_name(instrument) + (f" ({several} tracks)" if several > 1 else ""))
    figure.legend(
        [Patch(facecolor=colour) for colour in colours.values()],
        labels,
        loc="upper left",
        bbox_to_anchor=(0.12 / PAGE_INCHES, 1 - 0.4 / page),
        ncols=columns,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.1,
        handleheight=0.8,
        columnspacing=1.6,
        borderaxespad=0.2,
    )
