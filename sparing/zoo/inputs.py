"""Inputs to measure a model on, when nobody gives any: random images, or random latents for a denoiser."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_TEXT_TOKENS = 120  # caption length of PixArt and Latte
_TIMESTEP = 500  # the middle of the customary 1000


def example_call(
    model: nn.Module, *, batch: int = 1, image_size: int | None = None, seed: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of one forward, on the model's device and in its dtype.

    A timm-style model gets one tensor of random images. A diffusers-style denoiser gets, by the names in its
    ``forward`` and the sizes in its ``config``, random latents, the middle timestep, class 0 or random captions.

    Args:
        model: the model.
        batch: samples.
        image_size: side of the images, or of a denoiser's latents; None takes the model's own.
        seed: of the random numbers.

    Raises:
        ValueError: the model does not say what it takes, or takes one size only and it is not this.
    """
    config = getattr(model, "config", None)
    accepted = inspect.signature(model.forward).parameters
    if isinstance(config, Mapping) and {"sample_size", "in_channels"} <= set(config) and "timestep" in accepted:
        return (), _denoiser_inputs(model, config, set(accepted), batch=batch, side=image_size, seed=seed)
    return (example_input(model, batch=batch, image_size=image_size, seed=seed),), {}


def example_input(model: nn.Module, *, batch: int = 1, image_size: int | None = None, seed: int = 0) -> Tensor:
    """Random images ``(batch, channels, height, width)`` of the size that the model's ``pretrained_cfg`` names.

    Raises:
        ValueError: the model does not say what it takes, or takes one size only and it is not this.
    """
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = cfg.get("input_size") if isinstance(cfg, Mapping) else getattr(cfg, "input_size", None)
    if size is None:
        raise ValueError(f"{type(model).__name__} has no pretrained_cfg with an input_size: give inputs")
    channels, height, width = size
    if image_size is not None:
        height = width = image_size
    _check_image_size(model, (height, width))
    return _randn(model, torch.Generator().manual_seed(seed), batch, channels, height, width)


def _check_image_size(model: nn.Module, size: tuple[int, int]) -> None:
    """Refuses a size that a timm-style model with a fixed position embedding cannot take."""
    embedding: Any = getattr(model, "patch_embed", None)
    fixed = getattr(embedding, "img_size", None) if getattr(embedding, "strict_img_size", False) else None
    if fixed is not None and tuple(fixed) != size:
        raise ValueError(
            f"this {type(model).__name__} takes {fixed[0]} x {fixed[1]} images only, got {size[0]} x {size[1]}; "
            "create it with img_size=... or dynamic_img_size=True"
        )


def _denoiser_inputs(
    model: nn.Module, config: Mapping[str, Any], accepted: set[str], *, batch: int, side: int | None, seed: int
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    own = config["sample_size"]
    height, width = (side, side) if side is not None else tuple(own) if isinstance(own, list | tuple) else (own, own)
    frames = (config["video_length"],) if "video_length" in config else ()
    device, _ = placement(model)
    inputs: dict[str, Any] = {
        "hidden_states": _randn(model, generator, batch, config["in_channels"], *frames, height, width),
        "timestep": torch.full((batch,), _TIMESTEP, device=device),
    }
    if "class_labels" in accepted:
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.long, device=device)
    width_of_text = config.get("caption_channels") or config.get("cross_attention_dim")
    if "encoder_hidden_states" in accepted and width_of_text:
        inputs["encoder_hidden_states"] = _randn(model, generator, batch, _TEXT_TOKENS, width_of_text)
    if "added_cond_kwargs" in accepted:
        sized = bool(config.get("use_additional_conditions"))
        inputs["added_cond_kwargs"] = {
            "resolution": _randn(model, generator, batch, 2) if sized else None,
            "aspect_ratio": _randn(model, generator, batch, 1) if sized else None,
        }
    return inputs


def _randn(model: nn.Module, generator: torch.Generator, *shape: int) -> Tensor:
    device, dtype = placement(model)
    return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)


def placement(model: nn.Module, inputs: Any = ()) -> tuple[torch.device, torch.dtype]:
    """Device and floating-point type of a model: of its first floating tensor, else of its inputs."""
    for tensor in (*model.parameters(), *model.buffers(), *inputs):
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def batch_size(inputs: Any, kwargs: Mapping[str, Any]) -> int:
    """Length of the first tensor argument."""
    for value in (*inputs, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim:
            return value.shape[0]
    return 1
