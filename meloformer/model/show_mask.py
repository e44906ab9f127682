"""Draw what sees what in a piece: `python -m meloformer.model.show_mask file.mid --output mask.png`.

Left: its first bars in stream order, pair by pair, summaries in front, each quadrant in its colours, tracks and bars
ruled. Right: the blocks of the whole piece in the order in which tokens stand in memory, and the share of them that
the kernel visits, relative to causal attention.

    draw_mask(tokens, vocabulary, path, title="", bars=4, config=ModelConfig(size="small"))

The surprise: the left picture is made by the element rule on the tokens of those bars, the right one by counts alone.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from meloformer.command_line import Parser
from meloformer.config import ModelConfig
from meloformer.errors import UserError, exit_cleanly
from meloformer.files import write_atomic
from meloformer.hid import Tokenizer, Vocabulary
from meloformer.hid.rows import make_row
from meloformer.midi import read_score
from meloformer.midi.general_midi import instrument_name
from meloformer.model.attention import BLOCK_SIZE
from meloformer.model.block_table import KEY_ORDER, count_blocks, order_of
from meloformer.model.masks import GLOBAL, SUMMARY, AttentionRule, joint_fields

MAX_TOKENS = 3000  # of the left picture
COLOURS = {
    "SS  a summary sees earlier summaries": "#5b3f8c",
    "SR  a summary reads its own bar": "#d1495b",
    "RS  a note sees bars that have ended": "#9a86c9",
    "RR  its own instrument": "#1f6f8b",
    "RR  other instruments, near bars": "#66b7c4",
    "RR  meter, tempo, instrument names": "#edae49",
}


def draw_mask(
    tokens: np.ndarray,
    vocabulary: Vocabulary,
    path: str | Path,
    title: str = "",
    bars: int = 4,
    config: ModelConfig | None = None,
) -> float:
    """Write the PNG; returns the share of causal attention's 128 x 128 blocks that is visited."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise UserError("the picture needs matplotlib; pip install matplotlib") from None
    rule = AttentionRule(config or ModelConfig(size="small"))
    row = make_row([tokens], vocabulary)
    figure = Figure(figsize=(11.5, 6.1), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.06})
    figure.subplots_adjust(left=0.12, right=0.985, top=0.87, bottom=0.17)
    _draw_elements(left, rule, row, bars)
    share = _draw_blocks(right, rule, row)
    figure.suptitle(title, x=0.12, y=0.975, ha="left", fontsize=13, fontweight="bold", parse_math=False)
    patches = [Patch(color=colour, label=label) for label, colour in COLOURS.items()]
    place = {"loc": "lower left", "bbox_to_anchor": (0.11, 0.02), "ncols": 3, "columnspacing": 1.5}
    figure.legend(handles=patches, frameon=False, fontsize=9, **place)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", pil_kwargs={"optimize": True})
    write_atomic(path, buffer.getvalue())
    return share


def _draw_elements(ax, rule: AttentionRule, row: dict[str, np.ndarray], bars: int) -> None:
    """The pairs of the first bars; a row of the picture is a query, a column a key."""
    fields = joint_fields(row, rule.summaries)
    m = len(fields.document) - len(row["tokens"])
    while True:
        shown = (fields.document >= 0) & (fields.bar < bars)
        if int(shown.sum()) <= MAX_TOKENS or bars == 1:
            break
        bars -= 1
    f = fields.at(shown.nonzero()[:, 0])
    num_summaries = int(shown[:m].sum())
    seen = rule(f.queries(), f.keys()).numpy()
    is_summary, instrument = (f.kind == SUMMARY).numpy(), f.instrument.numpy()
    which = np.where(instrument[:, None] == instrument[None], 3, 4)
    which[:, f.kind.numpy() == GLOBAL] = 5
    which[:, is_summary] = 2
    which[is_summary] = 1
    which[np.ix_(is_summary, is_summary)] = 0
    palette = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in COLOURS.values()], dtype=np.uint8)
    image = np.where(seen[..., None], palette[which], np.uint8(255))
    ax.imshow(image, interpolation="nearest" if len(f.document) < 700 else "antialiased")
    # Rules: bars thin, tracks thick, and the edge of the summaries.
    track = np.r_[row["segment_track"][:m], row["track"]][shown.numpy()]
    bar = f.bar.numpy()
    regular = np.arange(len(track)) >= num_summaries
    change = np.flatnonzero(np.diff(track[regular], prepend=-2)) + num_summaries
    bar_change = np.flatnonzero((np.diff(bar, prepend=-2) != 0) & regular & (track >= 0) & (bar >= 0))
    for draw in (ax.axhline, ax.axvline):
        for at in bar_change:
            draw(at - 0.5, color="#000000", linewidth=0.25, alpha=0.18)
        for at in change:
            draw(at - 0.5, color="#000000", linewidth=0.5, alpha=0.55)
        if num_summaries:
            draw(num_summaries - 0.5, color="#000000", linewidth=1.2)
    ends = np.r_[change[1:], len(track)]
    labels = [(at, end, _name(instrument[at], track[at])) for at, end in zip(change, ends)]
    labels = [(0, num_summaries, "summaries")] * (num_summaries > 0) + labels
    labels = [label for label in labels if label[1] - label[0] > len(track) / 60]
    ax.set_yticks([(at + end - 1) / 2 for at, end, _ in labels], [name for *_, name in labels], fontsize=8)
    ax.set_xticks([])
    ax.set_xlabel("each row is a token, its colours are what it sees", fontsize=9)
    ax.tick_params(length=0)
    ax.set_title(f"Pair by pair: the first {bars} bars, {regular.sum()} tokens as written", fontsize=10)


def _name(instrument: int, track: int) -> str:
    if track < 0:
        return "meter, tempo"
    name = instrument_name(int(instrument))
    return name if len(name) <= 18 else f"{name[:17]}."


def _draw_blocks(ax, rule: AttentionRule, row: dict[str, np.ndarray]) -> float:
    fields = joint_fields(row, rule.summaries)
    m, size = len(fields.document) - len(row["tokens"]), BLOCK_SIZE
    order = order_of(fields, m)
    key_place = np.argsort(order_of(fields, m, KEY_ORDER))[order]
    counts = count_blocks(rule, fields.at(torch.from_numpy(order)), m, size, key_place=key_place).numpy()
    blocks = -(-len(row["tokens"]) // 128)
    share = float((counts > 0).sum() * size[0] * size[1] / 128**2 / (blocks * (blocks + 1) / 2))
    image = np.full((*counts.shape, 3), 255, dtype=np.uint8)
    image[counts > 0] = (0x9C, 0xC9, 0xD1)
    image[counts == size[0] * size[1]] = (0x1F, 0x6F, 0x8B)
    ax.imshow(image, interpolation="nearest" if len(counts) > 40 else "none")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(f"Blocks: all {len(row['tokens']):,} tokens, {share:.2f} of causal attention visited", fontsize=10)
    about = f"sorted by kind, in blocks of {size[0]} x {size[1]}: white is skipped, dark is full"
    ax.set_xlabel(about, fontsize=9)
    return share


def main() -> None:
    parser = Parser(
        prog="python -m meloformer.model.show_mask", description="Draw what sees what in a piece, and its blocks."
    )
    parser.add_argument("midi", help="a MIDI file")
    parser.add_argument("--output", default="mask.png", help="the picture (mask.png)")
    parser.add_argument("--bars", type=int, default=4, help="bars of the pair by pair picture (4)")
    arguments = parser.parse_args()
    if arguments.bars < 1:
        raise UserError(f"--bars is {arguments.bars}, must be at least 1")
    tokenizer, path = Tokenizer(), Path(arguments.midi)
    tokens = tokenizer.encode(read_score(path))
    share = draw_mask(tokens, tokenizer.vocabulary, arguments.output, f"What sees what in {path.stem}", arguments.bars)
    print(f"{arguments.output}: {len(tokens)} tokens, {share:.3f} of causal attention's blocks visited")


if __name__ == "__main__":
    exit_cleanly(main)
