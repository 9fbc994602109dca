"""Class-conditional generation with any number of classes, in latent or pixel space, at a scheduled token density.

``FlexDiTPipeline`` reads like the algorithm: at every step the batch is doubled (labels, null labels), one forward at
the step's density, guidance, one scheduler step. Stock ``DiTPipeline`` works with a FlexDiT too, for 1000 classes.
"""

import contextlib
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiTPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from sparing._compat import uncompiled
from sparing.diffusion.density import Density
from sparing.diffusion.density_control import DensityControlled

__all__ = ["FlexDiTPipeline", "guided"]


def guided(output: Tensor, scale: float, *, guided_channels: int) -> Tensor:
    """Classifier-free guidance on the first ``guided_channels`` channels.

    Args:
        output: of the guidance batch, ``(2 batch, channels, H, W)``: conditional half, then null half.
        scale: u + scale (c - u).
        guided_channels: the published samplers guide 3 of 4 latent channels, DiTPipeline all of them.

    Returns:
        ``(2 batch, channels, H, W)``: guided channels the same in both halves, the others as given.
    """
    conditional, null = output[:, :guided_channels].chunk(2)
    mixed = null + scale * (conditional - null)
    return torch.cat([torch.cat([mixed, mixed]), output[:, guided_channels:]], dim=1)


@contextlib.contextmanager
def _sampling(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without label dropout; then back in the mode that it had, its step caches empty, also
    after an error: what they hold of an unfinished run would go into the next one.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        reset = getattr(model, "_reset_stateful_cache", None)
        if reset is not None:
            reset()


class FlexDiTPipeline(DiTPipeline):
    """Class-conditional sampling. The transformer samples in eval mode, whatever mode it is in; the call restores that.

    Args:
        transformer: a ``FlexDiTTransformer2DModel``, or a dense ``DiTTransformer2DModel`` for comparison.
        vae: latents to images; None for a pixel-space model, whose samples in [-1, 1] are the images.
        scheduler: any diffusers scheduler; ``RespacedScheduler`` for the published sampler.
        id2label: class index -> names, separated by commas.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self, transformer: Any, scheduler: Any, vae: Any = None, id2label: dict[int, str] | None = None
    ) -> None:
        super().__init__(transformer=transformer, vae=vae, scheduler=scheduler, id2label=id2label)
        if id2label is not None:
            self.register_to_config(id2label={str(index): names for index, names in id2label.items()})

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        class_labels: Sequence[int | str],
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        density: Density | None = None,
        guidance_channels: int | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generates one image per label.

        Args:
            class_labels: class indices, or names when the pipeline has ``id2label``.
            guidance_scale: above 1 doubles the batch; 1 or less: no guidance.
            generator: for reproducible noise; one, or one per image.
            num_inference_steps: denoiser steps (NFE = steps, twice that in samples with guidance).
            output_type: 'pil', 'np' (batch, H, W, C in [0, 1]), 'pt' (batch, C, H, W in [0, 1]) or 'latent'.
            density: one sparse grid for all steps; None: the model's density table, looked up on the host before the
                loop.
            guidance_channels: how many latent channels are guided; None: all. The published results guide 3.
            latents: starting noise ``(batch, C, H, W)``.
            height, width: latent size when not that of the model's ``sample_size``.
            eta: for schedulers that take it.
            callback_on_step_end: ``f(pipeline, step, timestep, {'latents': ...}) -> dict``; may set
                ``pipeline._interrupt = True``.

        Raises:
            ValueError: a label, density, shape or output type that is not possible, named; or NaN in the pixels.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; possible: {self._callback_tensor_inputs}"
            )
        config, device = self.transformer.config, self._execution_device
        channels = config.in_channels
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale}")
        if guidance_channels is not None and not 1 <= guidance_channels <= channels:
            raise ValueError(f"guidance_channels must be in 1..{channels}, got {guidance_channels}")
        if guidance_scale > 1 and getattr(config, "class_dropout_prob", 1.0) == 0:
            raise ValueError(
                f"guidance needs a null class, and this model has none (class_dropout_prob 0): use guidance_scale 1, "
                f"got {guidance_scale}"
            )
        self._guidance_scale, self._interrupt = guidance_scale, False
        labels = torch.tensor(self.label_indices(class_labels))
        batch, guiding = len(labels), guidance_scale > 1
        if guiding:
            labels = torch.cat([labels, torch.full_like(labels, config.num_embeds_ada_norm)])
        labels = labels.to(device)

        size = [config.sample_size if side is None else side for side in (height, width)]
        if min(size) < 1:
            raise ValueError(f"height and width must be at least 1, got {height} and {width}")
        shape = (batch, channels, *size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; expected {shape}")
        latents = latents.to(device, self.transformer.dtype) * self.scheduler.init_noise_sigma

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        step_arguments = self._step_arguments(eta=eta, generator=generator)
        densities = self._densities(timesteps, density, grid=tuple(side // config.patch_size for side in shape[2:]))
        keeps_variance = getattr(self.scheduler.config, "variance_type", None) in ("learned", "learned_range")

        with _sampling(self.transformer), self.progress_bar(total=len(timesteps)) as progress:
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    continue
                doubled = torch.cat([latents, latents]) if guiding else latents
                doubled = self.scheduler.scale_model_input(doubled, t)
                with self._cache_context():
                    output = self.transformer(
                        doubled, timestep=t.expand(len(doubled)), class_labels=labels, return_dict=False, **densities[i]
                    )[0]
                if guiding:
                    output = guided(output, guidance_scale, guided_channels=guidance_channels or channels)[:batch]
                if output.shape[1] == 2 * channels and not keeps_variance:
                    output = output[:, :channels]
                latents = self.scheduler.step(output, t, latents, **step_arguments, return_dict=False)[0]
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, i, t, {"latents": latents}) or {}
                    latents = changed.get("latents", latents)
                progress.update()

        images = latents if output_type == "latent" else self._images(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _cache_context(self) -> Any:
        """Both halves of a guidance batch go through one forward, so there is one state for diffusers' step caches."""
        context = getattr(self.transformer, "cache_context", None)
        return contextlib.nullcontext() if context is None else context("guided")

    def label_indices(self, class_labels: Sequence[int | str]) -> list[int]:
        """Indices of classes given by index or by name, checked against the model; one alone counts as a list.

        Raises:
            ValueError: no class, an unknown name, or an index out of range.
        """
        if isinstance(class_labels, (int, str)):
            class_labels = [class_labels]
        if not len(class_labels):
            raise ValueError("class_labels is empty; give at least one class")
        classes = self.transformer.config.num_embeds_ada_norm
        indices: list[int] = []
        for label in class_labels:
            if isinstance(label, str):
                if label not in self.labels:
                    names = ", ".join(self.labels) or f"none, give an index 0..{classes - 1}"
                    raise ValueError(f"no class {label!r}; the model names {names}")
                indices.append(self.labels[label])
            else:
                indices.append(_class_index(label))
        outside = [index for index in indices if not 0 <= index < classes]
        if outside:
            raise ValueError(f"class {outside[0]} is out of range: the model has classes 0..{classes - 1}")
        return indices

    def _densities(self, timesteps: Tensor, density: Density | None, *, grid: Any) -> list[dict[str, Any]]:
        """Keywords of every step's forward."""
        model = uncompiled(self.transformer)
        if not isinstance(model, DensityControlled) or not model.has_sparse_layers:
            if density is not None:
                raise ValueError(f"{type(model).__name__} is dense: it has no density to set, got {density!r}")
            return [{}] * len(timesteps)
        if density is not None:
            return [{"density": density}] * len(timesteps)
        return [{"density": side} for side in model.precompute_densities(timesteps, grid=grid)]

    def _step_arguments(self, **possible: Any) -> dict[str, Any]:
        accepted = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in possible.items() if name in accepted}

    def _images(self, latents: Tensor, output_type: str) -> Any:
        samples = latents if self.vae is None else self.vae.decode(latents / self.vae.config.scaling_factor).sample
        samples = (samples / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return samples
        array = samples.cpu().permute(0, 2, 3, 1).float().numpy()
        if bool(np.isnan(array).any()):
            raise ValueError(
                f"the samples hold NaN after guidance_scale {self._guidance_scale}: it is too large for this model or "
                "precision, or the model's weights hold NaN (output_type 'pt' gives the samples as they are)"
            )
        return self.numpy_to_pil(array) if output_type == "pil" else array


def _class_index(label: Any) -> int:
    """A label as an int; ValueError for what is none, a bool included."""
    if not isinstance(label, bool):
        with contextlib.suppress(TypeError):
            return operator.index(label)
    raise ValueError(f"class {label!r} is neither an index nor a name")
