"""FLOP formulas of the custom ops for ``torch.utils.flop_counter`` (one multiply-add = 2).

Importing this module registers them; counters made afterwards know the ops. A forward does two products over the
pairs of queries and keys that are computed, a backward five (scores again, and the gradients of q, k, v and of the
weights).
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparing.kernels.ops import block_sparse_attention, codebook, few_query_attention, tiny_attention, window_attention

# the modules above define the ops that are looked up by name below
_DEFINED = (block_sparse_attention, codebook, few_query_attention, tiny_attention, window_attention)
_OPS = torch.ops.sparing


def _forward(pairs: int, dim: int, value_dim: int) -> int:
    return 2 * pairs * (dim + value_dim)


def _backward(pairs: int, dim: int, value_dim: int) -> int:
    return 2 * pairs * (3 * dim + 2 * value_dim)


def _dense_pairs(q: Tensor, k: Tensor) -> int:
    return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]


@register_flop_formula([_OPS.few_query_attention_fwd, _OPS.tiny_attention_fwd], get_raw=True)
def _dense_forward(q: Tensor, k: Tensor, v: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return _forward(_dense_pairs(q, k), q.shape[3], v.shape[3])


@register_flop_formula([_OPS.few_query_attention_bwd, _OPS.tiny_attention_bwd], get_raw=True)
def _dense_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return _backward(_dense_pairs(q, k), q.shape[3], v.shape[3])


def _window_pairs(q: Tensor, lse: Tensor) -> tuple[int, int]:
    """Pairs and head dim from lse (windows, heads, tokens of a window)."""
    return lse.numel() * lse.shape[2], q.shape[3] // lse.shape[1]


@register_flop_formula(_OPS.window_attention_fwd, get_raw=True)
def _window_forward(q: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    pairs, dim = _window_pairs(q, out_val[1])
    return _forward(pairs, dim, dim)


@register_flop_formula(_OPS.window_attention_bwd, get_raw=True)
def _window_backward(grad: Tensor, q: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    pairs, dim = _window_pairs(q, args[5])  # k, v, bias, region, out, lse
    return _backward(pairs, dim, dim)


def _kept_pairs(q: Tensor, k: Tensor, kv_num: Tensor, block_q: int, block_k: int) -> int:
    """Pairs in the kept blocks (ragged ones counted whole, a causal mask inside blocks not subtracted); all pairs
    where the counts hold no values (meta and fake tensors).
    """
    if kv_num.device.type == "meta" or type(kv_num) is not Tensor:
        return _dense_pairs(q, k)
    shared = (q.shape[0] // kv_num.shape[0]) * (q.shape[1] // kv_num.shape[1])
    return int(kv_num.sum()) * shared * block_q * block_k


@register_flop_formula(_OPS.block_sparse_attention_fwd, get_raw=True)
def _sparse_forward(q: Tensor, k: Tensor, v: Tensor, kv_num: Tensor, *args: Any, out_val: Any = None) -> int:
    return _forward(_kept_pairs(q, k, kv_num, args[3], args[4]), q.shape[3], v.shape[3])


@register_flop_formula(_OPS.block_sparse_attention_bwd, get_raw=True)
def _sparse_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num: Tensor,
    *args: Any,
    out_val: Any = None,
) -> int:
    return _backward(_kept_pairs(q, k, kv_num, args[3], args[4]), q.shape[3], v.shape[3])


@register_flop_formula(_OPS.codebook_argmin)
def _codebook(x_shape: Any, codebook_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * x_shape[0] * codebook_shape[0] * codebook_shape[1]
