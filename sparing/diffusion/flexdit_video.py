"""FlexDiT for video: Latte with sparse spatial tokens.

Host: Latte (arXiv 2401.03048), diffusers' ``LatteTransformer3DModel``: pairs of a spatial block (attention over the N
tokens of a frame, text cross-attention) and a temporal block (attention over the F frames of one position). The
SparseDiT paper reports a video variant without code, so the mapping is ours: the unit is the pair, frames are kept,
tokens are pooled within a frame only.

* pooling pair: the spatial attention is the mean over the frame's tokens; the temporal block is untouched.
* SDTM: y (B F, N, D) is pooled to z (B F, M, D); merge, sparse and recover act per frame; the temporal block of each
  pair runs over the current positions, M or N, so sparse positions attend along the trajectory of their cell. No new
  parameter.

Parameter names are the host's. Without sparse layers the twin equals its host; ``LattePipeline`` runs it unmodified.
Two things work here that fail in diffusers 0.42.1: 1 < F < video_length (the temporal table is cut to F), and a 2-D
text mask (there it is added to the scores as it is, and not repeated per frame). Class-conditional Latte (adaLN-zero)
has no diffusers host and is not covered.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from diffusers import ConfigMixin, LatteTransformer3DModel, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import PatchEmbed, PixArtAlphaTextProjection, get_1d_sincos_pos_embed_from_grid
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormSingle
from einops import rearrange, repeat
from torch import Tensor, nn

from sparing.diffusion.blocks import FlexDiTBlock, sdtm_inputs
from sparing.diffusion.density import Density, parse_density
from sparing.diffusion.flexdit_flops import Count, video_macs
from sparing.diffusion.hosting import (
    FlexDiTTwin,
    check_text_batch,
    latent_grid,
    reasons_against,
    text_bias,
    twin_of_dense,
)
from sparing.kernels import ln_modulate

__all__ = ["FlexDiTVideoTransformer3DModel"]

# number of pairs -> (num_pooling, num_sdtm, sdtm_group, num_dense_top); ours, nothing is published
_SPLITS = {14: (1, 2, (1, 3, 1, 1), 1), 28: (2, 4, (1, 3, 1, 1), 2)}


class FlexDiTVideoTransformer3DModel(
    FlexDiTTwin, ModelMixin, AttentionMixin, CacheMixin, PeftAdapterMixin, ConfigMixin
):
    """A Latte transformer with dynamic spatial token density.

    Args:
        num_attention_heads .. video_length: as in ``LatteTransformer3DModel``; ``num_layers`` counts pairs.
        num_pooling, num_sdtm, sdtm_group, num_dense_top: layout of the pairs.
        density_table, num_train_timesteps, status: as in ``FlexDiTTransformer2DModel``.

    Raises:
        ValueError: a layout that does not add up, or that starts with a merge pair (the temporal table is added after
            the first spatial block and would miss the dense tokens); a density above the dense grid.
    """

    method = "flexdit_video"
    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ["FlexDiTBlock", "PatchEmbed"]
    _repeated_blocks = ["FlexDiTBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "adaln_single"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        cross_attention_dim: int | None = 1152,
        attention_bias: bool = True,
        sample_size: int = 64,
        patch_size: int = 2,
        norm_eps: float = 1e-6,
        caption_channels: int = 4096,
        video_length: int = 16,
        num_pooling: int = 2,
        num_sdtm: int = 4,
        sdtm_group: Sequence[int] = (1, 3, 1, 1),
        num_dense_top: int = 2,
        density_table: Any = None,
        num_train_timesteps: int = 1000,
        status: str | None = None,
    ) -> None:
        super().__init__()
        self._configure(num_layers, sample_size=sample_size, patch_size=patch_size, status=status)
        if self.layout[0] == "merge":
            raise ValueError("the video layout must not start with a merge pair: use num_pooling >= 1")
        dim = num_attention_heads * attention_head_dim
        self.inner_dim, self.gradient_checkpointing = dim, False
        self.out_channels = in_channels if out_channels is None else out_channels
        self.register_to_config(out_channels=self.out_channels)
        self.pos_embed = PatchEmbed(
            height=sample_size,
            width=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            embed_dim=dim,
            interpolation_scale=max(sample_size // 64, 1),
        )

        def block(kind: Any, text_dim: int | None) -> FlexDiTBlock:
            return FlexDiTBlock(
                dim,
                kind,
                heads=num_attention_heads,
                head_dim=attention_head_dim,
                modulation="single",
                cross_attention_dim=text_dim,
                attention_bias=attention_bias,
                attention_norm_eps=norm_eps,
                mlp_norm_eps=norm_eps,
            )

        self.transformer_blocks = nn.ModuleList(block(kind, cross_attention_dim) for kind in self.layout)
        self.temporal_transformer_blocks = nn.ModuleList(block("plain", None) for _ in self.layout)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * self.out_channels)
        self.adaln_single = AdaLayerNormSingle(dim, use_additional_conditions=False)
        self.caption_projection = PixArtAlphaTextProjection(in_features=caption_channels, hidden_size=dim)
        table = get_1d_sincos_pos_embed_from_grid(dim, torch.arange(video_length).unsqueeze(1), output_type="pt")
        self.register_buffer("temp_pos_embed", table.float().unsqueeze(0), persistent=False)

    def flops(
        self,
        density: Density | None = None,
        *,
        frames: int | None = None,
        count: Count = "executed",
        text_tokens: int = 120,
        grid: tuple[int, int] | None = None,
    ) -> int:
        """Multiply-accumulates of one forward of one video of ``frames`` frames (``video_length`` when None)."""
        grid, frames = grid or self.base_grid, frames or self.config.video_length
        if density is None:
            return self._mean_over_schedule(
                lambda side: self.flops(side, frames=frames, count=count, text_tokens=text_tokens, grid=grid), grid
            )
        return video_macs(
            list(self.layout),
            grid=grid,
            side=parse_density(density, grid=grid),
            frames=frames,
            dim=self.inner_dim,
            patch_size=self.config.patch_size,
            in_channels=self.config.in_channels,
            out_channels=self.out_channels,
            text_tokens=0 if self.config.cross_attention_dim is None else text_tokens,
            caption_channels=self.config.caption_channels,
            count=count,
        )

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        enable_temporal_attentions: bool = True,
        return_dict: bool = True,
        density: Density | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predicts noise (and variance channels).

        Args:
            hidden_states: latents ``(batch, in_channels, F, H, W)``, 1 <= F <= ``video_length``.
            timestep: ``(batch,)``, or one for all.
            encoder_hidden_states: text ``(batch, L, caption_channels)``.
            encoder_attention_mask: ``(batch, L)``, 1 = keep; or an additive bias ``(batch, 1, L)``.
            enable_temporal_attentions: False skips all temporal blocks.
            return_dict: an output object, or a tuple.
            density: sparse grid of this call; None: see ``sparing.diffusion.density_control``.

        Returns:
            ``sample (batch, out_channels, F, H, W)``.

        Raises:
            ValueError: wrong shapes, more frames than ``video_length``, missing text or timestep, a density above the
                grid.
        """
        if hidden_states.ndim != 5:
            raise ValueError(
                f"video latents have shape {tuple(hidden_states.shape)}; expected (batch, {self.config.in_channels}, "
                "F, H, W)"
            )
        batch, _, frames = hidden_states.shape[:3]
        if not 1 <= frames <= self.config.video_length:
            raise ValueError(f"{frames} frames given; this model has 1..{self.config.video_length}")
        if encoder_hidden_states is None or timestep is None:
            raise ValueError("encoder_hidden_states and timestep are both needed")
        grid = latent_grid(
            hidden_states[:, :, 0], in_channels=self.config.in_channels, patch_size=self.config.patch_size
        )
        times = torch.as_tensor(timestep, device=hidden_states.device)
        times = times.expand(batch) if times.ndim == 0 or times.shape[0] == 1 else times
        check_text_batch(
            batch,
            timestep=times,
            text=encoder_hidden_states,
            mask=encoder_attention_mask,
            channels=self.config.caption_channels,
        )
        mask = text_bias(encoder_attention_mask, dtype=hidden_states.dtype)

        def run(side: tuple[int, int], index: Tensor | None) -> Tensor:
            parts: tuple[Any, ...] = (hidden_states, encoder_hidden_states, times, mask)
            latents, text, own_times, own_mask = (
                part if index is None or part is None else part[index] for part in parts
            )
            return self._forward_at(latents, text, own_times, own_mask, grid, side, enable_temporal_attentions)

        sample = self._by_density(run, timestep=times, grid=grid, density=density)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _forward_at(
        self,
        latents: Tensor,
        text: Tensor,
        timestep: Tensor,
        mask: Tensor | None,
        grid: tuple[int, int],
        side: tuple[int, int],
        temporal: bool,
    ) -> Tensor:
        batch, _, frames = latents.shape[:3]
        hidden = self.pos_embed(rearrange(latents, "b c f h w -> (b f) c h w")).contiguous()
        conditioning, embedded = self.adaln_single(timestep, batch_size=batch, hidden_dtype=hidden.dtype)
        text = repeat(self.caption_projection(text), "b l d -> (b f) l d", f=frames)
        if mask is not None:
            mask = repeat(mask, "b h m l -> (b f) h m l", f=frames)
        per_frame = repeat(conditioning, "b d -> (b f) d", f=frames)
        run = self._run_block if torch.is_grad_enabled() and self.gradient_checkpointing else _call

        context = sdtm_inputs()
        for i, (spatial, along) in enumerate(
            zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        ):
            hidden = run(spatial, hidden, per_frame, text, mask, context(spatial, hidden), grid, side)
            if temporal:
                positions = hidden.shape[1]
                hidden = rearrange(hidden, "(b f) n d -> (b n) f d", b=batch)
                if i == 0 and frames > 1:
                    hidden = hidden + self.temp_pos_embed[:, :frames].to(hidden.dtype)
                hidden = run(along, hidden, repeat(conditioning, "b d -> (b n) d", n=positions))
                hidden = rearrange(hidden, "(b n) f d -> (b f) n d", b=batch)

        shift, scale = (self.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        shift, scale = (repeat(part, "b 1 d -> (b f) 1 d", f=frames) for part in (shift, scale))
        tokens = self.proj_out(ln_modulate(hidden, shift, scale, eps=1e-6))
        p, (h, w) = self.config.patch_size, grid
        return rearrange(tokens, "(b f) (h w) (p q c) -> b c f (h p) (w q)", b=batch, f=frames, h=h, w=w, p=p, q=p)

    def _run_block(self, block: nn.Module, *arguments: Any) -> Tensor:
        return self._gradient_checkpointing_func(block, *arguments)

    def enable_cache(self, config: Any) -> None:
        """Caches inside blocks (pyramid attention broadcast) at a constant density.

        Raises:
            ValueError: first-block and MagCache compare tokens of a spatial block with those of a temporal one, whose
                layouts differ (in Latte too); others with a changing density.
        """
        if type(config).__name__ in ("FirstBlockCacheConfig", "MagCacheConfig"):
            raise ValueError(
                f"{type(config).__name__} does not fit pairs of spatial and temporal blocks: their token layouts differ"
            )
        super().enable_cache(config)

    # -- from a host

    @classmethod
    def why_not(cls, host: nn.Module) -> list[str]:
        """Why ``host`` cannot become a FlexDiT; empty when it can."""
        return reasons_against(host, LatteTransformer3DModel)

    @classmethod
    def from_host(
        cls,
        host: LatteTransformer3DModel,
        *,
        num_pooling: int | None = None,
        num_sdtm: int | None = None,
        sdtm_group: Sequence[int] | None = None,
        num_dense_top: int | None = None,
        density_table: Any = None,
        check_finite: bool = False,
    ) -> Self:
        """A FlexDiT with the weights of a live Latte: spatial block i from spatial block i, temporal blocks copied
        whole.

        Args:
            num_pooling, num_sdtm, sdtm_group, num_dense_top: layout in pairs; all None: ours for 14 or 28 pairs.

        Raises:
            TypeError: another kind of host.
            ValueError: a layout of the wrong depth, an unsupported host option, NaN weights when ``check_finite``.
        """
        if reasons := cls.why_not(host):
            error = ValueError if isinstance(host, LatteTransformer3DModel) else TypeError
            raise error(f"FlexDiT cannot be made from this host: {'; '.join(reasons)}")
        names = (
            "num_attention_heads",
            "attention_head_dim",
            "in_channels",
            "num_layers",
            "cross_attention_dim",
            "attention_bias",
            "sample_size",
            "patch_size",
            "norm_eps",
            "caption_channels",
            "video_length",
        )
        shape = {name: host.config[name] for name in names} | {"out_channels": host.out_channels}
        given = (num_pooling, num_sdtm, sdtm_group, num_dense_top)
        if all(part is None for part in given):
            if shape["num_layers"] not in _SPLITS:
                raise ValueError(
                    f"no layout of ours for {shape['num_layers']} pairs (have {sorted(_SPLITS)}); pass one"
                )
            given = _SPLITS[shape["num_layers"]]
        layout = {
            "num_pooling": given[0] or 0,
            "num_sdtm": given[1] or 0,
            "sdtm_group": list(given[2] or (1, 3, 1, 1)),
            "num_dense_top": given[3] or 0,
        }
        return twin_of_dense(
            cls,
            host.state_dict(),
            shape=shape,
            layout=layout,
            density_table=density_table,
            check_finite=check_finite,
            training=host.training,
        )


def _call(block: nn.Module, *arguments: Any) -> Tensor:
    return block(*arguments)
