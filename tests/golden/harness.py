"""The golden harness: described cases in, one comparable case out.

A golden directory is laid out ``DIR/<folder>/<case>.json`` beside ``<case>.safetensors``. One adapter module per folder
(``tests/golden/adapters/<folder>.py``) offers

* ``cases(case_file: CaseFile) -> Iterable[Case]``: turns one described file into cases (a file may hold many subcases,
  and a subcase may be yielded once per backend and dtype);
* ``BUILDERS: dict[str, Callable[[Case], dict[str, Tensor]]]``: for each ``kind`` a function that builds the model from
  ``case.config`` and ``case.weights``, runs it on ``case.inputs`` and returns every name in ``case.expected``.

A name that a builder does not return fails its case; a kind without a builder fails too. JSON files without a
``model``/``cases`` description are data, not cases.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

# Folders whose issue is not done yet. A later issue removes its line here and adds the adapter of that name.
NOT_YET: dict[str, str] = {
    "albef_evilm": "ALBEF and E-ViLM",
    "genau_autocap": "GenAu and AutoCap",
    "mue": "MuE early exiting",
}


@dataclass(frozen=True)
class Expected:
    """A reference tensor and how near a result must come to it.

    ``norm_rtol`` compares ``||a - ref|| <= norm_rtol * ||ref||`` over finite elements (absolute ``norm_floor`` when the
    reference is smaller than that); otherwise ``|a - ref| <= atol + rtol * |ref|`` element by element. Integers and
    booleans are compared exactly, infinities by position. ``where`` restricts the comparison to elements that are True.
    """

    tensor: Tensor
    atol: float = 0.0
    rtol: float = 0.0
    norm_rtol: float | None = None
    norm_floor: float = 1e-6
    where: Tensor | None = None


@dataclass(frozen=True)
class Case:
    """One comparable case. ``id`` reads ``folder/case[subcase][-backend-dtype]``."""

    id: str
    kind: str
    config: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    expected: dict[str, Expected]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CaseFile:
    """A described golden file: ``spec`` is its JSON, ``tensors`` reads the safetensors beside it, on first use."""

    path: Path
    spec: dict[str, Any]

    @property
    def folder(self) -> str:
        return self.path.parent.name

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def tensors(self) -> dict[str, Tensor]:
        return _tensors(self.path.with_suffix(".safetensors"))


@lru_cache(maxsize=8)
def _tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.exists() else {}


def find_case_files(directories: Iterable[Path]) -> list[CaseFile]:
    """All described cases below ``directories``. A copy of a file that an earlier directory holds is left out; another
    case of the same name is kept.
    """
    found: list[CaseFile] = []
    seen: set[tuple[str, str, str]] = set()
    for directory in directories:
        if not directory.is_dir():
            raise FileNotFoundError(f"golden directory {directory} does not exist")
        for path in sorted(directory.glob("*/*.json")):
            spec = json.loads(path.read_text())
            if not isinstance(spec, dict) or not ("model" in spec or "cases" in spec):
                continue
            key = (path.parent.name, path.stem, _digest(path))
            if key not in seen:
                seen.add(key)
                found.append(CaseFile(path, spec))
    return found


def _digest(path: Path) -> str:
    """What a case file and the tensors beside it hold, as one hash."""
    digest = hashlib.sha256(path.read_bytes())
    tensors = path.with_suffix(".safetensors")
    if tensors.exists():
        digest.update(tensors.read_bytes())
    return digest.hexdigest()


def adapter(folder: str) -> Any:
    """The adapter module of a golden folder, or None when the folder is listed in NOT_YET."""
    if folder in NOT_YET:
        return None
    return importlib.import_module(f"golden.adapters.{folder}")


def collect(directories: Iterable[Path]) -> list[Case]:
    """Every case of every directory. A folder that has neither adapter nor NOT_YET line raises."""
    collected: list[Case] = []
    for case_file in find_case_files(directories):
        module = adapter(case_file.folder)
        if module is not None:
            collected.extend(module.cases(case_file))
    return collected


def run(case: Case) -> None:
    """Build, run and compare one case; AssertionError names the tensors that differ and by how much."""
    builders: dict[str, Callable[[Case], dict[str, Tensor]]] = adapter(case.id.split("/")[0]).BUILDERS
    assert case.kind in builders, f"{case.id}: no builder for kind {case.kind!r}; have {sorted(builders)}"
    results = builders[case.kind](case)
    missing = [name for name in case.expected if name not in results]
    assert not missing, f"{case.id}: the builder returned no {missing}"
    problems = [p for name, want in case.expected.items() if (p := difference(results[name], want))]
    listed = [f"{name}: {difference(results[name], case.expected[name])}" for name in case.expected] if problems else []
    assert not problems, f"{case.id}:\n  " + "\n  ".join(line for line in listed if not line.endswith(": "))


def difference(result: Tensor, expected: Expected) -> str:
    """Empty when ``result`` is near enough, else what is wrong in words."""
    want = expected.tensor
    result = result.detach().cpu()
    if tuple(result.shape) != tuple(want.shape):
        return f"shape {tuple(result.shape)}, expected {tuple(want.shape)}"
    keep = torch.ones(want.shape, dtype=torch.bool) if expected.where is None else expected.where.expand(want.shape)
    if not (want.is_floating_point() or want.is_complex()):
        wrong = ((result.to(want.dtype) != want) & keep).sum().item()
        return f"{wrong} of {want.numel()} entries differ" if wrong else ""
    result, want = result.double(), want.double()
    finite = torch.isfinite(want)
    if not torch.equal(result[~finite & keep], want[~finite & keep]):
        return "infinities at other positions"
    a, b = result[finite & keep], want[finite & keep]
    if not torch.isfinite(a).all():
        return f"{(~torch.isfinite(a)).sum().item()} entries are not finite"
    if expected.norm_rtol is not None:
        error, scale = (a - b).norm().item(), b.norm().item()
        limit = expected.norm_floor if scale < expected.norm_floor else expected.norm_rtol * scale
        return f"norm error {error:.3e} above {limit:.3e}" if error > limit else ""
    excess = ((a - b).abs() - (expected.atol + expected.rtol * b.abs())).max().item() if a.numel() else -1.0
    return f"largest error {(a - b).abs().max().item():.3e}, {excess:.3e} above the tolerance" if excess > 0 else ""
