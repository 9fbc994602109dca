"""Names to models: ``register_model``, ``create_model``, ``list_models``, ``model_card``.

The habits are timm's: an entry point ``def name(pretrained=False, **kwargs)`` is registered under its own name,
weights carry a tag after a dot (``vit_micro_patch4_28.demo_fashion``), and a bare name stands for its first tag. What
exists is read from the static table; a module is imported only when one of its models is created.
"""

import functools
import importlib
from collections.abc import Callable
from contextlib import nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from sparing.zoo import cards
from sparing.zoo.table import MODELS, Entry, find_entry

if TYPE_CHECKING:
    import torch
    from torch import nn

EntryPoint = TypeVar("EntryPoint", bound=Callable[..., Any])

_ENTRY_POINTS: dict[str, Callable[..., Any]] = {}
_FROM_TIMM = ("pretrained_cfg_overlay", "cache_dir")  # what timm.create_model passes on beside the user's own arguments


@overload
def register_model(function: EntryPoint) -> EntryPoint: ...
@overload
def register_model(*, timm: bool = False) -> Callable[[EntryPoint], EntryPoint]: ...
def register_model(function: Any = None, *, timm: bool = False) -> Any:
    """Registers an entry point ``def name(pretrained=False, **kwargs)`` under its name.

    The registered function serves ``pretrained=True`` itself (the entry point is always called with False): it loads
    the weights that the table names for this model and raises when there are none, so an entry point only builds.

    Args:
        function: the entry point (the decorator may stand bare or be called).
        timm: also register with timm, so that ``timm.create_model(name)`` works once the module is imported.
    """
    if function is None:
        return functools.partial(register_model, timm=timm)
    name = function.__name__

    @functools.wraps(function)
    def build(pretrained: bool = False, **kwargs: Any) -> "nn.Module":
        tag = getattr(kwargs.get("pretrained_cfg"), "tag", kwargs.get("pretrained_cfg")) if timm else None
        if timm:
            kwargs = {key: value for key, value in kwargs.items() if key not in (*_FROM_TIMM, "pretrained_cfg")}
        if not pretrained:
            return function(pretrained=False, **kwargs)
        return _build_pretrained(function, f"{name}.{tag}" if isinstance(tag, str) and tag else name, kwargs)

    _ENTRY_POINTS[name] = build
    if timm:
        from timm.models import register_model as register_with_timm

        register_with_timm(build)
    return build


def registered(module: str | None = None) -> list[str]:
    """Names that imported modules have registered, of one module if given."""
    return sorted(name for name, build in _ENTRY_POINTS.items() if module in (None, build.__module__))


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    checkpoint_path: str | Path | None = None,
    device: "str | torch.device | None" = None,
    dtype: "torch.dtype | None" = None,
    host_pretrained: bool = False,
    **kwargs: Any,
) -> "nn.Module":
    """Creates a model of the zoo, a host by prefix, or a saved twin.

    Args:
        name: a name of ``list_models()``; ``timm/NAME``, ``torchvision/NAME``, ``open_clip/NAME``; a folder written by
            ``save_pretrained`` (ours or diffusers'); or a hub id ``OWNER/REPO``.
        pretrained: load published or shipped weights of this very model.
        checkpoint_path: a safetensors file, or one that ``torch.load(weights_only=True)`` reads; loaded strictly.
        device: where to build; ``'meta'`` builds without memory.
        dtype: floating-point type of parameters and buffers.
        host_pretrained: start a twin from its host's published weights.
        kwargs: knobs and arguments of the entry point.

    Returns:
        The model, in evaluation mode when weights were loaded, else as its entry point built it.

    Raises:
        ValueError: the name is unknown (the closest ones are named), or weights were asked for and there are none.
    """
    import torch

    from sparing.zoo import hosts, weights

    if pretrained and checkpoint_path is not None:
        raise ValueError("pretrained=True and checkpoint_path exclude each other: two sources of weights for one model")
    if str(device).startswith("meta") and (pretrained or checkpoint_path is not None or host_pretrained):
        raise ValueError(
            "device='meta' builds without memory and cannot hold weights: create on a real device to load them"
        )
    # a saved model is read where it lies and moved afterwards; everything else is built in place
    build_on = None if hosts.is_saved_name(name) else device
    with torch.device(build_on) if build_on is not None else nullcontext():
        if hosts.is_host_name(name):
            if host_pretrained:
                raise ValueError(f"{name!r} is a host itself: pretrained=True loads its published weights")
            model = hosts.create_host(name, pretrained, **kwargs)
        else:
            model = _create_named(name, pretrained, host_pretrained, kwargs)
    if checkpoint_path is not None:
        weights.load_checkpoint(model, checkpoint_path, filter_fn=_checkpoint_filter(name))
        model.eval()
    return model.to(device=device, dtype=dtype) if device is not None or dtype is not None else model


def list_models(
    pattern: str = "*",
    *,
    task: str | None = None,
    method: str | None = None,
    pretrained: bool = False,
    commercial: bool | None = None,
    demo: bool = False,
) -> list[str]:
    """Names of the zoo in alphabetical order, without importing a family.

    Args:
        pattern: shell-style pattern such as ``'stvit*'``; a plain word matches anywhere in the name.
        task: only this task.
        method: only twins by this method.
        pretrained: only names with weights of that very model.
        commercial: True keeps models whose licences allow commercial use as far as their cards know
            (:meth:`sparing.zoo.cards.ModelCard.commercial`), False keeps the others.
        demo: list the small shipped models too.

    Raises:
        ValueError: no entry has that task or method; the message names those there are.
    """
    for label, value, known in (
        ("task", task, {entry.task for entry in MODELS.values()}),
        ("method", method, {entry.method for entry in MODELS.values() if entry.method}),
    ):
        if value is not None and value not in known:
            raise ValueError(f"unknown {label} {value!r}; the zoo has {', '.join(sorted(known))}")
    if not any(sign in pattern for sign in "*?["):
        pattern = f"*{pattern}*"

    def wanted(name: str, entry: Entry) -> bool:
        return (
            fnmatch(name, pattern)
            and (demo or not entry.demo)
            and task in (None, entry.task)
            and method in (None, entry.method)
            and (not pretrained or entry.source is not None)
            and (commercial is None or cards.table_card(name).commercial() == commercial)
        )

    return sorted(name for name, entry in MODELS.items() if wanted(name, entry))


def model_card(name: str) -> cards.ModelCard:
    """The card of a name of the zoo (nothing is imported for it), a host by prefix, a saved folder or a hub id.

    Raises:
        ValueError: the name is unknown; the message names the closest ones.
    """
    if name not in MODELS and ("/" in name or Path(name).is_dir()):
        from sparing.zoo.host_cards import host_card

        return host_card(name)
    return cards.table_card(name)


def _entry_point(name: str) -> Callable[..., Any]:
    base = name.partition(".")[0]
    if base not in _ENTRY_POINTS:
        module = find_entry(name).module
        importlib.import_module(module)
        if base not in _ENTRY_POINTS:
            raise RuntimeError(f"{module} does not register {base!r} although the table says so")
    return _ENTRY_POINTS[base]


def _create_named(name: str, pretrained: bool, host_pretrained: bool, kwargs: dict[str, Any]) -> "nn.Module":
    from sparing.zoo import hosts

    entry = find_entry(name)
    if host_pretrained:
        if entry.host is None:
            raise ValueError(f"host_pretrained=True: {name!r} is no twin of a published host")
        if pretrained:
            raise ValueError(
                "pretrained=True (the twin's own weights) and host_pretrained=True (its host's) exclude each other"
            )
        kwargs = {**kwargs, "host_pretrained": True}
    build = _entry_point(name)
    if pretrained:
        return _build_pretrained(build.__wrapped__, name, kwargs)  # type: ignore[attr-defined]
    try:
        return build(pretrained=False, **kwargs)
    except OSError as error:
        if host_pretrained:
            raise hosts.needs_hub(str(entry.host)) from error
        raise


def _build_pretrained(function: Callable[..., Any], name: str, kwargs: dict[str, Any]) -> "nn.Module":
    """Builds by the undecorated entry point and loads the weights that the table names for ``name``."""
    from sparing.zoo import weights

    full_name = name if "." in name else next((tagged for tagged in tagged_names(name) if MODELS[tagged].source), name)
    entry = find_entry(full_name)
    path = weights.locate(full_name, entry.source, notes=entry.notes)
    model = function(pretrained=False, **kwargs)
    weights.load_checkpoint(model, path, filter_fn=_checkpoint_filter(full_name))
    if getattr(model, "status", None) == "converted, not trained":
        model.status = "trained"
    return model.eval()


def tagged_names(base: str) -> list[str]:
    """A name of the table and, of a bare one, its tagged forms, in the table's order; none when it is no name."""
    return [name for name in MODELS if base in (name, name.partition(".")[0])]


def _checkpoint_filter(name: str) -> Callable[..., Any] | None:
    """The family's ``checkpoint_filter_fn(state, model)``: published keys to ours."""
    entry = MODELS.get(name)
    return getattr(importlib.import_module(entry.module), "checkpoint_filter_fn", None) if entry else None
