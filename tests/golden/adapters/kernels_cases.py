"""From a kernel golden file to cases: one per subcase, backend and dtype, tensors found by role, tolerances by dtype
and kind.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from golden.harness import Case, CaseFile, Expected

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def expand(
    case_file: CaseFile,
    variants: Iterable[tuple[str, str]],
    *,
    keep: Callable[[str, str], bool] = lambda backend, role: True,
) -> Iterable[Case]:
    """One case for each subcase and each ``(backend, dtype)``; ``keep(backend, role)`` drops outputs a backend does
    not give.

    Floating inputs are left as stored (float32 on the bfloat16 grid): builders cast what the dtype under test applies
    to.
    """
    spec, variants = case_file.spec, list(variants)
    for config in spec["config"]["subcases"]:
        name = config["name"]
        described_in = {key: info for key, info in spec["inputs"].items() if info["subcase"] == name}
        described_out = {key: info for key, info in spec["outputs"].items() if info["subcase"] == name}
        inputs = {info["role"]: case_file.tensors[key] for key, info in described_in.items()}
        for backend, dtype in variants:
            expected = {
                info["role"]: _expected(case_file.tensors[key], info, spec["tolerance"]["norm_rtol"], backend, dtype)
                for key, info in described_out.items()
                if keep(backend, info["role"])
            }
            yield Case(
                id=f"{case_file.folder}/{case_file.name}[{name}]-{backend}-{dtype}",
                kind=spec["model"],
                config=config,
                weights={},
                inputs=inputs,
                expected=expected,
                options={"backend": backend, "dtype": DTYPES[dtype]},
            )


def _expected(
    tensor: Tensor, info: dict[str, Any], norm_rtol: dict[str, dict[str, float]], backend: str, dtype: str
) -> Expected:
    if info["kind"] not in ("forward", "gradient"):
        # stored copies of inputs: exact wherever the dtype holds the bfloat16 grid (float16 loses values below 2^-14)
        rounded = dtype == "float16" and tensor.is_floating_point()
        return Expected(tensor, norm_rtol=1e-3) if rounded else Expected(tensor)
    limit = norm_rtol[dtype][info["kind"]]
    if dtype == "float32":
        limit = max(limit, info.get("rtol", 0.0))  # a case's own tolerance holds where it is looser
    if dtype == "bfloat16" and backend == "triton":
        limit *= 2  # the interpreter truncates float32 to bfloat16 instead of rounding
    return Expected(tensor, norm_rtol=limit)


def cast(case: Case, *roles: str) -> list[Tensor | None]:
    """The inputs of these roles in the dtype under test, fresh leaves that require a gradient; None where absent."""
    found: list[Tensor | None] = []
    for role in roles:
        tensor = case.inputs.get(role)
        if tensor is not None and tensor.is_floating_point():
            tensor = tensor.to(case.options["dtype"]).clone().requires_grad_()
        found.append(tensor)
    return found


def gradients(out: Tensor, case: Case, **leaves: Tensor | None) -> dict[str, Tensor]:
    """``grad_<name>`` of ``sum(out * grad_out)`` for every leaf given."""
    upstream = case.inputs["grad_out"].to(out.dtype)
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = torch.autograd.grad(out, list(given.values()), upstream)
    return {f"grad_{name}": grad for name, grad in zip(given, grads)}


def or_skip(call: Callable[[], Any]) -> Any:
    """Run an op; where its backend says that it cannot serve this case, skip with its reasons."""
    from sparing.kernels import BackendUnsupported

    try:
        return call()
    except BackendUnsupported as refusal:
        pytest.skip(str(refusal))
