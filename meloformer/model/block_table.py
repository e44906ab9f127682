"""The block table of a row: which blocks of the attention matrix hold something, and which are full, from counts.

    count_blocks(rule, fields, num_summaries, block_size)  Fields (T,) on the CPU, any order -> (Tq, Tk) int32 counts
    block_tables(counts, block_size)                       (B, Tq, Tk) -> a BlockMask's index tables, both ways
    order_of(fields, num_summaries, kinds, block)          (T,): a physical order of a row; summaries stay first

Counts are exact numbers of visible pairs, so a block has something to compute where count > 0 and is full where count
is its area. `device=` says where the work over pairs of runs is done; the host only sorts and cuts the row, and
knows every size, so nothing waits for the device.

>>> from meloformer.config import ModelConfig
>>> note = Fields(*torch.tensor([[0, 0], [5, 6], [5, 6], [3, 3], [0, 0], [TIME, PITCH], [2, 2]]).int())
>>> count_blocks(AttentionRule(ModelConfig(size="small")), note, 0, (1, 1)).tolist()
[[1, 0], [1, 1]]

The idea: cut the stream into runs, stretches of one bar of one instrument that end where an onset does. Between two
runs what sees what depends on their bars and on the kinds of the two tokens alone, so with P the (block and kind) x run
incidence and V the run x run table, the counts are P V P^T, added up over the kinds that see each other; P has few
entries in a row, so the products are sums of gathered rows. Pairs within one run are counted one by one. The surprise:
summaries cost nothing of this: which of them a run has behind it is an interval.

The order: kinds that see, or are seen by, the same tokens stand together, and inside such a group the parts (one track,
bars rising). A block on the border of two parts is visited for both, so a part gives away what it has beyond whole
blocks, its latest bars: those of all parts stand together, every other part back to front, so that one block holds like
bars of two parts. docs/log.md has what that saves.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from meloformer.model.masks import (
    DURATION,
    GLOBAL,
    NUM_KINDS,
    OPEN,
    PITCH,
    SUMMARY,
    TIME,
    VELOCITY,
    AttentionRule,
    Fields,
    send,
)

LONGEST_RUN = 32  # tokens, but for a longer onset: pairs within runs are counted one by one
RUNS_AT_ONCE = 1024
# Kinds that stand together in memory, in stream order; a letter is a kind's first. docs/log.md compares groupings.
_LETTERS = {"S": SUMMARY, "G": GLOBAL, "O": OPEN, "T": TIME, "P": PITCH, "L": DURATION, "V": VELOCITY}
QUERY_ORDER = "S G O TV P L"  # by default T and V see the same keys
KEY_ORDER = "S G O TP L V"  # and T and P are seen by the same queries
BLOCK = 64  # tokens of a block, on both sides, that parts are cut for
OPEN_PARTS = 2  # parts whose open tokens stand together, bar by bar: a block of one part's spans too many bars


def order_of(fields: Fields, num_summaries: int, kinds: str = QUERY_ORDER, block: int = BLOCK) -> np.ndarray:
    """(T,) indices: summaries, then by piece, by group of kinds, by part; padding last of each.

    block: tokens of a block on this side, which parts are cut for; 0 leaves a group in the order of the stream.
    """
    document, position, kind, bar, instrument = (
        np.asarray(x) for x in (fields.document, fields.position, fields.kind, fields.bar, fields.instrument)
    )
    group_of = np.zeros(NUM_KINDS, dtype=np.int64)
    for number, letters in enumerate(kinds.split()):
        group_of[[_LETTERS[letter] for letter in letters]] = number
    stream = document.astype(np.int64) << 32 | position
    valid = np.flatnonzero(document >= 0)
    valid = valid[np.argsort(stream[valid], kind="stable")]
    summary, r = valid[valid < num_summaries], valid[valid >= num_summaries]
    kind, bar, document = kind[r], bar[r], document[r].astype(np.int64)
    group = document << 3 | group_of[kind]
    if block:
        part = _parts(document, bar, instrument[r], kind)
        is_open = kind == OPEN
        bag = group << 20 | np.where(is_open, part // OPEN_PARTS, part)
        sorted_by = np.argsort(bag << 16 | np.where(is_open, bar + 1, 0), kind="stable")
        r = r[sorted_by[_whole_blocks_first(bag[sorted_by], num_summaries, block)]]
    else:
        r = r[np.argsort(group, kind="stable")]
    padding = np.flatnonzero(np.asarray(fields.document) < 0)
    first = padding < num_summaries
    return np.concatenate([summary, padding[first], r, padding[~first]])


def _parts(document: np.ndarray, bar: np.ndarray, instrument: np.ndarray, kind: np.ndarray) -> np.ndarray:
    """(n,) number, within its piece, of each token's part: a stretch of the stream of one instrument, bars rising."""
    part = np.zeros(len(document), dtype=np.int64)
    local = np.flatnonzero(kind != GLOBAL)
    d, b, i = document[local], bar[local], instrument[local]
    begins = (d[1:] != d[:-1]) | (i[1:] != i[:-1]) | (b[1:] < b[:-1])
    part[local[1:]] = np.cumsum(begins)
    first = np.zeros(int(document[-1]) + 1 if len(document) else 0, dtype=np.int64)
    first[d[::-1]] = part[local[::-1]]
    part[local] -= first[d]
    return part


def _whole_blocks_first(bag: np.ndarray, offset: int, block: int) -> np.ndarray:
    """(n,) order of tokens sorted by bag, the first of them standing at place `offset`; a group is bag >> 20.

    What is left of the bags, every other one back to front, fills up the block in which the group begins; then the
    whole blocks, on block edges; then the rest of what is left.
    """
    n = len(bag)
    new_bag = np.diff(bag, prepend=-1) != 0
    new_group = np.diff(bag >> 20, prepend=-1) != 0
    bag_start, group_start = np.flatnonzero(new_bag), np.flatnonzero(new_group)
    number, group_of_bag = np.cumsum(new_bag) - 1, (np.cumsum(new_group) - 1)[bag_start]
    size = np.diff(bag_start, append=n)
    left = size % block
    whole = size - left

    def behind(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each bag, what the bags of its group before it count; of each group, what all of them do."""
        total = np.bincount(group_of_bag, weights=counts, minlength=len(group_start)).astype(np.int64)
        return np.cumsum(counts) - counts - (np.cumsum(total) - total)[group_of_bag], total

    (left_before, left_in_group), (whole_before, whole_in_group) = behind(left), behind(whole)
    fill = np.minimum(left_in_group, -(group_start + offset) % block)
    i = np.arange(n) - bag_start[number]
    is_left, group = i >= whole[number], group_of_bag[number]
    behind_whole = i - whole[number]
    turned = np.where(number % 2 == 1, left[number] - 1 - behind_whole, behind_whole)
    rank = left_before[number] + turned
    rank = rank + np.where(rank >= fill[group], whole_in_group[group], 0)
    place = group_start[group] + np.where(is_left, rank, fill[group] + whole_before[number] + i)
    order = np.empty(n, dtype=np.int64)
    order[place] = np.arange(n)
    return order


class _Runs(NamedTuple):
    """(R,) each, in the order of the stream."""

    document: np.ndarray
    bar: np.ndarray
    instrument: np.ndarray
    is_global: np.ndarray
    start: np.ndarray  # stream position of its first token


class _Entries(NamedTuple):
    """A sparse matrix bag x run, sorted by bag; a bag is what one block holds of one kind."""

    start: Tensor  # (bags,) first entry of each
    lengths: Tensor  # (bags,)
    run: Tensor  # (entries,)
    count: Tensor  # (entries,) float32
    block: Tensor  # (bags,)
    kind: Tensor  # (bags,)


def count_blocks(
    rule: AttentionRule,
    fields: Fields,
    num_summaries: int,
    block_size: tuple[int, int],
    device: torch.device | str = "cpu",
    key_place: np.ndarray | None = None,
) -> Tensor:
    """(blocks of queries, blocks of keys) int32: visible pairs in each block; `rule` has its tables on `device`.

    key_place: (T,) where each token stands among the keys, if they are in another order than the queries.
    """
    f = Fields(*(np.asarray(x) for x in fields))
    length = len(f.document)
    shape = tuple(-(-length // size) for size in block_size)
    places = np.arange(length), np.arange(length) if key_place is None else key_place
    block_of = [place // size for place, size in zip(places, block_size)]
    summary, regular = _sorted(f, np.arange(num_summaries)), _sorted(f, np.arange(num_summaries, length))
    counts = torch.zeros(shape, dtype=torch.int32, device=device)
    if len(regular) == 0:
        return counts
    first = _first_tokens(rule, Fields(*(x[regular] for x in f)), Fields(*(x[summary] for x in f)))
    run = np.cumsum(first) - 1  # of each regular token
    heads = regular[first]
    runs = _Runs(f.document[heads], f.bar[heads], f.instrument[heads], f.kind[heads] == GLOBAL, f.position[heads])
    kind = np.zeros_like(f.kind) if rule.full_causal else f.kind
    queries, keys = (_entries(block[regular], kind[regular], run, device) for block in block_of)

    pairs = _count_between(rule, runs, queries, keys, max(block_size), device)  # (query bags, key bags)
    if not rule.full_causal:
        pairs = pairs * rule.visible[queries.kind][:, keys.kind]
    _add_bags(counts, pairs, queries.block, keys.block)
    _count_within(rule, Fields(*(x[regular] for x in f)), run, [b[regular] for b in block_of], counts)
    if len(summary):
        _count_summaries(f, summary, runs, block_of, queries, keys, counts)
    return counts


def _sorted(f: Fields, index: np.ndarray) -> np.ndarray:
    """Those of `index` that are no padding, in the order of the stream."""
    index = index[f.document[index] >= 0]
    return index[np.lexsort((f.position[index], f.document[index]))]


def _first_tokens(rule: AttentionRule, r: Fields, s: Fields) -> np.ndarray:
    """(n,) bool over regular tokens in stream order: where a run begins."""
    n = len(r.document)
    changes = np.zeros(n, dtype=bool)
    changes[0] = True
    about = [r.document] if rule.full_causal else [r.document, r.bar, r.instrument, r.kind == GLOBAL]
    for x in about:
        changes[1:] |= x[1:] != x[:-1]
    if len(s.document):  # a run lies inside one segment or outside all
        place = r.document.astype(np.int64) << 32 | r.position
        for edge in (s.position, s.end + 1):
            at = np.searchsorted(place, s.document.astype(np.int64) << 32 | edge)
            changes[at[at < n]] = True
    # Long runs are cut, but never inside an onset.
    start = np.maximum.accumulate(np.where(changes, np.arange(n), 0))
    may_cut = changes.copy()
    may_cut[1:] |= (r.onset[1:] != r.onset[:-1]) | (r.onset[1:] < 0) | rule.full_causal
    cuts = np.flatnonzero(may_cut)
    piece = (cuts - start[cuts]) // LONGEST_RUN
    changes[cuts[1:]] |= piece[1:] != piece[:-1]
    return changes


def _entries(block: np.ndarray, kind: np.ndarray, run: np.ndarray, device: torch.device | str) -> _Entries:
    num_runs = int(run[-1]) + 1
    codes, count = np.unique((block * NUM_KINDS + kind) * num_runs + run, return_counts=True)
    bags, start = np.unique(codes // num_runs, return_index=True)
    lengths = np.diff(start, append=len(codes))
    parts = (start, lengths, codes % num_runs, count.astype(np.float32), bags // NUM_KINDS, bags % NUM_KINDS)
    return _Entries(*(send(part, device) for part in parts))


def _add_rows(table: Tensor, entries: _Entries, index: Tensor) -> Tensor:
    """(bags, columns): for each bag the rows of `table` that its entries' `index` names, times their counts, added."""
    weights = entries.count.to(table.dtype)
    return F.embedding_bag(index, table, entries.start, mode="sum", per_sample_weights=weights)


def _add_bags(counts: Tensor, pairs: Tensor, query_block: Tensor, key_block: Tensor) -> None:
    rows = counts.new_zeros(counts.shape[0], pairs.shape[1]).index_add_(0, query_block, pairs.to(torch.int32))
    counts.index_add_(1, key_block, rows)


def _count_between(
    rule: AttentionRule,
    runs: _Runs,
    queries: _Entries,
    keys: _Entries,
    block_length: int,
    device: torch.device | str,
) -> Tensor:
    """(query bags, key bags) float32: pairs of different runs that bars and the order of the stream allow."""
    num_runs = len(runs.document)
    piece = runs.document.astype(np.int64) << 32
    piece_and_instrument, part = np.unique(piece + runs.instrument + 1, return_inverse=True)
    piece_and_bar, bar = np.unique(piece + runs.bar + 1, return_inverse=True)
    speaker_of_part, speaker_of_bar = np.zeros(len(piece_and_instrument), int), np.zeros(len(piece_and_bar), int)
    speaker_of_part[part], speaker_of_bar[bar] = np.arange(num_runs), np.arange(num_runs)
    about = np.stack([runs.document, runs.bar, runs.instrument, runs.is_global]).astype(np.int32)
    about = send(about, device)
    part_t, bar_t = send(part, device), send(bar, device)
    by_part, by_bar = about[:, send(speaker_of_part, device)], about[:, send(speaker_of_bar, device)]
    # Sums of the first product stay within a block's length, which bfloat16 holds exactly up to 256.
    dtype = torch.bfloat16 if block_length <= 256 else torch.float32
    out = torch.zeros(len(keys.block), len(queries.block), device=device)
    for first in range(0, num_runs, RUNS_AT_ONCE):
        q, p, k = by_bar[:, :, None], by_part[:, :, None], about[:, None, first : first + RUNS_AT_ONCE]
        b, width = bar_t[first:], k.shape[-1]
        here = q[0] == k[0]  # (bars, keys)
        if rule.full_causal:
            seen = here[b]
        else:
            everywhere, bars = here & (k[3] != 0), here & (q[1] >= 0) & (k[1] >= 0)
            same, other = ((bars & rule.distance_allowed(q[1] - k[1], own)) | everywhere for own in (True, False))
            own_part = (p[0] == k[0]) & (p[2] == k[2])  # (parts, keys)
            seen = torch.where(own_part[part_t[first:]], same[b], other[b])
        # Run r sees run k if r > k, so rows begin at `first`; a row of zeros in front stands for all runs left out.
        table = torch.zeros(len(seen) + 1, width, dtype=dtype, device=device)
        table[1:] = seen.tril_(-1)
        rows = _add_rows(table, queries, (queries.run - (first - 1)).clamp_(min=0)).float()  # (query bags, keys)
        table = torch.zeros(width + 1, len(rows), device=device)
        table[1:] = rows.T
        index = keys.run - (first - 1)
        out += _add_rows(table, keys, index.masked_fill_((index < 0) | (index > width), 0))
    return out.T


def _count_within(rule: AttentionRule, r: Fields, run: np.ndarray, blocks: list[np.ndarray], counts: Tensor) -> None:
    """Add the pairs of each run, one by one, to `counts`."""
    device, n = counts.device, len(run)
    start = np.searchsorted(run, run)  # first token of each token's run
    behind = np.arange(n) - start + 1  # keys of its run up to itself
    total, before = int(behind.sum()), np.cumsum(behind) - behind
    about = np.stack([start - before, blocks[0] * counts.shape[1], r.kind * NUM_KINDS, r.onset]).astype(np.int32)
    about = send(about, device)
    key_about = send(np.stack([blocks[1], r.kind, r.onset, r.bar >= 0]).astype(np.int32), device)
    repeats = send(behind, device)
    q_shift, q_block, q_kind, q_onset = torch.repeat_interleave(about, repeats, dim=1, output_size=total)
    k_block, k_kind, k_onset, has_bar = key_about[:, q_shift + torch.arange(total, dtype=torch.int32, device=device)]
    place = q_block + k_block
    if rule.full_causal:
        seen = torch.ones_like(place)
    else:
        seen = rule.visible.flatten()[q_kind + k_kind] | ((q_onset == k_onset) & (q_onset >= 0))
        seen = ((k_kind == GLOBAL) | (seen & (has_bar > 0))).int()
    counts.view(-1).index_add_(0, place, seen)


def _count_summaries(
    f: Fields,
    summary: np.ndarray,
    runs: _Runs,
    blocks: list[np.ndarray],
    queries: _Entries,
    keys: _Entries,
    counts: Tensor,
) -> None:
    """Add what summaries see and what sees them: intervals of the list of summaries."""
    device, num = counts.device, len(summary)
    place = f.document[summary].astype(np.int64) << 32
    run_piece = runs.document.astype(np.int64) << 32
    run_place = run_piece + runs.start
    key_block = send(blocks[1][summary], device)
    ahead = torch.zeros(num + 1, counts.shape[1], dtype=torch.int32, device=device)  # of the first i, in each block
    ahead[1:] = F.one_hot(key_block, counts.shape[1]).cumsum(0)
    # RS: the summaries of the piece whose segments have ended where the run begins.
    lowest, ended = np.searchsorted(place, run_piece), np.searchsorted(place + f.end[summary], run_place)
    table = (ahead[send(np.maximum(ended, lowest), device)] - ahead[send(lowest, device)]).float()
    rows = _add_rows(table, queries, queries.run).to(torch.int32)
    counts.index_add_(0, queries.block, rows)
    # SS: those of the piece up to itself.
    query_block = send(blocks[0][summary], device)
    lowest = send(np.searchsorted(place, place), device)
    counts.index_add_(0, query_block, ahead[1:] - ahead[lowest])
    # SR: the runs of its own segment.
    own = np.searchsorted(place + f.position[summary], run_place, side="right") - 1
    inside = (own >= 0) & (place[own] == run_piece) & (run_place <= place[own] + f.end[summary][own])
    row = send(np.where(inside, blocks[0][summary][own], 0), device)[keys.run]
    weight = keys.count.to(torch.int32) * send(inside, device)[keys.run]
    column = torch.repeat_interleave(keys.block, keys.lengths, output_size=len(keys.run))
    counts.view(-1).index_add_(0, row * counts.shape[1] + column, weight)


def block_tables(counts: Tensor, block_size: tuple[int, int]) -> tuple[Tensor, ...]:
    """kv_num_blocks (B, 1, Tq), kv_indices (B, 1, Tq, Tk), full_kv_.. twice, and the same seen from the keys."""
    area = block_size[0] * block_size[1]
    partial, full = (counts > 0) & (counts < area), counts == area
    return tuple(
        table.unsqueeze(1) for matrix in (partial, full, partial.mT, full.mT) for table in _chosen_first(matrix)
    )


def _chosen_first(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(.., rows) int32 number and (.., rows, columns) int32 columns of what is True, then the rest, each in order."""
    number = matrix.sum(-1, keepdim=True)
    upto = matrix.cumsum(-1)
    column = torch.arange(matrix.shape[-1], device=matrix.device)
    place = torch.where(matrix, upto - 1, number + column - upto)
    # The kernels read a row of indices as neighbours in memory, whatever its strides say; `matrix` may be transposed.
    indices = torch.empty(place.shape, dtype=torch.int32, device=place.device)
    return number.squeeze(-1).int(), indices.scatter_(-1, place, column.int().expand_as(place))
