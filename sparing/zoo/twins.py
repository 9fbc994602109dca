"""Twins: the contract that every method meets, and how twins are made, listed, saved and brought back.

A method is a class with the mixin :class:`Twin`; the table's ``METHODS`` names it. ``sparing.methods(model)`` asks
each one whether it applies to a live model, ``sparing.twin(model, 'stvit', **knobs)`` builds one, ``save_pretrained``
writes config.json and model.safetensors, ``sparing.load`` rebuilds the twin from them without its host.
"""

import importlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from torch import nn

import sparing
from sparing._compat import quieten_xformers
from sparing.zoo import weights
from sparing.zoo.table import CLASSES, METHODS, closest

if TYPE_CHECKING:
    import torch

Status = Literal["exact", "training-free", "converted, not trained", "trained"]
STATUSES: tuple[Status, ...] = ("exact", "training-free", "converted, not trained", "trained")


class Twin:
    """Mixin of every twin that is a plain ``nn.Module`` (denoisers use diffusers' ``ModelMixin`` instead).

    A subclass sets ``method`` and ``training``, keeps ``status`` as an attribute, and implements ``knobs``,
    ``from_host``, ``why_not``, ``twin_config`` and ``from_twin_config``. It may set ``pretrained_cfg``
    (preprocessing, as timm's) and ``license`` (``{'code': ..., 'weights': ..., 'data': ...}``, inherited from the
    host).
    """

    method: ClassVar[str]
    training: ClassVar[Literal["none", "required"]]
    status: Status

    @property
    def knobs(self) -> dict[str, Any]:
        """The numbers that trade quality for cost, as JSON values."""
        raise NotImplementedError(f"{type(self).__name__} does not define its knobs")

    @classmethod
    def from_host(cls, host: nn.Module, **knobs: Any) -> Self:
        """Builds the twin from a live host, copying its weights and leaving it untouched."""
        raise NotImplementedError(f"{cls.__name__} does not define from_host")

    @classmethod
    def why_not(cls, host: nn.Module) -> list[str]:
        """Reasons why the method does not apply to ``host``; empty when it does."""
        raise NotImplementedError(f"{cls.__name__} does not define why_not")

    def twin_config(self) -> dict[str, Any]:
        """JSON values from which :meth:`from_twin_config` rebuilds the architecture: ``{'knobs': {...}, 'host':
        {...}, ...}``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define twin_config")

    @classmethod
    def from_twin_config(cls, config: dict[str, Any]) -> Self:
        """Rebuilds the architecture, without weights and without the host, from what :meth:`twin_config` gave."""
        raise NotImplementedError(f"{cls.__name__} does not define from_twin_config")

    def save_pretrained(self, directory: str | Path, *, dtype: "torch.dtype | None" = None) -> Path:
        """Writes config.json and model.safetensors; nothing half-written is ever left under either name.

        Args:
            directory: the folder; made when it is not there. Other files in it stay.
            dtype: store floating-point tensors in this type (``torch.float16`` halves a file), None: as they are.

        Returns:
            The folder.
        """
        from safetensors.torch import save_file

        state = weights.untied_state(cast(nn.Module, self))
        if dtype is not None:
            state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        config = json.dumps(self._saved_config(), indent=2, sort_keys=True, allow_nan=False) + "\n"
        directory = Path(directory)
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"cannot save into {str(directory)!r}: it is a file, a folder is needed")
        directory.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            save_file(state, draft / "model.safetensors", metadata={"format": "pt"})
            (draft / "config.json").write_text(config, encoding="utf-8")
            directory.mkdir(exist_ok=True)
            for name in ("model.safetensors", "config.json"):
                os.replace(draft / name, directory / name)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return directory

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Uploads what :meth:`save_pretrained` writes as a model repository, and returns its address.

        Args:
            repo: ``OWNER/REPO``; made when it is not there.
            private: visibility of a repository made by this call.
            token: access token; None uses the one that the user logged in with.
            commit_message: None names the method and the version of sparing.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "twin")
            message = commit_message or f"{self.method} twin, written by sparing {sparing.__version__}"
            commit = api.upload_folder(repo_id=repo_id, folder_path=Path(folder) / "twin", commit_message=message)
        return str(commit)

    def _saved_config(self) -> dict[str, Any]:
        import timm
        import torch

        if self.status not in STATUSES:
            raise ValueError(f"status {self.status!r} of this {type(self).__name__} is none of {', '.join(STATUSES)}")
        config = {
            "sparing_version": sparing.__version__,
            "method": self.method,
            "status": self.status,
            "knobs": self.knobs,
            "pretrained_cfg": _json_values(getattr(self, "pretrained_cfg", None)),
            "license": getattr(self, "license", None),
            "versions": {"torch": torch.__version__, "timm": timm.__version__},
        }
        return {**config, **self.twin_config()}


@dataclass(frozen=True, slots=True)
class Applicability:
    """Whether one method applies to a model: ``reasons`` says why not, and is empty when it does."""

    method: str
    training: str
    reasons: tuple[str, ...]

    @property
    def applies(self) -> bool:
        return not self.reasons

    def __str__(self) -> str:
        if self.applies:
            return f"{self.method}: applies ({'training-free' if self.training == 'none' else 'needs training'})"
        return f"{self.method}: no, {'; '.join(self.reasons)}"


def method_class(method: str) -> type[Twin]:
    """The class of a method.

    Raises:
        ValueError: there is no such method; the message names those there are.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(sorted(METHODS))}")
    return _resolve(METHODS[method])


def methods(model: nn.Module) -> list[Applicability]:
    """For every method, whether it applies to this live model, and if not why.

    A method whose optional dependency is not installed says so as its reason.
    """
    _check_module(model)
    answers = []
    for name in sorted(METHODS):
        try:
            cls = method_class(name)
        except ImportError as error:
            answers.append(Applicability(name, "unknown", (f"cannot be imported here: {error}",)))
            continue
        answers.append(Applicability(name, cls.training, tuple(cls.why_not(model))))
    return answers


def twin(model: nn.Module, method: str, **knobs: Any) -> nn.Module:
    """Builds the twin of a live model by a method, from the model's own weights; the model stays as it was.

    Args:
        model: the host.
        method: a method that ``sparing.methods(model)`` says applies, e.g. ``'stvit'`` or ``'tome'``.
        knobs: the method's own keywords, e.g. ``num_tokens=16`` or ``r=8``.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or a knob is not one of the method's.
        ValueError: no such method, or it does not apply; the message says why.
    """
    cls = method_class(method)
    _check_module(model)
    if reasons := cls.why_not(model):
        raise ValueError(f"{method} does not apply to this {type(model).__name__}: {'; '.join(reasons)}")
    _check_knobs(method, cls, knobs)
    return cast(nn.Module, cls.from_host(model, **knobs))


def _check_knobs(method: str, cls: type[Twin], knobs: Mapping[str, Any]) -> None:
    """Refuses a keyword that neither ``from_host`` nor, where that hands on, the constructor has."""
    accepted = inspect.signature(cls.from_host).parameters
    if any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        accepted = inspect.signature(cls).parameters
    if any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        return
    names = [name for name in accepted if name != "host"]
    for knob in knobs:
        if knob not in names:
            near = closest(knob, names)
            raise TypeError(f"{method} has no knob {knob!r}; {near or 'it has ' + ', '.join(names)}")


def load(
    directory_or_repo: str | Path,
    *,
    device: "str | torch.device | None" = None,
    dtype: "torch.dtype | None" = None,
) -> nn.Module:
    """Brings back a saved twin without its host, from a folder or a hub repository, in evaluation mode.

    Raises:
        FileNotFoundError: nothing is there, or it lacks config.json or weights.
        ValueError: the folder was not written by a twin's ``save_pretrained``, or its weights do not fit.
        ConnectionError: a hub id that is not in the cache while the hub cannot be reached.
    """
    folder = Path(directory_or_repo)
    if folder.is_file():
        raise ValueError(f"{str(folder)!r} is a file; load takes the folder that save_pretrained wrote, or a hub id")
    if not folder.is_dir():
        name = str(directory_or_repo)
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise FileNotFoundError(f"no such folder: {name!r}, nor is it a hub id OWNER/REPO")
        folder = weights.download_folder(name)
    config = read_config(folder)
    if "_class_name" in config:
        model = _load_diffusers(folder, config["_class_name"])
    else:
        if "method" not in config:
            raise ValueError(f"config.json in {str(folder)!r} names neither a method of sparing nor a diffusers class")
        cls = method_class(config["method"])
        model = cast(nn.Module, cls.from_twin_config(config))
        path = weights.weights_file(folder)
        weights.fill(model, weights.read_state(path), origin=repr(str(path)))
        cast(Twin, model).status = config["status"]
    model = model.to(device=device, dtype=dtype) if device is not None or dtype is not None else model
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a saved model.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"folder {str(folder)!r} has no config.json: it was not written by save_pretrained")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{str(path)!r} holds no JSON object")
    return config


def _load_diffusers(folder: Path, class_name: str) -> nn.Module:
    if class_name in CLASSES:
        return cast(nn.Module, cast(Any, _resolve(CLASSES[class_name])).from_pretrained(folder))
    quieten_xformers()
    import diffusers

    cls = getattr(diffusers, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise ValueError(
            f"{class_name!r} in {str(folder / 'config.json')!r} is no model of sparing or of this diffusers"
        )
    return cast(nn.Module, cast(Any, cls).from_pretrained(folder))


def _resolve(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"a live model (torch.nn.Module) is needed, got {type(model).__name__}; create_model makes one from a name"
        )


def _json_values(cfg: Any) -> Any:
    """timm's pretrained_cfg (a dict or a dataclass) as JSON values, without fields that are not set."""
    if cfg is None:
        return None
    items = dict(cfg) if isinstance(cfg, dict) else cfg.to_dict()
    plain = (str, int, float, bool, list, tuple)
    return {key: value for key, value in items.items() if isinstance(value, plain)}
