"""CoOadTR: online action detection on a stream of features, and the same network on audio features.

Hedegaard et al., *Continual Transformers: Redundancy-Free Attention for Online Inference* (ICLR 2023), section 4.1:
OadTR (Wang et al., ICCV 2021) without class token and decoder, one or two post-norm encoder blocks over a window of
64 features, a recycling positional encoding of 127 rows. A step costs 9.6 M multiply-adds with one block (605.7 M for
the clip network).

Frames (streams, dim_feature) to class scores (streams, num_classes); clips (N, dim_feature, T) to (N, num_classes, T
- n + 1).
"""

from typing import Any

from torch import Tensor, nn

from sparing.continual.container import Chain, Part
from sparing.continual.encoder import TransformerEncoder, encoder_filter_fn
from sparing.continual.per_frame import LayerNorm, Linear
from sparing.continual.positional import RecyclingPositionalEncoding
from sparing.zoo.registry import register_model

# Width of RGB and flow features together: ActivityNet- and Kinetics-pretrained extractors, and with audio beside them.
FEATURES = {"activitynet": 3072, "kinetics": 4096, "activitynet_audio": 7168, "kinetics_audio": 8192}


class CoOadTR(Chain, nn.Module):
    """Linear -> recycling positions -> dropout -> encoder -> LayerNorm -> Linear, a prediction per feature.

    Args:
        dim_feature: width of a feature.
        num_classes: classes (THUMOS14: 22 with background and ambiguous).
        sequence_len: window of the attention.
        num_embeds: rows of the positional table; None = ``2 * sequence_len - 1``.
        learned_positions: a trained table instead of the cyclic one.
        in_proj_bias: the published networks have none.
        partial: predict from the first feature on.
    """

    def __init__(
        self,
        dim_feature: int = 3072,
        num_classes: int = 22,
        *,
        embed_dim: int = 1024,
        num_heads: int = 8,
        mlp_dim: int = 1024,
        num_layers: int = 1,
        sequence_len: int = 64,
        num_embeds: int | None = None,
        learned_positions: bool = False,
        activation: str = "gelu",
        dropout: float = 0.1,
        layer_norm_eps: float = 1e-5,
        in_proj_bias: bool = False,
        partial: bool = False,
    ) -> None:
        super().__init__()
        self.linear_encoding = Linear(dim_feature, embed_dim)
        rows = 2 * sequence_len - 1 if num_embeds is None else num_embeds
        if rows < sequence_len:
            raise ValueError(f"num_embeds must be at least the window {sequence_len}, got {rows}")
        self.pe = RecyclingPositionalEncoding(embed_dim, rows, learned=learned_positions)
        self.dropout = nn.Dropout(dropout)
        self.encoder = TransformerEncoder(
            embed_dim,
            num_heads,
            dim_feedforward=mlp_dim,
            num_layers=num_layers,
            sequence_len=sequence_len,
            activation=activation,
            layer_norm_eps=layer_norm_eps,
            dropout=dropout,
            in_proj_bias=in_proj_bias,
            partial=partial,
        )
        self.pre_head_ln = LayerNorm(embed_dim, eps=layer_norm_eps)
        self.mlp_head = Linear(embed_dim, num_classes)
        self.pretrained_cfg = {"kind": f"features ({dim_feature} numbers a step)"}

    def parts(self) -> list[Part]:
        names = ("linear_encoding", "pe", "dropout", "encoder", "pre_head_ln", "mlp_head")
        return [(name, self._modules[name]) for name in names]  # type: ignore[misc]

    def forward(self, x: Tensor, *, start: int | None = None) -> Tensor:
        """Clip (N, dim_feature, T) to (N, num_classes, T - n + 1); ``start`` fixes the first positional row."""
        x = self.dropout(self.pe(self.linear_encoding(x), start=start))
        return self.mlp_head(self.pre_head_ln(self.encoder(x)))


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Published keys (torch's encoder or the continual-inference library's, table under ``pe`` or ``pe.pattern``) to
    ours.
    """
    clean = encoder_filter_fn(state_dict, model)
    renames = {"pe": "pe.pe.pattern", "pe.pattern": "pe.pe.pattern", "pe.weight": "pe.pe.weight"}
    return {renames.get(key, key): tensor for key, tensor in clean.items()}


@register_model
def co_oadtr_b1(pretrained: bool = False, *, features: str = "activitynet", **kwargs: Any) -> CoOadTR:
    """One block; ``features`` names the extractor (see ``FEATURES``)."""
    return CoOadTR(**{"dim_feature": FEATURES[features], "num_layers": 1, **kwargs})


@register_model
def co_oadtr_b2(pretrained: bool = False, *, features: str = "activitynet", **kwargs: Any) -> CoOadTR:
    """Two blocks."""
    return CoOadTR(**{"dim_feature": FEATURES[features], "num_layers": 2, **kwargs})


@register_model
def co_oadtr_b3(pretrained: bool = False, *, features: str = "activitynet", **kwargs: Any) -> CoOadTR:
    """Three blocks: as deep as OadTR's encoder, which the reference library cannot build continually."""
    return CoOadTR(**{"dim_feature": FEATURES[features], "num_layers": 3, **kwargs})


@register_model
def co_audio_transformer(pretrained: bool = False, **kwargs: Any) -> CoOadTR:
    """A small transformer over log-mel frames: 64 mels, width 192, 4 heads, 2 blocks, windows of 120 frames."""
    sizes = {"dim_feature": 64, "embed_dim": 192, "num_heads": 4, "mlp_dim": 384, "num_layers": 2, "sequence_len": 120}
    return CoOadTR(**{**sizes, "num_classes": 35, "in_proj_bias": True, **kwargs})
