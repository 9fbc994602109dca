"""Parameter groups and optimizers: AdamW, or Muon for the hidden matrices with AdamW for the rest."""

from collections.abc import Collection

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["build_optimizers", "parameter_groups"]


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    fresh: Collection[str] = (),
    fresh_lr_multiplier: float = 10.0,
) -> list[dict]:
    """AdamW groups: vectors and ``model.no_weight_decay()`` without decay, ``fresh`` parameters with a higher rate.

    Args:
        model: its trainable parameters are grouped.
        lr: peak learning rate of copied parameters.
        weight_decay: of matrices and kernels.
        fresh: names of parameters that the host did not have.
        fresh_lr_multiplier: on ``lr`` for them (specs: 10).
    """
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.squeeze().ndim > 1 and name not in exempt
            groups.setdefault((decayed, name in fresh), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr * (fresh_lr_multiplier if is_fresh else 1.0),
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (decayed, is_fresh), parameters in groups.items()
    ]


def build_optimizers(
    model: nn.Module,
    *,
    name: str = "adamw",
    lr: float,
    weight_decay: float = 0.05,
    matrix_lr: float = 0.02,
    fresh: Collection[str] = (),
    fresh_lr_multiplier: float = 10.0,
) -> list[Optimizer]:
    """``[AdamW]``, or with ``name='muon'`` ``[Muon, AdamW]``.

    Muon (Jordan et al. 2024; torch.optim.Muon) orthogonalises the momentum of each weight matrix inside a block;
    embeddings,
    heads, convolutions, norms and ``fresh`` parameters stay with AdamW. It needs fewer epochs on short budgets.

    Raises:
        ValueError: unknown ``name``.
    """
    if name not in ("adamw", "muon"):
        raise ValueError(f"optimizer must be 'adamw' or 'muon', got {name!r}")
    groups = parameter_groups(
        model, lr=lr, weight_decay=weight_decay, fresh=fresh, fresh_lr_multiplier=fresh_lr_multiplier
    )
    if name == "adamw":
        return [torch.optim.AdamW(groups, betas=(0.9, 0.99))]
    matrices = [
        parameter
        for key, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.ndim == 2 and ".blocks." in f".{key}" and key not in fresh
    ]
    if not matrices:
        raise ValueError("muon found no weight matrices under 'blocks'; use optimizer 'adamw' for this model")
    taken = {id(parameter) for parameter in matrices}
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in taken]
    groups = [group for group in groups if group["params"]]
    return [
        torch.optim.Muon(matrices, lr=matrix_lr, momentum=0.95, weight_decay=weight_decay),
        torch.optim.AdamW(groups, betas=(0.9, 0.99)),
    ]
