"""The sampler of DiT's and SparseDiT's published code, as a diffusers scheduler.

n steps visit t_i = round(i (T - 1) / (n - 1)) downwards, and the step from t goes to the next VISITED timestep
(alpha-bar 1 after the last). diffusers' DDIMScheduler differs in both: its default spacing is 'leading', and with
'linspace' its step still goes to t - T/n (diffusers issue 11347). Use this one to reproduce published numbers; the
stock schedulers work as well.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sparing.diffusion.losses import DiffusionProcess

__all__ = ["RespacedScheduler", "RespacedSchedulerOutput"]


@dataclass
class RespacedSchedulerOutput(BaseOutput):
    """``prev_sample``: the latents at the next visited timestep; ``pred_original_sample``: the predicted x_0."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class RespacedScheduler(SchedulerMixin, ConfigMixin):
    """DDIM or ancestral (DDPM) steps over evenly respaced timesteps, without clipping.

    Args:
        num_train_timesteps, beta_start, beta_end: of the training process (linear betas).
        sampler: 'ddim', or 'ddpm' (ancestral; uses the learned variance when the model gives one).
        variance_type: 'learned_range': a model output of twice the channels holds the variance fraction.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        sampler: str = "ddim",
        variance_type: str = "learned_range",
    ) -> None:
        if sampler not in ("ddim", "ddpm"):
            raise ValueError(f"sampler must be 'ddim' or 'ddpm', got {sampler!r}")
        process = DiffusionProcess(num_train_timesteps, beta_start, beta_end)
        self.alphas_cumprod = process.alphas_cumprod
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self._visited = self.timesteps.tolist()
        self._step_index: int | None = None

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Plans ``num_inference_steps`` steps; one step starts from pure noise, T - 1.

        Raises:
            ValueError: for fewer than 1 or more than T steps.
        """
        last = self.config.num_train_timesteps - 1
        if not 1 <= num_inference_steps <= last + 1:
            raise ValueError(f"num_inference_steps must be in 1..{last + 1}, got {num_inference_steps}")
        if num_inference_steps == 1:
            visited = [last]
        else:
            visited = [round(i * last / (num_inference_steps - 1)) for i in range(num_inference_steps)][::-1]
        self.num_inference_steps, self._visited, self._step_index = num_inference_steps, visited, None
        self.timesteps = torch.tensor(visited, device=device)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself: this process needs no scaling."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> RespacedSchedulerOutput | tuple[Tensor, Tensor]:
        """From ``timestep`` to the next visited one.

        Args:
            model_output: predicted noise ``(batch, C, ...)``, or with variance ``(batch, 2 C, ...)``.
            timestep: the visited timestep; steps follow one another after the first.
            sample: latents ``(batch, C, ...)``.
            eta: of DDIM; 0 is deterministic.
            generator: for eta > 0 and for 'ddpm'.
        """
        if self._step_index is None:
            first = int(timestep)
            if first not in self._visited:
                raise ValueError(f"timestep {first} is not among the planned timesteps {self._visited}")
            self._step_index = self._visited.index(first)
        i = self._step_index
        self._step_index = i + 1 if i + 1 < len(self._visited) else None
        here = self.alphas_cumprod[self._visited[i]]
        there = self._next_alpha_bar(i)

        channels = sample.shape[1]
        noise_estimate = model_output[:, :channels]
        fraction = model_output[:, channels:] if model_output.shape[1] == 2 * channels else None
        clean = (sample - _number(1 - here) ** 0.5 * noise_estimate) / _number(here) ** 0.5
        if self.config.sampler == "ddim":
            sigma = eta * _number((1 - there) / (1 - here) * (1 - here / there)) ** 0.5
            direction = max(_number(1 - there) - sigma**2, 0.0) ** 0.5
            previous = _number(there) ** 0.5 * clean + direction * noise_estimate
            if sigma > 0:
                previous = previous + sigma * self._noise(sample, generator)
        else:
            previous = self._ancestral(i, sample, clean, fraction, generator)
        if not return_dict:
            return previous, clean
        return RespacedSchedulerOutput(prev_sample=previous, pred_original_sample=clean)

    def _next_alpha_bar(self, i: int) -> Tensor:
        last = i + 1 == len(self._visited)
        return torch.ones((), dtype=torch.float64) if last else self.alphas_cumprod[self._visited[i + 1]]

    def _ancestral(self, i: int, sample: Tensor, clean: Tensor, fraction: Tensor | None, generator: Any) -> Tensor:
        """One DDPM step of the respaced process (its betas are 1 - abar_t / abar_next)."""
        here, there = self.alphas_cumprod[self._visited[i]], self._next_alpha_bar(i)
        beta = 1 - here / there
        from_clean = _number(beta * there.sqrt() / (1 - here))
        from_noised = _number((1 - there) * (here / there).sqrt() / (1 - here))
        mean = from_clean * clean + from_noised * sample
        if i + 1 == len(self._visited):
            return mean
        low, high = _number((beta * (1 - there) / (1 - here)).log()), _number(beta.log())
        if fraction is None:
            log_variance: Any = torch.full_like(sample, low)
        else:
            share = (fraction + 1) / 2
            log_variance = share * high + (1 - share) * low
        return mean + torch.exp(0.5 * log_variance) * self._noise(sample, generator)

    @staticmethod
    def _noise(like: Tensor, generator: Any) -> Tensor:
        return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t of the training process."""
        process = DiffusionProcess(self.config.num_train_timesteps, self.config.beta_start, self.config.beta_end)
        return process.add_noise(original_samples, noise, timesteps)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _number(value: Tensor) -> float:
    """A host scalar of the (host) float64 tables: no device is read."""
    return float(value)
