"""Several processes, one search: every rank plans the same, runs its share of the candidates, and hears of the others'.

Noises are never sent: a recipe rebuilds them anywhere. Process groups are torch.distributed's (``torchrun``,
``accelerate launch``); nothing here starts a process.
"""

from typing import Any

import torch.distributed as dist

__all__ = ["gather", "rank_and_world"]


def rank_and_world() -> tuple[int, int]:
    """(0, 1) where no process group was initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(thing: Any) -> list[Any]:
    """``thing`` of every rank, in their order."""
    _, world = rank_and_world()
    if world == 1:
        return [thing]
    found: list[Any] = [None] * world
    dist.all_gather_object(found, thing)
    return found
