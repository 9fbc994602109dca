"""What is installed, what the machine has, and which kernels work on it."""

import importlib
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import sparing
from sparing.kernels import report as report_kernels

_PACKAGES = (
    *("torchvision", "torchaudio", "timm", "diffusers", "transformers", "open_clip_torch", "accelerate", "safetensors"),
    *("huggingface_hub", "soundfile", "av", "torchmetrics", "pycocotools", "webdataset", "ray"),
)
# Compiled against one torch: a version that the installer accepted may still not load beside the torch that is here.
_COMPILED = ("torchvision", "torchaudio")


@dataclass(frozen=True, slots=True)
class Examination:
    """Versions by package ('not installed' where it is not), the machine in words, and the kernels' own report."""

    versions: dict[str, str]
    machine: dict[str, str]
    kernels: Any

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [*self.versions.items(), *self.machine.items()]
        width = max(len(name) for name, _ in rows)
        return "\n".join([*(f"{name:<{width}}  {value}" for name, value in rows), "", str(self.kernels)])


def examine() -> Examination:
    """Looks at the installation and the machine; changes nothing."""
    versions = {"sparing": sparing.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
        if package in _COMPILED and versions[package] != "not installed":
            versions[package] += _why_not_loaded(package)
    machine = {
        "platform": platform.platform(),
        "torch threads": str(torch.get_num_threads()),
        "CUDA of this torch": torch.version.cuda or "none",
        "CUDA devices": str(torch.cuda.device_count()),
    }
    return Examination(versions, machine, report_kernels())


def _why_not_loaded(package: str) -> str:
    """'' where the package loads beside this torch, else why it does not."""
    try:
        importlib.import_module(package)
    except Exception as error:  # OSError, ImportError and RuntimeError were all seen
        cause = error.__cause__ or error
        return f"  DOES NOT LOAD with torch {torch.__version__}, install the release made for it: {cause}"
    return ""
