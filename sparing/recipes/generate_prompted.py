"""Generate images, a video or a sound of prompts with any text pipeline of diffusers, as it is or with a twin.

    python -m sparing.recipes.generate_prompted --pipeline runs/latte --twin runs/flexdit_latte --density 8 \
        --prompts "a dog runs on the beach" --steps 50 --out dog.mp4

``--pipeline`` is a folder or hub id; ``--twin`` a folder or name of a denoiser that takes the place of the pipeline's
own (a ``FlexDiTVideoTransformer3DModel`` for LattePipeline, a ``FlexDiTPixArtTransformer2DModel`` for the PixArt
pipelines). The suffix of ``--out`` must go with what the pipeline makes: images .png or .jpg, video .mp4 or .gif, audio
.wav or .flac. The same function is ``sparing generate --prompt``.
"""

import contextlib
import inspect
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from sparing._compat import uncompiled
from sparing.diffusion.density import PUBLISHED_RATES, DensityTable, parse_density
from sparing.diffusion.density_control import DensityControlled
from sparing.diffusion.search.samples import Kind, read_output, sample_rate_of
from sparing.media.audio import write_audio
from sparing.media.image import write_image
from sparing.media.outputs import check_output
from sparing.media.video import write_gif, write_video
from sparing.recipes.generate import open_stored, open_transformer, sample_seeds

__all__ = ["generate_prompted", "open_prompted"]

SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp"),
    "video": (".mp4", ".gif"),
    "audio": (".wav", ".flac"),
}
_LENGTHS = ("video_length", "num_frames")  # what pipelines call the number of frames


def open_prompted(pipeline: Any, *, twin: str | Path | nn.Module | None = None) -> Any:
    """A text pipeline, live or by folder or hub id, with ``twin`` as its ``transformer`` (or ``unet``) where given.

    Raises:
        ValueError: no pipeline of prompts, or a twin of another kind of latents.
        FileNotFoundError: no such folder.
    """
    pipe = open_stored(pipeline) if isinstance(pipeline, str | Path) else pipeline
    if "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise ValueError(f"{type(pipe).__name__} takes no prompt; class-conditional models take --class")
    if twin is None:
        return pipe
    model = open_transformer(twin) if isinstance(twin, str | Path) else twin
    name = next((part for part in ("transformer", "unet") if isinstance(getattr(pipe, part, None), nn.Module)), None)
    if name is None:
        raise ValueError(f"{type(pipe).__name__} has no transformer or unet that a twin could stand in for")
    host: Any = getattr(pipe, name)
    for entry in ("in_channels", "sample_size", "caption_channels", "cross_attention_dim"):
        ours, theirs = getattr(host.config, entry, None), getattr(model.config, entry, None)
        if ours is not None and theirs is not None and ours != theirs:
            raise ValueError(f"the twin has {entry}={theirs}, the {name} of {type(pipe).__name__} has {ours}")
    pipe.register_modules(**{name: model.to(pipe.device).eval()})
    return pipe


def generate_prompted(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    out: str | Path | None = None,
    twin: str | Path | nn.Module | None = None,
    steps: int = 50,
    density: Any = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    rate: int = 8,
    batch_size: int = 1,
    seed: int = 0,
    device: str | None = None,
    enlarge: int = 1,
    **call: Any,
) -> dict[str, Any]:
    """Samples of prompts, and one file of them: a sheet, a video with the prompts side by side, or one after the other.

    Args:
        pipeline, twin: see :func:`open_prompted`.
        prompts: texts.
        out: file; None writes nothing. Its suffix goes with the pipeline: see the module.
        steps: denoiser steps.
        density: one sparse grid for all steps, of a FlexDiT, in tokens (or a share) of the grid that is sampled; or a
            schedule; None: its own schedule.
        guidance_scale: None: the pipeline's own.
        height, width: pixels; None: the pipeline's own.
        frames: of a video; None: the pipeline's own number.
        rate: frames per second of the video file.
        batch_size: prompts a call.
        seed: sample i starts from noise seeded by (seed, i), whatever the batch size.
        device: where to run; None: where the pipeline is.
        enlarge: each pixel becomes this many, for small models.
        call: further arguments of the pipeline (``negative_prompt``, ``audio_length_in_s``, ...).

    Returns:
        ``samples``: images ``(count, C, H, W)`` and video ``(count, frames, C, H, W)`` in [0, 1], audio ``(count,
        channels, samples)``; ``kind``, ``status`` of the denoiser, ``out`` and ``seeds``.

    Raises:
        ValueError: no prompt, a number, density, suffix or argument that is not possible.
    """
    for name, number in (("steps", steps), ("batch_size", batch_size), ("rate", rate), ("enlarge", enlarge)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    for name, pixels in (("height", height), ("width", width)):
        if pixels is not None and pixels < 1:
            raise ValueError(f"{name} must be at least 1, got {pixels}")
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale}")
    seeds = sample_seeds(seed, len(prompts))
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError("give at least one prompt, and none that is empty")
    pipe = open_prompted(pipeline, twin=twin)
    accepted = inspect.signature(pipe.__call__).parameters
    kind = _kind_of(pipe, accepted)
    if out is not None and Path(out).suffix.lower() not in SUFFIXES[kind]:
        raise ValueError(f"{type(pipe).__name__} makes {kind}: give out with {' or '.join(SUFFIXES[kind])}, not {out}")
    if out is not None:
        check_output(out)
    denoiser = uncompiled(getattr(pipe, "transformer", None) or getattr(pipe, "unet", None))
    arguments: dict[str, Any] = {**call, "num_inference_steps": steps}
    given = {"guidance_scale": guidance_scale, "height": height, "width": width}
    arguments |= {name: value for name, value in given.items() if value is not None}
    length = next((name for name in _LENGTHS if name in accepted), None)
    if frames is not None:
        if length is None or frames < 1:
            raise ValueError(f"frames={frames}: {type(pipe).__name__} makes {kind}" if length is None else "frames < 1")
        arguments[length] = frames
    unknown = [name for name in arguments if name not in accepted]
    if unknown:
        raise ValueError(f"{type(pipe).__name__} takes no {', '.join(unknown)}")
    if length is not None:
        most = getattr(getattr(denoiser, "config", None), "video_length", None)
        wanted = arguments.get(length, accepted[length].default)
        if most is not None and isinstance(wanted, int) and wanted > most:
            raise ValueError(f"frames={wanted}: this model makes 1..{most}")
    if device is not None:
        pipe.to(device)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    parts = []
    with _at_density(denoiser, density, at_own_size=height is None and width is None):
        for start in range(0, len(prompts), batch_size):
            chunk = slice(start, start + batch_size)
            generators = [torch.Generator().manual_seed(s) for s in seeds[chunk]]
            parts.append(_samples(pipe, list(prompts[chunk]), generators, arguments).cpu())
    samples = torch.cat(parts)
    if out is not None:
        out = _write(samples, kind, Path(out), rate=rate, enlarge=enlarge, sample_rate=sample_rate_of(pipe))
    return {
        "samples": samples,
        "kind": kind,
        "status": getattr(denoiser, "status", "dense"),
        "out": out,
        "seeds": seeds,
    }


def _kind_of(pipe: Any, accepted: Any) -> Kind:
    if any(name in accepted for name in _LENGTHS):
        return "video"
    if "audio_length_in_s" in accepted or "audio_end_in_s" in accepted or hasattr(pipe, "vocoder"):
        return "audio"
    return "image"


def _samples(pipe: Any, prompts: list[str], generators: list[torch.Generator], arguments: dict[str, Any]) -> Tensor:
    """In the first kind of output that the pipeline knows."""
    for form in ("pt", "np"):
        try:
            return read_output(pipe(prompts, generator=generators, output_type=form, **arguments))[0]
        except ValueError as error:
            if "output_type" not in str(error) or form == "np":
                raise
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _at_density(denoiser: Any, density: Any, *, at_own_size: bool) -> Iterator[None]:
    """The knob turned while samples are made, and turned back."""
    if density is None:
        yield
        return
    if not isinstance(denoiser, DensityControlled) or not denoiser.has_sparse_layers:
        raise ValueError(f"{type(denoiser).__name__} is dense: it has no density to set, got {density!r}")
    if not _is_schedule(density):
        if at_own_size:  # told before the text is encoded; at another size the first step tells
            parse_density(density, grid=denoiser.base_grid)
        with denoiser.at_density(density):
            yield
        return
    before = denoiser.density_table
    denoiser.set_density(density)
    try:
        yield
    finally:
        denoiser.set_density(before)


def _is_schedule(density: Any) -> bool:
    """Whether it says more than one grid for all steps: a table, its entries, or a published name."""
    if isinstance(density, (int, float)):
        return False
    if isinstance(density, str):
        return density in PUBLISHED_RATES
    return isinstance(density, DensityTable) or not all(isinstance(side, int) for side in density)


def _write(samples: Tensor, kind: Kind, out: Path, *, rate: int, enlarge: int, sample_rate: int | None) -> Path:
    if kind == "audio":
        if sample_rate is None:
            raise ValueError("the pipeline does not say its sampling rate, so no file was written; take out=None")
        sound = rearrange(samples, "b c s -> c (b s)")
        return write_audio(sound / sound.abs().max().clamp(min=1.0), out, rate=sample_rate)  # louder than full scale
    pixels = samples.nan_to_num(0).clamp(0, 1)
    pixels = pixels.repeat_interleave(enlarge, dim=-2).repeat_interleave(enlarge, dim=-1)
    columns = min(len(pixels), 8)
    if kind == "image":
        return write_image(to_pil_image(make_grid(pixels, nrow=columns, padding=2, pad_value=1.0)), out)
    sheets = torch.stack([make_grid(frame, nrow=columns, padding=0) for frame in pixels.unbind(1)])
    clip = (sheets * 255).round().to(torch.uint8)
    return write_gif(clip, out, rate=rate) if out.suffix.lower() == ".gif" else write_video(clip, out, rate=rate)


@dataclass(frozen=True)
class Arguments:
    """What to generate."""

    pipeline: str = field(metadata={"help": "folder or hub id of a text pipeline"})
    prompts: list[str] = field(metadata={"help": "texts"})
    out: str = field(metadata={"help": "file: .png, .mp4, .gif, .wav, ..."})
    twin: str = field(default="", metadata={"help": "folder or name of a denoiser in place of the pipeline's own"})
    steps: int = field(default=50, metadata={"help": "denoiser steps"})
    density: str = field(default="", metadata={"help": "side, 'HxW', share or 'all'; the twin's schedule if empty"})
    guidance_scale: float = field(default=-1.0, metadata={"help": "the pipeline's own if negative"})
    height: int = field(default=0, metadata={"help": "pixels; 0 = the pipeline's own"})
    width: int = field(default=0, metadata={"help": "pixels; 0 = the pipeline's own"})
    frames: int = field(default=0, metadata={"help": "of a video; 0 = the pipeline's own number"})
    rate: int = field(default=8, metadata={"help": "frames per second of the video file"})
    batch_size: int = field(default=1, metadata={"help": "prompts a call"})
    seed: int = field(default=0, metadata={"help": "of the starting noise"})
    device: str = field(default="", metadata={"help": "cpu, cuda, ..."})
    enlarge: int = field(default=1, metadata={"help": "each pixel becomes this many"})


def main(arguments: list[str] | None = None) -> int:
    """Command line; see ``--help``."""
    from transformers import HfArgumentParser

    (wanted,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(arguments)
    given = asdict(wanted)
    pipeline, prompts = given.pop("pipeline"), given.pop("prompts")
    for name in ("twin", "density", "height", "width", "frames", "device"):
        given[name] = given[name] or None
    if given["guidance_scale"] < 0:
        given["guidance_scale"] = None
    try:
        made = generate_prompted(pipeline, prompts, **given)
    except (ValueError, TypeError, OSError, ImportError, json.JSONDecodeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{made['kind']} of {len(prompts)} prompts in {made['out']} (denoiser: {made['status']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
