"""Layers that treat every frame alike: which torch modules they are, and the ones torch lacks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sparing.continual.module import Continual
from sparing.continual.timing import PER_FRAME, Span, Tick

# Modules whose output at a frame depends on that frame only, whatever the axes (batch norm: in eval mode).
ALIKE = (
    nn.modules.batchnorm._BatchNorm,
    nn.SyncBatchNorm,
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.ReLU,
    nn.ReLU6,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Tanh,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardshrink,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanhshrink,
    nn.Threshold,
)


def is_per_frame(module: nn.Module) -> bool:
    """Whether a torch module is known to treat every frame alike. A batch norm without running statistics does not:
    it takes those of the batch, in which other streams are.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
        return False
    return isinstance(module, ALIKE)


def on_frame(module: nn.Module, x: Tensor) -> Tensor:
    """A per-frame clip module on one frame x (streams, C, ...), as a clip of one frame."""
    return module(x.unsqueeze(2)).squeeze(2)


class PerFrameLayer(Continual):
    """Mixin of stateless layers: ``_frame`` maps (N, C, ...) to (N, C', ...)."""

    def _span(self) -> Span:
        return PER_FRAME

    def _frame(self, x: Tensor) -> Tensor:
        raise NotImplementedError(type(self).__name__)

    def _memory(
        self, streams: int, frame_shape: tuple[int, ...], make: Callable[..., Tensor]
    ) -> tuple[dict, tuple[int, ...]]:
        with torch.no_grad():
            return {}, tuple(self._frame(make((1, *frame_shape))).shape[1:])

    def _step(self, x: Tensor, memory: dict, tick: Tick) -> tuple[Tensor | None, dict]:
        return self._frame(x), memory

    def _steps(self, x: Tensor | None, memory: dict, tick: Tick, end: bool) -> tuple[Tensor | None, dict]:
        return (None if x is None else self.forward(x)), memory

    def forward(self, x: Tensor) -> Tensor:
        """Clip mode, (N, C, T, ...), frame by frame as one batch."""
        frames = self._frame(x.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class Linear(PerFrameLayer, nn.Linear):  # type: ignore[misc]
    """``nn.Linear`` over the channel axis 1; clips (N, C, T, ...), frames (streams, C, ...)."""

    def _memory(
        self, streams: int, frame_shape: tuple[int, ...], make: Callable[..., Tensor]
    ) -> tuple[dict, tuple[int, ...]]:
        if frame_shape[0] != self.in_features:
            raise ValueError(
                f"takes {self.in_features} features, a frame has {frame_shape[0]}; where a Flatten before it laid time "
                "side by side too, pool over time instead, or use a convolution over the clip's frames"
            )
        return {}, (self.out_features, *frame_shape[1:])

    def _frame(self, x: Tensor) -> Tensor:
        return F.linear(x.movedim(1, -1), self.weight, self.bias).movedim(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self._frame(x)


class LayerNorm(PerFrameLayer, nn.LayerNorm):  # type: ignore[misc]
    """``nn.LayerNorm`` over the channel axis 1 of each position; clips (N, C, T, ...), frames (streams, C, ...)."""

    def _frame(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps).movedim(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self._frame(x)


class Flatten(PerFrameLayer, nn.Module):
    """Channels and space of each frame into channels: clips (N, C, T, H, W) to (N, C H W, T); the time axis stays."""

    def _frame(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(x, "n c t ... -> n (c ...) t") if x.ndim < 5 else rearrange(x, "n c t h w -> n (c h w) t")


class Softmax(PerFrameLayer, nn.Module):
    """Softmax over the channel axis 1."""

    def _frame(self, x: Tensor) -> Tensor:
        return x.softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(1)


class LogSoftmax(PerFrameLayer, nn.Module):
    """Logarithm of the softmax over the channel axis 1."""

    def _frame(self, x: Tensor) -> Tensor:
        return x.log_softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        return x.log_softmax(1)


class GLU(PerFrameLayer, nn.Module):
    """Half of the channels, gated by the sigmoid of the other half: ``nn.GLU(1)``."""

    def _frame(self, x: Tensor) -> Tensor:
        return F.glu(x, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(x, 1)


class PerFrame(PerFrameLayer, nn.Module):
    """Apply any clip module to each frame alone, as a clip of one frame: (N, C, 1, ...) in, (N, C', 1, ...) out.

    For modules whose clip statistics run over time (GroupNorm, InstanceNorm) this is another function than the clip
    module.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def _frame(self, x: Tensor) -> Tensor:
        return on_frame(self.module, x)
