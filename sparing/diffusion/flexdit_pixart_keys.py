"""Weights of PixArt-alpha in the names of its authors' checkpoints, read as those of diffusers (specification, 5.5)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparing.diffusion.flexdit_keys import State

__all__ = ["infer_pixart_shape", "plain_from_pixart"]

_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "final_layer.linear": "proj_out",
}
# One layer of the authors' holds one or several of diffusers', stacked along its outputs.
_BLOCK = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
_DROPPED = ("pos_embed", "y_embedder.y_embedding")  # a constant table; the null caption, which pipelines encode anew
_PUBLISHED_HEADS = {1152: 16}


def plain_from_pixart(state: Mapping[str, Tensor]) -> State:
    """A dense PixArt state dict in diffusers' names, from the authors' names; one in diffusers' names as it is.

    Raises:
        ValueError: it is neither, or holds a name that belongs to neither.
    """
    if "transformer_blocks.0.attn1.to_q.weight" in state:
        return dict(state)
    if "blocks.0.attn.qkv.weight" not in state or "blocks.0.cross_attn.kv_linear.weight" not in state:
        raise ValueError(
            "not a PixArt checkpoint: neither 'blocks.0.cross_attn.kv_linear.weight' nor "
            "'transformer_blocks.0.attn1.to_q.weight' is in it"
        )
    found: State = {}
    for key, tensor in state.items():
        layer, _, kind = key.rpartition(".")
        if key in _DROPPED:
            continue
        if key == "final_layer.scale_shift_table":
            found["scale_shift_table"] = tensor
        elif layer in _OUTSIDE:
            found[f"{_OUTSIDE[layer]}.{kind}"] = tensor
        else:
            found |= _of_block(key, tensor)
    return found


def _of_block(key: str, tensor: Tensor) -> State:
    first, _, rest = key.partition(".")
    number, _, inner = rest.partition(".")
    layer, _, kind = inner.rpartition(".")
    if first != "blocks" or not number.isdigit() or (inner != "scale_shift_table" and layer not in _BLOCK):
        raise ValueError(f"the checkpoint holds {key!r}, which no PixArt-alpha has")
    prefix = f"transformer_blocks.{number}"
    if inner == "scale_shift_table":
        return {f"{prefix}.{inner}": tensor}
    names = _BLOCK[layer]
    if len(tensor) % len(names):
        raise ValueError(f"weight {key!r} has shape {tuple(tensor.shape)}, which is no stack of {len(names)} layers")
    return {f"{prefix}.{name}.{kind}": part for name, part in zip(names, tensor.chunk(len(names)), strict=True)}


def infer_pixart_shape(
    plain: Mapping[str, Tensor],
    *,
    pos_embed: Tensor | None,
    num_attention_heads: int | None = None,
    sample_size: int | None = None,
) -> dict[str, Any]:
    """The architecture that weights in diffusers' names imply, as keywords of ``FlexDiTPixArtTransformer2DModel``.

    Args:
        pos_embed: the authors' position table ``(1, tokens, dim)``, from which the sample size is read.

    Raises:
        ValueError: the head count or the sample size cannot be known and is not given, or a weight is missing.
    """
    for key in ("pos_embed.proj.weight", "proj_out.weight", "transformer_blocks.0.attn2.to_k.weight"):
        if key not in plain:
            raise ValueError(f"missing key: nothing in the checkpoint gives {key!r}")
    dim, in_channels, patch, _ = plain["pos_embed.proj.weight"].shape
    heads = num_attention_heads or _PUBLISHED_HEADS.get(dim)
    if heads is None or dim % heads:
        raise ValueError(f"the number of attention heads cannot be read from the weights (width {dim}): pass a divisor")
    if sample_size is None:
        if pos_embed is None:
            raise ValueError("the checkpoint has no position table: pass sample_size (latent side, 64 at 512 px)")
        sample_size = round(pos_embed.shape[-2] ** 0.5) * patch
    caption = plain.get("caption_projection.linear_1.weight")
    numbers = [int(key.split(".")[1]) for key in plain if key.startswith("transformer_blocks.")]
    return {
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": in_channels,
        "out_channels": plain["proj_out.weight"].shape[0] // patch**2,
        "num_layers": max(numbers) + 1,
        "cross_attention_dim": plain["transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "attention_bias": "transformer_blocks.0.attn1.to_q.bias" in plain,
        "sample_size": sample_size,
        "patch_size": patch,
        "caption_channels": None if caption is None else caption.shape[1],
        "use_additional_conditions": "adaln_single.emb.resolution_embedder.linear_1.weight" in plain,
    }
