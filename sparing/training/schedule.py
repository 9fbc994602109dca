"""Learning-rate schedules as functions of the step: nothing to save, nothing to restore."""

import math
from collections.abc import Iterable

from torch.optim import Optimizer

__all__ = ["set_learning_rates", "warmup_cosine"]


def warmup_cosine(step: int, *, total_steps: int, warmup_steps: int = 0, final: float = 0.0) -> float:
    """Factor on the peak learning rate at ``step`` (from 0): linear warm-up, then a half cosine down to ``final``.

    Raises:
        ValueError: the warm-up is not shorter than the whole, or ``step`` is negative.
    """
    if not 0 <= warmup_steps < max(total_steps, 1):
        raise ValueError(f"warm-up of {warmup_steps} steps does not fit into {total_steps} steps in all")
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    done = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))


def set_learning_rates(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Set every group's rate to ``factor`` times its peak (``group['peak_lr']``, kept from the first call on)."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * factor
