"""The attention rule: which key a query sees, written once over fields that broadcast.

`AttentionRule(config)(query, key)` takes two `Fields` of integer tensors that broadcast against each other and gives
a boolean tensor. The joint sequence is `[S_0 .. S_{M-1} ; R_0 .. R_{N-1}]`, summaries first.

    joint_fields(batch, summaries)        annotated rows (B, N), (B, M)  ->  Fields of (B, M + N) int32
    rule(fields.queries(), fields.keys()) every pair by the element rule ->  (B, M + N, M + N) bool, slow
    dense_mask(rule, fields, M)           the same out of small tables   ->  (B, M + N, M + N) bool
    row_mask(rule, query, key)            few queries (B, Q), keys (B, K) -> (B, Q, K) bool

>>> from meloformer.config import ModelConfig
>>> rule = AttentionRule(ModelConfig(size="small"))
>>> note = Fields(*torch.tensor([[0, 0], [5, 6], [5, 6], [3, 3], [0, 0], [TIME, PITCH], [2, 2]]))
>>> rule(note.queries(), note.keys()).tolist()      # a T and the P behind it: the P sees both, the T itself
[[True, False], [True, True]]

The surprise: a segment is known by the stream positions of its first and last token, never by its number. It is an
unbroken run of the stream, so the two say the same, and in decoding a BAR need not be told later that it opened one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from meloformer.config import ModelConfig
from meloformer.hid import Family

# What the rule needs to know of a token's type.
TIME, PITCH, DURATION, VELOCITY, OPEN, GLOBAL, SUMMARY = range(7)
NUM_KINDS = 8
_LETTERS = {"T": TIME, "P": PITCH, "L": DURATION, "V": VELOCITY}

_KIND_OF_TYPE = torch.full((len(Family),), OPEN, dtype=torch.int32, device="cpu")
for _family, _kind in (
    (Family.TIME, TIME),
    (Family.PITCH, PITCH),
    (Family.DURATION, DURATION),
    (Family.VELOCITY, VELOCITY),
):
    _KIND_OF_TYPE[_family] = _kind


class Fields(NamedTuple):
    """What the rule reads of a token, int32 tensors of one shape.

    document: -1 for padding. position, end: a regular token's stream position, twice; a summary's first and last
    position of its segment. kind: one of TIME .. SUMMARY. bar, instrument, onset: the annotations, -1 for none.
    """

    document: Tensor
    position: Tensor
    end: Tensor
    bar: Tensor
    instrument: Tensor
    kind: Tensor
    onset: Tensor

    def queries(self) -> Fields:
        return Fields(*(field[..., :, None] for field in self))

    def keys(self) -> Fields:
        return Fields(*(field[..., None, :] for field in self))

    def at(self, index) -> Fields:
        return Fields(*(field[index] for field in self))


def kinds(type: Tensor, track: Tensor, bar: Tensor) -> Tensor:
    """Kind of regular tokens. Global: the conductor's tokens, INSTRUMENT, and the controls of stream and tracks."""
    is_global = ((track < 0) | (bar < 0)) & (type != Family.EOS) & (type != Family.PAD)
    return _kind_of_type(type.device)[type.long()].masked_fill(is_global, GLOBAL)


@lru_cache
def _kind_of_type(device: torch.device) -> Tensor:
    """The table on a device, sent there once: what decodes there must not wait for the host."""
    return _KIND_OF_TYPE.to(device)


def joint_fields(batch: Mapping[str, np.ndarray | Tensor], summaries: bool = True) -> Fields:
    """Fields of the joint sequence of annotated rows (`hid.rows`), (B, M + N) or (M + N,); M = 0 without summaries."""
    get = {name: torch.as_tensor(values) for name, values in batch.items()}
    kind = kinds(get["type"], get["track"], get["bar"])
    position = get["position"]
    regular = Fields(get["document"], position, position, get["bar"], get["instrument"], kind, get["onset"])
    if not summaries:
        return regular
    document = get["segment_document"]
    segment = Fields(
        document,
        get["segment_start"],
        get["segment_end"],
        get["segment_bar"],
        get["segment_instrument"],
        torch.full_like(document, SUMMARY),
        torch.full_like(document, -1),
    )
    return Fields(*(torch.cat(pair, dim=-1) for pair in zip(segment, regular)))


def send(values: np.ndarray | Tensor, device: torch.device | str) -> Tensor:
    """Host values on `device`. Nothing waits: to a GPU they go from pinned memory, for a copy from any other first
    lets the device finish all that it has still to do."""
    tensor = torch.as_tensor(values).contiguous()
    tensor = tensor.pin_memory() if torch.device(device).type == "cuda" and tensor.device.type == "cpu" else tensor
    return tensor.to(device, non_blocking=True)


class AttentionRule:
    """The element rule of one config; tables live on the CPU until `to(device)`.

    The backends read its tables (`visible`, `same_bars`, `cross_bars`) and not `__call__`, which decoding asks: README,
    "Another attention pattern", says how a subclass with a rule of its own is put to use.
    """

    def __init__(self, config: ModelConfig):
        self.full_causal = config.pattern == "full_causal"
        self.summaries = config.summaries and not self.full_causal
        visible = torch.ones(NUM_KINDS, NUM_KINDS, dtype=torch.bool, device="cpu")
        if config.visible is not None:
            for q, letter in enumerate(_LETTERS):
                for k, other in enumerate(_LETTERS):
                    visible[q, k] = other in config.visible.get(letter, ())
        self.visible = visible
        self._in_cell = visible.numpy() | self.full_causal
        self.same_bars = None if config.same_bar_offsets == "all" else _offset_table(config.same_bar_offsets)
        self.cross_bars = _offset_table(config.cross_bar_offsets)

    def to(self, device: torch.device | str) -> AttentionRule:
        """A copy whose tables are on `device`."""
        rule = object.__new__(type(self))
        rule.__dict__ = {name: send(v, device) if isinstance(v, Tensor) else v for name, v in vars(self).items()}
        return rule

    def __call__(self, q: Fields, k: Fields) -> Tensor:
        """Whether `q` sees `k`, bool of the broadcast shape."""
        causal = k.position <= q.position
        if self.full_causal:
            return same_document(q, k) & causal
        regular = causal & ((k.kind == GLOBAL) | (self.bar_rule(q, k) & self.type_rule(q, k)))
        from_summary = torch.where(k.kind == SUMMARY, causal, in_segment(q, k))
        from_regular = torch.where(k.kind == SUMMARY, has_ended(q, k), regular)
        return same_document(q, k) & torch.where(q.kind == SUMMARY, from_summary, from_regular)

    def inside_cell(self, kind: int, onset: int, kinds: np.ndarray, onsets: np.ndarray) -> np.ndarray:
        """What a regular query sees of itself and earlier tokens of its own bar or fill, (n,) bool: there only their
        types and onsets decide."""
        seen = self._in_cell[kind][kinds]
        return seen | (onsets == onset) if onset >= 0 else seen

    def bar_rule(self, q: Fields, k: Fields) -> Tensor:
        """Bars of one's own instrument, and those of others at the chosen distances."""
        distance = q.bar - k.bar
        same, other = self.distance_allowed(distance, True), self.distance_allowed(distance, False)
        return (q.bar >= 0) & (k.bar >= 0) & torch.where(q.instrument == k.instrument, same, other)

    def distance_allowed(self, distance: Tensor, same_instrument: bool) -> Tensor:
        """Whether bars at this distance, of the same instrument or of two, see each other."""
        table = self.same_bars if same_instrument else self.cross_bars
        return torch.ones_like(distance, dtype=torch.bool) if table is None else _look_up(table, distance)

    def type_rule(self, q: Fields, k: Fields) -> Tensor:
        """The same onset, or a pair of types that may see each other."""
        return same_onset(q, k) | self.visible[q.kind.long(), k.kind.long()]


def same_document(q: Fields, k: Fields) -> Tensor:
    return (q.document == k.document) & (q.document >= 0)


def same_onset(q: Fields, k: Fields) -> Tensor:
    return (q.onset == k.onset) & (q.onset >= 0)


def in_segment(q: Fields, k: Fields) -> Tensor:
    """SR: the regular key lies in the summary's own segment."""
    return (q.position <= k.position) & (k.position <= q.end)


def has_ended(q: Fields, k: Fields) -> Tensor:
    """RS: the summary's segment has ended before the query. This is what keeps later notes out of earlier logits."""
    return k.end < q.position


def _offset_table(offsets: Iterable[int]) -> Tensor:
    """(2 L + 3,) bool over the distances -L-1 .. L+1, L the largest; the ends stand for all that is further."""
    offsets = list(offsets)
    largest = max((abs(offset) for offset in offsets), default=0)
    table = torch.zeros(2 * largest + 3, dtype=torch.bool, device="cpu")
    table[[offset + largest + 1 for offset in offsets]] = True
    return table


def _look_up(table: Tensor, distance: Tensor) -> Tensor:
    largest = len(table) // 2
    return table[(distance.clamp(-largest, largest) + largest).long()]


def row_mask(rule: AttentionRule, query: Fields, key: Fields) -> Tensor:
    """(B, Q, K) bool: what few queries (B, Q) see among keys (B, K). For decoding; padding has document -1."""
    return rule(query.queries(), key.keys())


def dense_mask(rule: AttentionRule, fields: Fields, num_summaries: int) -> Tensor:
    """(B, T, T) bool for fields (B, T), the first `num_summaries` of them summaries. Equals the element rule.

    Bars and types are looked up in two small tables, (cells, N) and (kinds, N), whose rows are copied into place; only
    the onset and the order of the stream are compared pair by pair.
    """
    batch, length = fields.document.shape
    mask = torch.empty(batch, length, length, dtype=torch.bool, device=fields.document.device)
    for b in range(batch):
        s, r = fields.at((b, slice(num_summaries))), fields.at((b, slice(num_summaries, None)))
        sq, sk, rq, rk = s.queries(), s.keys(), r.queries(), r.keys()
        if num_summaries:
            m = num_summaries
            mask[b, :m, :m] = same_document(sq, sk) & (sk.position <= sq.position)
            mask[b, :m, m:] = same_document(sq, rk) & in_segment(sq, rk)
            mask[b, m:, :m] = same_document(rq, sk) & has_ended(rq, sk)
        _regular_pairs(rule, r, mask[b, num_summaries:, num_summaries:])
    return mask


def _regular_pairs(rule: AttentionRule, r: Fields, out: Tensor) -> None:
    """Fill the quadrant RR, (N, N), of one row."""
    causal = torch.le(r.position[None, :], r.position[:, None], out=out)
    if rule.full_causal:
        causal &= same_document(r.queries(), r.keys())
        return
    # One cell for each (document, instrument, bar) of the row, and one of its tokens to speak for it.
    code = ((r.document.long() + 1) << 40) | ((r.instrument.long() + 1) << 24) | (r.bar.long() + 1)
    cells, cell = torch.unique(code, return_inverse=True)
    speaker = torch.empty_like(cells).scatter_(0, cell, torch.arange(len(code), device=code.device))
    q, k = r.at(speaker).queries(), r.keys()
    here = same_document(q, k)
    bars, everywhere = here & rule.bar_rule(q, k), here & (k.kind == GLOBAL)  # (cells, N)
    seen = rule.visible[:, r.kind.long()][r.kind.long()]  # (N, N)
    seen |= r.onset[None, :] == torch.where(r.onset < 0, -2, r.onset)[:, None]
    seen &= bars[cell]
    seen |= everywhere[cell]
    causal &= seen
