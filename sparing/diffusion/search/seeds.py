"""Random numbers of a search: every candidate has a seed of its own that does not depend on batching or on the device.

A seed is the BLAKE2b digest of what the candidate is; its noise is drawn alone, in float32, by a CPU generator. No
global generator is read or advanced.
"""

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["candidate_seed", "gaussian", "generator", "sde_seed"]

_MASK = 2**63 - 1


def _digest(parts: Sequence[object]) -> int:
    text = json.dumps(list(parts), separators=(",", ":"), ensure_ascii=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") & _MASK


def candidate_seed(run_seed: int, prompt: str | int | None, stage: str, round: int, index: int) -> int:
    """The seed of candidate ``index`` of ``round`` in ``stage``: 63 bits.

    Args:
        prompt: the prompt, or the class label of class-conditional pipelines.
    """
    return _digest([run_seed, prompt, stage, round, index])


def sde_seed(run_seed: int, prompt: str | int | None, stage: str, round: int, index: int) -> int:
    """The seed of the noise that a stochastic sampler adds along this candidate's path."""
    return _digest([run_seed, prompt, stage, round, index, "sde"])


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def gaussian(shape: Sequence[int], seed: int) -> Tensor:
    """N(0, I) of ``shape`` (no batch axis), float32, on the CPU: the noise that ``seed`` stands for."""
    return torch.randn(tuple(shape), generator=generator(seed), dtype=torch.float32)
