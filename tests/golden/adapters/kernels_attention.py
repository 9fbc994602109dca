"""Golden cases of the attention family."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from golden.adapters.kernels_cases import cast, expand, gradients, or_skip
from golden.harness import Case, CaseFile
from sparing import kernels

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


VARIANTS: dict[str, list[tuple[str, str]]] = {
    "attention": [*LIBRARY, ("flex", "float32")],
}
BUILDERS: dict[str, Callable[[Case], dict[str, Tensor]]] = {
    "attention": _attention,
}
