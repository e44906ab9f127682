"""The only caller of attention kernels. What each query sees comes in one of four forms, and `attend` knows them all.

    Visibility(mask, dtype)      dense: scaled_dot_product_attention with a boolean mask (B, Q, K), any device
    GatheredVisibility(mask, ..) gathered: chunks of queries, each against the keys that any of them sees; for a CPU
    BlockVisibility(rule, ...)   flex: compiled FlexAttention over a block table, made for CUDA; forward only on a CPU
    PieceVisibility(document)    fused: causal inside each piece and nothing else, the baseline's fastest kernel

`attend(q, k, v, visibility)`: q (B, Q, H, D), k and v (B, K, H, D) -> (B, Q, H, D), softmax(q k^T / sqrt(D)) v over
the keys that each query sees; fewer queries than `visibility` speaks of are its last ones.

>>> q = torch.randn(1, 3, 2, 8)
>>> attend(q, q, q, Visibility(torch.zeros(1, 3, 3, dtype=torch.bool), q.dtype)).abs().max().item()
0.0

The surprise: a query that sees nothing gives zeros, and kernels differ on that, so such queries are opened to all keys
and zeroed afterwards. And FlexAttention is compiled here once, for shapes that never change: a length that does is
an error after a few, never a silent fall back to all pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from meloformer.errors import UserError
from meloformer.model.block_table import BLOCK, KEY_ORDER, block_tables, count_blocks, order_of
from meloformer.model.masks import AttentionRule, Fields, send
from meloformer.model.packed import KEY_WORDS, pack, packed_rule

BLOCK_SIZE = (BLOCK, BLOCK)  # queries, keys; docs/log.md: a quarter less is visited than at 128 x 128
CHUNK = 64  # queries that the gathered backend takes at a time
HIDDEN = -1e9  # added to what is not seen; finite, because a query that sees nothing must not become NaN
# Inductor's one choice of tiles for the backward pass in bf16 is 128 wide on a Hopper or Blackwell device, and it drops
# what does not divide our blocks, kernel options or not: nothing is left, and training fails. Told to time several, it
# has some that fit. The forward pass keeps the tile it is given; matrix products around it are not timed.
CUDA_OPTIONS = {"max_autotune": True, "max_autotune_gemm_backends": "ATEN"}
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Made when first wanted, as what a GPU alone has is imported: both bring in the compiler, which takes longer to import
# than all else together, and most commands never need it.
_compiled_flex: dict[str, Callable] = {}


def _compile_flex(kind: str) -> None:
    """Put FlexAttention for one kind of device, "cuda" or "cpu", where `BlockVisibility.attend` finds it."""
    if kind not in _compiled_flex:
        options = CUDA_OPTIONS if kind == "cuda" else None
        _compiled_flex[kind] = torch.compile(flex_attention, fullgraph=True, dynamic=False, options=options)


def kernels(device: torch.device) -> AbstractContextManager:
    """What may compute `scaled_dot_product_attention` inside this context: on a GPU any kernel but cuDNN's.

    From torch 2.11 on that is the first choice for bfloat16 on Hopper and Blackwell. Its backward pass under a mask
    gives NaN at some lengths (pytorch issue 196678), and each new shape costs it a plan, up to a second.
    """
    return sdpa_kernel(KERNELS) if device.type == "cuda" else nullcontext()


class Visibility:
    """Dense: made once, used by every layer; additive, as kernels make a boolean mask at every call."""

    def __init__(self, mask: Tensor, dtype: torch.dtype):
        self.blind = ~mask.any(dim=-1)  # (B, Q) queries that see nothing
        shown, hidden = (torch.full((), x, dtype=dtype, device=mask.device) for x in (0.0, float("-inf")))
        self.bias = torch.where(mask | self.blind[..., None], shown, hidden)  # (B, Q, K)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = self.blind.shape[1] - q.shape[1]
        bias, blind = self.bias[:, None, first:], self.blind[:, first:, None, None]
        q, k, v = (x.to(bias.dtype).transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        with kernels(q.device):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return out.transpose(1, 2).masked_fill(blind, 0.0)


class GatheredVisibility:
    """Gathered: mask (B, T, T) bool, order (B, T) the queries by kind (`order_of`); tokens stay where they are.

    Queries of one kind see about the same keys, so a chunk of them is multiplied with those keys alone, in three steps
    that autograd knows: copy the keys and values that some query of the chunk sees, softmax of their products, put the
    results back. Chunks of about as many keys share a call. Calls have few shapes (key counts rounded up, powers of two
    of chunks), because the CPU's kernels are generated anew for each. docs/log.md has what it saves.
    """

    def __init__(self, mask: Tensor, order: np.ndarray):
        rows, length = order.shape
        self.blind = ~mask.any(dim=-1)
        chunks: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for b in range(rows):
            for queries in torch.from_numpy(order[b]).split(CHUNK):
                seen = mask[b, queries]
                keys = seen.any(dim=0).nonzero()[:, 0]
                size = _rounded(len(keys))
                bias = torch.full((CHUNK, size), HIDDEN)
                bias[: len(queries), : len(keys)].masked_fill_(seen[:, keys], 0.0)
                padded = (_padded(queries, CHUNK), _padded(keys, size))
                chunks.setdefault(size, []).append((padded[0] + b * length, padded[1] + b * length, bias))
        groups = [
            tuple(map(torch.stack, zip(*chunks[size][a:b])))
            for size in sorted(chunks)
            for a, b in _powers_of_two(len(chunks[size]))
        ]
        self.bias = [bias for _, _, bias in groups]  # (chunks, CHUNK, keys) float32, 0 or HIDDEN
        self.queries = torch.cat([queries.flatten() for queries, _, _ in groups])
        self.keys = torch.cat([keys.flatten() for _, keys, _ in groups])
        self.query_counts = [queries.numel() for queries, _, _ in groups]
        self.key_counts = [keys.numel() for _, keys, _ in groups]
        # Where each query's result stands. A chunk is filled up with repeats behind its own queries: the first counts.
        found, first = np.unique(self.queries.numpy(), return_index=True)
        self.place = torch.from_numpy(first)
        if len(found) != rows * length:
            raise ValueError("order: not a permutation of every row")

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, length, heads, size = k.shape
        # The last layer asks for regular tokens only; the summaries' queries are cheap, for each sees few keys.
        missing = length - q.shape[1]
        q = F.pad(q * size**-0.5, (0, 0, 0, 0, missing, 0)).flatten(0, 1).flatten(1)
        # In float32, for the gradient of a key adds up over all chunks that see it.
        k_v = torch.cat([k.flatten(0, 1), v.flatten(0, 1)], dim=1).flatten(1).float()
        queries = F.embedding(self.queries, q).to(v.dtype).split(self.query_counts)
        keys_values = F.embedding(self.keys, k_v).to(v.dtype).split(self.key_counts)
        out = []
        for chunk_q, chunk_kv, bias in zip(queries, keys_values, self.bias):
            chunk_q = chunk_q.view(len(bias), CHUNK, heads, size).transpose(1, 2)
            chunk_k, chunk_v = chunk_kv.view(len(bias), -1, 2, heads, size).permute(2, 0, 3, 1, 4)
            scores = chunk_q @ chunk_k.transpose(-1, -2) + bias[:, None].to(v.dtype)
            out.append((scores.softmax(dim=-1) @ chunk_v).transpose(1, 2).flatten(0, 1).flatten(1))
        out = F.embedding(self.place, torch.cat(out)).view(rows, length, heads, size)
        return out[:, missing:].masked_fill(self.blind[:, missing:, None, None], 0.0)


def _rounded(count: int) -> int:
    """At least one, up to a multiple of 64 (to 256), 128 (to 1,024) or 512."""
    step = 64 if count <= 256 else 128 if count <= 1024 else 512
    return max(1, -(-count // step)) * step


def _powers_of_two(count: int) -> list[tuple[int, int]]:
    """`count` things cut into runs [first, last) of 16, 8, 4, 2 and 1."""
    runs, first = [], 0
    for length in (16, 8, 4, 2, 1):
        while count - first >= length:
            runs.append((first, first + length))
            first += length
    return runs


def _padded(indices: Tensor, length: int) -> Tensor:
    """Indices with the last one (0 if there is none) repeated up to `length`."""
    last = indices[-1:] if len(indices) else indices.new_zeros(1)
    return torch.cat([indices, last.expand(length - len(indices))])


class _Permute(torch.autograd.Function):
    """x (B, T, H, D) in another order along T. The gradient is gathered too: scattering adds in atomics."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.take_along_dim(order[..., None, None], 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.take_along_dim(inverse[..., None, None], 1), None, None


class BlockVisibility:
    """Flex: fields (B, T) on the CPU, in physical order, the summaries first; the tables are made on `device`.

    Queries stand in that order; keys are put into their own, `key_order` (B, T), for the call of the kernel.
    """

    def __init__(
        self,
        rule: AttentionRule,
        fields: Fields,
        num_summaries: int,
        device: torch.device | str = "cpu",
        block_size: tuple[int, int] = BLOCK_SIZE,
    ):
        rows, length = fields.document.shape
        device_rule = rule.to(device)
        words = pack(rule, fields)
        self.key_order, places = None, [None] * rows
        if not rule.full_causal:
            order = np.stack([order_of(fields.at(b), num_summaries, KEY_ORDER, block_size[1]) for b in range(rows)])
            places = order.argsort(axis=1)
            self.key_order, self.key_place = (send(x, device) for x in (order, places))
            words[:KEY_WORDS] = words[:KEY_WORDS].take_along_dim(torch.from_numpy(order)[None], -1)
        counts = [
            count_blocks(device_rule, fields.at(b), num_summaries, block_size, device, places[b]) for b in range(rows)
        ]
        self.counts = torch.stack(counts)  # (B, blocks of queries, blocks of keys) visible pairs
        kv_num, kv, full_num, full, q_num, q, full_q_num, full_q = block_tables(self.counts, block_size)
        self.block_mask = BlockMask(
            seq_lengths=(length, length),
            kv_num_blocks=kv_num,
            kv_indices=kv,
            full_kv_num_blocks=full_num,
            full_kv_indices=full,
            q_num_blocks=q_num,
            q_indices=q,
            full_q_num_blocks=full_q_num,
            full_q_indices=full_q,
            BLOCK_SIZE=block_size,
            mask_mod=packed_rule(rule, send(words, device)),
        )
        # Never the kernel for decoding, which is chosen where queries are few and has tiles of its own.
        tile = {"fwd_BLOCK_M": block_size[0], "fwd_BLOCK_N": block_size[1], "FORCE_USE_FLEX_ATTENTION": True}
        self.kernel_options = tile if torch.device(device).type == "cuda" else None
        _compile_flex(torch.device(device).type)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type == "cpu" and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
            raise UserError("model.backend is 'flex', which has no backward pass on a CPU; train with --backend dense")
        # The last layer asks for regular tokens only. One shape for all layers is one graph for all layers.
        missing = k.shape[1] - q.shape[1]
        q = F.pad(q, (0, 0, 0, 0, missing, 0))
        q, k = (x.to(v.dtype) for x in (q, k))
        if self.key_order is not None:
            k, v = (_Permute.apply(x, self.key_order, self.key_place) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = _compiled_flex[q.device.type](q, k, v, block_mask=self.block_mask, kernel_options=self.kernel_options)
        return out.transpose(1, 2)[:, missing:]


class PieceVisibility:
    """Fused: documents (B, N), -1 for padding; every piece is causal within itself, padding gives zeros."""

    def __init__(self, document: np.ndarray, device: torch.device | str = "cpu"):
        flat = np.asarray(document).reshape(-1)
        self.shape = np.shape(document)
        # Padding stands in short pieces of its own: it costs little, and its outputs are dropped.
        place = np.arange(len(flat))
        starts = (
            (place % self.shape[1] == 0) | (np.diff(flat, prepend=flat[0]) != 0) | ((flat < 0) & (place % 128 == 0))
        )
        self.edges = [*np.flatnonzero(starts).tolist(), len(flat)]
        self.longest = int(np.diff(self.edges).max())
        self.cumulative = send(np.array(self.edges, dtype=np.int32), device)
        self.blind = send(flat < 0, device)[:, None, None]
        if self.blind.is_cuda:
            from torch.nn.attention.varlen import varlen_attn

            self.varlen_attn = varlen_attn

    @staticmethod
    def kernel(q: Tensor) -> str:
        """The name of the kernel that `attend` takes for this kind of tensor."""
        half = q.dtype in (torch.float16, torch.bfloat16)
        return "varlen_attn" if q.is_cuda and half else "causal sdpa, piece by piece"

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.to(v.dtype).flatten(0, 1) for x in (q, k, v))  # (B * N, H, D)
        if self.kernel(q) == "varlen_attn":
            ends, longest = self.cumulative, self.longest
            out = self.varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0))
        else:
            pieces = zip(self.edges, self.edges[1:])
            out = torch.cat([self._causal(q[a:b], k[a:b], v[a:b]) for a, b in pieces])
        return out.masked_fill(self.blind, 0.0).unflatten(0, self.shape)

    @staticmethod
    def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)


# What a backend makes of a batch, once for all layers; dense keeps the mask itself until its precision is known.
Prepared = GatheredVisibility | BlockVisibility | PieceVisibility


def attend(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility | Prepared) -> Tensor:
    """Attention of the last Q queries of `visibility`; zeros for those that see nothing."""
    return visibility.attend(q, k, v)
