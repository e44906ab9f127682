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
summary goes through the layers together with that token, as one more row in front, and the rule lets the token see it.
`segment` of the annotations is not read; `onset` numbers go on from the prompt's. On a CPU, SHARED_BY or more streams
that branched off one long prompt read it together (`shared_keys`).

The surprise: slots hold tokens and summaries in the order they came. Where a key stands says nothing about what may
see it: each slot keeps the fields of the rule, and the rule is asked which keys a step reads, of all slots when a bar
begins and then of those since; what is before them the queries of a class see throughout the bar, or do not.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from meloformer.hid import ENDS_CELL, OPENS_CELL, Annotations, Family
from meloformer.model.attention import Visibility, attend
from meloformer.model.decoding_layers import DecodingLayers
from meloformer.model.masks import NUM_KINDS, SUMMARY, Fields, joint_fields, kinds, row_mask
from meloformer.model.shared_keys import SharedKeys, SharingKeys, reader
from meloformer.model.transformer import MeloFormer
from meloformer.model.visible_keys import History, VisibleKeys, bytes_of

PREFILL_CHUNK = 1024  # tokens of a prompt that are read at once
# Streams that branched off a prompt, and slots of it, from which on it is read once for all of them.
SHARED_BY, SHARED_FROM = 4, 128

_POSITION, _KIND, _ONSET = (Fields._fields.index(name) for name in ("position", "kind", "onset"))


@lru_cache
def _kind(type: int, has_track: bool, has_bar: bool) -> int:
    return int(kinds(*torch.tensor([type, has_track - 1, has_bar - 1])))


class Stream:
    """One stream of a session. `cell`: position, bar, instrument, ordinal and time of the BAR or FILL that is being
    written into, and the slot of its first token; `sounding`: it has an onset, so it will be a segment."""

    def __init__(self, history: History):
        self.history = history
        # What the rule reads of each slot; behind `used` there is no document.
        self.fields = np.full((len(Fields._fields), len(history)), -1, dtype=np.int32)
        self.keys: dict[int, VisibleKeys] = {}
        self.length = self.used = 0  # tokens; slots
        self.cell: tuple[int, ...] | None = None
        self.sounding = False

    def branch(self) -> Stream:
        twin = copy.copy(self)
        twin.history, twin.fields, twin.keys = self.history.branch(self.used), self.fields.copy(), {}
        return twin

    def leave(self) -> None:
        """Nothing more will be written."""
        for keys in self.keys.values():
            if isinstance(keys, SharingKeys):
                keys.leave()

    def take(self, fields: Sequence[int]) -> int:
        """The slot for a key with these fields."""
        if self.used == len(self.history):
            raise ValueError(f"the session holds {self.used} tokens and summaries a stream, this is one more")
        self.fields[:, self.used] = fields
        self.used += 1
        return self.used - 1

    def follow(self, type: int, track: int, cell: tuple[int, ...]) -> None:
        """Keep track of the bar or fill that is being written, past a token that would open `cell`."""
        if type in ENDS_CELL:
            self.cell = cell if type in OPENS_CELL and track >= 0 else None
            self.sounding = False
        elif type == Family.TIME and track >= 0:
            self.sounding = True
        self.length += 1


class DecodingSession:
    """See the module's docstring."""

    def __init__(self, model: MeloFormer, batch_size: int, max_tokens: int, max_summaries: int):
        config = model.config
        self.model, self.rule, self.layers = model, model.rule, DecodingLayers(model)
        room = max_tokens + (max_summaries if self.rule.summaries else 0)
        shape = (config.n_layer, 2, config.n_head, config.d_model // config.n_head)
        nothing = torch.empty(0, *shape, dtype=model.token.weight.dtype, device=model.device)
        self.streams = [Stream(History(nothing, room)) for _ in range(batch_size)]
        self.prompts: set[tuple[int, int]] = set()  # those that are read once for all streams that branched off them
        self.common: dict[tuple, SharedKeys] = {}
        # Kinds of queries that see the same types share their keys; summaries have their own.
        types = self.rule.visible.tolist()
        self.group_of_kind = [types.index(row) for row in types]
        self.group_of_kind[SUMMARY] = NUM_KINDS

    @property
    def batch_size(self) -> int:
        return len(self.streams)

    @property
    def length(self) -> np.ndarray:
        """(B,) tokens of each stream so far."""
        return np.array([stream.length for stream in self.streams])

    @torch.inference_mode()
    def step(self, tokens: np.ndarray, annotations: Annotations, active: np.ndarray | None = None) -> Tensor:
        """Append one token to every active stream; logits (B, V) of what follows. ValueError where one is full."""
        rows = np.arange(self.batch_size) if active is None else np.flatnonzero(active)
        tokens, a = np.asarray(tokens)[rows], Annotations(*(np.asarray(values)[rows] for values in annotations))
        # One row of `x` each: stream, slot, kind, position, instrument, ordinal, time.
        summaries: list[tuple] = []
        regular: list[tuple] = []
        for n, row in enumerate(rows.tolist()):
            stream = self.streams[row]
            bar, track, instrument, ordinal, type, onset, _, time = (int(values[n]) for values in a)
            if self.rule.summaries and stream.sounding and type in ENDS_CELL:
                start, its_bar, its_instrument, its_ordinal, its_time, _ = stream.cell
                slot = stream.take((0, start, stream.length - 1, its_bar, its_instrument, SUMMARY, -1))
                summaries.append((stream, slot, SUMMARY, start, its_instrument, its_ordinal, its_time))
            here = stream.length
            kind = _kind(type, track >= 0, bar >= 0)
            slot = stream.take((0, here, here, bar, instrument, kind, onset))
            stream.follow(type, track, (here, bar, instrument, ordinal, time, slot))
            regular.append((stream, slot, kind, here, instrument, ordinal, time))
        out = torch.zeros(self.batch_size, self.model.vocabulary.size, device=self.model.device)
        if len(rows):
            out[torch.from_numpy(rows).to(out.device)] = self.layers.head(self._run(tokens, summaries, regular)).float()
        return out

    def _look(self, rows: Sequence[tuple]) -> list[VisibleKeys]:
        """The keys that the query of each row sees."""
        readers: list[VisibleKeys] = []
        anew: list[tuple[VisibleKeys, Stream, int]] = []
        for stream, slot, kind, *_ in rows:
            group = self.group_of_kind[kind]
            keys = stream.keys.get(group)
            if keys is None:
                keys = stream.keys[group] = self._new_keys(stream.history, group)
            readers.append(keys)
            # Inside a cell bar and instrument stay, and no onset lies outside: what is before it is seen or is not.
            cell = -1 if kind == SUMMARY or stream.cell is None else stream.cell[0]
            if cell >= 0 and keys.cell == cell:
                start = stream.cell[-1]
                here = stream.fields[:, start : slot + 1]
                keys.update(self.rule.inside_cell(kind, int(here[_ONSET, -1]), here[_KIND], here[_ONSET]), start)
            else:
                keys.cell = cell
                anew.append((keys, stream, slot))
        if anew:
            length = max(slot for *_, slot in anew) + 1
            window = torch.from_numpy(np.stack([stream.fields[:, :length] for _, stream, _ in anew], axis=1))
            query = torch.from_numpy(np.stack([stream.fields[:, slot] for _, stream, slot in anew], axis=1))
            seen = row_mask(self.rule, Fields(*query[..., None]), Fields(*window))[:, 0].numpy()
            for row, (keys, _, slot) in zip(seen, anew):
                keys.update(row[: slot + 1], 0)
        return readers

    def _new_keys(self, history: History, group: int) -> VisibleKeys:
        prompt = _place_of(history)
        if prompt not in self.prompts or group == NUM_KINDS:  # a summary may see nothing of the prompt
            return VisibleKeys(history)
        if (prompt, group) not in self.common:
            self.common[prompt, group] = SharedKeys(history.shared)
        return SharingKeys(history, self.common[prompt, group])

    def _run(self, tokens: np.ndarray, summaries: list[tuple], regular: list[tuple]) -> Tensor:
        """Rows through the layers, their keys into caches -> (regular rows, d_model)."""
        m, device, rows = len(summaries), self.model.device, [*summaries, *regular]
        readers = self._look(rows)
        read = reader(readers, self.model.token.weight.dtype)
        numbers = torch.tensor([row[3:] for row in rows]).to(device)
        position, instrument, ordinal, time = numbers.unbind(1)
        x = self.model.embed(torch.from_numpy(tokens.astype(np.int64)).to(device), instrument[m:], ordinal[m:])
        if m:
            x = torch.cat([self.model.embed(None, instrument[:m], ordinal[:m]), x])
        # A summary is a key of its own query and of the token behind it.
        token_keys = {id(row[0]): keys for row, keys in zip(regular, readers[m:])}
        held = [(n, keys, int(keys.place[row[1]])) for n, (row, keys) in enumerate(zip(rows, readers))]
        held += [
            (n, token_keys[id(row[0])], int(token_keys[id(row[0])].place[row[1]])) for n, row in enumerate(summaries)
        ]
        written, cached = [(n, keys.rows, place) for n, keys, place in held if place >= 0], []

        def attend_cached(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kv = torch.stack([k, v], dim=1)
            cached.append(kv)
            kv = bytes_of(kv)
            for n, to, place in written:
                to[place, i] = kv[n]
            return read(i, q)

        hidden = self.layers(x, m, position, time, attend_cached)
        values = bytes_of(torch.stack(cached, dim=1))  # (N, layer, 2, H, D)
        for n, (stream, slot, *_) in enumerate(rows):
            stream.history.write(slot, values[n])
        return hidden

    @torch.inference_mode()
    def prefill(self, batch: Mapping[str, np.ndarray]) -> Tensor:
        """Read prompts, rows (B, N) of one document each, into an empty session; logits (B, V) behind each.

        PREFILL_CHUNK tokens at a time: memory for pairs grows with the prompt's length, not with its square.
        """
        rows = {name: np.asarray(values) for name, values in batch.items()}
        lengths = (rows["document"] == 0).sum(axis=1)
        if len(lengths) != self.batch_size or self.length.any() or not lengths.all() or rows["document"].max() > 0:
            raise ValueError("prefill needs an empty session and for each stream a row with one document")
        hidden = [
            self._read({name: values[i : i + 1] for name, values in rows.items()}, self.streams[i], int(length))
            for i, length in enumerate(lengths)
        ]
        return self.model.head(torch.stack(hidden)).float()

    def _read(self, row: Mapping[str, np.ndarray], stream: Stream, length: int) -> Tensor:
        """A prompt (1, N) of `length` tokens -> (d_model,) behind its last one."""
        # The segment that a prompt ends in is not closed: the next token may still belong to it.
        closed = row["segment_document"].copy()
        unfinished = row["segment"][0, length - 1]
        if unfinished >= 0:
            closed[0, unfinished] = -1
        row = {**row, "segment_document": closed}
        for start in range(0, length, PREFILL_CHUNK):
            hidden = self._read_chunk(row, stream, start, min(start + PREFILL_CHUNK, length))
        for bar, track, instrument, ordinal, type, _, _, time in zip(
            *(row[name][0, :length].tolist() for name in Annotations._fields)
        ):
            stream.follow(type, track, (stream.length, bar, instrument, ordinal, time, stream.length))
        if stream.cell is not None:
            position, kind = stream.fields[_POSITION], stream.fields[_KIND]
            slot = int(np.flatnonzero((position == stream.cell[0]) & (kind != SUMMARY))[0])
            stream.cell = (*stream.cell[:-1], slot)
        return hidden[0, -1]

    def _read_chunk(self, row: Mapping[str, np.ndarray], stream: Stream, start: int, stop: int) -> Tensor:
        """The tokens [start, stop) of a row, and the summaries of the segments that end there -> hidden (1, n, d)."""
        ends_here = (row["segment_document"] >= 0) & (row["segment_end"] >= start) & (row["segment_end"] < stop)
        chunk = {
            name: values[ends_here][None] if name.startswith("segment_") else values[:, start:stop]
            for name, values in row.items()
        }
        query = Fields(*torch.stack(joint_fields(chunk, self.rule.summaries)))
        first, count = stream.used, query.document.shape[1]
        if first + count > len(stream.history):
            raise ValueError(
                f"the session holds {len(stream.history)} tokens and summaries a stream, the prompt has more"
            )
        stream.used += count
        stream.fields[:, first : stream.used] = torch.stack(query)[:, 0].numpy()
        device = self.model.device
        key = Fields(*torch.from_numpy(stream.fields[:, None, : stream.used]).to(device))
        mask = row_mask(self.rule.to(device), Fields(*(x.to(device) for x in query)), key)
        visibility = Visibility(mask, stream.history.own.dtype)

        def attend_cached(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache = stream.history.own[:, i]
            cache[first : stream.used] = torch.stack([k[0], v[0]], dim=1).to(cache.dtype)
            return attend(q, cache[None, : stream.used, 0], cache[None, : stream.used, 1], visibility)

        inputs = {name: torch.from_numpy(np.ascontiguousarray(values)).to(device) for name, values in chunk.items()}
        x, time, m = self.model.embed(inputs["tokens"], inputs["instrument"], inputs["ordinal"]), inputs["time"], 0
        if self.rule.summaries and ends_here.any():
            m, time = int(ends_here.sum()), torch.cat([inputs["segment_time"], time], dim=1)
            summaries = self.model.embed(None, inputs["segment_instrument"], inputs["segment_ordinal"])
            x = torch.cat([summaries, x], dim=1)
        return self.model.run_layers(x, m, query.position.to(device), time, attend_cached)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these streams only, in this order; a row may be named twice, to branch."""
        kept: list[Stream] = []
        for row in rows:
            stream = self.streams[row]
            kept.append(stream.branch() if stream in kept else stream)
        for stream in self.streams:
            if stream not in kept:
                stream.leave()
        self.streams = kept

    def branch(self, rows: Sequence[int]) -> DecodingSession:
        """A session that goes on with these streams, in this order; this one stays as it is."""
        twin = copy.copy(self)
        twin.streams = [self.streams[row].branch() for row in rows]
        count = Counter(_place_of(stream.history) for stream in twin.streams)
        twin.prompts = set()
        if self.model.device.type == "cpu":
            twin.prompts = {place for place, n in count.items() if n >= SHARED_BY and place[1] >= SHARED_FROM}
        twin.common = {}
        return twin


def _place_of(history: History) -> tuple[int, int]:
    """Where what it shares stands in memory, and its length."""
    return history.shared.data_ptr(), len(history.shared)
