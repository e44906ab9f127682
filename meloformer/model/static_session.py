"""`DecodingSession.step` with shapes that stay and nothing that the host has to know: for a GPU, and for graphs on it.

    static = StaticSession(session, batch_size, room)      # B streams where the session's one stream stands
    logits = static.step(tokens, annotations, active)      # (B,), (8, B), (B,) on the device -> (B, V)

Every row takes two rows through the layers, a summary that may be absent and the token. `span` slots are looked at and
`width` keys at most are read: the caller sets both, and asks `has_overflowed` once in a while. The prompt's keys stand
once for all streams. Everything changes in place, and `save` and `restore` take steps back.

The surprise: too narrow a `width` is found out afterwards. Then the steps since `save` are done again with a wider one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from meloformer.hid import ENDS_CELL, OPENS_CELL, Family
from meloformer.model.attention import Visibility, attend
from meloformer.model.cache import DecodingSession
from meloformer.model.masks import SUMMARY, Fields, kinds

_CHANGING = ("used", "length", "cell", "sounding", "has_overflowed")


def any_of(type: Tensor, families: Iterable[int]) -> Tensor:
    """bool, of the shape of `type`: whether it is one of these families. Comparisons alone, for graphs to capture."""
    found = torch.zeros_like(type, dtype=torch.bool)
    for family in families:
        found = found | (type == family)
    return found


class StaticSession:
    """See the module's docstring. Public: used (B,) slots, `span`, `width`, has_overflowed () bool."""

    def __init__(self, session: DecodingSession, batch_size: int, room: int):
        (stream,), device = session.streams, session.model.device
        self.model, self.layers, self.rule = session.model, session.layers, session.rule.to(device)
        self.prompt = stream.used
        self.slots = stream.used + room
        self.span = self.width = self.slots
        own = stream.history.own
        # (slots of the prompt, then those of each stream, then one for what is absent; layer, 2, H, D)
        self.cache = own.new_empty(self.prompt + batch_size * room + 1, *own.shape[1:])
        self.cache[: self.prompt] = own[: self.prompt]
        self.cache[-1] = 0  # read behind a mask, which a NaN would pass
        fields = torch.full((len(Fields._fields), batch_size, self.slots + 1), -1, dtype=torch.int32, device=device)
        fields[:, :, : self.prompt] = torch.from_numpy(stream.fields[:, None, : self.prompt]).to(device)
        self.fields = fields
        cell = (-1,) * 5 if stream.cell is None else stream.cell[:5]
        self.cell = torch.tensor(cell, device=device)[:, None].repeat(1, batch_size)
        self.used, self.length = (torch.full((batch_size,), n, device=device) for n in (stream.used, stream.length))
        self.sounding = torch.full((batch_size,), stream.sounding, device=device)
        self.has_overflowed = torch.zeros((), dtype=torch.bool, device=device)

    def step(self, tokens: Tensor, annotations: Tensor, active: Tensor) -> Tensor:
        """Append one token to every active stream; logits (B, V) of what follows. Nothing is read back."""
        bar, track, instrument, ordinal, type, onset, _, time = annotations
        is_closing = any_of(type, ENDS_CELL) & active
        closing = is_closing & self.sounding if self.rule.summaries else torch.zeros_like(active)
        start, its_bar, its_instrument, its_ordinal, its_time = self.cell
        here, none = self.length, torch.full_like(bar, -1)
        summary = (closing.long() - 1, start, here - 1, its_bar, its_instrument, torch.full_like(bar, SUMMARY), none)
        token = (active.long() - 1, here, here, bar, instrument, kinds(type, track, bar), onset)
        query = Fields(*(torch.stack(pair, dim=1).int() for pair in zip(summary, token)))  # (B, 2) each

        present = torch.stack([closing, active], dim=1)
        slots = self.used[:, None] + present.cumsum(dim=1) - 1
        slots = torch.where(present & (slots < self.slots), slots, self.slots)
        self.has_overflowed |= (present & (slots == self.slots)).any()
        self.fields.scatter_(2, slots.expand(len(query), -1, -1), torch.stack(query))
        self.used += present.sum(dim=1)
        self.has_overflowed |= (self.used > self.span).any()
        index, visibility = self._visible(query)
        written, count = self._flat(slots), len(tokens)

        def attend_cached(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.unflatten(0, (2, count)).transpose(0, 1) for x in (q, k, v))  # (B, 2, H, D)
            cache = self.cache[:, i]
            cache[written] = torch.stack([k, v], dim=2).to(cache.dtype)
            keys, values = cache[index].unbind(2)
            return attend(q, keys, values, visibility).transpose(0, 1).flatten(0, 1).flatten(1)

        x = torch.cat(
            [
                self.model.embed(None, its_instrument, its_ordinal)
                if self.rule.summaries
                else self.model.token(tokens),
                self.model.embed(tokens, instrument, ordinal),
            ]
        )
        position, ticks = torch.cat([start, here]), torch.cat([its_time, time])
        hidden = self.layers(x, count, position, ticks, attend_cached)

        opens = any_of(type, OPENS_CELL) & is_closing & (track >= 0)
        cell = torch.stack([here, bar, instrument, ordinal, time])
        self.cell.copy_(torch.where(opens, cell, torch.where(is_closing, -1, self.cell)))
        self.sounding.copy_((self.sounding & ~is_closing) | (active & (type == Family.TIME) & (track >= 0)))
        self.length += active
        return self.layers.head(hidden).float()

    def _flat(self, slots: Tensor) -> Tensor:
        """Where slots (B, n) stand in the cache."""
        room = self.slots - self.prompt
        first = self.prompt + room * torch.arange(len(slots), device=slots.device)[:, None]
        own = torch.where(slots < self.slots, first + slots - self.prompt, len(self.cache) - 1)
        return torch.where(slots < self.prompt, slots, own)

    def _visible(self, query: Fields) -> tuple[Tensor, Visibility]:
        """Places (B, width) in the cache of the keys that either query of a stream sees, and which sees which."""
        place = torch.arange(self.span, device=self.used.device)
        key = Fields(*self.fields[:, :, : self.span])
        seen = self.rule(query.queries(), key.keys()) & (place < self.used[:, None])[:, None]  # (B, 2, span)
        either = seen.any(dim=1)
        number = either.cumsum(dim=1)
        self.has_overflowed |= (number[:, -1] > self.width).any()
        to = torch.where(either & (number <= self.width), number - 1, self.width)
        index = torch.full((len(to), self.width + 1), self.slots, device=to.device)
        index = index.scatter_(1, to, place.expand_as(to))[:, : self.width]
        exists = torch.arange(self.width, device=to.device) < number[:, -1:]
        mask = seen.gather(2, index.clamp(max=self.span - 1)[:, None].expand(-1, 2, -1)) & exists[:, None]
        return self._flat(torch.where(exists, index, self.slots)), Visibility(mask, self.cache.dtype)

    def save(self) -> list[Tensor]:
        """A copy for `restore`. What stands behind `used` is never read, so keys need no copy."""
        return [getattr(self, name).clone() for name in _CHANGING]

    def restore(self, saved: list[Tensor]) -> None:
        for name, values in zip(_CHANGING, saved):
            getattr(self, name).copy_(values)

    def keep(self, rows: Tensor) -> None:
        """Go on with these streams only."""
        room = self.slots - self.prompt
        own = self.cache[self.prompt : -1].unflatten(0, (-1, room))[rows].flatten(0, 1)
        self.cache = torch.cat([self.cache[: self.prompt], own, self.cache[-1:]])
        self.fields, self.cell = self.fields[:, rows], self.cell[:, rows]
        self.used, self.length, self.sounding = self.used[rows], self.length[rows], self.sounding[rows]
