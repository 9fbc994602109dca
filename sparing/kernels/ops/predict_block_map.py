"""Predict, from block means, which blocks of an attention matter (SpargeAttn, arXiv 2502.18137, section 3.2).

Per block: the mean vector p and the self-similarity s, the mean of all pairwise cosines of its rows (= squared norm
of the mean unit vector). ``prob = softmax_j(scale * p_q . p_k)`` over self-similar key blocks; of each row the best
are kept until their mass passes ``cdf`` (the block that crosses it is dropped, at least one stays) or by share
``topk``. Blocks that are not self-similar are badly described by their mean and are always computed. Ragged last
blocks use their valid rows only.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparing.kernels.block_map import BlockMap
from sparing.kernels.dispatch import define_op, register_impl, run
from sparing.kernels.masks import check_qkv


class BlockPrediction(NamedTuple):
    """What the prediction rests on.

    Attributes:
        pool_q: (B, H, NQ, D) mean query of each block; pool_k (B, H, NK, D) likewise.
        sim_q: (B, H, NQ) self-similarity of each query block; sim_k (B, H, NK) likewise.
        prob: (B, H, NQ, NK) predicted share of attention.
        num_selected: (B, H, NQ) int32, blocks kept by their share, before any is forced.
        mask: (B, H, NQ, NK) bool, kept or forced.
    """

    pool_q: Tensor
    pool_k: Tensor
    sim_q: Tensor
    sim_k: Tensor
    prob: Tensor
    num_selected: Tensor
    mask: Tensor


def predict_block_map(
    q: Tensor,
    k: Tensor,
    *,
    block_q: int,
    block_k: int,
    sim_threshold: float,
    cdf: float | None = None,
    topk: float | None = None,
    keep_sink: bool = False,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> BlockMap:
    """Predict a :class:`BlockMap` from q and k. No gradient, no host synchronisation.

    Args:
        q: (batch, heads, M, head_dim).
        k: (batch, heads, N, head_dim).
        block_q: query rows of a block.
        block_k: key rows of a block.
        sim_threshold: blocks whose self-similarity is at or below this are always computed (-1 = none are).
        cdf: keep the best key blocks of each row while their cumulative share is at most this; or
        topk: keep this share of the key blocks of each row. Exactly one of the two.
        keep_sink: always compute the first key block.
        causal: drop blocks that lie wholly above the diagonal ``j <= i + N - M``, before the shares are computed too.
        scale: factor of the block scores; ``head_dim ** -0.5`` when None.
        backend: ``'auto'`` or ``'reference'``.

    Raises:
        ValueError: shapes that do not fit, or not exactly one of ``cdf`` and ``topk`` in [0, 1].
    """
    check_qkv(q, k, k)
    if (cdf is None) == (topk is None):
        raise ValueError(f"give exactly one of cdf and topk, got cdf={cdf} and topk={topk}")
    share = cdf if cdf is not None else topk
    if share is None or not 0.0 <= share <= 1.0:
        raise ValueError(f"cdf and topk are shares between 0 and 1, got {share}")
    return run(
        "predict_block_map", backend, q, k, block_q=block_q, block_k=block_k, sim_threshold=sim_threshold, cdf=cdf,
        topk=topk, keep_sink=keep_sink, causal=causal, scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )  # fmt: skip


def block_statistics(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Mean vector (B, H, NB, D) and self-similarity (B, H, NB) of blocks of ``block`` rows of x (B, H, N, D)."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    rows = x.shape[2]
    blocks = -(-rows // block)
    starts = torch.arange(blocks, device=x.device) * block
    count = (rows - starts).clamp(max=block).to(x.dtype).unsqueeze(-1)
    unit = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
    missing = blocks * block - rows
    if not (isinstance(missing, int) and missing == 0):  # a symbolic size is padded, perhaps by nothing
        x, unit = pad(x, (0, 0, 0, missing)), pad(unit, (0, 0, 0, missing))
    mean = x.unflatten(2, (blocks, block)).sum(3) / count
    mean_unit = unit.unflatten(2, (blocks, block)).sum(3) / count
    return mean, mean_unit.square().sum(-1)


@torch.no_grad()
def block_prediction(
    q: Tensor,
    k: Tensor,
    *,
    block_q: int,
    block_k: int,
    sim_threshold: float,
    cdf: float | None,
    topk: float | None,
    keep_sink: bool,
    causal: bool,
    scale: float,
) -> BlockPrediction:
    """The prediction with everything it rests on; arguments as in :func:`predict_block_map`."""
    pool_q, sim_q = block_statistics(q, block_q)
    pool_k, sim_k = block_statistics(k, block_k)
    similar = (sim_k > sim_threshold).unsqueeze(-2)
    scores = torch.matmul(pool_q, pool_k.transpose(-2, -1)) * scale
    scores = scores.masked_fill(~similar, float("-inf"))
    below = None
    if causal:
        below = _causal_blocks(q.shape[2], k.shape[2], block_q=block_q, block_k=block_k, device=q.device)
        scores = scores.masked_fill(~below, float("-inf"))
    peak = scores.amax(-1, keepdim=True)
    weight = torch.exp(scores - peak.masked_fill(peak == float("-inf"), 0.0))
    total = weight.sum(-1, keepdim=True)
    prob = weight / total.masked_fill(total == 0, 1.0)
    num_keys = prob.shape[-1]
    ordered, order = torch.sort(prob, dim=-1, descending=True, stable=True)
    if cdf is not None:
        count = (ordered.cumsum(-1) <= cdf).sum(-1, dtype=torch.int32).clamp_min(1)
    else:
        assert topk is not None
        # floor(topk * NK) as a count of ranks, so that NK may be symbolic; in float64, as Python multiplies
        ranks = torch.arange(1, num_keys + 1, device=q.device, dtype=torch.float64)
        count = (ranks <= topk * num_keys).sum(dtype=torch.int32).clamp_min(1).expand(prob.shape[:-1])
    best = torch.arange(num_keys, device=q.device) < count.unsqueeze(-1)
    mask = torch.zeros_like(best).scatter(-1, order, best)
    mask = mask | ~similar | (sim_q <= sim_threshold).unsqueeze(-1)
    if keep_sink:
        mask = mask | (torch.arange(num_keys, device=q.device) == 0)
    if below is not None:
        mask = mask & below
    return BlockPrediction(pool_q, pool_k, sim_q, sim_k, prob, count, mask)


def _causal_blocks(num_queries: int, num_keys: int, *, block_q: int, block_k: int, device: torch.device) -> Tensor:
    """(NQ, NK) bool: blocks that hold at least one pair with ``j <= i + N - M``."""
    last_query = (torch.arange(-(-num_queries // block_q), device=device) * block_q + block_q).clamp(
        max=num_queries
    ) - 1
    first_key = torch.arange(-(-num_keys // block_k), device=device) * block_k
    return first_key <= last_query.unsqueeze(1) + (num_keys - num_queries)


def _reference(q: Tensor, k: Tensor, *, block_q: int, block_k: int, **options: Any) -> BlockMap:
    found = block_prediction(q, k, block_q=block_q, block_k=block_k, **options)
    return BlockMap.from_mask(found.mask, block_q=block_q, block_k=block_k)


def _order(*args: Any, **kwargs: Any) -> tuple[str, ...]:
    return ("reference",)


define_op(predict_block_map, order=_order)
register_impl("predict_block_map", "reference", _reference)
