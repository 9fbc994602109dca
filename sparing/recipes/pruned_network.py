"""The folder of a pruned and fused network: weights, the name of what it was before pruning, metrics."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import sparing
from sparing.continual.channel_groups import resize_as
from sparing.training import save_weights, write_json
from sparing.zoo.table import MODELS

__all__ = ["load_pruned", "save_pruned"]


def save_pruned(fused: nn.Module, out: Path, metrics: dict[str, Any]) -> None:
    """Write model.safetensors, config.json and, last, metrics.json: where that stands, the folder is whole."""
    config: Any = getattr(fused, "pretrained_cfg", None) or {}
    config = dict(config if isinstance(config, dict) else config.to_dict())
    save_weights(out / "model.safetensors", fused)
    card = {
        "pruned_host": config.get("architecture"),
        "num_classes": getattr(fused, "num_classes", None),
        "density": metrics["density"],
        "pretrained_cfg": {key: value for key, value in config.items() if value is not None},
    }
    write_json(out / "config.json", card)
    write_json(out / "metrics.json", metrics)


def load_pruned(folder: str | Path, *, network: nn.Module | None = None) -> nn.Module:
    """The fused network that :func:`adapt_pruned` wrote, in eval mode.

    Args:
        folder: ``out`` of the run.
        network: an unpruned network of the same build, cut to the stored sizes in place; None makes it by the name in
            config.json (hosts of the zoo and of timm at their usual image size).

    Raises:
        ValueError: no such files in the folder, or a network of another build.
    """
    folder = Path(folder)
    try:
        card = json.loads((folder / "config.json").read_text())
        state = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(folder)!r} holds no pruned network: {error}") from error
    if "pruned_host" not in card:
        raise ValueError(f"{str(folder)!r} holds no pruned network: its config.json names no pruned_host")
    if network is None:
        name = card["pruned_host"]
        if not name:
            raise ValueError(
                f"{str(folder)!r} does not say what network it was: pass network=, built as the source was"
            )
        network = sparing.create_model(name if name in MODELS else f"timm/{name}", num_classes=card["num_classes"])
    missing = sorted(network.state_dict().keys() - state.keys())
    if missing:
        raise ValueError(f"{str(folder)!r} lacks {', '.join(missing[:3])} of this {type(network).__name__}")
    resize_as(network, state).load_state_dict(state)
    return network.eval()
