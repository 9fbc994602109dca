"""A spotter: what is being said now, from raw samples, one hop of samples a step.

Log-mel spectra (:mod:`sparing.continual.log_mel`) -> batch norm per mel -> the continual transformer of Hedegaard et
al. (ICLR 2023; :class:`sparing.continual.oadtr.CoOadTR`). Nothing in it pads, so a step equals the clip network on the
last ``clip_frames`` hops, up to the phase of the recycling positions.

Frames (streams, hop) to class scores (streams, classes); clips (N, hop, T) to (N, classes, T - clip_frames + 1).
"""

from typing import Any

from torch import Tensor, nn

from sparing.continual.container import Chain, Part
from sparing.continual.log_mel import LogMel
from sparing.continual.oadtr import CoOadTR
from sparing.zoo.registry import register_model

__all__ = ["CoSpotter", "co_spotter_micro"]

# What the shipped small network tells apart, and how many hops after it was said (sparing/recipes/spoken_digits.py).
DIGIT_LABELS = (*"0123456789", "none")
DIGIT_LAG = 12


class CoSpotter(Chain, nn.Module):
    """Log-mel front end and a continual transformer.

    Args:
        num_classes: classes, "nothing" among them.
        sample_rate: Hz.
        num_mels, hop, n_fft: see :class:`LogMel`.
        label_names: names of the classes.
        transformer: ``embed_dim``, ``num_heads``, ``mlp_dim``, ``num_layers``, ``sequence_len`` and what else
            :class:`CoOadTR` takes.
    """

    def __init__(
        self,
        num_classes: int = 11,
        *,
        sample_rate: int = 8000,
        num_mels: int = 40,
        hop: int = 128,
        n_fft: int = 256,
        label_names: tuple[str, ...] = (),
        **transformer: Any,
    ) -> None:
        super().__init__()
        self.front_end = LogMel(num_mels, sample_rate=sample_rate, hop=hop, n_fft=n_fft)
        self.norm = nn.BatchNorm1d(num_mels)
        self.transformer = CoOadTR(num_mels, num_classes, **{"in_proj_bias": True, **transformer})
        self.num_classes = num_classes
        self.pretrained_cfg = {
            "kind": "audio",
            "sample_rate": sample_rate,
            "hop": hop,
            "clip_frames": self.plan().receptive_field,
            "label_names": label_names,
        }

    def parts(self) -> list[Part]:
        return [(name, self._modules[name]) for name in ("front_end", "norm", "transformer")]  # type: ignore[misc]

    def forward(self, x: Tensor, *, start: int | None = None) -> Tensor:
        """Clip of hops (N, hop, T) to (N, classes, T - clip_frames + 1); ``start`` fixes the first position."""
        return self.transformer(self.norm(self.front_end(x)), start=start)


@register_model
def co_spotter_micro(pretrained: bool = False, **kwargs: Any) -> CoSpotter:
    """8 kHz, hops of 16 ms, 40 mels, two blocks of width 96 over 48 spectra (0.78 s)."""
    sizes = {"embed_dim": 96, "num_heads": 4, "mlp_dim": 192, "num_layers": 2, "sequence_len": 48}
    names = DIGIT_LABELS if kwargs.get("num_classes", len(DIGIT_LABELS)) == len(DIGIT_LABELS) else ()
    network = CoSpotter(**{**sizes, "label_names": names, **kwargs})
    if names:
        network.pretrained_cfg["lag_frames"] = DIGIT_LAG
    return network
