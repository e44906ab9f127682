"""Where a model runs and in what arithmetic: the words `auto`, `cpu`, `cuda:1`, `bf16` of the command line made real.

>>> choose_device("cpu"), choose_precision("fp32", torch.device("cpu"))
(device(type='cpu'), torch.float32)

What surprises: `auto` may be bf16 on a CPU. With bfloat16 instructions (AVX512-BF16, AMX) a training step of the demo's
model took 0.5 to 0.6 of the time on two cores; without them, or where torch cannot say, `auto` is fp32.
"""

from __future__ import annotations

import torch

from meloformer.errors import UserError


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that `name` asks for, `auto` being a GPU if there is one; UserError if it is not there. A GPU becomes
    the current one: graphs are captured there, and memory is pinned for it.

    `auto` and `cuda` mean the GPU number `local_rank`, which is this process's number among those of its machine;
    a list of numbers, "2,3", the one at that place in it.
    """
    if name.replace(",", "").isdecimal():
        numbers = name.split(",")
        if local_rank >= len(numbers):
            raise UserError(f"devices is {name!r}, and there are more processes than GPUs in it; name one for each")
        name = f"cuda:{numbers[local_rank] or 'none'}"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device is {name!r}, must be auto, cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device is {name!r}, must be auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device is {name!r}, and torch sees {torch.cuda.device_count()} GPUs; try --device cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """What matrix products run in; parameters and sums stay float32."""
    if name == "auto":
        name = "bf16" if has_bf16(device) else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # is_bf16_supported() also says yes to emulation
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch does not say
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """The context to run the forward pass in; does nothing for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16)
