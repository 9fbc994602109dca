"""What the described files of the vision folder share: inputs and outputs listed with role, args and tolerances."""

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
    """The described inputs by role; uint8 images become ``(x - 127.5) / 58`` as the description says."""
    found = {}
    for name, spec in case_file.spec["inputs"].items():
        tensor = case_file.tensors[name]
        found[spec["role"]] = (tensor.float() - 127.5) / 58.0 if spec["role"] == "image_u8" else tensor
    return found


def weights(case_file: CaseFile) -> dict[str, Tensor]:
    """The reference state dict, without its prefix."""
    prefix = case_file.spec["weights_prefix"]
    return {k.removeprefix(prefix): v for k, v in case_file.tensors.items() if prefix and k.startswith(prefix)}


def outputs_by_role(case_file: CaseFile) -> dict[str, tuple[str, dict[str, Any]]]:
    """Output name -> (role, args)."""
    return {name: (spec["role"], spec.get("args", {})) for name, spec in case_file.spec["outputs"].items()}
