"""Hosts by prefix: ``timm/NAME``, ``torchvision/NAME``, ``open_clip/NAME``, a saved folder, or a hub id
``OWNER/REPO``.
"""

import importlib
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sparing.zoo import twins, weights
from sparing.zoo.table import MODELS, closest

PREFIXES = ("timm", "torchvision", "open_clip")


def is_host_name(name: str) -> bool:
    """Whether ``name`` means a host or a saved folder rather than a name of the zoo."""
    return name not in MODELS and ("/" in name or name in (".", "..") or Path(name).is_dir())


def is_saved_name(name: str) -> bool:
    """Whether ``name`` means a saved folder or a hub id, which bring their own weights."""
    return is_host_name(name) and (name.partition("/")[0] not in PREFIXES or Path(name).is_dir())


def create_host(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Creates a host.

    Args:
        name: ``timm/NAME``, ``torchvision/NAME``, ``open_clip/NAME`` (or ``open_clip/NAME:TAG`` for published
            weights); a folder with model_index.json (its transformer is meant) or config.json; or a hub id of such a
            folder.
        pretrained: load the host's published weights. A folder or hub id always brings its own.
        kwargs: passed to the library that knows the name.

    Raises:
        ValueError: the library has no such model (the closest names are given), or none of its weights.
        FileNotFoundError: no such folder.
        ConnectionError: the hub is needed and cannot be reached.
    """
    prefix, _, rest = name.partition("/")
    if not is_saved_name(name):
        return {"timm": _timm, "torchvision": _torchvision, "open_clip": _open_clip}[prefix](rest, pretrained, kwargs)
    if kwargs:
        raise ValueError(f"{name!r} is a saved model and takes no further arguments, got {', '.join(sorted(kwargs))}")
    folder = Path(name)
    if not folder.is_dir():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise FileNotFoundError(
                f"no such folder: {name!r}, nor is it a hub id OWNER/REPO; hosts are named timm/NAME, ..."
            )
        folder = weights.download_folder(name)
    if (folder / "model_index.json").is_file():
        folder = folder / "transformer"
        if not folder.is_dir():
            raise ValueError(
                f"the pipeline in {name!r} has no transformer: sparing makes twins of diffusion transformers only"
            )
    config = twins.read_config(folder)
    return _timm_folder(folder, config) if "architecture" in config else twins.load(folder)


def _unknown(name: str, library: str, known: list[str]) -> ValueError:
    near = closest(name, known)
    return ValueError(f"{library} has no model {name!r}" + (f"; {near}" if near else ""))


def _timm(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    import timm

    base = name.partition(".")[0]
    if not timm.is_model(base):
        raise _unknown(base, "timm", timm.list_models())
    if pretrained and not timm.models.is_model_pretrained(name):
        with_weights = ", ".join(timm.list_models(base, pretrained=True)) or "none"
        raise ValueError(f"timm has no weights of {name!r}; with weights: {with_weights}")
    try:
        return cast(nn.Module, timm.create_model(name, pretrained=pretrained, **kwargs))
    except RuntimeError as error:
        if "Invalid pretrained tag" not in str(error):
            raise
        raise ValueError(f"timm's {base!r} has no weights tagged {name.partition('.')[2]!r}") from error
    except OSError as error:
        raise needs_hub(f"timm/{name}") from error


def _timm_folder(folder: Path, config: dict[str, Any]) -> nn.Module:
    """A folder in timm's layout: config.json with ``architecture`` and ``pretrained_cfg``, and weights."""
    name, arguments = str(config["architecture"]), dict(config.get("model_args") or {})
    if name in MODELS:
        importlib.import_module(MODELS[name].module)  # makes our name one of timm's
    if "num_classes" in config:
        arguments["num_classes"] = config["num_classes"]
    model: Any = _timm(name, False, arguments)
    path = weights.weights_file(folder)
    weights.fill(model, weights.read_state(path), origin=repr(str(path)))
    model.pretrained_cfg = {**as_dict(model.pretrained_cfg), **config.get("pretrained_cfg", {})}
    return cast(nn.Module, model.eval())


def as_dict(cfg: Any) -> dict[str, Any]:
    """timm's pretrained_cfg, a dict or a dataclass, as a dict."""
    return dict(cfg) if isinstance(cfg, dict) else dict(cfg.to_dict())


def _torchvision(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise _unknown(name, "torchvision", models.list_models())
    try:
        return cast(nn.Module, models.get_model(name, weights="DEFAULT" if pretrained else None, **kwargs))
    except OSError as error:
        raise needs_hub(f"torchvision/{name}") from error


def _open_clip(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    import open_clip

    name, _, tag = name.partition(":")
    if name not in open_clip.list_models():
        raise _unknown(name, "open_clip", open_clip.list_models())
    tags = open_clip.list_pretrained_tags_by_model(name)
    if (tag and tag not in tags) or (pretrained and not tags):
        raise ValueError(f"open_clip has no weights {tag or ''!r} of {name!r}; there are {', '.join(tags) or 'none'}")
    weights_tag = tag or (tags[0] if pretrained else None)
    kwargs.setdefault("device", torch.get_default_device())  # else it would leave the device context of the caller
    try:
        return cast(nn.Module, open_clip.create_model(name, pretrained=weights_tag, **kwargs))
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "download" not in str(error):  # open_clip wraps what the hub raises
            raise
        raise needs_hub(f"open_clip/{name}") from error


def needs_hub(name: str) -> ConnectionError:
    """The error of published weights that are neither in the cache nor to be had."""
    return ConnectionError(f"the weights of {name} are not in the local cache and cannot be downloaded (offline?)")
