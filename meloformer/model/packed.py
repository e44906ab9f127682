"""The element rule over packed words, for a kernel that asks pair by pair: eight int32 a token.

    words = pack(rule, fields)              Fields (B, T), any order -> (8, B, T) int32
    seen = packed_rule(rule, words)         a mask_mod of FlexAttention: (b, h, q, k) -> bool, same as `rule`

>>> from meloformer.config import ModelConfig
>>> from meloformer.model.masks import PITCH, TIME
>>> rule = AttentionRule(ModelConfig(size="small"))
>>> note = Fields(*torch.tensor([[[0, 0]], [[5, 6]], [[5, 6]], [[3, 3]], [[0, 0]], [[TIME, PITCH]], [[2, 2]]]).int())
>>> packed_rule(rule, pack(rule, note))(0, 0, torch.tensor([[0], [1]]), torch.tensor([0, 1])).tolist()
[[True, False], [True, True]]

The surprise: document and causality are one interval. A regular token of piece d at position p has the place
2 (d T + p), a summary the odd place behind its segment's last token; a query sees places from the start of its piece
to its own. Only for a summary's view of regular tokens is there another lower end: its segment's start.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from meloformer.model.masks import GLOBAL, NUM_KINDS, SUMMARY, AttentionRule, Fields, send

_KINDS = (1 << NUM_KINDS) - 1  # lowest bits: a key's kind, or the kinds that a query sees
_ANYTHING = 1 << (NUM_KINDS - 1)  # no kind has this bit: summaries as queries
_OPEN = 1 << GLOBAL | 1 << SUMMARY  # keys that neither bars nor types concern
_INSTRUMENT_SHIFT, _BAR_SHIFT = NUM_KINDS, NUM_KINDS + 9
_INSTRUMENT = (1 << _BAR_SHIFT) - (1 << _INSTRUMENT_SHIFT)
MAX_BARS = 1 << (31 - _BAR_SHIFT)


KEY_WORDS = 3  # the first of them


def pack(rule: AttentionRule, f: Fields) -> Tensor:
    """(8, B, T) int32. Of keys: place, about, onset; of queries: first place among regular keys, among summaries,
    last place, about, onset. `about` is bar, instrument and kind bits."""
    if int(f.bar.max()) >= MAX_BARS:
        raise ValueError(f"a piece has {int(f.bar.max()) + 1} bars, the packed rule has room for {MAX_BARS}")
    length, padding, is_summary = f.document.shape[-1], f.document < 0, f.kind == SUMMARY
    piece = 2 * length * f.document
    place = piece + torch.where(is_summary, 2 * f.end + 1, 2 * f.position)
    first = piece + torch.where(is_summary, 2 * f.position, 0)
    kind = f.kind.long()
    free = (1 << kind) & _OPEN
    has_bar = f.bar >= 0
    visible = rule.visible.long() @ (1 << torch.arange(NUM_KINDS))  # (kinds,) what each sees
    sees = torch.where(is_summary, _KINDS, torch.where(has_bar, visible[kind], 0) & ~_ANYTHING | _OPEN)
    where = (f.bar.clamp(min=0) << _BAR_SHIFT) | ((f.instrument + 1) << _INSTRUMENT_SHIFT)
    key = place.masked_fill(padding, -1), where | torch.where(has_bar, 1 << kind, free), f.onset
    query = first, piece, place.masked_fill(padding, -2), where | sees, torch.where(f.onset < 0, -2, f.onset)
    return torch.stack([word.to(torch.int32) for word in (*key, *query)])


def packed_rule(rule: AttentionRule, words: Tensor) -> Callable:
    """The rule as a mask_mod; a new one for each batch compiles nothing anew while the words keep their shape.

    The words may be on a device; `rule` keeps its tables on the CPU, where reading them waits for nothing.
    """
    place, key_about, key_onset, first, piece, last, query_about, query_onset = words.unbind(0)
    if rule.full_causal:

        def sees_all_before(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (place[b, k] >= piece[b, q]) & (place[b, k] <= last[b, q])

        return sees_all_before
    same_bars, cross_bars = (_membership(table, words.device) for table in (rule.same_bars, rule.cross_bars))

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        ask, about, at = query_about[b, q], key_about[b, k], place[b, k]
        lowest = torch.where((about & (1 << SUMMARY)) != 0, piece[b, q], first[b, q])
        types = ((ask & about & _KINDS) != 0) | (query_onset[b, q] == key_onset[b, k])
        distance = (ask >> _BAR_SHIFT) - (about >> _BAR_SHIFT)
        same_instrument = ((ask ^ about) & _INSTRUMENT) == 0
        bars = torch.where(same_instrument, same_bars(distance), cross_bars(distance))
        free = ((about & _OPEN) != 0) | ((ask & _ANYTHING) != 0)
        return (at >= lowest) & (at <= last[b, q]) & (free | (types & bars))

    return sees


def _membership(table: Tensor | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Whether a distance is in an offset table: the bits of a constant where 31 are enough, the table else."""
    if table is None:
        return lambda distance: distance == distance
    largest = len(table) // 2
    if len(table) <= 31:
        bits = sum(1 << i for i, allowed in enumerate(table.tolist()) if allowed)
        return lambda distance: ((bits >> (distance.clamp(-largest, largest) + largest)) & 1) != 0
    table = send(table, device)
    return lambda distance: table[distance.clamp(-largest, largest) + largest]
