"""Generate images of given classes with a DiT or FlexDiT, and write them as one sheet.

    python -m sparing.recipes.generate --model runs/flexdit --classes 0 1 2 3 --steps 20 --density 3 --out sheet.png

``--model`` is a name of the zoo with weights, a folder of a transformer (``sparing.load`` reads it; a pixel-space one
is complete, a latent one needs ``--vae``), or a folder or hub id of a whole pipeline, a diffusers ``DiTPipeline``
included. The same function is ``sparing generate``.
"""

import inspect
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

import sparing
from sparing.diffusion.pipelines import FlexDiTPipeline
from sparing.diffusion.respaced import RespacedScheduler
from sparing.media.image import writable_suffixes, write_image
from sparing.media.outputs import check_output
from sparing.zoo.registry import tagged_names
from sparing.zoo.weights import download_folder

__all__ = ["generate", "open_pipeline", "open_stored", "open_transformer", "open_vae", "parse_class", "sample_seeds"]


def open_pipeline(model: str | Path | nn.Module | FlexDiTPipeline, *, vae: str | Path | None = None) -> FlexDiTPipeline:
    """A pipeline from a live transformer or pipeline, a folder or hub id of either, or a name of the zoo.

    Raises:
        ValueError: a latent-space model without a VAE, a VAE of other latents or where a pipeline has its own, a model
            of another kind, a folder that holds neither, or a name without weights.
        FileNotFoundError: no such folder.
        ConnectionError: a hub id that is not in the cache while the hub cannot be reached.
    """
    stands_alone = isinstance(model, (str, Path)) and _holds_pipeline(model)
    if vae is not None and (stands_alone or isinstance(model, FlexDiTPipeline)):
        raise ValueError("a pipeline brings its own decoder: leave vae out")
    if isinstance(model, FlexDiTPipeline):
        return model
    if stands_alone:
        stored = open_stored(model)  # type: ignore[arg-type]
        if isinstance(stored, FlexDiTPipeline):
            return stored
        if "transformer" not in stored.components or "text_encoder" in stored.components:
            raise ValueError(
                f"{str(model)!r} is a {type(stored).__name__}; generate takes class-conditional transformers"
            )
        names = {index: name for name, index in stored.labels.items()}
        return FlexDiTPipeline(stored.transformer, stored.scheduler, vae=stored.vae, id2label=names or None)
    transformer: Any = open_transformer(model) if isinstance(model, (str, Path)) else model
    takes_classes = "class_labels" in inspect.signature(transformer.forward).parameters
    if not takes_classes or not hasattr(getattr(transformer, "config", None), "in_channels"):
        raise ValueError(
            f"{str(model) if isinstance(model, (str, Path)) else 'the model'!r} is a {type(transformer).__name__}; "
            "generate takes class-conditional diffusion transformers (DiT, FlexDiT)"
        )
    decoder = None
    if vae is not None:
        decoder = open_vae(vae)
        if decoder.config.latent_channels != transformer.config.in_channels:
            raise ValueError(
                f"the model works on {transformer.config.in_channels} channels, the decoder in {str(vae)!r} on "
                f"{decoder.config.latent_channels}"
            )
    elif transformer.config.in_channels not in (1, 3):
        raise ValueError(
            f"this model works on latents of {transformer.config.in_channels} channels: pass vae, the folder of its "
            f"decoder"
        )
    return FlexDiTPipeline(transformer.eval(), RespacedScheduler(), vae=decoder)


def open_stored(pipeline: str | Path) -> Any:
    """A FlexDiTPipeline or any pipeline of diffusers, from a folder or the hub.

    Raises:
        FileNotFoundError: no such folder, and no hub id.
        OSError: the folder or repository holds no pipeline.
        ValueError: a pipeline of a class that is neither ours nor of diffusers, or one whose files cannot be read.
    """
    name = str(pipeline)
    _check_place(name)
    opener = _pipeline_class(name)
    try:
        return opener.from_pretrained(name)
    except (ValueError, TypeError, OSError, ImportError):
        raise
    except Exception as error:  # whatever damaged files make the readers of the components raise
        raise ValueError(f"pipeline {name!r} cannot be loaded ({type(error).__name__}): {error}") from error


def _holds_pipeline(place: str | Path) -> bool:
    """Whether a folder or a repository of the hub holds a whole pipeline."""
    name, folder = str(place), Path(place)
    if not folder.exists() and not tagged_names(name) and _is_hub_id(name):
        folder = download_folder(name)
    return (folder / "model_index.json").exists()


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _check_place(name: str) -> None:
    if not Path(name).is_dir() and not _is_hub_id(name):
        raise FileNotFoundError(f"no such folder: {name!r}, nor is it a hub id OWNER/REPO")


def _pipeline_class(name: str) -> Any:
    """The class that the ``model_index.json`` of a folder or repository names, ours or one of diffusers."""
    import diffusers

    index = Path(name) / "model_index.json"
    if index.exists():
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{index} is not JSON: {error}") from error
    else:
        content = diffusers.DiffusionPipeline.load_config(name)
    wanted = content.get("_class_name") if isinstance(content, dict) else None
    if wanted == FlexDiTPipeline.__name__:
        return FlexDiTPipeline
    found = getattr(diffusers, wanted, None) if isinstance(wanted, str) else None
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
        raise ValueError(f"{index} names the class {wanted!r}, which is no pipeline of diffusers or of this library")
    return found


def open_vae(folder: str | Path) -> Any:
    """An ``AutoencoderKL`` from its folder or hub id.

    Raises:
        ValueError: a folder of a pipeline or of another class, or weights that cannot be read.
        OSError: nothing is there.
    """
    from diffusers import AutoencoderKL

    name = str(folder)
    _check_place(name)
    if (Path(name) / "model_index.json").exists():
        raise ValueError(f"{name!r} is the folder of a pipeline; give that of its decoder, {str(Path(name) / 'vae')!r}")
    wanted = AutoencoderKL.load_config(name).get("_class_name")
    if wanted != AutoencoderKL.__name__:
        raise ValueError(f"{name!r} holds a model of class {wanted!r}; an AutoencoderKL is needed")
    try:
        return AutoencoderKL.from_pretrained(name)
    except (ValueError, TypeError, OSError):
        raise
    except Exception as error:  # whatever damaged weights make the reader raise
        raise ValueError(f"decoder {name!r} cannot be loaded ({type(error).__name__}): {error}") from error


def parse_class(text: str) -> int | str:
    """A class as a person writes it: an index, or else a name."""
    return int(text) if re.fullmatch(r"-?[0-9]+", text) else text


def sample_seeds(seed: int, count: int) -> list[int]:
    """The seed of each sample.

    Raises:
        ValueError: ``seed`` is too large for torch's generators.
    """
    seeds = [seed * 1_000_003 + i for i in range(count)]
    if not all(-(2**63) <= number < 2**63 for number in seeds):
        raise ValueError(f"seed must lie within -9e12 and 9e12, got {seed}")
    return seeds


def open_transformer(model: str | Path) -> Any:
    """A denoiser by its name in the zoo, with its weights, or from a folder.

    Raises:
        ValueError: a name without weights, or a folder without a model.
    """
    if tagged_names(str(model)):
        return sparing.create_model(str(model), pretrained=True)
    return sparing.load(model)


def generate(
    model: str | Path | nn.Module | FlexDiTPipeline,
    classes: Sequence[int | str],
    *,
    out: str | Path | None = None,
    steps: int = 50,
    density: Any = None,
    guidance_scale: float = 4.0,
    guidance_channels: int | None = None,
    per_class: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    vae: str | Path | None = None,
    device: str | None = None,
    enlarge: int = 1,
) -> dict[str, Any]:
    """Images of classes, one row a class when ``per_class`` is above 1.

    Args:
        model: see :func:`open_pipeline`.
        classes: class indices (or names, when the pipeline knows them).
        out: image file for the sheet; None writes nothing.
        steps: denoiser steps.
        density: one sparse grid for all steps; None: the model's own schedule.
        guidance_scale: 1 or less: no guidance.
        guidance_channels: as in :class:`sparing.diffusion.FlexDiTPipeline`.
        per_class: images of each class.
        batch_size: images a forward (twice that in samples with guidance).
        seed: image i starts from noise seeded by (seed, i), whatever the batch size.
        vae: decoder of a latent-space model.
        device: where to run; where the model is when None.
        enlarge: each pixel becomes this many, for small images.

    Returns:
        ``images (count, channels, H, W)`` in [0, 1], ``status`` of the model, ``out`` (the file or None) and ``seeds``.

    Raises:
        ValueError: a class, density or number that is not possible.
    """
    for name, number in (("steps", steps), ("per_class", per_class), ("batch_size", batch_size), ("enlarge", enlarge)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if out is not None:
        check_output(out, suffixes=writable_suffixes())
    pipeline = open_pipeline(model, vae=vae)
    if device is not None:
        pipeline.to(device)
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty())
    labels = [label for label in classes for _ in range(per_class)]
    seeds = sample_seeds(seed, len(labels))
    parts = []
    for start in range(0, len(labels), batch_size):
        chunk = slice(start, start + batch_size)
        parts.append(
            pipeline(
                labels[chunk],
                guidance_scale=guidance_scale,
                guidance_channels=guidance_channels,
                num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(s) for s in seeds[chunk]],
                density=density,
                output_type="pt",
            ).images.cpu()
        )
    if not parts:
        raise ValueError("classes is empty; give at least one class")
    images = torch.cat(parts)
    if out is not None:
        sheet = images.repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)
        columns = per_class if per_class > 1 else min(len(labels), 8)
        picture = to_pil_image(make_grid(sheet, nrow=columns, padding=2, pad_value=1.0))
        out = write_image(picture, out)
    status = getattr(pipeline.transformer, "status", "dense")
    return {"images": images, "status": status, "out": out, "seeds": seeds}


@dataclass(frozen=True)
class Arguments:
    """What to generate."""

    model: str = field(metadata={"help": "name in the zoo, folder of a transformer or of a pipeline"})
    classes: list[str] = field(metadata={"help": "class indices or names"})
    out: str = field(metadata={"help": "image file of the sheet"})
    steps: int = field(default=50, metadata={"help": "denoiser steps"})
    density: str = field(default="", metadata={"help": "side, 'HxW', share or 'all'; the model's schedule if empty"})
    guidance_scale: float = field(default=4.0, metadata={"help": "1 = no guidance"})
    per_class: int = field(default=1, metadata={"help": "images of each class"})
    batch_size: int = field(default=16, metadata={"help": "images a forward"})
    seed: int = field(default=0, metadata={"help": "of the starting noise"})
    vae: str = field(default="", metadata={"help": "folder of the decoder of a latent-space model"})
    device: str = field(default="", metadata={"help": "cpu, cuda, ..."})
    enlarge: int = field(default=1, metadata={"help": "each pixel becomes this many"})


def main(arguments: list[str] | None = None) -> int:
    """Command line; see ``--help``."""
    from dataclasses import asdict

    from transformers import HfArgumentParser

    (wanted,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(arguments)
    given = asdict(wanted)
    model, classes = given.pop("model"), [parse_class(text) for text in given.pop("classes")]
    for name in ("density", "vae", "device"):
        given[name] = given[name] or None
    try:
        made = generate(model, classes, **given)
    except (ValueError, TypeError, OSError, json.JSONDecodeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{len(made['images'])} images in {made['out']} (model: {made['status']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
