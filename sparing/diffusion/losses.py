"""The training loss of SparseDiT: min-SNR weighted noise error plus the variational term of a learned-range variance.

Improved DDPM (Nichol & Dhariwal, arXiv 2102.09672, section 3.1) with DiT's settings: T = 1000 linear betas, noise
prediction, a variance between beta_t and the posterior variance. SparseDiT adds one thing to DiT's recipe: the weight
min(SNR, 5) / SNR on the noise error (Hang et al., arXiv 2303.09556). loss = mse + vb, both in float32 whatever the
model ran in: at t = 0 the weight is about 5e-4.
"""

import math
from dataclasses import dataclass

import torch
from einops import reduce
from torch import Tensor

__all__ = ["DiffusionProcess", "training_losses"]


@dataclass(frozen=True)
class DiffusionProcess:
    """A Gaussian diffusion process with linear betas; all tables are float64, ``(T,)``.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end: first and last beta.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    @property
    def betas(self) -> Tensor:
        return torch.linspace(self.beta_start, self.beta_end, self.num_train_timesteps, dtype=torch.float64)

    @property
    def alphas_cumprod(self) -> Tensor:
        return torch.cumprod(1 - self.betas, dim=0)

    @property
    def alphas_cumprod_previous(self) -> Tensor:
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])

    @property
    def posterior_log_variance(self) -> Tensor:
        """log of the variance of q(x_{t-1} | x_t, x_0), the zero at t = 0 replaced by its successor."""
        variance = self.betas * (1 - self.alphas_cumprod_previous) / (1 - self.alphas_cumprod)
        return torch.log(torch.cat([variance[1:2], variance[1:]]))

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; ``(batch, ...)``, ``timesteps (batch,)``."""
        abar = _at(self.alphas_cumprod, timesteps, clean)
        return abar.sqrt().to(clean.dtype) * clean + (1 - abar).sqrt().to(clean.dtype) * noise


def _at(table: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
    """``table[timesteps]`` in float64, shaped to broadcast over ``like (batch, ...)``."""
    values = table.to(timesteps.device)[timesteps.long()]
    return values.reshape(-1, *([1] * (like.ndim - 1)))


def _mean_per_sample(values: Tensor) -> Tensor:
    return reduce(values, "b ... -> b", "mean")


def training_losses(
    output: Tensor,
    clean: Tensor,
    *,
    noise: Tensor,
    noised: Tensor,
    timesteps: Tensor,
    process: DiffusionProcess | None = None,
    min_snr_gamma: float | None = 5.0,
) -> dict[str, Tensor]:
    """The loss of every sample.

    Args:
        output: of the model, ``(batch, 2 C, ...)``: noise, then the variance fraction in [-1, 1]; ``(batch, C, ...)``
            for a model without learned variance, which has no vb term.
        clean, noise, noised: x_0, eps and x_t, ``(batch, C, ...)``.
        timesteps: ``(batch,)``, integers in [0, T).
        process: betas; the DiT default when None.
        min_snr_gamma: clamp of the signal-to-noise ratio; None: no weight (plain DiT).

    Returns:
        ``mse`` (weighted), ``vb`` (bits per element, not rescaled) and ``loss = mse + vb``, each ``(batch,)`` float32.

    Raises:
        ValueError: when ``output`` has neither C nor 2 C channels.
    """
    process = process or DiffusionProcess()
    channels = clean.shape[1]
    if output.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"the model gave {output.shape[1]} channels for {channels}-channel samples; expected {channels} or twice "
            "as many"
        )
    output, clean, noise, noised = (tensor.float() for tensor in (output, clean, noise, noised))
    predicted = output[:, :channels]
    mse = _mean_per_sample((noise - predicted) ** 2)
    if min_snr_gamma is not None:
        abar = _at(process.alphas_cumprod, timesteps, mse)
        snr = abar / (1 - abar)
        mse = mse * (snr.clamp(max=min_snr_gamma) / snr).float()
    if output.shape[1] == channels:
        return {"mse": mse, "vb": torch.zeros_like(mse), "loss": mse}
    vb = _variational_bits(predicted.detach(), output[:, channels:], clean, noised, timesteps, process)
    return {"mse": mse, "vb": vb, "loss": mse + vb}


def _variational_bits(
    predicted: Tensor, fraction: Tensor, clean: Tensor, noised: Tensor, timesteps: Tensor, process: DiffusionProcess
) -> Tensor:
    """KL(q(x_{t-1} | x_t, x_0) || p) for t > 0, the discretised Gaussian's negative log-likelihood at t = 0;
    ``(batch,)`` bits.
    """
    beta = _at(process.betas, timesteps, clean)
    abar = _at(process.alphas_cumprod, timesteps, clean)
    before = _at(process.alphas_cumprod_previous, timesteps, clean)
    low = _at(process.posterior_log_variance, timesteps, clean).float()
    high = beta.log().float()
    share = (fraction + 1) / 2
    log_variance = share * high + (1 - share) * low

    from_clean = (beta * before.sqrt() / (1 - abar)).float()
    from_noised = ((1 - before) * (1 - beta).sqrt() / (1 - abar)).float()
    predicted_clean = abar.rsqrt().float() * noised - (1 / abar - 1).sqrt().float() * predicted
    true_mean = from_clean * clean + from_noised * noised
    mean = from_clean * predicted_clean + from_noised * noised

    divergence = 0.5 * (
        -1 + log_variance - low + torch.exp(low - log_variance) + (true_mean - mean) ** 2 * torch.exp(-log_variance)
    )
    likelihood = _discretised_log_likelihood(clean, mean, 0.5 * log_variance)
    at_zero = (timesteps == 0).to(clean.device)
    return torch.where(at_zero, -_mean_per_sample(likelihood), _mean_per_sample(divergence)) / math.log(2)


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log-probability of the 1/255 bin around ``x`` in [-1, 1]; the outermost bins reach to infinity (DDPM, Eq. 13)."""

    def cdf(z: Tensor) -> Tensor:
        # The tanh approximation of the normal distribution function that the published code uses.
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    centred, inverse = x - mean, torch.exp(-log_scale)
    upper, lower = cdf(inverse * (centred + 1 / 255)), cdf(inverse * (centred - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return torch.log(probability.clamp(min=1e-12))
