"""A generator of one level: a transformer over the patches of a problem, given the states that its parent hands down.

A problem of level l is one patch of level l - 1 (at level 0 the whole roll), cut into a grid of R x C patches.

    level.states(cells, masked, valid, conditions) -> (K, N, width), the state that predicts each patch, in grid order
    neighbourhood(states, ...)                     -> a patch's own state and its four neighbours', for the level below

K problems, N = R * C patches (row by row in memory whatever the scan order), P condition tokens before them. Cells are
velocity classes 0..255, int64, and -1 where padding stands. Two kinds, with parameters of their own:

* `MarLevel`: every patch sees every other; a masked patch enters as a learned vector, and its state predicts it.
* `ArLevel`: causal in the scan order; a token holds the content of the patch before it, and its state predicts its own.
  `step` does the same for one patch after the other, over a cache.

What surprises: a state of an ArLevel never holds the patch that it stands for, so it may be handed down to that patch;
the neighbours on the right and below come later in either scan order, hold it, and are handed down as zeros.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meloformer.fractal.velocity import CLASSES
from meloformer.model.attention import kernels
from meloformer.model.layers import FeedForward, RMSNorm, rotate
from meloformer.model.linear import Linear

SLOTS = 5  # own, above, right, below, left
COLUMN_WAVE, ROW_WAVE = 512.0, 64.0  # longest wavelengths of rotary positions, in patches


class Block(nn.Module):
    """Attention and feed-forward, each behind its RMSNorm."""

    def __init__(self, width: int, num_heads: int, d_ff: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm = RMSNorm(width)
        self.qkv = Linear(width, 3 * width, bias=False)
        self.query_norm, self.key_norm = RMSNorm(width // num_heads), RMSNorm(width // num_heads)
        self.out = Linear(width, width, bias=False)
        self.feed_forward = FeedForward(width, d_ff)

    def forward(self, x: Tensor, mask: Tensor | None, causal: bool, rotary=None, cache: Cache | None = None) -> Tensor:
        """x (K, T, width) -> the same; mask (K, 1, 1 or T, keys) bool. With a cache x holds the next T tokens."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (K, T, H, D)
        q, k = self.query_norm(q), self.key_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if cache is not None:
            k, v = cache.append(k, v)
        with kernels(q.device):  # problems come in another number every time
            attended = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        x = x + self._drop(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self._drop(self.feed_forward(x))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Cache:
    """Keys and values of one block, for K problems and at most `length` tokens."""

    def __init__(self, length: int):
        self.length, self.filled = length, 0
        self.k = self.v = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take the next tokens' k and v (K, H, T, D); returns those of all tokens so far."""
        if self.k is None:
            shape = (*k.shape[:2], self.length, k.shape[3])
            self.k, self.v = k.new_empty(shape), v.new_empty(shape)
        end = self.filled + k.shape[2]
        self.k[:, :, self.filled : end], self.v[:, :, self.filled : end] = k, v
        self.filled = end
        return self.k[:, :, :end], self.v[:, :, :end]


class Level(nn.Module):
    """What both kinds share. `rows` x `columns` is the grid; `columns` None means that it varies (level 0)."""

    is_causal = False

    def __init__(
        self,
        width: int,
        num_blocks: int,
        num_heads: int,
        d_ff: int,
        dropout: float,
        patch: int,
        rows: int,
        columns: int | None,
        cond_width: int | None,
    ):
        super().__init__()
        self.width, self.rows, self.columns, self.patch = width, rows, columns, patch
        self.gradient_checkpointing = False
        self.pixels = Linear(2 * patch * patch, width, bias=False)
        # A single cell is also looked up: to copy a velocity exactly, its number on a line is a poor key.
        self.velocity = nn.Embedding(CLASSES + 1, width) if patch == 1 else None
        self.row = nn.Parameter(torch.empty(rows, width))
        self.column = nn.Parameter(torch.empty(columns, width)) if columns is not None else None
        if cond_width is None:
            self.first = nn.Parameter(torch.empty(1, width))  # what level 0 is conditioned on
            self.condition = self.slot = None
        else:
            self.first = None
            self.condition = Linear(cond_width, width, bias=False)
            self.slot = nn.Parameter(torch.empty(SLOTS, width))
        self.input_norm = RMSNorm(width)
        self.blocks = nn.ModuleList(Block(width, num_heads, d_ff, dropout) for _ in range(num_blocks))
        self.output_norm = RMSNorm(width)

    @property
    def num_prefix(self) -> int:
        return 1 if self.condition is None else SLOTS

    # --- the tokens -------------------------------------------------------------------------------------------

    def embed(self, cells: Tensor) -> Tensor:
        """Patches (K, N, cells) of classes -> (K, N, width)."""
        sounding = (cells > 0).to(self.pixels.weight.dtype)
        values = torch.where(cells < 0, 0.0, cells * (2.0 / (CLASSES - 1)) - 1.0).to(sounding.dtype)
        x = self.pixels(torch.cat([values, sounding], dim=-1))
        return x if self.velocity is None else x + self.velocity(cells[..., 0] + 1)

    def positions(self, num_columns: int) -> Tensor:
        """(N, width), in grid order."""
        x = self.row[:, None] if self.column is None else self.row[:, None] + self.column
        return x.expand(self.rows, num_columns, self.width).flatten(0, 1)

    def rotary(self, num_columns: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """cos and sin (1, N, D / 2) of a grid that varies: half of the planes turn with the column, half with the row.

        A fixed grid has learned positions on both axes and needs none.
        """
        if self.column is not None:
            return None
        planes = self.width // self.blocks[0].num_heads // 4
        at = torch.arange(planes, dtype=torch.float64, device=device) / planes
        rows = torch.arange(self.rows, device=device).repeat_interleave(num_columns)
        columns = torch.arange(num_columns, device=device).repeat(self.rows)
        angles = [
            axis[:, None] / (longest / (2 * math.pi)) ** at
            for axis, longest in ((columns, COLUMN_WAVE), (rows, ROW_WAVE))
        ]
        angle = torch.cat(angles, dim=-1).float()[None]
        return angle.cos(), angle.sin()

    def prefix(self, conditions: Tensor | None, num_problems: int) -> Tensor:
        """(K, P, width) out of (K, 5, cond_width), or the learned vector."""
        if self.condition is None:
            return self.first.expand(num_problems, 1, self.width)
        return self.condition(conditions) + self.slot

    def run(self, x: Tensor, prefix: Tensor, valid: Tensor | None, rotary) -> Tensor:
        """Embedded patches (K, N, width) in scan order -> states (K, N, width). valid (K, N) or None for all."""
        p = prefix.shape[1]
        x = self.input_norm(torch.cat([prefix.to(x.dtype), x], dim=1))
        if rotary is not None:
            rotary = tuple(F.pad(part, (0, 0, p, 0), value=float(i == 0)) for i, part in enumerate(rotary))
        mask, causal = None, self.is_causal
        if valid is not None:
            mask = F.pad(valid, (p, 0), value=True)[:, None, None]
            if causal:
                length = x.shape[1]
                mask = mask & torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
                causal = False
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, causal, rotary, use_reentrant=False)
            else:
                x = block(x, mask, causal, rotary)
        return self.output_norm(x[:, p:])

    def states(self, cells: Tensor, masked: Tensor, valid: Tensor | None, conditions: Tensor | None) -> Tensor:
        raise NotImplementedError


class MarLevel(Level):
    """Masked: bidirectional."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.mask_token = nn.Parameter(torch.empty(self.width))

    def states(self, cells: Tensor, masked: Tensor, valid: Tensor | None, conditions: Tensor | None) -> Tensor:
        """cells (K, N, cells), masked (K, N) bool -> (K, N, width). What stands in a masked patch is not looked at."""
        num_columns = cells.shape[1] // self.rows
        x = torch.where(masked[..., None], self.mask_token, self.embed(cells))
        x = x + self.positions(num_columns)
        rotary = self.rotary(num_columns, cells.device)
        return self.run(x, self.prefix(conditions, len(cells)), valid, rotary)


class ArLevel(Level):
    """Autoregressive: causal in the scan order."""

    is_causal = True

    def __init__(self, *arguments, scan_order: str, **options):
        super().__init__(*arguments, **options)
        self.scan_order = scan_order
        self.start = nn.Parameter(torch.empty(self.width))
        self.line_start = nn.Parameter(torch.empty(self.width))

    def scan(self, num_columns: int, device: torch.device) -> Tensor:
        """(N,) the grid index of the i-th patch of the scan."""
        grid = torch.arange(self.rows * num_columns, device=device).view(self.rows, num_columns)
        return (grid if self.scan_order == "row_major" else grid.T).flatten()

    def line(self, num_columns: int) -> int:
        """Patches in one line of the scan."""
        return num_columns if self.scan_order == "row_major" else self.rows

    def states(self, cells: Tensor, masked: Tensor, valid: Tensor | None, conditions: Tensor | None) -> Tensor:
        """cells (K, N, cells) -> (K, N, width). The state of a patch depends on the patches before it alone."""
        num_columns = cells.shape[1] // self.rows
        scan = self.scan(num_columns, cells.device)
        content = self.embed(cells[:, scan[:-1]])
        if valid is not None:  # place i holds the patch before: what that one is decides
            valid = F.pad(valid[:, scan[:-1]], (1, 0), value=True)
            content = content * valid[:, 1:, None]
        x = torch.cat([self.start.expand(len(cells), 1, self.width).to(content.dtype), content], dim=1)
        x = x + self.places(num_columns, scan)
        rotary = self.rotary(num_columns, cells.device)
        if rotary is not None:
            rotary = tuple(part[:, scan] for part in rotary)
        states = self.run(x, self.prefix(conditions, len(cells)), valid, rotary)
        return torch.empty_like(states).index_copy(1, scan, states)

    def places(self, num_columns: int, scan: Tensor) -> Tensor:
        """(N, width) in scan order: where a patch stands, and whether the one before it stands beside it."""
        begins = torch.arange(len(scan), device=scan.device) % self.line(num_columns) == 0
        return self.positions(num_columns)[scan] + begins[:, None] * self.line_start

    # --- one patch after the other ----------------------------------------------------------------------------

    def begin(self, num_problems: int, num_columns: int, valid: Tensor | None, conditions: Tensor | None) -> Walk:
        return Walk(self, num_problems, num_columns, valid, conditions)


class Walk:
    """`ArLevel.states` patch by patch, over a cache: `step(content of the patch before)` gives the next state."""

    def __init__(self, level: ArLevel, num_problems: int, num_columns: int, valid: Tensor | None, conditions):
        self.level, device = level, level.row.device
        self.scan = level.scan(num_columns, device)
        self.places = level.places(num_columns, self.scan)
        self.rotary = level.rotary(num_columns, device)
        p = level.num_prefix
        self.valid = None if valid is None else F.pad(valid[:, self.scan[:-1]], (p + 1, 0), value=True)
        self.caches = [Cache(p + len(self.scan)) for _ in level.blocks]
        self.done = 0
        prefix = level.prefix(conditions, num_problems)
        still = None
        if self.rotary is not None:
            still = (torch.ones_like(self.rotary[0][:, :p]), torch.zeros_like(self.rotary[1][:, :p]))
        self._run(prefix, still, causal=True)

    def step(self, before: Tensor | None) -> Tensor:
        """(K, width), the state of the next patch of the scan; `before` (K, cells) is the patch before, if any."""
        level, i = self.level, self.done
        if before is None:
            x = level.start.expand(self.caches[0].k.shape[0], 1, level.width)
        else:
            x = level.embed(before[:, None])
            if self.valid is not None:
                x = x * self.valid[:, level.num_prefix + i, None, None]
        rotary = None if self.rotary is None else tuple(part[:, self.scan[i], None] for part in self.rotary)
        self.done += 1
        return self._run(x + self.places[i], rotary, causal=False)[:, 0]

    def _run(self, x: Tensor, rotary, causal: bool) -> Tensor:
        x = self.level.input_norm(x)
        mask = None
        if self.valid is not None and not causal:
            mask = self.valid[:, None, None, : self.caches[0].filled + x.shape[1]]
        for block, cache in zip(self.level.blocks, self.caches):
            x = block(x, mask, causal, rotary, cache)
        return self.level.output_norm(x)


# --- what is handed down ----------------------------------------------------------------------------------------


def neighbourhood(states: Tensor, columns: int, chosen: Tensor, valid: Tensor | None, causal: bool) -> Tensor:
    """States (K, N, D) -> (S, 5, D): those of the chosen patches (S,) (indices into K * N) and of their neighbours
    above, right, below and left; zeros beyond the border, for padding, and for what an AR level knows only later."""
    k, n, d = states.shape
    rows = n // columns
    if valid is not None:
        states = states * valid[..., None]
    padded = F.pad(states.view(k, rows, columns, d), (0, 0, 1, 1, 1, 1)).flatten(0, 2)
    problem, place = chosen // n, chosen % n
    own = (problem * (rows + 2) + place // columns + 1) * (columns + 2) + place % columns + 1
    above, left, nowhere = own - (columns + 2), own - 1, torch.zeros_like(own)
    right, below = (nowhere, nowhere) if causal else (own + 1, own + (columns + 2))
    return padded[torch.stack([own, above, right, below, left], dim=1)]
