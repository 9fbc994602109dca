"""What the described files of the vision folder share: inputs and outputs listed with role, args and tolerances."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from golden.harness import CaseFile, Expected


def expected(case_file: CaseFile, names: list[str] | None = None) -> dict[str, Expected]:
    """The described outputs (those in ``names``, or all) with their tolerances."""
    outputs = case_file.spec["outputs"]
    return {
        name: Expected(
            case_file.tensors[name], atol=outputs[name].get("atol", 0.0), rtol=outputs[name].get("rtol", 0.0)
        )
        for name in (outputs if names is None else names)
    }


def inputs(case_file: CaseFile) -> dict[str, Tensor]:
    """The described inputs by role, each after its ``transform``."""
    return {
        spec["role"]: transformed(case_file.tensors[name], spec.get("transform"))
        for name, spec in case_file.spec["inputs"].items()
    }


def transformed(tensor: Tensor, transform: str | None) -> Tensor:
    """``tensor`` after a transform in words: ``x = (NAME.float() - A) / B``, either part optional; None: as it is.

    Raises:
        ValueError: a transform of another form, which must not be guessed.
    """
    if not transform:
        return tensor
    said = transform.replace(" ", "").removeprefix("x=")
    number = r"(\d+(?:\.\d+)?)"
    found = re.fullmatch(rf"\(?\w+(?:\.float\(\))?(?:-{number})?\)?(?:/{number})?", said)
    if found is None:
        raise ValueError(f"a transform of the form x = (NAME.float() - A) / B is read, got {transform!r}")
    shift, scale = (float(part) if part else other for part, other in zip(found.groups(), (0.0, 1.0)))
    return (tensor.float() - shift) / scale


def image(inputs: Mapping[str, Tensor]) -> Tensor:
    """The picture among the inputs: role ``image_u8`` (after its transform) or ``image`` (float as it comes)."""
    (role,) = [role for role in inputs if role.split("_")[0] == "image"]
    return inputs[role]


def weights(case_file: CaseFile) -> dict[str, Tensor]:
    """The reference state dict, without its prefix."""
    prefix = case_file.spec["weights_prefix"]
    return {k.removeprefix(prefix): v for k, v in case_file.tensors.items() if prefix and k.startswith(prefix)}


def outputs_by_role(case_file: CaseFile) -> dict[str, tuple[str, dict[str, Any]]]:
    """Output name -> (role, args)."""
    return {name: (spec["role"], spec.get("args", {})) for name, spec in case_file.spec["outputs"].items()}
