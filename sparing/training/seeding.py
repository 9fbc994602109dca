"""Random draws that depend only on (seed, epoch, sample index).

A counter-based hash (the finaliser of SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014) turns the three numbers into a 64-bit key. A sample is therefore augmented in the same way whatever batch,
worker or rank it falls into, and a run that was stopped needs no generator state to go on as if it had not been.
"""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["epoch_order", "sample_keys", "seeded", "uniforms"]

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _finalise(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * _MULTIPLIERS[0]
    state = (state ^ (state >> np.uint64(27))) * _MULTIPLIERS[1]
    return state ^ (state >> np.uint64(31))


def _absorb(state: np.ndarray, number: np.ndarray) -> np.ndarray:
    return _finalise(state + _GOLDEN_GAMMA * (number + np.uint64(1)))


def sample_keys(seed: int, epoch: int, indices: Tensor | Sequence[int], *, stream: int = 0) -> np.ndarray:
    """64-bit keys of samples.

    Args:
        seed: seed of the run, at least 0.
        epoch: number of the epoch, from 0.
        indices: (batch,) places of the samples in the data set.
        stream: separates independent uses (augmentation, mixing, ...) of one sample.

    Returns:
        (batch,) array of ``uint64``.

    Raises:
        ValueError: a number is negative.
    """
    numbers = np.asarray(indices, dtype=np.int64)
    if min(seed, epoch, stream) < 0 or (numbers.size and numbers.min() < 0):
        raise ValueError(f"seed, epoch, stream and sample indices start at 0, got {seed}, {epoch}, {stream}, {numbers}")
    state = np.zeros(numbers.shape, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for number in (seed, epoch, stream):
            state = _absorb(state, np.full(numbers.shape, number, dtype=np.uint64))
        return _absorb(state, numbers.astype(np.uint64))


def uniforms(seed: int, epoch: int, indices: Tensor | Sequence[int], *, count: int, stream: int = 0) -> Tensor:
    """``count`` numbers in [0, 1) for each sample, as (batch, count) float32."""
    keys = sample_keys(seed, epoch, indices, stream=stream)
    with np.errstate(over="ignore"):
        words = _absorb(keys[:, None], np.arange(count, dtype=np.uint64)[None, :])
    return torch.from_numpy((words >> np.uint64(40)).astype(np.float32) / np.float32(2**24))


def epoch_order(
    num_samples: int, *, seed: int, epoch: int, shuffle: bool = True, rank: int = 0, world_size: int = 1
) -> Tensor:
    """Sample indices that this rank visits in this epoch, in order.

    All ranks get equally many: when ``num_samples`` does not divide, the first samples of the order come again at its
    end.

    Returns:
        (ceil(num_samples / world_size),) int64.
    """
    if num_samples < 1:
        raise ValueError("the data set holds no samples")
    if shuffle:
        generator = torch.Generator().manual_seed(int(sample_keys(seed, epoch, [0], stream=1)[0] >> np.uint64(1)))
        order = torch.randperm(num_samples, generator=generator)
    else:
        order = torch.arange(num_samples)
    each = -(-num_samples // world_size)
    return order.repeat(-(-each * world_size // num_samples))[: each * world_size][rank::world_size]


@contextlib.contextmanager
def seeded(seed: int, epoch: int, index: int, *, stream: int = 0) -> Iterator[None]:
    """Within the block, torch's global CPU generator is seeded by (seed, epoch, index); it is restored afterwards.

    torchvision.transforms.v2 draws from that generator, so a transform called inside is a function of the three
    numbers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(sample_keys(seed, epoch, [index], stream=stream)[0] >> np.uint64(1)))
        yield
