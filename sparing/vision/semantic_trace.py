"""Looking into STViT: the tensors of one forward pass, attention maps and the regions that semantic tokens gather.

Shapes: M semantic tokens, N image tokens, ``prefix`` class, register and distillation tokens where the twin keeps them.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from sparing.kernels import attention_weights
from sparing.vision.semantic_pooling import OffsetPooling, WeightedPooling
from sparing.vision.split_attention import cross_block, project_keys_values, project_queries
from sparing.vision.vit_contracts import check_images

if TYPE_CHECKING:
    from sparing.vision.stvit import SemanticTokenViT

__all__ = ["SemanticTrace", "gathered_regions", "trace"]


class SemanticTrace(NamedTuple):
    """What happens inside one forward pass.

    Attributes:
        embedded: (batch, prefix + N, dim) before the first block.
        base: (batch, prefix + N, dim) after the base module.
        pool_weights: (batch, M, positions of a cell in raster order), None without weighted pooling.
        centers: P, (batch, M, dim).
        semantic: S after each generation layer, (batch, M, dim).
        prefix: the prefix tokens beside each S, (batch, prefix, dim).
        attention: of each generation layer, (batch, heads, prefix + M, keys). Keys are the prefix tokens, from the
            second layer on the M semantic tokens, then the N image tokens.
        tokens: (batch, prefix + M, dim) before the last norm.
    """

    embedded: Tensor
    base: Tensor
    pool_weights: Tensor | None
    centers: Tensor
    semantic: list[Tensor]
    prefix: list[Tensor]
    attention: list[Tensor]
    tokens: Tensor


def trace(twin: "SemanticTokenViT", images: Tensor) -> SemanticTrace:
    """Runs ``twin`` on images (batch, channels, height, width) step by step; maps are computed without fused kernels.

    Raises:
        ValueError: the twin keeps all tokens and generates none.
    """
    if twin.semantic_grid is None:
        raise ValueError("num_tokens='all' generates no semantic tokens: there is nothing to trace")
    grid, prefix = check_images(twin, images), twin.num_prefix_tokens
    embedded = twin.embed(images)
    base = keys = embedded
    for block in twin.blocks[: twin.base_depth]:
        base = keys = block(base)
    image = base[:, prefix:]
    pooling = twin.center_pooling.pooling if isinstance(twin.center_pooling, OffsetPooling) else twin.center_pooling
    weights = pooling.pool(image, grid)[1] if isinstance(pooling, WeightedPooling) else None
    tokens = query = twin.first_queries(base, image, grid)
    centers, semantic, leading, maps = query[:, prefix:], [], [], []
    for step, block in enumerate(twin.blocks[twin.base_depth : twin.base_depth + twin.generation_depth]):
        if step > 0:
            query, keys = twin.next_streams(tokens, image, step)
        queries = project_queries(block.attn, block.norm1(query))
        maps.append(
            attention_weights(queries, project_keys_values(block.attn, block.norm1(keys))[0], scale=block.attn.scale)
        )
        tokens = cross_block(block, query, keys)
        semantic.append(tokens[:, prefix:])
        leading.append(tokens[:, :prefix])
    for block in twin.blocks[twin.base_depth + twin.generation_depth :]:
        tokens = block(tokens)
    return SemanticTrace(embedded, base, weights, centers, semantic, leading, maps, tokens)


def gathered_regions(twin: "SemanticTokenViT", images: Tensor) -> Tensor:
    """Which image tokens each semantic token gathers: (batch, M, rows, columns), each map summing to 1.

    It is the attention of the last generation layer to the image tokens, mean over heads: what that layer reads from
    the image. What the residual stream carried from the pooling is not in it.
    """
    grid = check_images(twin, images)
    last = trace(twin, images).attention[-1].mean(1)[:, twin.num_prefix_tokens :, -math.prod(grid) :]
    return (last / last.sum(-1, keepdim=True)).unflatten(2, grid)
