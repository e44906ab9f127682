"""The KV cache of one stream, and out of it the keys that its queries see.

    history = History(prompt, slots, ...)      # K and V of tokens and summaries, in the order they came
    keys = VisibleKeys(history)                # for queries of one class: those that predict a P, say
    keys.update(seen, start)                   # they see these of the slots from `start` on; before it, as they did
    keys.rows[keys.place[slot], i] = kv        # layer i's K and V (2, H, D) of a slot that has none yet
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
        self._values = bytes_of(shared), bytes_of(self.own)

    def __len__(self) -> int:
        return len(self.shared) + len(self.own)

    def send(self, slots: np.ndarray, to: Tensor | np.ndarray, places: np.ndarray) -> None:
        """Copy what stands in rising slots to those places of (places, layer, 2, H, D), as `bytes_of` gives it."""
        first = len(self.shared)
        split = int(np.searchsorted(slots, first))
        shared, own = self._values
        if split:
            to[_index(to, places[:split])] = shared[_index(to, slots[:split])]
        if split < len(slots):
            to[_index(to, places[split:])] = own[_index(to, slots[split:] - first)]

    def write(self, slot: int, values: Tensor | np.ndarray) -> None:
        """Fill one slot of the stream's own with (layer, 2, H, D), as `bytes_of` gives it."""
        self._values[1][slot - len(self.shared)] = values

    def branch(self, used: int) -> History:
        """A stream that goes on behind the first `used` slots. This one may go on too: it writes behind them."""
        own = self.own[: used - len(self.shared)]
        shared = own if not len(self.shared) else torch.cat([self.shared, own]) if len(own) else self.shared
        return History(shared, len(self) - used)


def bytes_of(values: Tensor) -> Tensor | np.ndarray:
    """The same memory as a numpy array where it is a CPU's, in whatever type: numpy copies a few rows in a third of the
    time. Elsewhere the tensor."""
    if values.device.type != "cpu":
        return values
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]).numpy()


def _index(of: Tensor | np.ndarray, index: np.ndarray) -> Tensor | np.ndarray:
    return index if isinstance(of, np.ndarray) else torch.from_numpy(index).to(of.device)


class VisibleKeys:
    """See the module's docstring. `cell` is the caller's: what the slots before the window were chosen for."""

    def __init__(self, history: History):
        self.history, self.cell = history, -1
        self.slots = np.zeros(0, dtype=np.int64)  # the slot at each place
        self.place = np.full(len(history), -1, dtype=np.int64)  # the place of each slot, -1 for those not held
        self.count = 0
        _, layers, _, n_head, size = history.own.shape
        self._take(history.own.new_empty(layers, 2, 1, n_head, 0, size))
        self._read: tuple[Tensor, ...] = ()  # K and V of each layer in turn, (1, H, count, D)

    def _take(self, data: Tensor) -> None:
        self.data = data  # (layer, 2, 1, H, places, D)
        self.rows = bytes_of(data[:, :, 0].permute(3, 0, 1, 2, 4))  # (places, layer, 2, H, D) of it

    def update(self, seen: np.ndarray, start: int) -> None:
        """From slot `start` on hold those of `seen` (n,) bool and no others."""
        changed = np.flatnonzero(seen != (self.place[start : start + len(seen)] >= 0))
        if not len(changed):
            return
        comes = seen[changed]
        coming, leaving = changed[comes] + start, changed[~comes] + start
        free = np.sort(self.place[leaving])
        self.place[leaving] = -1
        reused = min(len(free), len(coming))
        places = np.concatenate([free[:reused], np.arange(self.count, self.count + len(coming) - reused)])
        if reused < len(free):
            self._close(free[reused:])
        self._grow(self.count + len(coming) - reused)
        self.slots[places], self.place[coming] = coming, places
        if len(coming):
            self.history.send(coming, self.rows, places)
        self._read = self.data[..., : self.count, :].flatten(0, 1).unbind(0)

    def attend(self, i: int, q: Tensor) -> Tensor:
        """Attention of one query over all that is held; zeros if that is nothing."""
        if not self.count:
            return torch.zeros_like(q)
        return F.scaled_dot_product_attention(q, *self.of_layer(i))

    def of_layer(self, i: int) -> tuple[Tensor, ...]:
        """K and V (1, H, count, D) of a layer."""
        return self._read[2 * i : 2 * i + 2]

    def _close(self, gaps: np.ndarray) -> None:
        """Fill places that nothing came to, rising, with the last ones."""
        count = self.count - len(gaps)
        stays = np.ones(len(gaps), dtype=bool)
        stays[gaps[gaps >= count] - count] = False
        last, gaps = np.flatnonzero(stays) + count, gaps[gaps < count]
        self.slots[gaps] = self.slots[last]
        self.place[self.slots[gaps]] = gaps
        self.rows[_index(self.rows, gaps)] = self.rows[_index(self.rows, last)]
        self.count = count

    def _grow(self, count: int) -> None:
        room = len(self.slots)
        if count > room:
            more = max(count + 64, room * 3 // 2) - room
            self.slots = np.concatenate([self.slots, np.zeros(more, dtype=np.int64)])
            wider = self.data.new_empty(*self.data.shape[:4], room + more, self.data.shape[5])
            wider[..., : self.count, :] = self.data[..., : self.count, :]
            self._take(wider)
        self.count = count
