"""Triton kernel of the ring step: append and attend in one launch, one program per stream and head.

A program reads the old tokens from the ring and the new ones from the arguments, so it never reads what it has just
written; a slot about to be overwritten is hidden among the old ones. The stream's counters are advanced by a second,
tiny launch, because the programs of the other heads still read them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparing.kernels.triton.config import next_power_of_2
from sparing.kernels.triton.device import on_their_device
from sparing.kernels.triton.tiles import LOG2E, acc_type, accumulator, natural_lse, softmax_step

_SIZES = ["heads", "window", "capacity"]


@triton.jit
def old_ages(slots, head, capacity):
    """Steps since each slot was written, before this call: 0 = the newest."""
    return (head - 1 - slots + 2 * capacity) % capacity


@triton.jit(do_not_specialize=_SIZES)
def ring_step_kernel(
    q_ptr, k_new_ptr, v_new_ptr,  # (S, T, H, D), (S, T, H, D), (S, T, H, DV) contiguous
    k_ptr, v_ptr,  # (S, CP, H, D), (S, CP, H, DV) contiguous, updated
    head_ptr, length_ptr,  # (S,) int32
    active_ptr, reset_ptr,  # (S,) bool
    bias_ptr,  # (H, window) by age
    out_ptr, lse_ptr,  # (S, T, H, DV), (S, T, H) contiguous
    heads, window, capacity, scale,
    T: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    HAS_ACTIVE: tl.constexpr, HAS_RESET: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    stream, h = program // heads, program % heads
    d, e = tl.arange(0, BD), tl.arange(0, BV)
    in_d, in_e = d < D, e < DV
    active = True
    if HAS_ACTIVE:
        active = tl.load(active_ptr + stream) != 0
    head = tl.load(head_ptr + stream)
    length = tl.load(length_ptr + stream)
    if HAS_RESET:
        kept = tl.load(reset_ptr + stream) == 0
        head = tl.where(kept, head, 0)
        length = tl.where(kept, length, 0)
    ring = stream * capacity * heads + h
    for j in tl.static_range(T):
        row = (stream * T + j) * heads + h
        q = tl.load(q_ptr + row * D + d, mask=in_d, other=0.0).to(ACC) * (scale * LOG2E)
        acc = tl.zeros([1, BV], dtype=ACC)
        peak = tl.full([1], float("-inf"), dtype=ACC)
        total = tl.zeros([1], dtype=ACC)
        sees = tl.minimum(length + j + 1, window)  # tokens this query sees, its own and j new ones before it among them
        if active:
            for first in range(0, capacity, BN):
                slots = first + tl.arange(0, BN)
                ages = old_ages(slots, head, capacity) + j + 1
                live = (slots < capacity) & (ages < sees)
                at = ring + slots.to(tl.int64) * heads
                k = tl.load(k_ptr + at[:, None] * D + d[None, :], mask=live[:, None] & in_d[None, :], other=0.0)
                scores = tl.sum(k.to(ACC) * q[None, :], 1)
                if HAS_BIAS:
                    scores += tl.load(bias_ptr + h * window + ages, mask=live, other=0.0).to(ACC) * LOG2E
                scores = tl.where(live, scores, float("-inf"))[None, :]
                weights, rescale, peak, total = softmax_step(scores, peak, total)
                v = tl.load(v_ptr + at[:, None] * DV + e[None, :], mask=live[:, None] & in_e[None, :], other=0.0)
                acc = acc * rescale[:, None] + tl.sum(tl.trans(weights) * v.to(ACC), 0)[None, :]
            for i in tl.static_range(j + 1):
                new = (stream * T + i) * heads + h
                age = j - i
                k_one = tl.load(k_new_ptr + new * D + d, mask=in_d, other=0.0).to(ACC)
                score = tl.sum(k_one * q, 0)
                if HAS_BIAS:
                    score += tl.load(bias_ptr + h * window + age, mask=age < window, other=0.0).to(ACC) * LOG2E
                score = tl.where(age < sees, score, float("-inf"))
                weights, rescale, peak, total = softmax_step(tl.zeros([1, 1], dtype=ACC) + score, peak, total)
                v_one = tl.load(v_new_ptr + new * DV + e, mask=in_e, other=0.0).to(ACC)
                acc = acc * rescale[:, None] + weights * v_one[None, :]
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        one = tl.arange(0, 1)
        tl.store(out_ptr + row * DV + e[None, :], acc.to(out_ptr.dtype.element_ty), mask=in_e[None, :])
        tl.store(lse_ptr + row + one, natural_lse(peak, total))
    # every read of the ring above is of slots that stay; all threads pass them before any slot is overwritten
    tl.debug_barrier()
    if active:
        for j in tl.static_range(T):
            row = (stream * T + j) * heads + h
            slot = ((head + j) % capacity).to(tl.int64)
            k_one = tl.load(k_new_ptr + row * D + d, mask=in_d, other=0.0)
            v_one = tl.load(v_new_ptr + row * DV + e, mask=in_e, other=0.0)
            tl.store(k_ptr + (ring + slot * heads) * D + d, k_one, mask=in_d)
            tl.store(v_ptr + (ring + slot * heads) * DV + e, v_one, mask=in_e)


@triton.jit(do_not_specialize=["streams", "capacity", "tokens"])
def ring_advance_kernel(
    head_ptr, length_ptr, active_ptr, reset_ptr, streams, capacity, tokens,
    HAS_ACTIVE: tl.constexpr, HAS_RESET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Reset and advance the counters of all streams, in place."""
    stream = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = stream < streams
    head = tl.load(head_ptr + stream, mask=live, other=0)
    length = tl.load(length_ptr + stream, mask=live, other=0)
    step = tokens
    if HAS_RESET:
        kept = tl.load(reset_ptr + stream, mask=live, other=0) == 0
        head = tl.where(kept, head, 0)
        length = tl.where(kept, length, 0)
    if HAS_ACTIVE:
        step = tl.where(tl.load(active_ptr + stream, mask=live, other=0) != 0, tokens, 0)
    tl.store(head_ptr + stream, (head + step) % capacity, mask=live)
    tl.store(length_ptr + stream, tl.minimum(length + step, capacity), mask=live)


@on_their_device
def step(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    head: Tensor,
    length: Tensor,
    active: Tensor | None,
    reset: Tensor | None,
    age_bias: Tensor | None,
    *,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out (S, T, H, DV) and lse (S, T, H); the cache and its counters are updated in place. The caches are
    contiguous.
    """
    q, k_new, v_new = (t.contiguous() for t in (q, k_new, v_new))
    streams, tokens, heads, dim = q.shape
    capacity, value_dim = k_cache.shape[1], v_cache.shape[3]
    out = torch.empty(streams, tokens, heads, value_dim, device=q.device, dtype=q.dtype)
    lse = torch.empty(streams, tokens, heads, device=q.device, dtype=accumulator(q.dtype))
    if out.numel() == 0:
        return out, lse
    flags = (head if active is None else active.contiguous(), head if reset is None else reset.contiguous())
    has = {"HAS_ACTIVE": active is not None, "HAS_RESET": reset is not None}
    ring_step_kernel[(streams * heads,)](
        q, k_new, v_new, k_cache, v_cache, head, length, *flags, q if age_bias is None else age_bias.contiguous(),
        out, lse, heads, window, capacity, scale,
        T=tokens, D=dim, BD=next_power_of_2(dim), DV=value_dim, BV=next_power_of_2(value_dim), BN=32,
        HAS_BIAS=age_bias is not None, ACC=acc_type(q.dtype), **has, num_warps=4, num_stages=2,
    )  # fmt: skip
    block = 256
    ring_advance_kernel[(triton.cdiv(streams, block),)](
        head, length, *flags, streams, capacity, tokens, **has, BLOCK=block, num_warps=4
    )
    return out, lse
