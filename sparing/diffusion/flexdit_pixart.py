"""FlexDiT for text-to-image: PixArt-alpha with sparse tokens.

Host: PixArt-alpha (arXiv 2310.00426), diffusers' ``PixArtTransformer2DModel``: 28 blocks of adaLN-single,
self-attention, text cross- attention, MLP. The SparseDiT paper reports such a variant (+69% speed) without code, so the
mapping is ours: every block type changes its self-attention as in the class-conditional model
(``sparing.diffusion.blocks``) and keeps text attention and MLP; inside an SDTM the M sparse tokens attend to the text.
The text mask is the same at every density.

Parameter names are the host's (plus ``merge_sparse`` / ``merge_dense`` in recover blocks, less ``to_q`` / ``to_k`` in
pooling blocks), so a host's LoRA targets stay. Without sparse layers the twin equals its host; ``PixArtAlphaPipeline``
runs it unmodified, also at rectangular aspect-ratio sizes (the position table is interpolated as the host's is).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin, PixArtTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import PatchEmbed, PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormSingle
from einops import rearrange
from torch import Tensor, nn

from sparing.diffusion import flexdit_keys as keys
from sparing.diffusion.blocks import FlexDiTBlock, run_blocks
from sparing.diffusion.density import Density, parse_density
from sparing.diffusion.flexdit_flops import Count, text_conditional_macs
from sparing.diffusion.flexdit_pixart_keys import infer_pixart_shape, plain_from_pixart
from sparing.diffusion.hosting import (
    FlexDiTTwin,
    check_text_batch,
    latent_grid,
    reasons_against,
    text_bias,
    twin_of_dense,
)
from sparing.kernels import ln_modulate

__all__ = ["FlexDiTPixArtTransformer2DModel"]


class FlexDiTPixArtTransformer2DModel(
    FlexDiTTwin, ModelMixin, AttentionMixin, CacheMixin, PeftAdapterMixin, ConfigMixin
):
    """A PixArt transformer with dynamic token density.

    Args:
        num_attention_heads .. caption_channels: as in ``PixArtTransformer2DModel``.
        num_pooling, num_sdtm, sdtm_group, num_dense_top, density_table, num_train_timesteps, status: as in
            ``FlexDiTTransformer2DModel``.

    Raises:
        ValueError: a layout that does not add up, or a density above the dense grid.
    """

    method = "flexdit_pixart"
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
        cross_attention_dim: int = 1152,
        attention_bias: bool = True,
        sample_size: int = 64,
        patch_size: int = 2,
        norm_eps: float = 1e-6,
        interpolation_scale: float | None = None,
        use_additional_conditions: bool | None = None,
        caption_channels: int | None = 4096,
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
        dim = num_attention_heads * attention_head_dim
        self.inner_dim, self.gradient_checkpointing = dim, False
        self.out_channels = in_channels if out_channels is None else out_channels
        additional = sample_size == 128 if use_additional_conditions is None else use_additional_conditions
        self.use_additional_conditions = additional
        scale = max(sample_size // 64, 1) if interpolation_scale is None else interpolation_scale
        self.register_to_config(
            out_channels=self.out_channels, use_additional_conditions=additional, interpolation_scale=scale
        )
        self.pos_embed = PatchEmbed(
            height=sample_size,
            width=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            embed_dim=dim,
            interpolation_scale=scale,
        )
        self.transformer_blocks = nn.ModuleList(
            FlexDiTBlock(
                dim,
                kind,
                heads=num_attention_heads,
                head_dim=attention_head_dim,
                modulation="single",
                cross_attention_dim=cross_attention_dim,
                attention_bias=attention_bias,
                attention_norm_eps=norm_eps,
                mlp_norm_eps=norm_eps,
            )
            for kind in self.layout
        )
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * self.out_channels)
        self.adaln_single = AdaLayerNormSingle(dim, use_additional_conditions=additional)
        self.caption_projection = (
            None
            if caption_channels is None
            else PixArtAlphaTextProjection(in_features=caption_channels, hidden_size=dim)
        )
        for block in self.transformer_blocks:
            if block.kind == "recover":
                nn.init.zeros_(block.merge_sparse.weight)
                nn.init.zeros_(block.merge_sparse.bias)
                nn.init.eye_(block.merge_dense.weight)
                nn.init.zeros_(block.merge_dense.bias)

    def flops(
        self,
        density: Density | None = None,
        *,
        count: Count = "executed",
        text_tokens: int = 120,
        grid: tuple[int, int] | None = None,
    ) -> int:
        """Multiply-accumulates of one forward of one sample; arguments as in ``FlexDiTTransformer2DModel.flops``."""
        grid = grid or self.base_grid
        if density is None:
            return self._mean_over_schedule(
                lambda side: self.flops(side, count=count, text_tokens=text_tokens, grid=grid), grid
            )
        return text_conditional_macs(
            list(self.layout),
            grid=grid,
            side=parse_density(density, grid=grid),
            dim=self.inner_dim,
            patch_size=self.config.patch_size,
            in_channels=self.config.in_channels,
            out_channels=self.out_channels,
            text_tokens=text_tokens,
            caption_channels=self.config.caption_channels,
            count=count,
        )

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | float | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        density: Density | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predicts noise (and variance channels).

        Args:
            hidden_states: latents ``(batch, in_channels, H, W)``.
            encoder_hidden_states: text ``(batch, L, caption_channels)``.
            timestep: ``(batch,)``, or one for all.
            added_cond_kwargs: ``{'resolution': (batch, 2), 'aspect_ratio': (batch, 1)}`` for 1024-pixel hosts.
            cross_attention_kwargs: accepted as in the host; nothing is read from it.
            attention_mask: must be None: image tokens have no padding.
            encoder_attention_mask: ``(batch, L)``, 1 = keep; or an additive bias ``(batch, 1, L)``.
            return_dict: an output object, or a tuple.
            density: sparse grid of this call; None: see ``sparing.diffusion.density_control``.

        Raises:
            ValueError: missing text, timestep or size conditions, wrong shapes, a density above the grid.
        """
        grid = latent_grid(hidden_states, in_channels=self.config.in_channels, patch_size=self.config.patch_size)
        if attention_mask is not None:
            raise ValueError("attention_mask is not supported: its tokens would be those of one density only")
        if encoder_hidden_states is None or timestep is None:
            raise ValueError("encoder_hidden_states and timestep are both needed")
        if self.use_additional_conditions and added_cond_kwargs is None:
            raise ValueError("this model is conditioned on resolution and aspect_ratio: pass added_cond_kwargs")
        batch = hidden_states.shape[0]
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
            def pick(value: Any) -> Any:
                return value if index is None or not isinstance(value, Tensor) else value[index]

            sizes = {name: pick(value) for name, value in added_cond_kwargs.items()} if added_cond_kwargs else None
            latents, text, own_times = pick(hidden_states), pick(encoder_hidden_states), pick(times)
            return self._forward_at(latents, text, own_times, pick(mask), sizes, grid, side)

        sample = self._by_density(run, timestep=times, grid=grid, density=density)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _forward_at(
        self,
        latents: Tensor,
        text: Tensor,
        timestep: Tensor,
        mask: Tensor | None,
        sizes: dict[str, Tensor] | None,
        grid: tuple[int, int],
        side: tuple[int, int],
    ) -> Tensor:
        hidden = self.pos_embed(latents).contiguous()  # as all later tokens: strides are part of a compiled graph
        conditioning, embedded = self.adaln_single(
            timestep, sizes, batch_size=latents.shape[0], hidden_dtype=hidden.dtype
        )
        if self.caption_projection is not None:
            text = self.caption_projection(text)
        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        hidden = run_blocks(
            self.transformer_blocks,
            hidden,
            conditioning,
            grid=grid,
            sparse_grid=side,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            checkpoint=self._gradient_checkpointing_func if checkpointing else None,
        )
        shift, scale = (self.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        tokens = self.proj_out(ln_modulate(hidden, shift, scale, eps=1e-6))
        p = self.config.patch_size
        return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=p, q=p)

    # -- from a host

    @classmethod
    def why_not(cls, host: nn.Module) -> list[str]:
        """Why ``host`` cannot become a FlexDiT; empty when it can."""
        return reasons_against(host, PixArtTransformer2DModel, attention_type=("default", None))

    @classmethod
    def from_host(
        cls,
        host: PixArtTransformer2DModel,
        *,
        num_pooling: int = 2,
        num_sdtm: int = 4,
        sdtm_group: Sequence[int] = (1, 3, 1, 1),
        num_dense_top: int = 2,
        density_table: Any = None,
        check_finite: bool = False,
    ) -> Self:
        """A FlexDiT with the weights of a live PixArt transformer (block i from block i, W1 = 0, W2 = identity).

        Raises:
            TypeError: another kind of host.
            ValueError: a layout of the wrong depth, an unsupported host option, NaN weights when ``check_finite``.
        """
        if reasons := cls.why_not(host):
            error = ValueError if isinstance(host, PixArtTransformer2DModel) else TypeError
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
            "interpolation_scale",
            "caption_channels",
        )
        shape = {name: host.config[name] for name in names}
        shape |= {
            "out_channels": host.out_channels,
            "use_additional_conditions": host.use_additional_conditions,
        }
        layout = {
            "num_pooling": num_pooling,
            "num_sdtm": num_sdtm,
            "sdtm_group": list(sdtm_group),
            "num_dense_top": num_dense_top,
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

    @classmethod
    def from_pixart(
        cls,
        source: str | Path | Mapping[str, Tensor],
        *,
        num_attention_heads: int | None = None,
        sample_size: int | None = None,
        num_pooling: int = 2,
        num_sdtm: int = 4,
        sdtm_group: Sequence[int] = (1, 3, 1, 1),
        num_dense_top: int = 2,
        density_table: Any = None,
        check_finite: bool = False,
    ) -> Self:
        """A FlexDiT from a dense PixArt-alpha checkpoint, in its authors' names or in diffusers'.

        Args:
            source: a state dict, or a file (.safetensors, .pth, .pt; nothing is unpickled but tensors).
            num_attention_heads: where the width is not that of PixArt-XL/2 (1152: 16).
            sample_size: latent side; None: read from the checkpoint's position table.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another checkpoint, missing or extra names, a layout of the wrong depth, NaN weights when
                ``check_finite``.
        """
        state = keys.read_checkpoint(source) if isinstance(source, str | Path) else keys.unwrap_checkpoint(source)
        plain = plain_from_pixart(state)
        shape = infer_pixart_shape(
            plain,
            pos_embed=state.get("pos_embed"),
            num_attention_heads=num_attention_heads,
            sample_size=sample_size,
        )
        layout = {
            "num_pooling": num_pooling,
            "num_sdtm": num_sdtm,
            "sdtm_group": list(sdtm_group),
            "num_dense_top": num_dense_top,
        }
        return twin_of_dense(
            cls, plain, shape=shape, layout=layout, density_table=density_table, check_finite=check_finite
        )
