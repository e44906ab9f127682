"""The only caller of attention kernels. Backend `dense`: scaled_dot_product_attention with a boolean mask.

`attend(q, k, v, visibility)`: q (B, Q, H, D), k and v (B, K, H, D) -> (B, Q, H, D), softmax(q k^T / sqrt(D)) v over
the keys that each query sees. `Visibility(mask, dtype)` holds a mask (B, Q, K), bool, for kernels that run in `dtype`.

>>> q = torch.randn(1, 3, 2, 8)
>>> attend(q, q, q, Visibility(torch.zeros(1, 3, 3, dtype=torch.bool), q.dtype)).abs().max().item()
0.0

The surprise: a query that sees nothing gives zeros, and kernels differ on that, so such queries are opened to all keys
and zeroed afterwards. The kernel turns a boolean mask into an additive one at every call, half of its forward time on a
CPU: here that is done once for all layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Visibility:
    """What each query sees, in the form that the kernel reads; made once, used by every layer."""

    def __init__(self, mask: Tensor, dtype: torch.dtype):
        self.blind = ~mask.any(dim=-1)  # (B, Q) queries that see nothing
        self.bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)  # (B, Q, K) 0 or -inf
        self.bias.masked_fill_(~(mask | self.blind[..., None]), float("-inf"))


def attend(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
    """Attention of the last Q queries of `visibility`; zeros for those that see nothing."""
    first = visibility.blind.shape[1] - q.shape[1]
    bias, blind = visibility.bias[:, None, first:], visibility.blind[:, first:, None, None]
    q, k, v = (x.to(bias.dtype).transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return out.transpose(1, 2).masked_fill(blind, 0.0)
