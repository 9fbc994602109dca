"""Log-mel spectra on a stream of samples, one hop of samples a step.

**Framing.** A frame of the stream is a *hop*: ``hop`` new samples, as channels. Spectrum t is taken over the last
``n_fft`` samples up to and including hop t, under a periodic Hann window: nothing of the future, no reflection at the
borders, no padding. It exists once ``n_fft / hop`` hops have come, so a step equals the clip of the last hops exactly
(``plan().equals_clip_of_last_frames``). The numbers are those of
``torchaudio.transforms.MelSpectrogram(center=False)`` with ``log(power + floor)``: torchaudio's mel filters (HTK
scale), behind a Fourier transform written as one product with cosines and sines, which exports and compiles without
complex numbers.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from sparing.continual.module import Continual
from sparing.continual.timing import Span, Tick, admit, admit_chunk, first_emission, is_lockstep, keep, kernel_span

__all__ = ["LogMel", "hops_of"]


def hops_of(samples: Tensor, hop: int) -> Tensor:
    """Samples (..., count) to frames of a stream (..., hop, count // hop); what does not fill a hop is left off."""
    whole = samples.shape[-1] // hop
    return samples[..., : whole * hop].unflatten(-1, (whole, hop)).transpose(-1, -2)


class LogMel(Continual, nn.Module):
    """Hops (N, hop, T) to log-mel spectra (N, num_mels, T - n_fft / hop + 1); steps (streams, hop) to (streams, mels).

    Args:
        num_mels: mel filters.
        sample_rate: of the samples, Hz.
        hop: samples between two spectra.
        n_fft: samples under the window; a multiple of ``hop``.
        f_min, f_max: range of the filters in Hz; ``f_max`` None = half the sample rate.
        floor: added to the power before the logarithm.

    Spectra are computed in float32 at any precision of the samples.
    """

    basis: Tensor
    filters: Tensor

    def __init__(
        self,
        num_mels: int = 40,
        *,
        sample_rate: int = 8000,
        hop: int = 128,
        n_fft: int = 256,
        f_min: float = 0.0,
        f_max: float | None = None,
        floor: float = 1e-5,
    ) -> None:
        super().__init__()
        if hop < 1 or n_fft < hop or n_fft % hop:
            raise ValueError(f"n_fft must be a multiple of hop, got n_fft {n_fft} and hop {hop}")
        if num_mels < 1 or floor <= 0:
            raise ValueError(f"num_mels must be at least 1 and floor positive, got {num_mels} and {floor}")
        self.num_mels, self.sample_rate, self.hop, self.n_fft, self.floor = num_mels, sample_rate, hop, n_fft, floor
        self._range = (f_min, f_max or sample_rate / 2)
        device = torch.get_default_device()
        for name, table in zip(("basis", "filters"), self._tables()):
            self.register_buffer(name, table.to(device), persistent=False)

    def _tables(self) -> tuple[Tensor, Tensor]:
        """(n_fft, 2 * frequencies) windowed cosines and sines, and (frequencies, num_mels) filters, float32 on the CPU:
        torchaudio reads the filters' values, and the meta device has none."""
        from torchaudio.functional import melscale_fbanks

        with torch.device("cpu"):
            window = torch.hann_window(self.n_fft, periodic=True, dtype=torch.float64)
            turns = torch.outer(torch.arange(self.n_fft), torch.arange(self.n_fft // 2 + 1)) * (
                2 * torch.pi / self.n_fft
            )
            waves = torch.cat([turns.double().cos(), turns.double().sin()], 1) * window[:, None]
            filters = melscale_fbanks(self.n_fft // 2 + 1, *self._range, self.num_mels, self.sample_rate)
        return waves.float(), filters

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Tables follow the module to other devices and stay float32; off the meta device they are made anew."""
        super()._apply(fn, recurse)
        self.basis, self.filters = (table.to(self.basis.device) for table in self._tables())
        return self

    def _span(self) -> Span:
        return kernel_span(self.n_fft // self.hop, name=type(self).__name__)

    def _spectra(self, windows: Tensor) -> Tensor:
        """(..., n_fft) samples to (..., num_mels)."""
        with torch.autocast(windows.device.type, enabled=False):
            waves = windows.float() @ self.basis
            power = waves.square().unflatten(-1, (2, self.n_fft // 2 + 1)).sum(-2)
            return (power @ self.filters + self.floor).log().to(windows.dtype)

    def _memory(
        self, streams: int, frame_shape: tuple[int, ...], make: Callable[..., Tensor]
    ) -> tuple[dict, tuple[int, ...]]:
        if frame_shape != (self.hop,):
            raise ValueError(f"LogMel steps on hops of samples ({self.hop},), got frames {frame_shape}")
        kept = self.n_fft // self.hop - 1
        return ({"hops": make((streams, self.hop, kept))} if kept else {}), (self.num_mels,)

    def _step(self, x: Tensor, memory: dict, tick: Tick) -> tuple[Tensor | None, dict]:
        line, new = admit(x, tick).unsqueeze(2), memory
        if memory:
            line = torch.cat([memory["hops"], line], 2)
            new = {"hops": keep(line[:, :, 1:], memory["hops"], tick)}
        if is_lockstep(tick) and first_emission(tick, self.span()) > 0:
            return None, new
        return self._spectra(line.transpose(1, 2).flatten(1)), new

    def _steps(self, x: Tensor | None, memory: dict, tick: Tick, end: bool) -> tuple[Tensor | None, dict]:
        if x is None:
            return None, memory
        line, new, frames = admit_chunk(x, tick), memory, x.shape[2]
        if memory:
            line = torch.cat([memory["hops"], line], 2)
            new = {"hops": line[:, :, frames:]}
        offset = first_emission(tick, self.span()) if is_lockstep(tick) else 0
        return (None if offset >= frames else self.forward(line[:, :, offset:])), new

    def forward(self, x: Tensor) -> Tensor:
        """Clip of hops (N, hop, T) to (N, num_mels, T - n_fft / hop + 1)."""
        taps = self.n_fft // self.hop
        if x.ndim != 3 or x.shape[1] != self.hop or x.shape[2] < taps:
            raise ValueError(
                f"clips must have shape (N, {self.hop}, T) with T >= {taps} (sparing.continual.hops_of makes them of "
                f"samples), got {tuple(x.shape)}"
            )
        samples = x.transpose(1, 2).flatten(1)
        return self._spectra(samples.unfold(1, self.n_fft, self.hop)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"{self.num_mels} mels, {self.sample_rate} Hz, hop {self.hop}, n_fft {self.n_fft}"
