"""Blocks of the attention matrix visited, relative to those of causal attention inside each piece, by physical order.

    python -m benchmarks.blocks --data_dir processed/ --lengths 2048,8192,24576 --rows 6

Prints a table for packed rows as training draws them (some bars deferred), one for packed rows with nothing deferred
and one for rows of a single piece (not cut, nothing deferred): each line an order of the tokens in memory, each column
a block size, each number the area of the visited blocks, summaries included, over that of the baseline's own 128 x 128
blocks. The last lines keep keys in another order than queries, or see fewer bars.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks import whole_numbers
from benchmarks.rows import packed_rows
from meloformer.command_line import Parser
from meloformer.config import ModelConfig
from meloformer.errors import exit_cleanly
from meloformer.model.block_table import KEY_ORDER, QUERY_ORDER, count_blocks, order_of
from meloformer.model.masks import AttentionRule, joint_fields

BLOCK_SIZES = ((128, 128), (128, 64), (64, 64), (64, 32), (32, 32))
ORDERS = {
    "stream order": "S GOTPLV",
    "G O T P L V": "S G O T P L V",
    "GO T P L V": "S GO T P L V",
    "G O TP L V": "S G O TP L V",
    "G O TV P L": "S G O TV P L",
}


def baseline_blocks(row: dict[str, np.ndarray]) -> int:
    """128 x 128 blocks that hold a pair of causal attention inside each piece, in stream order."""
    fields = joint_fields(row, summaries=False)
    rule = AttentionRule(ModelConfig(size="small", pattern="full_causal"))
    return int((count_blocks(rule, fields, 0, (128, 128)) > 0).sum())


def visited(rule: AttentionRule, row: dict[str, np.ndarray], block_size, queries: str, keys: str, cut: bool) -> float:
    """Area of the blocks with something to compute, in blocks of 128 x 128; `cut`: parts are cut for these blocks."""
    fields = joint_fields(row, rule.summaries)
    m = len(fields.document) - len(row["tokens"])
    order = order_of(fields, m, queries, cut * block_size[0])
    key_place = np.argsort(order_of(fields, m, keys, cut * block_size[1]))[order]
    counts = count_blocks(rule, fields.at(torch.from_numpy(order)), m, block_size, key_place=key_place)
    return int((counts > 0).sum()) * block_size[0] * block_size[1] / 128**2


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="folder that preprocess_data.py wrote")
    parser.add_argument("--lengths", default="2048,8192,24576", type=whole_numbers, help="tokens in a row")
    parser.add_argument("--rows", type=int, default=6, help="rows of each length")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    default = AttentionRule(ModelConfig(size="small"))
    near_linear = [0, 1, 2, *range(4, 2048, 4)]
    without = AttentionRule(ModelConfig(size="small", summaries=False))
    fewer_bars = AttentionRule(ModelConfig(size="small", same_bar_offsets=near_linear))
    variants = [(name, default, kinds, kinds, False) for name, kinds in ORDERS.items()]
    variants += [
        ("queries G O TV P L, keys G O TP L V", default, QUERY_ORDER, KEY_ORDER, False),
        ("the same, parts cut for the blocks: used", default, QUERY_ORDER, KEY_ORDER, True),
        ("the same without summaries", without, QUERY_ORDER, KEY_ORDER, True),
        ("the same, same_bar_offsets 0,1,2,4,8,12..", fewer_bars, QUERY_ORDER, KEY_ORDER, True),
    ]
    for length in arguments.lengths:
        for title, choice in (
            ("packed, bars deferred as in training", {}),
            ("packed, nothing deferred", {"deferred": False}),
            ("one piece each, nothing deferred", {"single_piece": True}),
        ):
            rows = packed_rows(arguments.data_dir, length, arguments.rows, **choice)
            if not rows:
                continue
            bases = [baseline_blocks(row) for row in rows]
            pieces = [int(row["document"].max()) + 1 for row in rows]
            mean = f"{np.mean(pieces):.1f} pieces each"
            print(f"\n{length} tokens, {len(rows)} rows, {title}, {mean}; baseline {np.mean(bases):.0f} blocks")
            print(f"{'':42}" + "".join(f"{f'{q} x {k}':>11}" for q, k in BLOCK_SIZES))
            for name, rule, queries, keys, cut in variants:
                shares = [
                    sum(visited(rule, row, size, queries, keys, cut) for row in rows) / sum(bases)
                    for size in BLOCK_SIZES
                ]
                print(f"{name:42}" + "".join(f"{share:11.3f}" for share in shares), flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
