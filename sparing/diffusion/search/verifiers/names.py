"""Verifiers by name, as a command line gives them: ``clip``, ``brightness:target=0.5``, ``-compressibility``,
``2*clip``, or the user's own function as ``scorers.py:fit``.

Nothing is imported until a verifier is made, so that the list can be shown for nothing.
"""

import functools
import inspect
import json
import math
import re
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparing.diffusion.search.settings import check_numbers, check_whole
from sparing.zoo.table import closest

if TYPE_CHECKING:
    from sparing.diffusion.search.verifiers.base import Verifier

__all__ = ["VERIFIERS", "Entry", "key_values", "make_verifier", "make_verifiers"]


@dataclass(frozen=True)
class Entry:
    """A verifier that can be named.

    Args:
        home: module below ``sparing.diffusion.search.verifiers``.
        kind: its class.
        summary: one line.
        options: arguments that it takes as ``KEY=VALUE``.
        needs: those of them that must be given.
        of: what it scores.
    """

    home: str
    kind: str
    summary: str
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    of: str = "image"


_CLIP = ("model", "pretrained", "device")
_CLASSIFIER = ("model", "target", "weights", "device")

VERIFIERS: dict[str, Entry] = {
    "aesthetic": Entry("rewards", "Aesthetic", "LAION's aesthetic head on CLIP (downloads)", ("head", "device")),
    "brightness": Entry("image_stats", "Brightness", "minus distance of mean luma from target=1", ("target",)),
    "class_prob": Entry(
        "classifier", "InceptionClassProb", "probability of the class, model=NAME", _CLASSIFIER, ("model",)
    ),
    "classifier": Entry(
        "classifier",
        "ClassifierLogit",
        "log-softmax (or output=logit) of the class, model=NAME",
        (*_CLASSIFIER, "output"),
        ("model",),
    ),
    "clip": Entry("clip", "CLIPScore", "fit of image and prompt by CLIP ViT-L/14 (downloads)", (*_CLIP, "scale")),
    "clip_class": Entry(
        "clip", "CLIPClassLogit", "zero-shot class logit of CLIP, 80 templates (downloads)", (*_CLIP, "target")
    ),
    "clip_ratio": Entry("audio", "ClipRatio", "minus share of samples that clip", ("threshold",), of="audio"),
    "colorfulness": Entry("image_stats", "Colorfulness", "Hasler and Suesstrunk's colourfulness"),
    "compressibility": Entry("image_stats", "Compressibility", "minus kilobytes as JPEG", ("quality",)),
    "contrast": Entry("image_stats", "Contrast", "standard deviation of luma"),
    "denoising_error": Entry(
        "self_supervised",
        "DenoisingError",
        "minus the model's own error on the re-noised result; costs NFE",
        ("levels",),
        of="any",
    ),
    "entropy": Entry("image_stats", "Entropy", "entropy of luma, 256 bins, in bits"),
    "loudness": Entry("audio", "LoudnessTarget", "minus distance in dB from target=-20 dBFS", ("target",), of="audio"),
    "self_consistency": Entry(
        "self_supervised",
        "SelfConsistency",
        "cosine of features of an early estimate and the result, encoder=NAME",
        ("encoder", "level", "device"),
        ("encoder",),
    ),
    "sharpness": Entry("image_stats", "Sharpness", "variance of the Laplacian of luma"),
    "spectral_flatness": Entry("audio", "SpectralFlatness", "1 for noise, 0 for a tone", ("n_fft",), of="audio"),
    "temporal_smoothness": Entry(
        "video", "TemporalSmoothness", "minus mean |frame difference|", ("motion_floor",), of="video"
    ),
}

_FORM = re.compile(r"(?P<sign>-?)(?:(?P<factor>\d+(?:\.\d*)?|\.\d+)\*)?(?P<rest>[^\s].*)")


def make_verifiers(texts: Sequence[str], *, weights: Sequence[float] | None = None) -> "Verifier":
    """One verifier of one text, a rank ensemble of several.

    Raises:
        ValueError: none was given, or one of them is not possible; see :func:`make_verifier`.
    """
    if not texts:
        raise ValueError(f"no verifier given; there are {', '.join(VERIFIERS)}, and FILE.py:FUNCTION")
    members = [make_verifier(text) for text in texts]
    if len(members) == 1 and weights is None:
        return members[0]
    from sparing.diffusion.search.verifiers.ensemble import RankEnsemble

    return RankEnsemble(members, weights=weights)


def make_verifier(text: str) -> "Verifier":
    """``[-][FACTOR*]NAME[:KEY=VALUE,...]`` or ``[-][FACTOR*]FILE.py:FUNCTION`` to a verifier.

    Raises:
        ValueError: an unknown name (the closest are named), an argument that the verifier does not take, or a file
            without that function or that cannot be run.
        FileNotFoundError: no such file.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"verifier {text!r} has no name; there are {', '.join(VERIFIERS)}")
    name, colon, rest = match["rest"].partition(":")
    verifier = _from_file(name, rest) if name.endswith(".py") else _named(name.strip().lower(), rest, text)
    for part in verifier.parts:
        vars(part)["measure"] = _saying_whose(part.name, part.measure)
    factor = float(match["factor"] or 1) * (-1 if match["sign"] else 1)
    return verifier if factor == 1 else factor * verifier


def _saying_whose(name: str, measure: Callable[..., Any]) -> Callable[..., Any]:
    """``measure`` with errors that name the verifier: a function of the user's may raise anything."""
    import torch

    @functools.wraps(measure)
    def named(samples: Any, prompts: Sequence[Any]) -> Any:
        try:
            return measure(samples, prompts)
        except torch.OutOfMemoryError:  # the search halves its batch
            raise
        except Exception as error:
            if repr(name) in str(error):
                raise
            raise ValueError(f"{name!r} could not score: {type(error).__name__}: {error}") from error

    return named


def _named(name: str, rest: str, text: str) -> "Verifier":
    name = name.replace("-", "_")
    if name not in VERIFIERS:
        near = closest(name, VERIFIERS) or f"there are {', '.join(VERIFIERS)}"
        raise ValueError(f"no verifier {name!r}; {near}")
    entry = VERIFIERS[name]
    kind: Any = getattr(import_module(f"sparing.diffusion.search.verifiers.{entry.home}"), entry.kind)
    arguments = key_values(rest, of=f"verifier {text!r}")
    unknown = [key for key in arguments if key not in entry.options]
    if unknown:
        known = ", ".join(entry.options) or "no argument"
        raise ValueError(f"verifier {name!r} takes {known}; not {', '.join(unknown)}")
    needed = [key for key in entry.needs if key not in arguments]
    if needed:
        raise ValueError(f"verifier {name!r} needs {', '.join(needed)}: {name}:{needed[0]}=...")
    parameters = inspect.signature(kind).parameters
    wanted = {key: parameters[key].annotation if key in parameters else None for key in arguments}
    try:
        check_whole(**{key: value for key, value in arguments.items() if wanted[key] is int})
        check_numbers(**{key: value for key, value in arguments.items() if wanted[key] is float})
    except ValueError as error:
        raise ValueError(f"verifier {text!r}: {error}") from error
    try:
        return kind(**arguments)
    except TypeError as error:  # a value of the wrong kind
        raise ValueError(f"verifier {text!r}: {error}") from error


def key_values(text: str, *, of: str) -> dict[str, Any]:
    """``KEY=VALUE,...`` with JSON values, others as text; commas inside brackets belong to the value.

    Raises:
        ValueError: a part is no KEY=VALUE, a bracket is not closed, or a value no finite number; ``of`` is named.
    """
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    if depth:
        raise ValueError(f"{of}: the brackets of {text!r} do not match")
    found = {}
    for part in filter(None, parts):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{of}: {part!r} is no KEY=VALUE")
        found[key.strip()] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{text!r} is no finite number")
    return value


def _from_file(file: str, function: str) -> "Verifier":
    """A user's own ``function(samples, prompts) -> scores``, or a verifier object, from a Python file."""
    from sparing.diffusion.search.verifiers.base import as_verifier

    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {file!r}")
    if not function:
        raise ValueError(f"{file!r}: name the function in it, {file}:FUNCTION")
    try:
        content = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise ValueError(f"{file!r} could not be run: {type(error).__name__}: {error}") from error
    if function not in content:
        own = [name for name, value in content.items() if callable(value) and not name.startswith("_")]
        raise ValueError(f"{file!r} has no {function!r}; it has {', '.join(own) or 'nothing that can be called'}")
    try:
        return as_verifier(content[function], name=None if hasattr(content[function], "name") else function)
    except TypeError as error:
        raise ValueError(f"{file}:{function}: {error}") from error
