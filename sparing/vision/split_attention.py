"""timm's multi-head attention with its query and its key/value sides apart.

A timm ``Attention`` projects one stream to q, k and v with one matrix. The cross block of STViT (CVPR 2023, eq. 1 and
2) has queries from one stream and keys from another, and ToMe needs the keys and a bias on the logits. These functions
run the modules of a live ``Attention`` (``qkv``, ``q_norm``, ``k_norm``, ``norm``, ``gate``, ``proj``, dropouts) in
those forms; with both streams equal and no bias they compute what the module computes.

Shapes: streams are ``(batch, tokens, dim)``, heads ``(batch, heads, tokens, head_dim)``.
"""

import torch.nn.functional as F
from einops import rearrange
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from sparing.kernels import attention

__all__ = ["attend", "cross_block", "project_keys_values", "project_queries", "project_self"]


def project_queries(attn: Attention, x: Tensor) -> Tensor:
    """Queries (batch, heads, tokens, head_dim) of ``x`` (batch, tokens, dim): the first third of ``qkv``."""
    return attn.q_norm(rearrange(_project(attn, x, 0, 1), "b n (h d) -> b h n d", h=attn.num_heads))


def project_keys_values(attn: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, each (batch, heads, tokens, head_dim), of ``x`` (batch, tokens, dim), by one matrix product."""
    keys, values = rearrange(_project(attn, x, 1, 3), "b n (two h d) -> two b h n d", two=2, h=attn.num_heads).unbind(0)
    return attn.k_norm(keys), values


def project_self(attn: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one stream, as timm's own forward projects them."""
    q, k, v = rearrange(attn.qkv(x), "b n (three h d) -> three b h n d", three=3, h=attn.num_heads).unbind(0)
    return attn.q_norm(q), attn.k_norm(k), v


def attend(
    attn: Attention, stream: Tensor, queries: Tensor, keys: Tensor, values: Tensor, *, bias: Tensor | None = None
) -> Tensor:
    """softmax(q k^T * scale + bias) v, then scale norm, gate, output projection and dropout of ``attn``.

    Args:
        attn: the live timm module.
        stream: (batch, queries, dim), the normalised query stream, read by the gate.
        queries: (batch, heads, queries, head_dim).
        keys: (batch, heads, keys, head_dim).
        values: (batch, heads, keys, head_dim).
        bias: added to the logits, broadcastable to (batch, heads, queries, keys).

    Returns:
        (batch, queries, dim)
    """
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = attention(queries, keys, values, bias=bias, scale=attn.scale, dropout_p=dropout)
    out = attn.norm(rearrange(out, "b h m d -> b m (h d)"))
    if attn.gate is not None:
        out = out * attn.gate(stream).sigmoid()
    return attn.proj_drop(attn.proj(out))


def cross_block(block: Block, query: Tensor, key_value: Tensor) -> Tensor:
    """A timm block whose queries come from one stream and keys and values from another (paper eq. 1).

    With equal streams it computes what the block computes. Both streams pass the same first norm; whatever the block
    has (query and key norms, scale norm, gate, LayerScale, drop path, dropouts) is used.

    Args:
        block: the live block.
        query: (batch, queries, dim), also the residual.
        key_value: (batch, keys, dim).

    Returns:
        (batch, queries, dim)
    """
    stream = block.norm1(query)
    keys, values = project_keys_values(block.attn, block.norm1(key_value))
    attended = attend(block.attn, stream, project_queries(block.attn, stream), keys, values)
    query = query + block.drop_path1(block.ls1(attended))
    return query + block.drop_path2(block.ls2(block.mlp(block.norm2(query))))


def _project(attn: Attention, x: Tensor, start: int, stop: int) -> Tensor:
    """Thirds ``start`` to ``stop`` of the qkv projection of ``x``.

    Only those rows of a plain linear layer are multiplied (slices of the weight are views). A layer with its own
    forward, such as a low-rank adapter put around ``qkv``, is called as it is and its output cut: right, at the cost of
    the rows that are thrown away.
    """
    qkv, width = attn.qkv, attn.attn_dim
    if type(qkv).forward is not nn.Linear.forward:
        return qkv(x)[..., start * width : stop * width]
    rows = slice(start * width, stop * width)
    return F.linear(x, qkv.weight[rows], None if qkv.bias is None else qkv.bias[rows])
