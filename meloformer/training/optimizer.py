"""Which parameters get which optimizer, and the optimizers' state as named tensors.

AdamW for everything, or torch.optim.Muon for the hidden matrices and AdamW for the rest. Weight decay is
for matrices alone: embeddings, norms and learned vectors go without.

>>> optimizers = build_optimizers(model, "adamw", 3e-4, 0.1, (0.9, 0.95))        # doctest: +SKIP
>>> save_file(optimizer_tensors(model, optimizers), "optimizer.safetensors")             # doctest: +SKIP

AdamW: Loshchilov and Hutter 2019, arXiv 1711.05101. Muon: Jordan et al. 2024, kellerjordan.github.io/posts/muon.

What surprises: Muon takes the same learning rate as AdamW. Its update is scaled to the root mean square that AdamW's
usually has ("match_rms_adamw", Liu et al. 2025, arXiv 2502.16982), so one schedule serves both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from meloformer.errors import UserError

MUON_MOMENTUM = 0.95


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(hidden matrices, all the rest) of the trainable parameters. A matrix is a weight of a linear map: an embedding,
    tied or not, and a table of learned positions are rows that are looked up."""
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if id(p) in linear]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in trainable if id(p) not in chosen]


def build_optimizers(
    model: nn.Module, name: str, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> list[Optimizer]:
    """One optimizer for "adamw", two for "muon" (Muon on the matrices, AdamW on the rest)."""
    matrices, rest = split_parameters(model)
    decayed = {"params": matrices, "weight_decay": weight_decay}
    plain = {"params": rest, "weight_decay": 0.0}
    # Fused is one pass over each parameter instead of a dozen: the update's cost is memory traffic, on the CPU too.
    adamw = {"lr": learning_rate, "betas": betas, "fused": True}
    if name == "adamw":
        return [torch.optim.AdamW([decayed, plain], **adamw)]
    muon = torch.optim.Muon(
        [decayed], lr=learning_rate, momentum=MUON_MOMENTUM, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW([plain], **adamw)]


def set_learning_rate(optimizers: list[Optimizer], learning_rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate


def optimizer_tensors(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """State of all parameters as {"parameter.name/moment": tensor}; empty before the first update."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]}/{key}": value.detach().contiguous()
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizers: list[Optimizer], tensors: dict[str, Tensor], where: str
) -> None:
    """Put `optimizer_tensors` back. UserError where they are another optimizer's, or of another model."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, moment = key.rpartition("/")
        by_name.setdefault(name, {})[moment] = value
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        moments = {"momentum_buffer"} if isinstance(optimizer, torch.optim.Muon) else {"step", "exp_avg", "exp_avg_sq"}
        state = {}
        for i, parameter in enumerate(parameters):
            name = names[id(parameter)]
            found = by_name.pop(name, {})
            if found and (set(found) != moments or any(v.shape not in ((), parameter.shape) for v in found.values())):
                raise UserError(f"{where}: the state of {name} is not what this model and optimizer hold")
            if found:
                state[i] = found
        # load_state_dict and not a plain assignment: it puts each tensor on its parameter's device
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if by_name:
        raise UserError(f"{where}: holds the state of {sorted(by_name)[0]}, which this model does not have")
