"""What is installed, what the machine has, and which kernels work on it."""

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
    machine = {
        "platform": platform.platform(),
        "torch threads": str(torch.get_num_threads()),
        "CUDA of this torch": torch.version.cuda or "none",
        "CUDA devices": str(torch.cuda.device_count()),
    }
    return Examination(versions, machine, report_kernels())
