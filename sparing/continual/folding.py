"""Batch norms folded into the convolutions before them, for inference.

In eval mode a batch norm is a fixed scale and shift of each channel, which a convolution can carry in its weight and
bias: ``gamma / sqrt(var + eps) * (W x + b - mean) + beta``. A step then reads and writes each frame once less. Only a
norm that directly follows a convolution (in a chain or a branch) is folded; padding is untouched, since the norm comes
after it. The folded network has other keys than its checkpoint: load first, fold then.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import nn

from sparing.continual.container import Branches, Chain, Part

__all__ = ["fold_batch_norm"]

Network = TypeVar("Network", bound=nn.Module)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fold_batch_norm(network: Network) -> Network:
    """A copy of a continual network whose batch norms are folded where they can be; the rest is as it was.

    Memories, delays and outputs (to rounding) are those of the network; states of one serve the other as long as no
    folded convolution keeps partial sums.

    Args:
        network: in eval mode.

    Raises:
        ValueError: the network is in training mode (its norms would use the statistics of the batch), or none of its
            norms follows a convolution.
    """
    if network.training:
        raise ValueError("batch norms are folded for inference: call network.eval() first")
    folded = copy.deepcopy(network)
    uses = Counter(id(module) for parts in _lists(folded) for _, _, module in parts)
    count = 0
    for parts in _lists(folded):
        for (_, _, conv), (owner, name, norm) in pairwise(parts):
            if _fits(conv, norm) and uses[id(conv)] == uses[id(norm)] == 1:
                _fold(conv, norm)
                owner._modules[name] = nn.Identity()
                count += 1
    if not count:
        raise ValueError(f"no batch norm of this {type(network).__name__} follows a convolution directly")
    return folded


def _lists(network: nn.Module) -> Iterator[list[tuple[nn.Module, str, Any]]]:
    """(owner, name, module) in the order in which they run, for every chain and branch."""
    for module in network.modules():
        orders: list[list[Part]] = []
        if isinstance(module, Branches):
            orders = module.branches()
        elif isinstance(module, Chain):
            orders = [module.parts()]
        for order in orders:
            # a part that its container does not hold under that name cannot be replaced there
            yield [(module, name, part) for name, part in order if module._modules.get(name) is part]


def _fits(conv: Any, norm: Any) -> bool:
    return (
        isinstance(conv, _CONVS)
        and isinstance(norm, nn.modules.batchnorm._BatchNorm)
        and norm.running_mean is not None
        and norm.num_features == conv.out_channels
    )


@torch.no_grad()
def _fold(conv: Any, norm: Any) -> None:
    exact = torch.float64 if conv.weight.device.type != "mps" else torch.float32
    scale = (norm.running_var.to(exact) + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.to(exact)
    shift = -norm.running_mean.to(exact) if conv.bias is None else conv.bias.to(exact) - norm.running_mean.to(exact)
    shift = shift * scale
    if norm.affine:
        shift = shift + norm.bias.to(exact)
    weight = conv.weight.to(exact) * scale.view(-1, *[1] * (conv.weight.ndim - 1))
    learned = conv.weight.requires_grad
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=learned)
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=learned)
