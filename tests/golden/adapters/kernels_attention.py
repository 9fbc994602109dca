"""Golden cases of the attention family."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from golden.adapters.kernels_cases import cast, expand, gradients, or_skip
from golden.harness import Case, CaseFile
from sparing import kernels
from sparing.kernels.ops.few_query_attention import partial_attention
from sparing.kernels.ops.predict_block_map import block_prediction

LIBRARY = [("reference", "float64"), ("reference", "float32"), ("sdpa", "float64"), ("sdpa", "float32")]
LIBRARY += [(backend, dtype) for backend in ("reference", "sdpa") for dtype in ("bfloat16", "float16")]
TRITON = [("triton", dtype) for dtype in ("float32", "bfloat16", "float16")]


def _keep(backend: str, role: str) -> bool:
    """SDPA gives no lse; FlexAttention gives no gradient on CPU."""
    return not (backend == "sdpa" and role == "lse") and not (backend == "flex" and role.startswith("grad"))


def cases(case_file: CaseFile) -> Iterable[Case]:
    yield from expand(case_file, VARIANTS[case_file.spec["model"]], keep=_keep)


def _out_and_lse(result: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {"out": result[0], "lse": result[1]} if isinstance(result, tuple) else {"out": result}


def _attention(case: Case) -> dict[str, Tensor]:
    q, k, v, bias = cast(case, "q", "k", "v", "bias")
    backend = case.options["backend"]
    with torch.set_grad_enabled(backend != "flex"):
        found = or_skip(
            lambda: kernels.attention(
                q,
                k,
                v,
                bias=bias,
                key_padding_mask=case.inputs.get("key_padding_mask"),
                kv_len=case.inputs.get("kv_len"),
                causal=case.config["causal"],
                scale=case.config["scale"],
                dropout_p=case.config["dropout_p"],
                return_lse=backend != "sdpa",
                backend=backend,
            )
        )
    found = _out_and_lse(found)
    return found if backend == "flex" else {**found, **gradients(found["out"], case, q=q, k=k, v=v, bias=bias)}


def _few_query(case: Case) -> dict[str, Tensor]:
    q, k, v, bias = cast(case, "q", "k", "v", "bias")
    kv_len, splits, scale = case.inputs.get("kv_len"), case.config["splits"], case.config["scale"]
    backend = case.options["backend"]
    found = _out_and_lse(
        or_skip(
            lambda: kernels.few_query_attention(
                q,
                k,
                v,
                bias=bias,
                kv_len=kv_len,
                scale=scale,
                splits=splits,
                return_lse=backend != "sdpa",
                backend=backend,
            )
        )
    )
    found |= gradients(found["out"], case, q=q, k=k, v=v, bias=bias)
    if "partial_out" in case.expected:
        partials = partial_attention(q, k, v, bias=bias, kv_len=kv_len, scale=scale, splits=splits)
        found["partial_out"], found["partial_lse"] = partials
    return found


def _window(case: Case) -> dict[str, Tensor]:
    qkv, table = cast(case, "qkv", "rel_table")
    window, shift, backend = case.config["window"], case.config["shift"], case.options["backend"]
    found = _out_and_lse(
        or_skip(
            lambda: kernels.window_attention(
                qkv,
                table,
                window=window,
                shift=shift,
                heads=case.config["heads"],
                scale=case.config["scale"],
                return_lse=backend != "sdpa",
                backend=backend,
            )
        )
    )
    found["rel_index"] = kernels.relative_position_index(window)
    found["region"] = kernels.window_region(*qkv.shape[1:3], window=window, shift=shift)
    return {**found, **gradients(found["out"], case, qkv=qkv, table=table)}


def _ring(case: Case) -> dict[str, Tensor]:
    config, backend, dtype = case.config, case.options["backend"], case.options["dtype"]
    q, k, v, age_bias = cast(case, "q", "k_new", "v_new", "age_bias")
    streams, _, heads, head_dim = q.shape[1:]
    room = config["capacity"] - config["window"] + 1
    cache = kernels.RingCache.empty(
        streams, config["window"], heads=heads, head_dim=head_dim, tokens_per_step=room, dtype=dtype
    )
    trace: dict[str, list[Tensor]] = {"out": [], "lse": [], "head_after": [], "len_after": []}
    for step in range(q.shape[0]):
        found = _out_and_lse(
            or_skip(
                lambda step=step: kernels.ring_attention_step(
                    q[step],
                    k[step],
                    v[step],
                    cache,
                    active=case.inputs["active"][step],
                    reset=case.inputs["reset"][step],
                    age_bias=age_bias,
                    scale=config["scale"],
                    return_lse=backend != "sdpa",
                    backend=backend,
                )
            )
        )
        found |= {"head_after": cache.head.clone(), "len_after": cache.length.clone()}
        for name, value in found.items():
            trace[name].append(value)
    stacked = {name: torch.stack(values) for name, values in trace.items() if values}
    return {**stacked, "k_cache_final": cache.k, "v_cache_final": cache.v}


def _varlen(case: Case) -> dict[str, Tensor]:
    q, k, v = cast(case, "q", "k", "v")
    backend, config = case.options["backend"], case.config
    found = _out_and_lse(
        or_skip(
            lambda: kernels.varlen_attention(
                q,
                k,
                v,
                case.inputs["cu_q"],
                case.inputs["cu_k"],
                config["max_q"],
                config["max_k"],
                causal=config["causal"],
                scale=config["scale"],
                return_lse=backend != "sdpa",
                backend=backend,
            )
        )
    )
    return {**found, **gradients(found["out"], case, q=q, k=k, v=v)}


def _block_sparse(case: Case) -> dict[str, Tensor]:
    q, k, v = cast(case, "q", "k", "v")
    backend, config = case.options["backend"], case.config
    block_map = kernels.BlockMap.from_mask(
        case.inputs["block_mask"], block_q=config["block_q"], block_k=config["block_k"]
    )
    with torch.set_grad_enabled(backend != "flex"):
        found = _out_and_lse(
            or_skip(
                lambda: kernels.block_sparse_attention(
                    q,
                    k,
                    v,
                    block_map,
                    causal=config["causal"],
                    scale=config["scale"],
                    return_lse=backend != "sdpa",
                    backend=backend,
                )
            )
        )
    lists = {"kv_num": block_map.kv_num, "kv_idx": block_map.kv_idx}
    if backend == "flex":
        return {**found, **lists}
    return {**found, **lists, **gradients(found["out"], case, q=q, k=k, v=v)}


def _predict(case: Case) -> dict[str, Tensor]:
    q, k = cast(case, "q", "k")
    options = {name: case.config[name] for name in ("block_q", "block_k", "sim_threshold", "cdf", "topk", "causal")}
    options |= {"keep_sink": case.config["keep_sink"], "scale": case.config["scale"]}
    found = block_prediction(q, k, **options)
    block_map = kernels.predict_block_map(q, k, **options, backend=case.options["backend"])
    assert torch.equal(block_map.mask, found.mask)
    similarities = torch.cat([found.sim_q.flatten(), found.sim_k.flatten()])
    margin = (similarities - case.config["sim_threshold"]).abs().min()
    return {**found._asdict(), "block_mask": block_map.mask, "threshold_margin": margin}


WIDE = [("reference", "float64"), ("reference", "float32")]  # the prediction's decisions are exact in these
VARIANTS: dict[str, list[tuple[str, str]]] = {
    "attention": [*LIBRARY, ("flex", "float32")],
    "varlen_attention": LIBRARY,
    "block_sparse_attention": [*LIBRARY, *TRITON, ("flex", "float32")],
    "predict_block_map": WIDE,
    "few_query_attention": [*LIBRARY, *TRITON],
    "window_attention": [*LIBRARY, *TRITON],
    "ring_attention_step": [*LIBRARY, *TRITON],
}
BUILDERS: dict[str, Callable[[Case], dict[str, Tensor]]] = {
    "attention": _attention,
    "varlen_attention": _varlen,
    "block_sparse_attention": _block_sparse,
    "predict_block_map": _predict,
    "few_query_attention": _few_query,
    "window_attention": _window,
    "ring_attention_step": _ring,
}
