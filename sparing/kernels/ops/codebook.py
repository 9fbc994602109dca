"""Nearest code of a codebook, without ever writing the vectors x codes matrix, and the sums that update a codebook.

``codebook_argmin`` finds ``argmin_k ||x_n - c_k||^2`` as ``|c_k|^2 - 2 x_n . c_k`` (``|x_n|^2`` is the same for every
code and enters only the returned distance), or the code of largest cosine. ``codebook_stats`` gives the counts and
sums of the vectors of each code that an exponential-moving-average codebook needs. Neither has a gradient: the
straight-through estimator lives in the module.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from sparing.kernels.dispatch import define_op, interpreting, register_impl, run, triton_here

__all__ = ["codebook_argmin", "codebook_stats"]

Metric = Literal["l2", "cosine"]
Precision = Literal["auto", "tf32", "tf32x3", "bf16x6"]

NORMALIZE_EPS = 1e-12
# Bytes of the score tile that the chunked search writes at a time. The design allows 64 MB on a GPU; a CPU cache
# wants less.
SCORE_TILE_BYTES = {"cuda": 64 << 20, "cpu": 8 << 20}


def codebook_argmin_reference(x: Tensor, codebook: Tensor, *, metric: str = "l2") -> tuple[Tensor, Tensor]:
    """Index and distance of the nearest code, row chunk by row chunk: extra memory is one score tile plus ``O(N + K)``.

    Codes are padded to a multiple of 64 with unreachable ones, so that a matrix product treats every column alike and
    exact copies of a code tie exactly (the remainder columns of a BLAS kernel may add in another order).
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    (num_vectors, _), (num_codes, _) = x.shape, codebook.shape
    codes = codebook.detach().to(dtype)
    if metric == "cosine":
        codes = torch.nn.functional.normalize(codes, dim=1, eps=NORMALIZE_EPS)
    padding = -num_codes % 64
    codes = torch.nn.functional.pad(codes, (0, 0, 0, padding)).t()
    offset = torch.zeros(num_codes + padding, dtype=dtype, device=x.device)
    if metric == "l2":
        offset = codes.square().sum(0)
    offset[num_codes:] = float("inf")
    factor = -2.0 if metric == "l2" else -1.0
    tile = SCORE_TILE_BYTES.get(x.device.type, 64 << 20)
    rows = max(64, tile // (codes.shape[1] * codes.element_size()) // 64 * 64)
    index = torch.empty(num_vectors, dtype=torch.int32, device=x.device)
    distance = torch.empty(num_vectors, dtype=dtype, device=x.device)
    for start in range(0, num_vectors, rows):
        part = x[start : start + rows].detach().to(dtype)
        square = part.square().sum(1)
        if metric == "cosine":
            part = torch.nn.functional.normalize(part, dim=1, eps=NORMALIZE_EPS)
        score = torch.addmm(offset, part, codes, alpha=factor)
        best, where = score.min(1)
        index[start : start + rows] = where.to(torch.int32)
        distance[start : start + rows] = (best + square).clamp(min=0) if metric == "l2" else best
    return index, distance


def codebook_argmin(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: Metric = "l2",
    precision: Precision = "auto",
    return_dist: bool = False,
    backend: str = "auto",
) -> Any:
    """Index of the nearest code of each vector; exact ties go to the lowest index. No gradient.

    Args:
        x: ``(vectors, dim)``.
        codebook: ``(codes, dim)``, at least one code.
        metric: ``'l2'`` for the smallest squared distance, ``'cosine'`` for the largest cosine of the normalised rows.
        precision: of the products of float32 inputs in the kernel: ``'tf32x3'`` or ``'bf16x6'`` (near float32),
            ``'tf32'`` (fast); ``'auto'`` follows ``torch.get_float32_matmul_precision()``. 16-bit inputs are
            multiplied exactly and added in float32 whatever it says; the reference is float32 throughout.
        return_dist: also give the squared distance (l2) or minus the cosine.
        backend: ``'auto'``, ``'triton'`` or ``'reference'`` (a chunked matrix product).

    Returns:
        index ``(vectors,)`` int32; with ``return_dist`` also the distance ``(vectors,)`` in float32 (float64 for
        float64 inputs).

    Raises:
        ValueError: shapes that do not fit, an empty codebook, or an unknown metric or precision.
        BackendUnsupported: the named backend cannot serve; the message says why.

    Complexity: ``2 * vectors * codes * dim`` FLOPs and ``O(vectors + codes)`` memory: the distance matrix is never
        written.
    """
    _check_codebook(x, codebook, metric)
    if precision not in ("auto", "tf32", "tf32x3", "bf16x6"):
        raise ValueError(f"precision is {precision!r}; expected 'auto', 'tf32', 'tf32x3' or 'bf16x6'")
    index, distance = run("codebook_argmin", backend, x, codebook, metric=metric, precision=precision)
    return (index, distance) if return_dist else index


def _check_codebook(x: Tensor, codebook: Tensor, metric: str) -> None:
    if x.ndim != 2 or codebook.ndim != 2 or x.shape[1] != codebook.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and codebook {tuple(codebook.shape)}; expected (vectors, dim) and (codes, dim)"
        )
    if codebook.shape[0] == 0:
        raise ValueError("the codebook is empty; expected at least one code")
    if metric not in ("l2", "cosine"):
        raise ValueError(f"metric is {metric!r}; expected 'l2' or 'cosine'")


def codebook_stats(x: Tensor, index: Tensor, num_codes: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """How many vectors each code got, and their sum: what an exponential moving average of a codebook needs.

    The sum runs over the vectors sorted by code, each code's in ascending order: the same bits in every run.

    Args:
        x: ``(vectors, dim)``.
        index: ``(vectors,)`` integer codes in ``0 .. num_codes - 1``.
        num_codes: size of the codebook.
        backend: ``'auto'`` or ``'reference'``, the only one.

    Returns:
        counts ``(num_codes,)`` int32 and sums ``(num_codes, dim)`` in float32 (float64 for float64 inputs); 0 for
        unused codes.

    Raises:
        ValueError: shapes that do not fit, or an index that is not of integers.
    """
    if x.ndim != 2 or index.shape != x.shape[:1]:
        raise ValueError(f"x {tuple(x.shape)} and index {tuple(index.shape)}; expected (vectors, dim) and (vectors,)")
    if index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(f"index has dtype {index.dtype}; expected integers")
    if num_codes < 0:
        raise ValueError(f"num_codes is {num_codes}; expected 0 or more")
    return run("codebook_stats", backend, x, index, num_codes)


def _codebook_stats(x: Tensor, index: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    ordered, order = index.detach().long().sort(stable=True)
    edges = torch.searchsorted(ordered, torch.arange(num_codes + 1, device=x.device))
    counts = edges.diff().to(torch.int32)
    sums = torch.segment_reduce(x.detach()[order].to(dtype), "sum", offsets=edges, axis=0)
    return counts, sums


@torch.library.custom_op("sparing::codebook_argmin", mutates_args=())
def _codebook_argmin(x: Tensor, codebook: Tensor, metric: str, precision: str) -> tuple[Tensor, Tensor]:
    if precision == "reference" or triton_here(x.device):
        return codebook_argmin_reference(x, codebook, metric=metric)
    from sparing.kernels.triton.codebook import codebook_argmin_forward

    if precision == "auto":
        precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    contiguous = (x.contiguous(), codebook.contiguous())
    return codebook_argmin_forward(*contiguous, metric, precision, NORMALIZE_EPS, interpreted=interpreting())


@_codebook_argmin.register_fake
def _codebook_argmin_fake(x: Tensor, codebook: Tensor, metric: str, precision: str) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[0], dtype=torch.int32), x.new_empty(x.shape[0], dtype=dtype)


def _codebook_argmin_triton(
    x: Tensor, codebook: Tensor, *, metric: str = "l2", precision: str = "auto", return_dist: bool = False
) -> tuple[Tensor, Tensor]:
    return _codebook_argmin(x.detach(), codebook.detach(), metric, precision)


def _codebook_argmin_chunked(
    x: Tensor, codebook: Tensor, *, metric: str = "l2", precision: str = "auto", return_dist: bool = False
) -> tuple[Tensor, Tensor]:
    # One node under a compiler: its chunks would otherwise be unrolled for one number of vectors.
    if torch.compiler.is_compiling():
        return _codebook_argmin(x.detach(), codebook.detach(), metric, "reference")
    return codebook_argmin_reference(x, codebook, metric=metric)


def _order(x: Tensor, *args: Any, **kwargs: Any) -> tuple[str, ...]:
    return ("triton", "reference") if x.device.type == "cuda" else ("reference",)


def _triton_supports(x: Tensor, codebook: Tensor, **kwargs: Any) -> list[str]:
    reasons = []
    if x.dtype != codebook.dtype:
        reasons.append(f"x is {x.dtype} and the codebook {codebook.dtype}; takes one dtype")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"dtype {x.dtype}; takes float32, bfloat16 and float16")
    return reasons


define_op(codebook_argmin, order=_order)
register_impl("codebook_argmin", "triton", _codebook_argmin_triton, supports=_triton_supports, here=triton_here)
register_impl("codebook_argmin", "reference", _codebook_argmin_chunked)
define_op(codebook_stats, order=lambda *args, **kwargs: ("reference",))
register_impl("codebook_stats", "reference", _codebook_stats)
