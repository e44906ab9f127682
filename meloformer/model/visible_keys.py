"""The KV cache of one stream, and out of it the keys that its queries see.

    history = History(prompt, slots, ...)      # K and V of tokens and summaries, in the order they came
    keys = VisibleKeys(history)                # for queries of one class: those that predict a P, say
    keys.update(seen, start)                   # they see these of the slots from `start` on; before it, as they did
    keys.places(slot)[i].copy_(kv)             # layer i's K and V (2, H, D) of a slot that has none yet
    out = keys.attend(i, q)                    # q (1, H, 1, D) -> the same

From one query of a class to the next few keys come and go: what is there stays, what goes is written over, what comes
is copied out of the history, for all layers at once. So a step reads what its token may see, and little else.

The surprise: the keys stand in no order at all. Attention does not ask for one: positions are turned into the keys.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class History:
    """K and V (slots, layer, 2, H, D) of a stream: first those of the stream that it branched off, which it shares
    and leaves alone, then its own."""

    def __init__(self, shared: Tensor, room: int):
        """`shared` (slots, layer, 2, H, D); room for so many more."""
        self.shared = shared
        self.own = shared.new_empty(room, *shared.shape[1:])

    def __len__(self) -> int:
        return len(self.shared) + len(self.own)

    def read(self, slots: np.ndarray) -> Tensor:
        """(n, layer, 2, H, D) of rising slots."""
        first = len(self.shared)
        split = int(np.searchsorted(slots, first))
        if split == 0:
            return _rows(self.own, slots - first)
        if split == len(slots):
            return _rows(self.shared, slots)
        return torch.cat([_rows(self.shared, slots[:split]), _rows(self.own, slots[split:] - first)])

    def write(self, slot: int, values: Tensor) -> None:
        """One slot of the stream's own or several from it on, (n, layer, 2, H, D)."""
        first = slot - len(self.shared)
        self.own[first : first + len(values)] = values

    def branch(self, used: int) -> History:
        """A stream that goes on behind the first `used` slots. This one may go on too: it writes behind them."""
        own = self.own[: used - len(self.shared)]
        shared = own if not len(self.shared) else torch.cat([self.shared, own]) if len(own) else self.shared
        return History(shared, len(self) - used)


def _rows(values: Tensor, index: np.ndarray) -> Tensor:
    """values[index], without a copy where the rows stand together."""
    if index[-1] - index[0] == len(index) - 1:
        return values[int(index[0]) : int(index[-1]) + 1]
    return values[torch.from_numpy(index).to(values.device)]


class VisibleKeys:
    """See the module's docstring. `cell` is the caller's: what the slots before the window were chosen for."""

    def __init__(self, history: History):
        self.history, self.cell = history, -1
        _, layers, _, n_head, size = history.own.shape
        self.data = history.own.new_empty(layers, 2, 1, n_head, 0, size)
        self.slots = np.zeros(0, dtype=np.int64)  # the slot at each place
        self.place = np.full(len(history), -1, dtype=np.int64)  # the place of each slot, -1 for those not held
        self.count = 0
        self._read: tuple[Tensor, ...] = ()  # K and V of each layer in turn, (1, H, count, D)

    def update(self, seen: np.ndarray, start: int) -> None:
        """From slot `start` on hold those of `seen` (n,) bool and no others."""
        held = self.place[start : start + len(seen)] >= 0
        coming, leaving = np.flatnonzero(seen & ~held) + start, np.flatnonzero(held & ~seen) + start
        free = np.sort(self.place[leaving])
        self.place[leaving] = -1
        reused = min(len(free), len(coming))
        places = np.concatenate([free[:reused], np.arange(self.count, self.count + len(coming) - reused)])
        self._close(free[reused:])
        self._grow(self.count + len(coming) - reused)
        self.slots[places], self.place[coming] = coming, places
        if len(coming):
            values = self.history.read(coming).permute(1, 2, 3, 0, 4)
            first, last = int(places[0]), int(places[-1])
            if last - first == len(places) - 1:  # they stand together: a plain copy
                self.data[:, :, 0, :, first : last + 1] = values
            else:
                self.data[:, :, 0, :, torch.from_numpy(places).to(self.data.device)] = values
        self._read = self.data[..., : self.count, :].flatten(0, 1).unbind(0)

    def places(self, slot: int) -> tuple[Tensor, ...]:
        """For each layer where K and V (2, H, D) of a slot stand; nothing if the slot is not held."""
        place = int(self.place[slot])
        return self.data[:, :, 0, :, place].unbind(0) if place >= 0 else ()

    def attend(self, i: int, q: Tensor) -> Tensor:
        """Attention of one query over all that is held; zeros if that is nothing."""
        if not self.count:
            return torch.zeros_like(q)
        return F.scaled_dot_product_attention(q, self._read[2 * i], self._read[2 * i + 1])

    def _close(self, gaps: np.ndarray) -> None:
        """Fill places that nothing came to, rising, with the last ones."""
        if not len(gaps):
            return
        count = self.count - len(gaps)
        stays = np.ones(len(gaps), dtype=bool)
        stays[gaps[gaps >= count] - count] = False
        last, gaps = np.flatnonzero(stays) + count, gaps[gaps < count]
        self.slots[gaps] = self.slots[last]
        self.place[self.slots[gaps]] = gaps
        gaps, last = (torch.from_numpy(x).to(self.data.device) for x in (gaps, last))
        self.data[..., gaps, :] = self.data[..., last, :]
        self.count = count

    def _grow(self, count: int) -> None:
        room = len(self.slots)
        if count > room:
            more = max(count + 64, room * 3 // 2) - room
            self.slots = np.concatenate([self.slots, np.zeros(more, dtype=np.int64)])
            wider = self.data.new_empty(*self.data.shape[:4], room + more, self.data.shape[5])
            wider[..., : self.count, :] = self.data[..., : self.count, :]
            self.data = wider
        self.count = count
