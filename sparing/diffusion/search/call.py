"""How a pipeline is called: which keyword arguments belong to one prompt, and those of a batch of rows.

call = Call(pipe, {"prompt": ["a cat", "a dog"], "num_inference_steps": 30})
call.prompts            # ["a cat", "a dog"]
call.rows([0, 0, 1])    # {"prompt": ["a cat", "a cat", "a dog"], "num_inference_steps": 30}
"""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Call"]

_OURS = {
    "generator": "the search draws every candidate's noise itself; give it seed=",
    "output_type": "the search asks for tensors itself; convert result.best.sample",
    "return_dict": "the search reads the pipeline's output itself",
}


class Call:
    """Keyword arguments of one search.

    Args:
        pipe: a diffusers pipeline.
        kwargs: as the pipeline takes them, for one prompt or for a list of them.

    Raises:
        TypeError: arguments that the pipeline does not take.
        ValueError: arguments that the search decides, several samples a prompt, an empty list of prompts, or lists of
            unequal length.
    """

    def __init__(self, pipe: Any, kwargs: Mapping[str, Any]) -> None:
        self.parameters = inspect.signature(pipe.__call__).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in self.parameters.values())
        unknown = [name for name in kwargs if name not in self.parameters and not open_ended]
        if unknown:
            raise TypeError(
                f"{type(pipe).__name__} takes no {', '.join(unknown)}; it takes {', '.join(self.parameters)}"
            )
        for name, why in _OURS.items():
            if name in kwargs:
                raise ValueError(f"{name} cannot be given: {why}")
        for name, value in kwargs.items():
            if name.startswith("num_") and name.endswith("_per_prompt") and value not in (None, 1):
                raise ValueError(f"{name}={value}: a search chooses among noises itself; leave it at 1")
        self.kwargs = dict(kwargs)
        self.kwargs.pop("latents", None)
        self.given: Tensor | None = kwargs.get("latents")
        if self.kwargs.pop("batch_size", None) not in (None, 1):
            raise ValueError("batch_size of the pipeline is the search's own; set NoiseSearch(batch_size=)")
        self.prompts, self.is_list = self._read_prompts()
        self._check_lengths()

    def _read_prompts(self) -> tuple[list[Any], bool]:
        for name in ("prompt", "class_labels"):
            value = self.kwargs.get(name)
            if value is None:
                continue
            if isinstance(value, Tensor):
                value = self.kwargs[name] = value.tolist()
            if not isinstance(value, list | tuple):
                return [value], False
            if not value:
                raise ValueError(f"{name} is an empty list: there is nothing to search for")
            # a list of one label is the only way to ask DiTPipeline for one sample
            return list(value), name == "prompt" or len(value) > 1
        embeds = self.kwargs.get("prompt_embeds")
        if isinstance(embeds, Tensor):
            return [None] * len(embeds), len(embeds) > 1
        return [None], False

    def _check_lengths(self) -> None:
        count = len(self.prompts)
        for name, value in self.kwargs.items():
            if _by_prompt(name) and isinstance(value, list | tuple | Tensor) and len(value) != count:
                raise ValueError(f"{name} has {len(value)} entries for {count} prompts")

    @property
    def keys(self) -> list[Any]:
        """What enters the seeds: the prompt, the class label, or "" where there is neither."""
        keys = ["" if prompt is None else prompt for prompt in self.prompts]
        if keys.count("") > 1:  # embeddings without text: prompts are told apart by their place
            keys = [f"#{i}" if key == "" else key for i, key in enumerate(keys)]
        return keys

    def rows(self, indices: Sequence[int]) -> dict[str, Any]:
        """Keyword arguments for a batch of rows, each of one prompt."""
        found: dict[str, Any] = {}
        for name, value in self.kwargs.items():
            if value is None or not _by_prompt(name):
                found[name] = value
            elif isinstance(value, Tensor):
                found[name] = value[torch.as_tensor(indices, device=value.device)]
            elif isinstance(value, list | tuple):
                found[name] = [value[i] for i in indices]
            else:
                found[name] = [value] * len(indices)
        if "batch_size" in self.parameters and "prompt" not in self.parameters:
            found["batch_size"] = len(indices)
        return found

    def fingerprint(self) -> str:
        """Hash of the arguments, for the log's header."""
        text = json.dumps({name: _described(value) for name, value in sorted(self.kwargs.items())}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def described(self) -> dict[str, Any]:
        """Arguments as JSON: tensors by shape and hash."""
        return {name: _described(value) for name, value in sorted(self.kwargs.items())}


def _by_prompt(name: str) -> bool:
    """Arguments with one entry a prompt; a scalar stands for all of them."""
    if name == "class_labels" or name in ("prompt", "negative_prompt", "lyrics", "image"):
        return True
    text = name.startswith(("prompt", "negative_prompt")) and name[-1].isdigit()
    return text or name.endswith(("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds", "_embeds_mask"))


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return {"shape": list(value.shape), "hash": hashlib.blake2b(data, digest_size=8).hexdigest()}
    if isinstance(value, Mapping):
        return {str(key): _described(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_described(entry) for entry in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if hasattr(value, "tobytes"):  # PIL images, arrays
        return {"type": type(value).__name__, "hash": hashlib.blake2b(value.tobytes(), digest_size=8).hexdigest()}
    return type(value).__name__
