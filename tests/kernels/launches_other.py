"""Launches of the adaLN, exit-test and codebook kernels at published sizes, for offline compilation; names as in
``launches``.
"""

from collections.abc import Callable
from functools import partial

import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def adaln(dim: int, dtype: torch.dtype, *, affine: bool = False, per_token: bool = False) -> None:
    from sparing.kernels.triton import adaln as kernels

    x = torch.empty(2, 256, dim, dtype=dtype)
    modulation = torch.empty(2, 256 if per_token else 1, dim, dtype=dtype)
    weight = torch.empty(dim, dtype=dtype) if affine else None
    statistic = torch.empty(2, 256)
    fused = (x, x, modulation, modulation, modulation, weight, weight, x, x, statistic, statistic)
    kernels.adaln_forward(*fused, eps=1e-6)
    kernels.adaln_backward(x, x, modulation, modulation, weight, weight, statistic, statistic, x, x)


def cosine_exit(dim: int, dtype: torch.dtype, mode: str) -> None:
    from sparing.kernels.triton.cosine_exit import cosine_exit_forward

    states, valid = torch.empty(4, 950, dim, dtype=dtype), torch.ones(4, 950, dtype=torch.bool)
    cosine_exit_forward(states, states, valid, torch.empty(4), mode, 1e-8)


def codebook(dim: int, dtype: torch.dtype, *, metric: str = "l2", precision: str = "tf32x3") -> None:
    from sparing.kernels.triton.codebook import codebook_argmin_forward

    x, codes = torch.empty(1024, dim, dtype=dtype), torch.empty(8192, dim, dtype=dtype)
    codebook_argmin_forward(x, codes, metric, precision, 1e-12, interpreted=False)


LAUNCHES: dict[str, Callable[[], None]] = {
    "adaln/c1152-bf16/default": partial(adaln, 1152, BF16),
    "adaln/c384-bf16": partial(adaln, 384, BF16),
    "adaln/c3072-bf16": partial(adaln, 3072, BF16),
    "adaln/c1152-fp32": partial(adaln, 1152, FP32),
    "adaln/c768-bf16-affine-per-token": partial(adaln, 768, BF16, affine=True, per_token=True),
    "adaln/c3072-fp32-affine": partial(adaln, 3072, FP32, affine=True),
    "cosine_exit/c768-bf16-mean/default": partial(cosine_exit, 768, BF16, "mean"),
    "cosine_exit/c768-fp32-flat": partial(cosine_exit, 768, FP32, "flat"),
    "codebook/d256-bf16/default": partial(codebook, 256, BF16),
    "codebook/d64-fp16-cosine": partial(codebook, 64, FP16, metric="cosine"),
    "codebook/d768-bf16": partial(codebook, 768, BF16),
    "codebook/d32-fp32": partial(codebook, 32, FP32),
    "codebook/d256-fp32": partial(codebook, 256, FP32),
    "codebook/d256-fp32-tf32": partial(codebook, 256, FP32, precision="tf32"),
    "codebook/d256-fp32-bf16x6": partial(codebook, 256, FP32, precision="bf16x6"),
}
