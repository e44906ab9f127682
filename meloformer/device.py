"""Where a model runs and in what arithmetic: the words `auto`, `cpu`, `cuda:1`, `bf16` of the command line made real.

>>> choose_device("cpu")
device(type='cpu')
>>> choose_precision("auto", torch.device("cpu"))
torch.float32

What surprises: `auto` is float32 on a CPU even where it has bfloat16 instructions. *Measured* on two cores with
AVX512-BF16, the demo's model, torch 2.13: see `docs/log.md`.
"""

from __future__ import annotations

import torch

from meloformer.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device that `name` asks for, `auto` being the first GPU if there is one; UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device is {name!r}, must be auto, cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device is {name!r}, must be auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device is {name!r}, and torch sees {torch.cuda.device_count()} GPUs; try --device cpu")
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """What matrix products run in; parameters and sums stay float32."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """The context to run the forward pass in; does nothing for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16)
