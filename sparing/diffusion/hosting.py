"""What the three FlexDiT hosts share besides blocks and densities: input checks, exact weight filling, cache checks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig
from torch import Tensor, nn

__all__ = ["check_cache_config", "fill_exactly", "latent_grid"]


def latent_grid(latents: Tensor, *, in_channels: int, patch_size: int) -> tuple[int, int]:
    """The token grid of latents ``(..., in_channels, H, W)`` with one or more leading axes folded into the batch.

    Raises:
        ValueError: naming the shape and what is expected.
    """
    expected = f"(batch, {in_channels}, H, W) with H and W multiples of {patch_size}"
    if latents.ndim != 4 or latents.shape[1] != in_channels:
        raise ValueError(f"latents have shape {tuple(latents.shape)}; expected {expected}")
    height, width = latents.shape[-2:]
    if height % patch_size or width % patch_size or not height or not width:
        raise ValueError(f"latents of {height}x{width} do not divide into patches of {patch_size}; expected {expected}")
    return height // patch_size, width // patch_size


def fill_exactly(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies ``state`` into a model built without memory; every parameter must be given, and nothing else.

    Raises:
        ValueError: listing missing and unexpected names, or the first shape that differs.
    """
    wanted = dict(model.named_parameters())
    missing = sorted(set(wanted) - set(state))
    extra = sorted(set(state) - set(wanted))
    if missing or extra:
        parts = [
            f"{len(names)} {what}, first {names[0]!r}"
            for what, names in (("missing", missing), ("unexpected", extra))
            if names
        ]
        raise ValueError(f"weights do not fit the model: {'; '.join(parts)}")
    for name, parameter in wanted.items():
        if parameter.shape != state[name].shape:
            raise ValueError(
                f"weight {name!r} has shape {tuple(state[name].shape)}, the model needs {tuple(parameter.shape)}"
            )
    copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    model.load_state_dict(copies, strict=False, assign=True)
    first = next(iter(copies.values()))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device=first.device, dtype=first.dtype))


def check_cache_config(config: Any, *, layout: Sequence[str], constant_density: bool) -> None:
    """Whether a diffusers step cache composes with sparse tokens.

    First-block and MagCache keep the residual over all remaining blocks, which starts and ends on dense tokens. Others
    keep activations inside blocks: those of sparse tokens have another size after a change of density.

    Raises:
        ValueError: saying why not.
    """
    if isinstance(config, (FirstBlockCacheConfig, MagCacheConfig)):
        if layout and layout[0] == "merge":
            raise ValueError(
                f"{type(config).__name__} compares the input and output of the first block, which must both be dense: "
                "the layout starts with a merge block; use num_pooling >= 1"
            )
        return
    if not constant_density and "merge" in layout:
        raise ValueError(
            f"{type(config).__name__} keeps activations inside blocks, and this model's sparse token count changes "
            f"with the timestep; "
            "use FirstBlockCacheConfig or MagCacheConfig, or a constant density"
        )
