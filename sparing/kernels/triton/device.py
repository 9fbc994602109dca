"""Which GPU a launch goes to: Triton launches on PyTorch's current device, not on that of the tensors."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["on_their_device"]

Launcher = TypeVar("Launcher", bound=Callable[..., Any])


def on_their_device(launcher: Launcher) -> Launcher:
    """Run a launcher with the device of its first tensor as the current one (nothing changes for CPU tensors)."""

    @functools.wraps(launcher)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        tensor = next(value for value in args if isinstance(value, Tensor))
        with torch.cuda.device_of(tensor):
            return launcher(*args, **kwargs)

    return guarded  # type: ignore[return-value]
