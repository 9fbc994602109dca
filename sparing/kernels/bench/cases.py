"""What is measured: ops at the sizes of named models, with the arithmetic and the bytes that each cannot avoid."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparing import kernels

__all__ = ["SUITES", "Case", "Inputs", "cases"]

SUITES = ("smoke", "paper", "full")
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass
class Inputs:
    """One set of arguments. ``leaves``: the tensors that a backward differentiates."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    leaves: tuple[Tensor, ...] = ()

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]


@dataclass(frozen=True)
class Case:
    """One row: ``make(device, dtype, generator)`` builds its inputs.

    ``flops`` and ``exps`` of the forward; ``passes`` counts bytes read and written by it, each tensor once;
    ``backward``: whether forward with backward is measured too. ``narrow`` cuts inputs and output to what the float32
    reference can hold. ``peers``: further implementations, called as the op is.
    """

    op: str
    name: str
    make: Callable[[torch.device, torch.dtype, torch.Generator], Inputs]
    dtype: torch.dtype = BF16
    flops: float = 0.0
    exps: float = 0.0
    bytes: float = 0.0
    backward: bool = False
    narrow: Callable[[Inputs], Inputs] = lambda inputs: inputs
    take: Callable[[Any], Any] = lambda out: out
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    tolerance: float | None = None


def cases(suite: str, ops: Iterable[str] | None = None) -> list[Case]:
    """The cases of a suite, of these ops only when given.

    Raises:
        ValueError: an unknown suite, or an op without a case in it.
    """
    if suite not in SUITES:
        raise ValueError(f"suite is {suite!r}; expected one of {', '.join(SUITES)}")
    found = {"smoke": _smoke, "paper": _paper, "full": _full}[suite]()
    wanted = None if ops is None else set(ops)
    unknown = set() if wanted is None else wanted - {case.op for case in found}
    if unknown:
        have = ", ".join(sorted({case.op for case in found}))
        raise ValueError(f"suite {suite} has no case of {', '.join(sorted(unknown))}; it has {have}")
    return [case for case in found if wanted is None or case.op in wanted]


def _randn(*shape: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, device=device, dtype=FP32, generator=generator).to(dtype)


def _scores(b: int, h: int, m: int, n: int, d: int, *, size: int = 2, share: float = 1.0) -> dict[str, Any]:
    """Floors of an attention of which this share of the scores is computed; ``size``: bytes of an element."""
    pairs = share * b * h * m * n
    return {"flops": 4.0 * pairs * d, "exps": pairs, "bytes": float(size * b * h * d * (2 * m + 2 * n))}


def _first_head(inputs: Inputs) -> Inputs:
    q, k, v, *rest = inputs.args
    kwargs = {
        name: value[:1] if name == "kv_len" else value[:, :1] if name == "bias" else value
        for name, value in inputs.kwargs.items()
    }
    if rest and isinstance(rest[0], kernels.BlockMap):
        block_map = rest[0]
        mask = block_map.mask[:1, :1]
        rest = [kernels.BlockMap.from_mask(mask, block_q=block_map.block_q, block_k=block_map.block_k)]
    return Inputs((q[:1, :1], k[:1, :1], v[:1, :1], *rest), kwargs)


def _attention(op: str, name: str, b: int, h: int, m: int, n: int, d: int, *, extra: str = "", **options: Any) -> Case:
    """A case of ``attention``, ``few_query_attention`` or ``tiny_attention``; ``extra``: ``bias`` and/or ``kv_len``."""

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        new = {"device": device, "dtype": dtype, "generator": generator}
        q, k, v = _randn(b, h, m, d, **new), _randn(b, h, n, d, **new), _randn(b, h, n, d, **new)
        kwargs: dict[str, Any] = {}
        if "bias" in extra:
            kwargs["bias"] = _randn(1, h, m, n, **new)
        if "kv_len" in extra:
            lengths = torch.full((b,), n, dtype=torch.int32, device=device)
            kwargs["kv_len"] = lengths - torch.arange(b, dtype=torch.int32, device=device) % max(n // 8, 1)
        return Inputs((q, k, v), kwargs, (q, k, v))

    floors: dict[str, Any] = _scores(b, h, m, n, d)
    floors["bytes"] += 2.0 * h * m * n if "bias" in extra else 0.0
    return Case(op, name, make, narrow=_first_head, take=lambda out: out[:1, :1], **floors, **options)


def _block_sparse(name: str, b: int, h: int, n: int, d: int, density: float, **options: Any) -> Case:
    block_q, block_k = 128, 64

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        new = {"device": device, "dtype": dtype, "generator": generator}
        q, k, v = (_randn(b, h, n, d, **new) for _ in range(3))
        blocks = (1, h, -(-n // block_q), -(-n // block_k))
        mask = torch.rand(blocks, device=device, generator=generator) < density
        mask[..., 0] = True
        block_map = kernels.BlockMap.from_mask(mask, block_q=block_q, block_k=block_k)
        return Inputs((q, k, v, block_map), {}, (q, k, v))

    floors = _scores(b, h, n, n, d, share=density)
    return Case("block_sparse_attention", name, make, narrow=_first_head, take=lambda o: o[:1, :1], **floors, **options)


def _window(name: str, b: int, side: int, heads: int, d: int, window: int, shift: int, **options: Any) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        new = {"device": device, "dtype": dtype, "generator": generator}
        qkv, table = _randn(b, side, side, 3 * heads * d, **new), _randn((2 * window - 1) ** 2, heads, **new)
        return Inputs((qkv, table), {"window": window, "shift": shift, "heads": heads}, (qkv, table))

    def narrow(inputs: Inputs) -> Inputs:
        return Inputs((inputs.args[0][:1], inputs.args[1]), inputs.kwargs)

    floors = _scores(b * (side // window) ** 2, heads, window**2, window**2, d)
    return Case("window_attention", name, make, narrow=narrow, take=lambda out: out[:1], **floors, **options)


def _ring(name: str, streams: int, window: int, heads: int = 8, d: int = 128, **options: Any) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        new = {"device": device, "dtype": dtype, "generator": generator}
        cache = kernels.RingCache.empty(streams, window, heads=heads, head_dim=d, device=device, dtype=dtype)
        cache.k.copy_(_randn(*cache.k.shape, **new))
        cache.v.copy_(_randn(*cache.v.shape, **new))
        cache.length.fill_(window)
        return Inputs((*(_randn(streams, 1, heads, d, **new) for _ in range(3)), cache))

    return Case("ring_attention_step", name, make, **_scores(streams, heads, 1, window, d), **options)


def _adaln(op: str, name: str, b: int, tokens: int, dim: int, dtype: torch.dtype = BF16, **options: Any) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        new = {"device": device, "dtype": dtype, "generator": generator}
        x, y = _randn(b, tokens, dim, **new), _randn(b, tokens, dim, **new)
        gate, shift, scale = (_randn(b, 1, dim, **new) for _ in range(3))
        chosen = {"gate_residual": (x, y, gate), "ln_modulate": (x, shift, scale)}.get(op, (x, y, gate, shift, scale))
        return Inputs(chosen, {}, chosen)

    passes = {"gate_residual": 3, "ln_modulate": 2}.get(op, 4)
    peers = {"inductor": compiled_reference(op)}
    return Case(op, name, make, dtype, bytes=float(passes * b * tokens * dim * dtype.itemsize), peers=peers, **options)


def _cosine(name: str, b: int, tokens: int, dim: int, dtype: torch.dtype = BF16) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        new = {"device": device, "dtype": dtype, "generator": generator}
        prev = _randn(b, tokens, dim, **new)
        valid = torch.rand(b, tokens, device=device, generator=generator) > 0.1
        return Inputs((prev, prev + 0.3 * _randn(b, tokens, dim, **new), valid, 0.9))

    peers = {"inductor": compiled_reference("cosine_exit")}
    return Case("cosine_exit", name, make, dtype, bytes=float(2 * b * tokens * dim * dtype.itemsize), peers=peers)


def _codebook(name: str, vectors: int, codes: int, dim: int, dtype: torch.dtype = BF16) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        new = {"device": device, "dtype": dtype, "generator": generator}
        return Inputs((_randn(vectors, dim, **new), _randn(codes, dim, **new)), {"return_dist": True})

    size = float((vectors + codes) * dim * dtype.itemsize)
    return Case(
        "codebook_argmin", name, make, dtype, flops=2.0 * vectors * codes * dim, bytes=size,
        narrow=lambda i: Inputs((i.args[0][:2048], i.args[1]), i.kwargs),
        take=lambda out: out[1][:2048],  # the distance: an index may differ where two codes are equally near
    )  # fmt: skip


def _gather(name: str, b: int, tokens: int, dim: int) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        x = _randn(b, tokens, dim, device=device, dtype=dtype, generator=generator)
        keep = torch.rand(b, tokens, device=device, generator=generator) > 0.5
        return Inputs((x, kernels.compact(keep, capacity=b * tokens // 2)))

    return Case("gather_rows", name, make, bytes=float(2 * b * tokens * dim))


def _pool(name: str, b: int, grid: tuple[int, int], out_grid: tuple[int, int], dim: int) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        x = _randn(b, grid[0] * grid[1], dim, device=device, dtype=dtype, generator=generator)
        return Inputs((x, grid, out_grid), {}, (x,))

    def images(x: Tensor, grid: tuple[int, int], out_grid: tuple[int, int]) -> Tensor:
        pooled = torch.nn.functional.adaptive_avg_pool2d(x.mT.unflatten(2, grid), out_grid)
        return pooled.flatten(2).mT.contiguous()

    moved = float(2 * b * dim * (grid[0] * grid[1] + out_grid[0] * out_grid[1]))
    return Case("grid_pool", name, make, bytes=moved, peers={"adaptive_avg_pool2d": images})


def _varlen(name: str, segments: int, longest: int, heads: int, d: int) -> Case:
    lengths = [longest // 4 + (3 * longest // 4) * (i * 7 % segments) // segments for i in range(segments)]

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        total = sum(lengths)
        cu = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
        q, k, v = (_randn(total, heads, d, device=device, dtype=dtype, generator=generator) for _ in range(3))
        return Inputs((q, k, v, cu, cu, longest, longest), {}, (q, k, v))

    pairs = float(sum(n * n for n in lengths) * heads)
    return Case(
        "varlen_attention", name, make, flops=4.0 * pairs * d, exps=pairs, bytes=8.0 * sum(lengths) * heads * d,
        narrow=lambda i: Inputs((*(t[: lengths[0]] for t in i.args[:3]), *(c[:2] for c in i.args[3:5]), *i.args[5:])),
        take=lambda out: out[: lengths[0]],
    )  # fmt: skip


def compiled_reference(op: str) -> Callable[..., Any]:
    """The reference of an op through Inductor, compiled on first use."""
    compiled: list[Any] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if not compiled:
            public = getattr(kernels, op)
            compiled.append(torch.compile(lambda *a, **k: public(*a, **k, backend="reference")))
        return compiled[0](*args, **kwargs)

    return call


def _smoke() -> list[Case]:
    return [
        _attention("attention", "2x3x65 d32", 2, 3, 65, 65, 32, dtype=FP32, backward=True),
        _attention("attention", "bias 2x3x65 d32", 2, 3, 65, 65, 32, extra="bias", dtype=FP32),
        _varlen("4 segments to 64", 4, 64, 2, 32),
        _block_sparse("n512 d64 density .5", 1, 2, 512, 64, 0.5, dtype=FP32, backward=True),
        _attention("few_query_attention", "9x512 d32", 2, 4, 9, 512, 32, extra="kv_len", dtype=FP32),
        _window("w7 28x28", 2, 28, 3, 32, 7, 3, dtype=FP32, backward=True),
        _attention("tiny_attention", "8x16 d64", 32, 8, 8, 16, 64, dtype=FP32),
        _ring("s4 w64", 4, 64, dtype=FP32),
        *(
            _adaln(op, "b2 l64 c384", 2, 64, 384, FP32)
            for op in ("gate_residual", "ln_modulate", "gate_residual_ln_modulate")
        ),
        _cosine("b4 l64 c384", 4, 64, 384, FP32),
        _codebook("n512 k1024 d64", 512, 1024, 64, FP32),
        _gather("b4 l64 c384", 4, 64, 384),
        _pool("14x14 to 7x7 c384", 4, (14, 14), (7, 7), 384),
    ]


def _paper() -> list[Case]:
    """The rows of the floor table: published models at published sizes."""
    both: dict[str, Any] = {"backward": True}
    return [
        _attention("attention", "DeiT-S 224 b256", 256, 6, 197, 197, 64, **both),
        _attention("attention", "DeiT-B 384 b64", 64, 12, 577, 577, 64),
        _attention("attention", "DiT-XL 256px b64 d72", 64, 16, 256, 256, 72, **both),
        _attention("attention", "DiT-XL 512px b16 d72", 16, 16, 1024, 1024, 72),
        _attention("attention", "DiT-XL 1024px b4 d72", 4, 16, 4096, 4096, 72),
        _attention("attention", "OFA-base encoder b32, bias", 32, 12, 950, 950, 64, extra="bias", **both),
        _attention("attention", "ALBEF cross 30x577 b64", 64, 12, 30, 577, 64),
        _attention("attention", "SparseDiT merge 64x256 b64 d72", 64, 16, 64, 256, 72),
        _attention("attention", "SparseDiT recovery 256x64 b64 d72", 64, 16, 256, 64, 72),
        _varlen("MuE survivors, 64 segments to 950", 64, 950, 12, 64),
        *(_block_sparse(f"video DiT n32768 d128 density {s}", 1, 24, 32768, 128, s) for s in (1.0, 0.5, 0.25)),
        *(_block_sparse(f"DiT n4096 d72 density {s}", 4, 16, 4096, 72, s, backward=s == 0.5) for s in (1.0, 0.5)),
        _attention("few_query_attention", "16x65536 b1", 1, 16, 16, 65536, 64),
        _attention("few_query_attention", "16x65536 b1, kv_len", 1, 16, 16, 65536, 64, extra="kv_len", **both),
        _attention("few_query_attention", "STViT-R window 9x109 b256", 256, 12, 9, 109, 32),
        _attention("tiny_attention", "FIT read 8x16 b256", 256, 8, 8, 16, 64, **both),
        _attention("tiny_attention", "FIT write 16x8 b256", 256, 8, 16, 8, 64),
        _window("Swin-S stage 1, b64", 64, 56, 3, 32, 7, 0, **both),
        _window("Swin-S stage 1, b64, shifted", 64, 56, 3, 32, 7, 3),
        _window("Swin-B 384 stage 3, b64", 64, 24, 16, 32, 12, 6),
        *(_ring(f"streams {s} window 64", s, 64) for s in (1, 16, 128, 512)),
        *(
            _adaln(op, "DiT-XL 256px b64 c1152", 64, 256, 1152, **both)
            for op in ("gate_residual", "ln_modulate", "gate_residual_ln_modulate")
        ),
        _cosine("MuE b64 l950 c768", 64, 950, 768),
        _codebook("n12544 k8192 d256", 12544, 8192, 256),
        _codebook("n12544 k8192 d256 float32", 12544, 8192, 256, FP32),
        _codebook("n100352 k8192 d256", 100352, 8192, 256),
        _gather("half of b64 l950 c768", 64, 950, 768),
        _pool("DiT 32x32 to 16x16 c1152", 16, (32, 32), (16, 16), 1152),
        _pool("DiT 32x32 to 12x12 c1152", 16, (32, 32), (12, 12), 1152),
    ]


def _full() -> list[Case]:
    """The paper rows and the sweeps, each case once."""
    return list({(case.op, case.name, case.dtype): case for case in [*_paper(), *_sweeps()]}.values())


def _sweeps() -> list[Case]:
    found = [
        _attention("few_query_attention", f"m{m} n{n} bh{bh}, kv_len", bh // 8, 8, m, n, 64, extra="kv_len")
        for m in (1, 4, 9, 16, 32, 64)
        for n in (1024, 4096, 16384, 65536)
        for bh in (8, 32, 128)
    ]
    found += [
        _block_sparse(f"n{n} d{d} density {s}", 1, 16, n, d, s)
        for s in (0.1, 0.25, 0.5, 0.75, 1.0)
        for n in (4096, 16384, 32768)
        for d in (64, 72, 128)
    ]
    stages = ((56, 3), (28, 6), (14, 12))
    found += [_window(f"w7 stage {i + 1}", 64, side, heads, 32, 7, 0) for i, (side, heads) in enumerate(stages)]
    found += [_window(f"w8 {side}x{side}", 64, side, heads, 32, 8, 4) for side, heads in ((64, 3), (32, 6))]
    found += [_window(f"w12 {side}x{side}", 32, side, heads, 32, 12, 6) for side, heads in ((96, 4), (48, 8))]
    found += [
        _ring(f"streams {s} window {w}", s, w) for s in (1, 4, 16, 64, 128, 256, 512) for w in (32, 64, 128, 1024)
    ]
    found += [
        _codebook(f"n{n} k{k} d{d}", n, k, d)
        for n in (1000, 10_000, 100_000)
        for k in (1024, 8192, 16384)
        for d in (64, 256, 768)
    ]
    found += [
        _adaln("gate_residual_ln_modulate", f"rows {rows} c{dim}", rows // 256, 256, dim)
        for dim in (384, 768, 1152, 3072)
        for rows in (4096, 16384, 65536)
    ]
    return found
