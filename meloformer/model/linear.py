"""A linear map whose large products on a CPU go through oneDNN while nothing is learnt.

In: x (.., in) float; out (.., out): `torch.nn.Linear` in all else, and with the same parameters.

>>> Linear(4, 8, bias=False)(torch.zeros(3, 4)).shape
torch.Size([3, 8])

What surprises: torch hands float32 products to MKL, which leaves AVX-512 unused on processors that are not Intel's.
oneDNN, which torch brings along too, took 0.4 of the time on an EPYC. Its operator has no gradient and costs 10 us a
call, so training and small products stay where they were, and so does every other dtype and device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEAST_ROWS, LEAST_PRODUCTS = 8, 2**20  # below, the call costs more than it saves
# What torch's own compiler emits for a linear map on a CPU; a build without oneDNN has none.
ONEDNN = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None


class Linear(nn.Linear):
    """`nn.Linear`, faster on a CPU without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if (
            ONEDNN is None
            or torch.is_grad_enabled()
            or x.dtype is not torch.float32
            or weight.dtype is not torch.float32
            or x.device.type != "cpu"
            or x.numel() < LEAST_ROWS * self.in_features
            or x.numel() * self.out_features < LEAST_PRODUCTS
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
        ):
            return super().forward(x)
        return ONEDNN(x, weight, self.bias, "none", [], "")
