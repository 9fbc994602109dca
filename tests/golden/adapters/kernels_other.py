"""Golden cases of the fusions, the exit test, the codebook search, compaction and pooling."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from golden.adapters.kernels_cases import cast, expand, or_skip
from golden.harness import Case, CaseFile
from sparing import kernels
from sparing.kernels import dispatch

REFERENCE = [("reference", dtype) for dtype in ("float64", "float32", "bfloat16", "float16")]
TRITON = [("triton", dtype) for dtype in ("float32", "bfloat16", "float16")]


def cases(case_file: CaseFile) -> Iterable[Case]:
    yield from expand(case_file, VARIANTS[case_file.spec["model"]])


def _adaln(case: Case) -> dict[str, Tensor]:
    names = ("x", "y", "gate", "shift", "scale", "weight", "bias")
    leaves = dict(zip(names, cast(case, *names)))
    backend, eps = case.options["backend"], case.config["eps"]
    arguments = tuple(leaves.values())
    x1, h = or_skip(lambda: kernels.gate_residual_ln_modulate(*arguments, eps=eps, backend=backend))
    _, _, mean, rstd = dispatch.run("gate_residual_ln_modulate", backend, *arguments, eps=eps)
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    upstream = [case.inputs[f"grad_{name}"].to(x1.dtype) for name in ("h", "x1")]
    grads = torch.autograd.grad([h, x1], list(given.values()), upstream)
    found = {"x1": x1, "h": h, "mean": mean, "rstd": rstd}
    found |= {f"grad_{name}": grad for name, grad in zip(given, grads)}
    assert torch.equal(kernels.gate_residual(*arguments[:3], backend=backend), x1)
    if x1.dtype in (torch.float32, torch.float64):  # a stored 16-bit x1 has lost what the norm needs
        alone = kernels.ln_modulate(x1, *arguments[3:], eps=eps, backend=backend)
        torch.testing.assert_close(alone, h, rtol=1e-5, atol=1e-5)
    return found


def _cosine(case: Case) -> dict[str, Tensor]:
    prev, cur = (tensor.detach() for tensor in cast(case, "prev", "cur"))
    valid, backend, dtype = case.inputs["valid"], case.options["backend"], case.options["dtype"]
    threshold, eps = case.config["threshold"], case.config["eps"]
    found: dict[str, Tensor] = {}
    for mode in case.config["modes"]:
        similarity, leaves = or_skip(
            lambda: kernels.cosine_exit(prev, cur, valid, threshold, mode, eps=eps, backend=backend)  # noqa: B023
        )
        found |= {f"{mode}_cos": similarity, f"exit_{mode}": leaves}
    tokens = valid.numel()
    one_by_one = (prev.reshape(tokens, 1, -1), cur.reshape(tokens, 1, -1), torch.ones(tokens, 1, dtype=torch.bool))
    found["token_cos"] = kernels.cosine_exit(*one_by_one, threshold, eps=eps, backend=backend)[0].view(valid.shape)
    index, count = kernels.survivors(found["exit_mean"])
    padded, same_count = kernels.survivors(found["exit_mean"], capacity=valid.shape[0])
    assert torch.equal(padded[: len(index)], index)
    assert int(count) == int(same_count) == len(index)
    assert similarity.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    return found | {"survivors": index}


def _codebook(case: Case) -> dict[str, Tensor]:
    x, codebook = (tensor.detach() for tensor in cast(case, "x", "codebook"))
    metric = case.config["metric"]
    index, distance = or_skip(
        lambda: kernels.codebook_argmin(x, codebook, metric=metric, return_dist=True, backend=case.options["backend"])
    )
    counts, sums = kernels.codebook_stats(x, index, codebook.shape[0])
    wide = torch.promote_types(x.dtype, torch.float32)
    leaf = x.to(wide).requires_grad_()
    quantized = codebook[index.long()]
    loss = case.config["commitment_weight"] * (leaf - quantized.to(wide)).square().mean()
    straight_through = leaf + (quantized.to(wide) - leaf).detach()
    (grad,) = torch.autograd.grad((straight_through * case.inputs["grad_out"]).sum() + loss, leaf)
    return {
        "index": index,
        "min_dist": distance,
        "gap_to_second": _gap_to_second(case, metric),
        "quantized": quantized,
        "counts": counts,
        "sums": sums,
        "commit_loss": loss,
        "grad_x_ste_plus_commit": grad,
    }


def _gap_to_second(case: Case, metric: str) -> Tensor:
    """How safe an index is, from all distances in float64; an exact tie looks past the two duplicates."""
    x, codebook = case.inputs["x"].double(), case.inputs["codebook"].double()
    if metric == "cosine":
        x, codebook = (torch.nn.functional.normalize(t, dim=1, eps=case.config["normalize_eps"]) for t in (x, codebook))
        ordered = -(x @ codebook.T)
    else:
        ordered = (x[:, None] - codebook).square().sum(-1)
    ordered = ordered.sort(1).values
    tied = ordered[:, 1] - ordered[:, 0] < 1e-12
    return torch.where(tied, ordered[:, 3], ordered[:, 1]) - ordered[:, 0]


def _compaction(case: Case) -> dict[str, Tensor]:
    x, update, weight, grid_x = (tensor.detach() for tensor in cast(case, "x", "update", "weight", "grid_x"))
    config = case.config
    packing = kernels.compact(case.inputs["keep"])
    mean, total = kernels.segment_pool(x, case.inputs["segment"], weight, config["groups"], return_weight=True)
    grid, out_grid = tuple(config["grid_hw"]), tuple(config["out_hw"])
    pooled = {mode: kernels.grid_pool(grid_x, grid, out_grid, mode) for mode in config["pool_modes"]}
    return {
        "lengths": packing.lengths,
        "cu_seqlens": packing.cu_seqlens,
        "flat_index": packing.flat_index,
        "inverse_index": packing.inverse,
        "packed": kernels.gather_rows(x, packing),
        "scattered_into_x": kernels.scatter_rows(update, packing, x),
        "scattered_into_zeros": kernels.scatter_rows(update, packing),
        "segment_weighted_mean": mean,
        "segment_weight": total,
        "grid_unpool_nearest": kernels.grid_unpool(pooled["avg"], out_grid, grid),
        **{f"grid_{mode}_pool": value for mode, value in pooled.items()},
    }


VARIANTS: dict[str, list[tuple[str, str]]] = {
    "gate_residual_ln_modulate": REFERENCE + TRITON,
    "cosine_exit": REFERENCE + TRITON,
    "codebook_argmin": REFERENCE + TRITON,
    "compact": REFERENCE,
}
BUILDERS: dict[str, Callable[[Case], dict[str, Tensor]]] = {
    "gate_residual_ln_modulate": _adaln,
    "cosine_exit": _cosine,
    "codebook_argmin": _codebook,
    "compact": _compaction,
}
