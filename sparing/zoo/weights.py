"""Weights: where they are found, how they are read, and how they enter a model.

Three sources: a file shipped in ``sparing/zoo/weights``, a local file or folder, a hub id. Files are safetensors, or
read by ``torch.load(weights_only=True)``; code in a pickle is refused and never run. A model is filled completely or
not at all.
"""

import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SHIPPED = Path(__file__).parent / "weights"

_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
_WANTED = ("*.json", *_FILES, "diffusion_pytorch_model*.safetensors", "transformer/*.safetensors")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


def locate(name: str, source: str | None, *, notes: str = "") -> Path:
    """The local file with weights of ``name``, downloaded first when its source is the hub.

    Args:
        name: full name in the zoo, with its tag.
        source: the table's ``source``: ``'shipped'``, ``'hf:OWNER/REPO/FILE'`` or None.
        notes: what the table says of other weights, for the message when there are none to fetch.

    Raises:
        ValueError: there are no weights of this very model.
        ConnectionError: the hub cannot be reached.
    """
    if source is None:
        raise ValueError(
            f"{name!r} has no weights of its own that could be fetched: create it with pretrained=False, load a file "
            "by checkpoint_path, or start a twin from its host's weights with host_pretrained=True"
            + (f" ({notes})" if notes else "")
        )
    if source == "shipped":
        path = SHIPPED / f"{name}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"the shipped weights of {name!r} are missing from this installation ({path.name})")
        return path
    owner, repo, file = source.removeprefix("hf:").split("/", 2)
    return download(f"{owner}/{repo}", file)


def download(repo: str, file: str) -> Path:
    """One file of a hub repository, from the local cache if it is there.

    Raises:
        ConnectionError: it is not in the cache and the hub cannot be reached.
        FileNotFoundError: the hub has no such repository or file.
    """
    from huggingface_hub import hf_hub_download

    return Path(_from_hub(repo, lambda: hf_hub_download(repo, file)))


def download_folder(repo: str) -> Path:
    """A hub repository as a local folder: configurations, and the weights of the model or of the pipeline's transformer
    (no text encoders and the like). Raises as :func:`download` does.
    """
    from huggingface_hub import snapshot_download

    return Path(_from_hub(repo, lambda: snapshot_download(repo, allow_patterns=list(_WANTED))))


def _from_hub(repo: str, fetch: Callable[[], str]) -> str:
    from huggingface_hub import errors

    try:
        return fetch()
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError, errors.RevisionNotFoundError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise _offline(repo) from error
        raise FileNotFoundError(
            f"the hub has no {repo!r} with the files asked for (or it is private and you are not logged in)"
        ) from error
    except errors.HFValidationError as error:
        raise ValueError(f"{repo!r} is neither a folder here nor a hub id OWNER/REPO") from error
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        raise _offline(repo) from error


def _offline(repo: str) -> ConnectionError:
    return ConnectionError(
        f"{repo!r} is not in the local cache and the hub cannot be reached (offline?): "
        "give a local folder or file, or download it once while online"
    )


def weights_file(path: str | Path) -> Path:
    """The weights file that a path means: itself, or the one inside a folder written by ``save_pretrained``.

    Raises:
        FileNotFoundError: nothing is there, or the folder holds no weights.
    """
    path = Path(path)
    if path.is_dir():
        for name in _FILES:
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"folder {str(path)!r} holds no weights; looked for {', '.join(_FILES)}")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {str(path)!r}")
    return path


def read_state(path: str | Path, *, stubs: Sequence[str] = ()) -> dict[str, Tensor]:
    """Reads a state dict from a file or folder, without ever running code that a file holds.

    Args:
        path: safetensors, a torch file of tensors (bare, or under ``state_dict``, ``model_state_dict``, ``model``,
            ``module``), or a folder holding one.
        stubs: full names of classes that published files carry beside their tensors (a training configuration, say);
            each is read as an inert dict and dropped.

    Returns:
        Tensors on the CPU, by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, damaged, of another kind, or holds pickled code.
    """
    path = weights_file(path)
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise ValueError(f"{str(path)!r} is empty")
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _read_safetensors(path)
    if head[:2] != b"PK" and head[:1] != b"\x80":
        raise ValueError(f"{str(path)!r} is neither a safetensors nor a torch file")
    return _unwrap(_read_torch(path, stubs), path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{str(path)!r} is no valid safetensors file: its header does not fit its content ({_line(error)})"
        ) from error


def _read_torch(path: Path, stubs: Sequence[str]) -> Any:
    allowed = torch.serialization.safe_globals([(OrderedDict, name) for name in stubs]) if stubs else nullcontext()
    try:
        with allowed, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols; what matters is raised
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise ValueError(
                f"{str(path)!r} is refused: no torch file of plain tensors; nothing of it was run"
            ) from error
        raise ValueError(
            f"{str(path)!r} is refused: it holds pickled code ({named[1]}) beside or instead of tensors; "
            "nothing of it was run; ask for the weights as safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, OSError) as error:
        raise ValueError(f"{str(path)!r} is a damaged torch file ({_line(error)})") from error


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside a checkpoint: bare, or under one of the customary names; 'module.' of DDP is stripped."""
    if isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        content = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), content)
    state = (
        {key: value for key, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not state:
        raise ValueError(f"{str(path)!r} holds no tensors by name (a state dict, bare or under {', '.join(_WRAPPERS)})")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    filter_fn: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = None,
) -> nn.Module:
    """Fills a model with the weights of a file, completely or not at all.

    Args:
        model: the model; its tensors keep their dtype and device.
        path: what :func:`read_state` reads.
        filter_fn: turns published keys into ours, given the state dict and the model.

    Returns:
        The model.

    Raises:
        ValueError: the file belongs to another model: missing, unexpected or differently shaped tensors, the first
            five of each.
    """
    state = read_state(path)
    if filter_fn is not None:
        state = filter_fn(state, model)
    return fill(model, state, origin=repr(str(path)))


def fill(model: nn.Module, state: Mapping[str, Tensor], *, origin: str) -> nn.Module:
    """Copies ``state`` into ``model`` strictly; tensors that the model ties need to be there once. Raises as
    :func:`load_checkpoint`.
    """
    own = model.state_dict()
    given_places = {_place(own[name]) for name in state if name in own}
    missing = [name for name, tensor in own.items() if name not in state and _place(tensor) not in given_places]
    unexpected = sorted(name for name in state if name not in own)
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        f"{label}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise ValueError(
            f"{origin} holds weights of another model than this {type(model).__name__}; {'; '.join(problems)}"
        )
    model.load_state_dict(dict(state), strict=False)
    return model


def untied_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as contiguous CPU tensors, each storage once (tied tensors under their first name), ready to be
    saved.
    """
    state: dict[str, Tensor] = {}
    seen: set[tuple[int, ...]] = set()
    for name, tensor in model.state_dict().items():
        place = _place(tensor)
        if place not in seen:
            seen.add(place)
            state[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return state


def _place(tensor: Tensor) -> tuple[int, ...]:
    """Identifies the memory a tensor shows: equal for tied tensors."""
    if tensor.numel() == 0 or tensor.is_meta:
        return (id(tensor),)
    return (tensor.data_ptr(), *tensor.shape, *tensor.stride())


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
