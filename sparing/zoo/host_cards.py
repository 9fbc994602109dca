"""Cards of models that stand in no table: hosts of the libraries, saved folders, hub repositories."""

from pathlib import Path
from typing import Any

from sparing.zoo import hosts, twins, weights
from sparing.zoo.cards import ModelCard
from sparing.zoo.profile import count_params
from sparing.zoo.table import PAPERS


def host_card(name: str) -> ModelCard:
    """The card of ``timm/NAME``, ``torchvision/NAME``, ``open_clip/NAME``, a saved folder or a hub id.

    What a library says of licence and source is repeated, nothing is guessed; parameters are counted on a model
    without memory.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: as :func:`sparing.zoo.hosts.create_host`.
    """
    return _saved_card(name) if hosts.is_saved_name(name) else _library_card(name)


def _library_card(name: str) -> ModelCard:
    import torch

    with torch.device("meta"):
        model: Any = hosts.create_host(name)
    cfg = hosts.as_dict(getattr(model, "pretrained_cfg", None) or {})
    source = f"hf:{cfg['hf_hub_id']}" if cfg.get("hf_hub_id") else cfg.get("url") or None
    return ModelCard(
        **_unmeasured(name, model),
        task="image-classification" if getattr(model, "num_classes", 0) else "image-features",
        method=None,
        host=None,
        paper=cfg.get("paper_name"),
        license_code="see " + name.partition("/")[0],
        license_weights=cfg.get("license"),
        license_data=None,
        derived_from=None,
        source=source,
        training=None,
        notes=f"weights tagged {cfg['tag']}" if cfg.get("tag") else "",
    )


def _saved_card(name: str) -> ModelCard:
    folder = Path(name) if Path(name).is_dir() else weights.download_folder(name)
    config = twins.read_config(folder) if (folder / "config.json").is_file() else {}
    model: Any = hosts.create_host(str(folder))
    licences = config.get("license") or {}
    host = (config.get("host") or {}).get("name")
    return ModelCard(
        **_unmeasured(name, model),
        task="image-classification" if getattr(model, "num_classes", 0) else "see its class",
        method=config.get("method"),
        host=host,
        paper=PAPERS.get(config.get("method", "")),
        license_code=licences.get("code") or "not known",
        license_weights=licences.get("weights"),
        license_data=licences.get("data"),
        derived_from=host,
        source=str(folder),
        training=config.get("status"),
        notes=f"{type(model).__name__}, written by sparing {config['sparing_version']}"
        if host
        else type(model).__name__,
    )


def _unmeasured(name: str, model: Any) -> dict[str, Any]:
    loader = "verified" if Path(name).is_dir() else "untested"
    return {"name": name, "params": count_params(model), "loader": loader, "measured": {}}
