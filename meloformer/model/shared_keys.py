"""The keys of a prompt that several streams branched off, read once for all of them.

    common = SharedKeys(prompt)               # of one class of queries, for all streams
    keys = SharingKeys(history, common)       # of one stream: `VisibleKeys` of what it wrote since
    attend = reader([keys, ...])              # one for each row of a step
    out = attend(i, q)                        # layer i, q (N, H, D) -> (N, H * D)

A row's attention is that over its stream's own keys and that over the prompt's, weighed by the sums of exponentials.
`common` holds what any stream sees of the prompt, and a mask says which row sees which of it: a few rows over more keys
than each needs take less time than each row over its own, whose keys come from memory one stream after the other.

The surprise: on a CPU alone. Elsewhere streams keep `VisibleKeys` of prompt and all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from meloformer.model.visible_keys import History, VisibleKeys

# What `scaled_dot_product_attention` calls on a CPU; it gives the logarithm of the sum of exponentials too.
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class SharedKeys:
    """See the module's docstring. `prompt` (slots, layer, 2, H, D)."""

    def __init__(self, prompt: Tensor):
        self.held = VisibleKeys(History(prompt, 0))
        self.readers = np.zeros(len(prompt), dtype=np.int64)  # streams that see each slot
        self._has_changed = False

    def change(self, start: int, before: np.ndarray, after: np.ndarray) -> None:
        """A stream saw these of the slots from `start` on, (n,) bool, and now sees those."""
        self.readers[start : start + len(after)] += after.astype(np.int64) - before
        self._has_changed = True

    def mask(self, readers: Sequence[SharingKeys], dtype: torch.dtype) -> Tensor:
        """(1, 1, R, keys held) to add to the scores of these streams."""
        if self._has_changed:
            self.held.update(self.readers > 0, 0)
            self._has_changed = False
        slots = self.held.slots[: self.held.count]
        seen = torch.from_numpy(np.stack([keys.of_prompt[slots] for keys in readers]))
        return torch.zeros(1, 1, *seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)


class SharingKeys(VisibleKeys):
    """`VisibleKeys` of a stream's own slots; what it sees of its prompt's, `of_prompt`, stands in `common`."""

    def __init__(self, history: History, common: SharedKeys):
        super().__init__(history)
        self.common, self.of_prompt = common, np.zeros(len(history.shared), dtype=bool)

    def update(self, seen: np.ndarray, start: int) -> None:
        rest = max(len(self.of_prompt) - start, 0)
        if rest:
            before, after = self.of_prompt[start : start + len(seen)], seen[:rest]
            if (before != after).any():
                self.common.change(start, before, after)
                before[:] = after
        super().update(seen[rest:], start + rest)

    def leave(self) -> None:
        """The stream ends."""
        self.common.change(0, self.of_prompt, np.zeros_like(self.of_prompt))


def reader(readers: Sequence[VisibleKeys], dtype: torch.dtype) -> Callable[[int, Tensor], Tensor]:
    """Attention for rows that see these keys: (layer, q (N, H, D)) -> (N, H * D)."""
    clusters: dict[SharedKeys, list[int]] = {}
    for n, keys in enumerate(readers):
        if isinstance(keys, SharingKeys):
            clusters.setdefault(keys.common, []).append(n)

    def alone(i: int, q: Tensor) -> Tensor:
        rows = q[:, None, :, None].unbind(0)  # (1, H, 1, D) each
        return torch.cat([keys.attend(i, row) for keys, row in zip(readers, rows)]).flatten(1)

    if not clusters:
        return alone
    masks = [common.mask([readers[n] for n in rows], dtype) for common, rows in clusters.items()]
    index = [torch.tensor(rows) for rows in clusters.values()]
    sharing = torch.cat(index)

    def together(i: int, q: Tensor) -> Tensor:
        own = [_part(keys, i, row) for keys, row in zip(readers, q[:, None, :, None].unbind(0))]
        out, weight = (torch.cat(parts) for parts in zip(*own))  # (N, H, 1, D), (N, H, 1)
        found = [
            _part(common.held, i, q[n].transpose(0, 1)[None], mask) for common, n, mask in zip(clusters, index, masks)
        ]
        # (R, H, 1, D), (R, H, 1)
        prompt, its_weight = (torch.cat(parts, dim=2).transpose(0, 2) for parts in zip(*found))
        share = torch.sigmoid(its_weight - weight[sharing])[..., None].to(q.dtype)
        out[sharing] = torch.lerp(out[sharing], prompt, share)
        return out.flatten(1)

    return together


def _part(keys: VisibleKeys, i: int, q: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention of q (1, H, R, D) over these keys alone, and (1, H, R), the logarithm of its sum of exponentials."""
    if not keys.count:
        return torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf)
    return _attend(q, *keys.of_layer(i), attn_mask=mask)
