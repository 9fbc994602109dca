"""The parts of timm's ViT contract that both methods on ViTs keep in the same way: images in, intermediates out."""

from collections.abc import Sequence
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

__all__ = ["check_images", "check_output_format", "pack_intermediates", "refuse_masks", "take_indices"]

Grid = tuple[int, int]


def check_images(model: VisionTransformer, images: Tensor) -> tuple[int, int]:
    """The token grid (rows, columns) of ``images`` (batch, channels, height, width).

    Raises:
        ValueError: wrong rank or channel count, or a size that this model does not take; the numbers are named.
    """
    if images.ndim != 4 or images.shape[1] != model.in_chans:
        raise ValueError(
            f"{type(model).__name__} takes images (batch, {model.in_chans}, height, width), "
            f"got shape {tuple(images.shape)}"
        )
    embed = model.patch_embed
    height, width = images.shape[-2:]
    if getattr(embed, "strict_img_size", True) and embed.img_size is not None:
        if (height, width) != tuple(embed.img_size):
            raise ValueError(
                f"this model is fixed to images of {embed.img_size[0]}x{embed.img_size[1]}, got {height}x{width}; "
                f"resize them, call set_input_size, or build the host with dynamic_img_size=True"
            )
    elif not embed.dynamic_img_pad and (height % embed.patch_size[0] or width % embed.patch_size[1]):
        raise ValueError(
            f"image size {height}x{width} is not a multiple of the patch size "
            f"{embed.patch_size[0]}x{embed.patch_size[1]}"
        )
    rows, columns = embed.dynamic_feat_size((height, width))
    return rows, columns


def take_indices(depth: int, indices: int | Sequence[int] | None) -> list[int]:
    """Block numbers that timm's ``indices`` mean: all for None, the last n for an int, negative ones from the end.

    Raises:
        ValueError: there is no such block.
    """
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int):
        if not 0 < indices <= depth:
            raise ValueError(f"the last {indices} blocks of {depth} cannot be taken; 1 to {depth} can")
        return list(range(depth - indices, depth))
    wrong = [i for i in indices if not -depth <= i < depth]
    if wrong:
        raise ValueError(f"block indices {wrong} are outside a model of {depth} blocks (0 to {depth - 1})")
    return [i % depth for i in indices]


def refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise ValueError for timm's mask arguments: pooled or merged tokens have no position of the input grid."""
    if attn_mask is not None or is_causal:
        raise ValueError(
            "attn_mask and is_causal are not accepted: a twin's tokens have no positions of the input grid"
        )


def check_output_format(output_fmt: str) -> None:
    """Raise ValueError unless ``output_fmt`` is one of timm's two for ViTs."""
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt {output_fmt!r} is unknown; 'NCHW' and 'NLC' are accepted")


def pack_intermediates(
    tokens: Sequence[Tensor],
    grids: Sequence[Grid],
    last: Tensor | None,
    *,
    num_prefix: int,
    output_fmt: str,
    return_prefix_tokens: bool,
    output_dict: bool,
) -> Any:
    """What timm's ``forward_intermediates`` returns.

    Args:
        tokens: one (batch, prefix + N, dim) a block taken.
        grids: (rows, columns) of each.
        last: the final tokens, None to return intermediates only.
        num_prefix: prefix tokens in front of each.
        output_fmt: 'NCHW' maps or 'NLC' tokens, without prefix tokens.
        return_prefix_tokens: pair each with its prefix tokens.
        output_dict: a dict with timm's keys instead of tuple or list.
    """
    prefix = [t[:, :num_prefix] for t in tokens]
    maps = [t[:, num_prefix:] for t in tokens]
    if output_fmt == "NCHW":
        maps = [m.transpose(1, 2).unflatten(2, grid).contiguous() for m, grid in zip(maps, grids)]
    with_prefix = return_prefix_tokens and num_prefix > 0
    if output_dict:
        result: dict[str, Any] = {"image_intermediates": maps}
        if with_prefix:
            result["image_intermediates_prefix"] = prefix
        return result if last is None else {**result, "image_features": last}
    out: list[Any] = list(zip(maps, prefix)) if with_prefix else maps
    return out if last is None else (last, out)
