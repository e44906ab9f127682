"""Decoding with a KV cache, summaries included: one session is a batch of streams that grow token by token.

    session = DecodingSession(model, batch_size=B, max_tokens=N, max_summaries=M)
    logits = session.prefill(batch)                      # prompts, annotated rows of one document each  -> (B, V)
    logits = session.step(tokens, annotations, active)   # the next token of each stream                 -> (B, V)
    session.keep(rows)                                   # go on with some of the streams only

`tokens` (B,) ids just chosen; `annotations` what `hid.Annotations` says of them, (B,) each (with one `StreamState` a
stream: `Annotations(*np.array([s.push(t) for s, t in zip(states, tokens)]).T)`); `active` (B,) bool, False for streams
that wait or have ended, whose logits mean nothing. The logits, float32, are those of the token after, and equal the
full forward pass. A stream may begin with `step`; `prefill` is for an empty session.

The session closes segments itself: a BAR, FILL, INSTRUMENT or EOS ends the bar that notes were being written into. The
summary goes through the layers together with that token, as one more query in front of it, and the rule lets the token
see it. `segment` of the annotations is not read; `onset` numbers go on from the prompt's.

The surprise: slots hold tokens and summaries in the order they came. Where a key stands says nothing about what may
see it: each slot keeps the fields of the rule, and a CPU copies together and reads the keys that are seen, no others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from meloformer.hid import Annotations, Family
from meloformer.model.attention import Visibility, attend
from meloformer.model.masks import SUMMARY, Fields, joint_fields, kinds, row_mask
from meloformer.model.transformer import MeloFormer

_CLOSING = np.zeros(len(Family), dtype=bool)
_CLOSING[[Family.BAR, Family.FILL, Family.INSTRUMENT, Family.EOS]] = True


class DecodingSession:
    """See the module's docstring. `length` (B,) is the number of tokens of each stream so far."""

    def __init__(self, model: MeloFormer, batch_size: int, max_tokens: int, max_summaries: int):
        config, device = model.config, model.device
        self.model, self.rule = model, model.rule.to(device)
        self.capacity = max_tokens + (max_summaries if self.rule.summaries else 0)
        # One slot beyond the capacity: whatever is not there is written to it, and its document stays -1.
        slots = (batch_size, self.capacity + 1)
        shape = (config.n_layer, 2, *slots, config.n_head, config.d_model // config.n_head)
        self.cache = torch.zeros(shape, dtype=model.compute_dtype(), device=device)  # (layer, K and V, B, slot, H, D)
        self.fields = torch.full((len(Fields._fields), *slots), -1, dtype=torch.int32, device=device)
        self.used = np.zeros(batch_size, dtype=np.int64)  # slots
        self.length = np.zeros(batch_size, dtype=np.int64)
        # The bar or fill being written: position (-1: none), bar, instrument, ordinal and time of its BAR or FILL.
        self.cell = np.full((batch_size, 5), -1, dtype=np.int64)
        self.sounding = np.zeros(batch_size, dtype=bool)  # it has an onset: it will be a segment

    @property
    def batch_size(self) -> int:
        return len(self.length)

    @torch.inference_mode()
    def step(self, tokens: np.ndarray, annotations: Annotations, active: np.ndarray | None = None) -> Tensor:
        """Append one token to every active stream; logits (B, V) of what follows. ValueError where one is full."""
        a = Annotations(*(np.asarray(values) for values in annotations))
        active = np.ones(self.batch_size, dtype=bool) if active is None else np.asarray(active, dtype=bool)
        closing = active & self.sounding & _CLOSING[a.type] & self.rule.summaries
        m = int(closing.any())  # where any stream closes a segment, each has one query more in front
        here = self.length
        start, bar, instrument, ordinal, time = self.cell.T
        kind = kinds(*(torch.from_numpy(np.asarray(x)) for x in (a.type, a.track, a.bar))).numpy()
        none, is_summary = np.full_like(here, -1), np.full_like(here, SUMMARY)
        # rows of Fields, then instrument, ordinal and time: (10, B, 2), the summary before the token
        summary = (
            closing - 1,
            start,
            here - 1,
            bar,
            instrument,
            is_summary,
            none,
            instrument,
            ordinal,
            time,
        )
        token = (active - 1, here, here, a.bar, a.instrument, kind, a.onset, a.instrument, a.ordinal, a.time)
        both = np.stack([np.stack(summary), np.stack(token)], axis=2).astype(np.int32)[:, :, 1 - m :]
        both = torch.from_numpy(both).to(self.model.device)
        query, (instruments, ordinals, times) = Fields(*both[:7]), both[7:]

        rows, slots = self._write_fields(both[:7], np.stack([closing, active], axis=1)[:, 1 - m :])
        visibility, index = self._visible_keys(query)

        def attend_cached(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.cache[i, :, rows, slots] = torch.stack([k, v]).to(self.cache.dtype)
            if index is None:
                return attend(q, *self.cache[i, :, :, : visibility.bias.shape[-1]], visibility)
            seen = self.cache[i].flatten(1, 2).flatten(2).index_select(1, index.flatten())  # (2, B * n, H * D)
            return attend(q, *seen.view(2, *index.shape, *k.shape[2:]), visibility)

        ids = torch.from_numpy(np.asarray(tokens).astype(np.int64)).to(self.model.device)[:, None]
        x = self.model.embed(ids, instruments[:, m:], ordinals[:, m:])
        if m:
            x = torch.cat([self.model.embed(None, instruments[:, :1], ordinals[:, :1]), x], dim=1)
        hidden = self.model.run_layers(x, m, query.position, times, attend_cached)
        self._follow(a, active)
        return self.model.head(hidden[:, -1]).float()

    @torch.inference_mode()
    def prefill(self, batch: Mapping[str, np.ndarray]) -> Tensor:
        """Read prompts, rows (B, N) of one document each, into an empty session; logits (B, V) behind each."""
        lengths = (np.asarray(batch["document"]) == 0).sum(axis=1)
        if len(lengths) != self.batch_size or self.used.any() or not lengths.all() or np.max(batch["document"]) > 0:
            raise ValueError("prefill needs an empty session and for each stream a row with one document")
        rows, last = np.arange(len(lengths)), lengths - 1
        # The segment that a prompt ends in is not closed: the next token may still belong to it.
        unfinished = np.asarray(batch["segment"])[rows, last]
        closed = np.array(batch["segment_document"])
        closed[rows[unfinished >= 0], unfinished[unfinished >= 0]] = -1
        batch = {**batch, "segment_document": closed}
        fields = torch.stack(joint_fields(batch, self.rule.summaries)).to(self.cache.device)
        at, slots = self._write_fields(fields, (fields[0] >= 0).cpu().numpy())
        inputs = self.model.prepare(batch, "dense")
        visibility = Visibility(inputs.mask, self.model.compute_dtype())

        def attend_and_keep(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.cache[i, :, at, slots] = torch.stack([k, v]).to(self.cache.dtype)
            return attend(q, k, v, visibility)

        hidden = self.model.run_layers(*self.model.joint(inputs), attend_and_keep)
        for t in range(int(lengths.max())):
            self._follow(Annotations(*(np.asarray(batch[name])[:, t] for name in Annotations._fields)), t < lengths)
        return self.model.head(hidden[torch.from_numpy(rows), torch.from_numpy(last)]).float()

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these streams only, in this order; a row may be named twice, to branch."""
        rows = np.asarray(rows, dtype=np.int64)
        index = torch.from_numpy(rows).to(self.cache.device)
        self.cache, self.fields = self.cache.index_select(2, index), self.fields.index_select(1, index)
        for name in ("used", "length", "cell", "sounding"):
            setattr(self, name, getattr(self, name)[rows])

    # --- inside ---------------------------------------------------------------------------------------------

    def _write_fields(self, fields: Tensor, present: np.ndarray) -> tuple[Tensor, Tensor]:
        """Give each present one of (B, Q) the next free slot of its stream; (rows, slots) to write keys to."""
        if (self.used + present.sum(axis=1)).max() > self.capacity:
            raise ValueError(f"the session holds {self.capacity} tokens and summaries a stream, this is one more")
        slots = np.where(present, self.used[:, None] + np.cumsum(present, axis=1) - 1, self.capacity)
        self.used = self.used + present.sum(axis=1)
        slots = torch.from_numpy(slots).to(self.cache.device)
        rows = torch.arange(self.batch_size, device=self.cache.device)[:, None].expand_as(slots)
        self.fields[:, rows, slots] = fields
        return rows, slots

    def _visible_keys(self, query: Fields) -> tuple[Visibility, Tensor | None]:
        """What the queries see of the cache; on a CPU with the places of the n keys that any query of a row sees,
        (B, n) into the flattened (B * slots): a step's time goes into reading keys, and most are not seen."""
        length = int(self.used.max())
        mask = row_mask(self.rule, query, Fields(*self.fields[:, :, :length]))
        if self.cache.device.type != "cpu":
            return Visibility(mask, self.cache.dtype), None
        seen = mask.numpy().any(axis=1)
        count = seen.sum(axis=1)
        index = np.zeros((len(seen), max(int(count.max()), 1)), dtype=np.int64)
        exists = np.arange(index.shape[1]) < count[:, None]
        index[exists] = np.nonzero(seen)[1]
        mask = mask.gather(2, torch.from_numpy(index)[:, None].expand(-1, mask.shape[1], -1))
        index += np.arange(len(index))[:, None] * (self.capacity + 1)
        return Visibility(mask & torch.from_numpy(exists)[:, None], self.cache.dtype), torch.from_numpy(index)

    def _follow(self, a: Annotations, active: np.ndarray) -> None:
        """Keep track of the bar or fill that is being written, past one token of each active stream."""
        closes = active & _CLOSING[a.type]
        opens = closes & (a.track >= 0) & ((a.type == Family.BAR) | (a.type == Family.FILL))
        opener = np.stack([self.length, a.bar, a.instrument, a.ordinal, a.time], axis=1)
        self.cell = np.where(opens[:, None], opener, np.where(closes[:, None], -1, self.cell))
        starts_onset = active & (a.type == Family.TIME) & (a.track >= 0)
        self.sounding = (self.sounding & ~closes) | starts_onset
        self.length = self.length + active
