"""Checkpoints that are either whole or absent."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save
from torch import nn

__all__ = ["atomic_file", "load_checkpoint", "save_checkpoint", "save_weights", "write_json"]


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that takes its name only when the block ends well.

    A reader, or a crash, sees the old file or the new one and nothing between.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically.

    Raises:
        ValueError: a number is not finite, or something has no JSON form.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with atomic_file(path) as file:
        file.write(text.encode())


def save_weights(path: str | Path, network: nn.Module) -> None:
    """Write the state of a network as safetensors, atomically.

    A tensor under several names (tied weights, a module in two places) is written under each, so that a plain
    ``load_state_dict`` finds all of them.
    """
    state = {name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}
    with atomic_file(path) as file:
        file.write(save(state))


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings and containers of them) atomically."""
    with atomic_file(path) as file:
        torch.save(dict(state), file)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """What :func:`save_checkpoint` wrote, on the CPU; nothing is unpickled.

    Raises:
        ValueError: the file is not such a checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of sparing.training: {type(error).__name__}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a checkpoint of sparing.training")
    return state
