"""What the attention kernels share: tile loads and stores, dots, the row sums of the backward, and how a head dim is
cut.

A head dim that is no power of two is cut into two parts (72 = 64 + 16, of which 8 are used): 1.11 times the work,
where padding to 128 would cost 1.78 times.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparing.kernels.dispatch import interpreting
from sparing.kernels.triton.config import next_power_of_2

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def product(a, b, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """a (m, k) times b (k, n). UPCAST: the interpreter multiplies the raw bits of bfloat16, so operands go to
    float32.
    """
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_tile(ptr, rows, columns, row_stride, row_limit, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(len(rows), BLOCK) tile of a matrix with unit column stride; 0 outside."""
    live = (rows < row_limit)[:, None]
    if BLOCK > WIDTH:
        live = live & (columns < WIDTH)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * row_stride + columns[None, :], mask=live, other=0.0)


@triton.jit
def store_tile(ptr, tile, rows, columns, row_stride, row_limit, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write the part of a tile that lies inside the matrix, in its dtype."""
    live = (rows < row_limit)[:, None]
    if BLOCK > WIDTH:
        live = live & (columns < WIDTH)[None, :]
    where = ptr + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    tl.store(where, tile.to(ptr.dtype.element_ty), mask=live)


@triton.jit
def softmax_step(scores, peak, total):
    """One online-softmax step in base 2: (weights, rescaling of what was summed so far, new peak, new total).

    Rows that have seen nothing keep peak -inf: their peak counts as 0, so that no ``-inf - -inf`` arises.
    """
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    rescale = tl.exp2(peak - safe)
    weights = tl.exp2(scores - safe[:, None])
    return weights, rescale, new_peak, total * rescale + tl.sum(weights, 1)


@triton.jit
def natural_lse(peak, total):
    """Natural-log normaliser of base-2 sums; -inf for rows that saw nothing."""
    return tl.where(total == 0.0, float("-inf"), (peak + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN2)


@triton.jit
def load_base2_lse(ptr, rows, limit):
    """Normalisers in base 2; +inf where a row is outside or empty, which makes its weights exp2(-inf) = 0."""
    lse = tl.load(ptr + rows, mask=rows < limit, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit(do_not_specialize=["a_batch", "a_head", "a_row", "b_batch", "b_head", "b_row", "heads", "num_rows"])
def row_dot_kernel(
    a_ptr,  # (B, H, M, D), any strides
    b_ptr,  # (B, H, M, D), any strides
    out_ptr,  # (B, H, M) contiguous
    a_batch,
    a_head,
    a_row,
    b_batch,
    b_head,
    b_row,
    heads,
    num_rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
    UNIT: tl.constexpr,
):
    tiles = tl.cdiv(num_rows, ROWS)
    program = tl.program_id(0).to(tl.int64)
    head_index = program // tiles
    batch, head = head_index // heads, head_index % heads
    rows = (program % tiles) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    a_ptr += (batch * a_batch + head * a_head) * UNIT
    b_ptr += (batch * b_batch + head * b_head) * UNIT
    a = load_tile(a_ptr, rows, columns, a_row * UNIT, num_rows, D, BLOCK_D).to(ACC)
    b = load_tile(b_ptr, rows, columns, b_row * UNIT, num_rows, D, BLOCK_D).to(ACC)
    tl.store(out_ptr + head_index * num_rows + rows, tl.sum(a * b, 1), mask=rows < num_rows)


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over the last dim of a * b, both (B, H, M, D): (B, H, M) in the accumulator dtype (the delta of a
    backward).
    """
    batch, heads, rows, dim = a.shape
    out = torch.empty(batch, heads, rows, device=a.device, dtype=accumulator(a.dtype))
    block = 32
    strides, unit = strides_in_units(a, b)
    row_dot_kernel[(batch * heads * -(-rows // block),)](
        a, b, out, *strides, heads, rows,
        D=dim, BLOCK_D=next_power_of_2(dim), ROWS=block, ACC=acc_type(a.dtype), UNIT=unit, num_warps=4,
    )  # fmt: skip
    return out


def split_dim(dim: int) -> tuple[int, int]:
    """How a dim is cut into tile widths: two powers of two, at least 16 each, or one and 0 where a cut saves
    nothing.
    """
    whole = max(next_power_of_2(dim), 16)
    low = whole // 2
    if dim == whole or low < 16:
        return whole, 0
    rest = max(next_power_of_2(dim - low), 16)
    return (whole, 0) if low + rest >= whole else (low, rest)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """dtype of sums and normalisers."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def acc_type(dtype: torch.dtype) -> Any:
    """The accumulator as Triton names it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_options(dtype: torch.dtype) -> dict[str, Any]:
    """UPCAST and PRECISION of :func:`product` for inputs of ``dtype``: float32 dots follow torch's matmul precision."""
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return {"UPCAST": interpreting() and dtype == torch.bfloat16, "PRECISION": "tf32x3" if exact else "tf32"}


def unit_last_stride(x: Tensor) -> Tensor:
    """``x`` itself when its last stride is 1 (what the kernels address), else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def strides_in_units(*tensors: Tensor) -> tuple[list[int], int]:
    """All strides but the last of each tensor, divided by the largest power of two up to 16 that divides them all,
    and that number. Kernels multiply by it again: so the compiler knows the alignment (72 = 9 * 8 gives 128-bit loads
    of 16-bit rows), and new lengths make no new variants, since the strides themselves are not specialised.
    """
    strides = [stride for tensor in tensors for stride in tensor.stride()[:-1]]
    unit = math.gcd(16, *strides)
    return [stride // unit for stride in strides], unit


def power_of_two_tile(block: int, largest: int) -> int:
    """The largest power of two that divides ``block`` and is at most ``largest``."""
    return min(block & -block, largest)
