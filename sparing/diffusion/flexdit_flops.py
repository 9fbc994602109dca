"""Multiply-accumulates of a FlexDiT, block by block, as the DiT and SparseDiT papers count "FLOPs".

Attention products are included; norms, activations and softmax are not. ``count='reference'`` is the structure of the
published code (V and Proj of a pooling block on all N tokens, both merge maps of a recover block on N tokens);
``count='executed'`` is what runs here (one token in a pooling block, W1 on the M sparse tokens) and equals
``torch.utils.flop_counter`` / 2.
"""

from typing import Literal

__all__ = ["block_macs", "class_conditional_macs", "text_conditional_macs", "video_macs"]

Count = Literal["reference", "executed"]


def block_macs(
    kind: str,
    *,
    dense: int,
    sparse: int,
    dim: int,
    mlp_ratio: float = 4.0,
    modulated: bool = True,
    text_tokens: int = 0,
    count: Count = "reference",
) -> int:
    """Multiply-accumulates of one block for one sample.

    Args:
        kind: kind of the block (``sparing.diffusion.blocks``).
        dense, sparse: token counts N and M.
        dim: width D.
        mlp_ratio: hidden width of the MLP over D.
        modulated: the block owns its adaLN ``Linear(D, 6D)`` (adaLN-zero); False for adaLN-single.
        text_tokens: text keys of its cross-attention (of width D), 0 for none.
        count: as in the module docstring.

    Raises:
        ValueError: an unknown ``kind`` or ``count``.
    """
    if count not in ("reference", "executed"):
        raise ValueError(f"count must be 'reference' or 'executed', got {count!r}")
    n, m, square = dense, sparse, dim * dim
    mlp = int(2 * mlp_ratio * square)
    if kind in ("plain", "dense", "sparse"):
        tokens = m if kind == "sparse" else n
        total = tokens * (4 * square + mlp) + 2 * tokens * tokens * dim
    elif kind == "pooling":
        tokens = n
        total = n * mlp + 2 * square * (n if count == "reference" else 1)
    elif kind == "merge":
        tokens = m
        total = m * (2 * square + mlp) + 2 * n * square + 2 * m * n * dim
    elif kind == "recover":
        tokens = n
        merge_maps = 2 * n if count == "reference" else n + m
        total = merge_maps * square + n * (2 * square + mlp) + 2 * m * square + 2 * m * n * dim
    else:
        raise ValueError(f"unknown kind of block {kind!r}")
    if text_tokens:
        total += 2 * tokens * square + 2 * text_tokens * square + 2 * tokens * text_tokens * dim
    return total + (6 * square if modulated else 0)


def class_conditional_macs(
    layout: list[str],
    *,
    grid: tuple[int, int],
    side: tuple[int, int],
    dim: int,
    patch_size: int,
    in_channels: int,
    out_channels: int,
    mlp_ratio: float = 4.0,
    frequency_dim: int = 256,
    count: Count = "reference",
) -> int:
    """Multiply-accumulates of one forward of the class-conditional model for one sample at the sparse grid ``side``."""
    dense, sparse = grid[0] * grid[1], side[0] * side[1]
    area = patch_size * patch_size
    embed = dense * dim * area * in_channels + frequency_dim * dim + dim * dim
    final = dense * dim * area * out_channels + 2 * dim * dim
    blocks = (
        block_macs(kind, dense=dense, sparse=sparse, dim=dim, mlp_ratio=mlp_ratio, count=count) for kind in layout
    )
    return embed + final + sum(blocks)


def text_conditional_macs(
    layout: list[str],
    *,
    grid: tuple[int, int],
    side: tuple[int, int],
    dim: int,
    patch_size: int,
    in_channels: int,
    out_channels: int,
    text_tokens: int,
    caption_channels: int | None,
    count: Count = "executed",
) -> int:
    """Multiply-accumulates of one forward of the PixArt variant for one image and ``text_tokens`` text tokens."""
    dense, sparse = grid[0] * grid[1], side[0] * side[1]
    area = patch_size * patch_size
    embed = dense * dim * area * in_channels + 256 * dim + dim * dim + 6 * dim * dim
    caption = 0 if caption_channels is None else text_tokens * (caption_channels * dim + dim * dim)
    blocks = (
        block_macs(kind, dense=dense, sparse=sparse, dim=dim, modulated=False, text_tokens=text_tokens, count=count)
        for kind in layout
    )
    return embed + caption + dense * dim * area * out_channels + sum(blocks)


def video_macs(
    layout: list[str],
    *,
    grid: tuple[int, int],
    side: tuple[int, int],
    frames: int,
    dim: int,
    patch_size: int,
    in_channels: int,
    out_channels: int,
    text_tokens: int = 0,
    caption_channels: int = 4096,
    count: Count = "executed",
) -> int:
    """Multiply-accumulates of one forward of the video variant: spatial blocks once a frame, temporal ones once a
    position.
    """
    dense, sparse = grid[0] * grid[1], side[0] * side[1]
    area = patch_size * patch_size
    total = frames * dense * dim * area * (in_channels + out_channels) + 256 * dim + dim * dim + 6 * dim * dim
    total += text_tokens * (caption_channels * dim + dim * dim)
    along = block_macs("plain", dense=frames, sparse=frames, dim=dim, modulated=False)
    for kind in layout:
        spatial = block_macs(
            kind, dense=dense, sparse=sparse, dim=dim, modulated=False, text_tokens=text_tokens, count=count
        )
        total += frames * spatial + (sparse if kind in ("merge", "sparse") else dense) * along
    return total
