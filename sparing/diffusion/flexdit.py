"""FlexDiT: a class-conditional DiT with fewer tokens in its middle layers, and fewest at noisy timesteps.

Paper: "SparseDiT: Token Sparsification for Efficient Diffusion Transformer" (arXiv 2412.06028; first version
"FlexDiT"). A pretrained DiT is restructured block by block, without new depth: mean mixing in the bottom layers,
sparse-dense token modules in the middle, plain blocks on top (``sparing.diffusion.blocks``); then it is fine-tuned. All
weights are independent of the density, so one set runs at every sparse grid; which one is a knob
(``sparing.diffusion.density_control``).

Shapes: latents ``(batch, C, H, W)``, patches of p, a dense grid of N = (H/p)(W/p) tokens of width D, a sparse grid of M
tokens; output ``(batch, out_channels, H, W)``. A freshly converted FlexDiT is not equal to its DiT at any density
(pooling and merge blocks are other functions): its ``status`` says so until it is trained. Without sparse layers it
equals its host.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import ConfigMixin, DiTTransformer2DModel, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import LabelEmbedding, PatchEmbed, TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from einops import rearrange
from torch import Tensor, nn

from sparing.diffusion import flexdit_keys as keys
from sparing.diffusion.blocks import FlexDiTBlock, run_blocks
from sparing.diffusion.density import Density, parse_density
from sparing.diffusion.flexdit_flops import Count, class_conditional_macs
from sparing.diffusion.flexdit_hosts import complete_split, live_shape, own_names, read_host
from sparing.diffusion.hosting import FlexDiTTwin, fill_exactly, latent_grid, twin_of_dense
from sparing.kernels import ln_modulate

__all__ = ["FlexDiTTransformer2DModel"]


class TimeClassEmbedding(nn.Module):
    """c = MLP(sinusoid(t)) + table[y] (DiT paper, section 3.2), computed once for all blocks; the last row is the null
    class.
    """

    def __init__(
        self, dim: int, *, num_classes: int, class_dropout_prob: float, frequency_dim: int, freq_shift: float
    ) -> None:
        super().__init__()
        self.time_proj = Timesteps(frequency_dim, flip_sin_to_cos=True, downscale_freq_shift=freq_shift)
        self.timestep_embedder = TimestepEmbedding(in_channels=frequency_dim, time_embed_dim=dim)
        self.class_embedder = LabelEmbedding(num_classes, dim, class_dropout_prob)

    def forward(self, timestep: Tensor, class_labels: Tensor, *, dtype: torch.dtype) -> Tensor:
        """``(batch,)``, ``(batch,)`` -> ``(batch, dim)``."""
        return self.timestep_embedder(self.time_proj(timestep).to(dtype)) + self.class_embedder(class_labels)


class FlexDiTTransformer2DModel(FlexDiTTwin, ModelMixin, AttentionMixin, CacheMixin, PeftAdapterMixin, ConfigMixin):
    """A class-conditional diffusion transformer with dynamic token density, a drop-in for ``DiTTransformer2DModel``.

    Args:
        num_attention_heads, attention_head_dim, in_channels, out_channels, num_layers, sample_size, patch_size,
            attention_bias: as in ``DiTTransformer2DModel`` (``sample_size``: side of the latents).
        num_embeds_ada_norm: number of classes; the null class has this index.
        num_pooling, num_sdtm, sdtm_group, num_dense_top: the depth layout; ``num_pooling + num_sdtm * sum(sdtm_group) +
            num_dense_top`` must be ``num_layers``. All zero but ``num_dense_top = num_layers`` is the plain DiT.
        density_table: schedule of sparse grids (anything ``DensityTable.of`` takes); None: 8x8, or half the dense grid
            where that is less.
        timestep_freq_shift: 0 as the published DiT weights were trained with; diffusers' own DiT class uses 1.
        norm_eps: of the norm before the MLP (diffusers' DiT class: 1e-5); ``attention_norm_eps`` and
            ``output_norm_eps``: of the others.
        class_dropout_prob: in training mode each label is replaced by the null class with this probability; 0: no null
            class.
        mlp_ratio, frequency_embedding_size, drop_path: rarely other than here.
        num_train_timesteps: T of the diffusion process.
        status: 'exact' (no sparse layers), 'converted, not trained' or 'trained'.

    Raises:
        ValueError: a layout that does not add up (all numbers in the message), or a density above the dense grid.
    """

    method = "flexdit"
    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ["FlexDiTBlock", "PatchEmbed"]
    _repeated_blocks = ["FlexDiTBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "time_class_embed"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        sample_size: int = 32,
        patch_size: int = 2,
        num_embeds_ada_norm: int = 1000,
        num_pooling: int = 1,
        num_sdtm: int = 4,
        sdtm_group: Sequence[int] = (1, 3, 1, 1),
        num_dense_top: int = 3,
        density_table: Any = None,
        timestep_freq_shift: float = 0,
        norm_eps: float = 1e-6,
        attention_norm_eps: float = 1e-6,
        output_norm_eps: float = 1e-6,
        class_dropout_prob: float = 0.1,
        attention_bias: bool = True,
        mlp_ratio: float = 4.0,
        frequency_embedding_size: int = 256,
        drop_path: float = 0.0,
        num_train_timesteps: int = 1000,
        status: str | None = None,
    ) -> None:
        super().__init__()
        self._configure(num_layers, sample_size=sample_size, patch_size=patch_size, status=status)
        dim = num_attention_heads * attention_head_dim
        self.inner_dim, self.gradient_checkpointing = dim, False
        self.out_channels = in_channels if out_channels is None else out_channels
        self.register_to_config(out_channels=self.out_channels)
        self.pos_embed = PatchEmbed(
            height=sample_size, width=sample_size, patch_size=patch_size, in_channels=in_channels, embed_dim=dim
        )
        self.time_class_embed = TimeClassEmbedding(
            dim,
            num_classes=num_embeds_ada_norm,
            class_dropout_prob=class_dropout_prob,
            frequency_dim=frequency_embedding_size,
            freq_shift=timestep_freq_shift,
        )
        self.transformer_blocks = nn.ModuleList(
            FlexDiTBlock(
                dim,
                kind,
                heads=num_attention_heads,
                head_dim=attention_head_dim,
                attention_bias=attention_bias,
                mlp_ratio=mlp_ratio,
                attention_norm_eps=attention_norm_eps,
                mlp_norm_eps=norm_eps,
                drop_path=drop_path,
            )
            for kind in self.layout
        )
        self.proj_out_1 = nn.Linear(dim, 2 * dim)
        self.proj_out_2 = nn.Linear(dim, patch_size * patch_size * self.out_channels)
        self._initialise()

    def _initialise(self) -> None:
        """From scratch (section 2.5): xavier with gain 0.5 (plain DiT: 1), zero adaLN and output, W1 = 0, W2 =
        identity.
        """
        gain = 0.5 if self.has_sparse_layers else 1.0
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=gain)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.view(self.inner_dim, -1))
        nn.init.zeros_(self.pos_embed.proj.bias)
        nn.init.normal_(self.time_class_embed.class_embedder.embedding_table.weight, std=0.02)
        for linear in (
            self.time_class_embed.timestep_embedder.linear_1,
            self.time_class_embed.timestep_embedder.linear_2,
        ):
            nn.init.normal_(linear.weight, std=0.02)
        for block in self.transformer_blocks:
            nn.init.zeros_(block.norm1.linear.weight)
            if block.kind == "recover":
                nn.init.zeros_(block.merge_sparse.weight)
                nn.init.eye_(block.merge_dense.weight)
        for linear in (self.proj_out_1, self.proj_out_2):
            nn.init.zeros_(linear.weight)

    # -- facts

    def flops(
        self, density: Density | None = None, *, count: Count = "reference", grid: tuple[int, int] | None = None
    ) -> int:
        """Multiply-accumulates of one forward of one sample (the papers' "FLOPs"; torch's counter gives twice as many).

        Args:
            density: sparse grid; None: the mean over the timesteps of the model's own density table.
            count: 'reference' as the published code is structured, 'executed' as it runs here.
            grid: dense token grid, that of ``config.sample_size`` when None.
        """
        grid = grid or self.base_grid
        if density is None:
            return self._mean_over_schedule(lambda side: self.flops(side, count=count, grid=grid), grid)
        return class_conditional_macs(
            list(self.layout),
            grid=grid,
            side=parse_density(density, grid=grid),
            dim=self.inner_dim,
            patch_size=self.config.patch_size,
            in_channels=self.config.in_channels,
            out_channels=self.out_channels,
            mlp_ratio=self.config.mlp_ratio,
            frequency_dim=self.config.frequency_embedding_size,
            count=count,
        )

    def parameter_count(self, *, position_table: bool = True) -> int:
        """Number of parameters; the fixed position table counts as the published logs count it."""
        table = self.pos_embed.pos_embed.numel() if position_table else 0
        return table + sum(parameter.numel() for parameter in self.parameters())

    # -- forward

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        density: Density | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predicts noise (and variance channels).

        Args:
            hidden_states: latents ``(batch, in_channels, H, W)``; H and W multiples of ``patch_size``, not necessarily
                equal.
            timestep: original training timesteps ``(batch,)``, or one for all.
            class_labels: ``(batch,)`` integers, 0 .. ``num_embeds_ada_norm`` (the last: the null class).
            cross_attention_kwargs: accepted as in the host, which reads nothing from it for this model.
            return_dict: an output object, or a tuple.
            density: sparse grid of this call for the whole batch; None: see ``sparing.diffusion.density_control``.

        Returns:
            ``Transformer2DModelOutput`` with ``sample (batch, out_channels, H, W)``.

        Raises:
            ValueError: latents of another shape, labels or timesteps out of range (on the CPU; on a GPU reading them
                would cost a synchronisation), a density above the grid.
        """
        grid = latent_grid(hidden_states, in_channels=self.config.in_channels, patch_size=self.config.patch_size)
        batch = hidden_states.shape[0]
        if timestep is None or class_labels is None:
            raise ValueError("timestep and class_labels are both needed, (batch,) each")
        times = torch.as_tensor(timestep, device=hidden_states.device)
        times = times.expand(batch) if times.ndim == 0 or times.shape[0] == 1 else times
        if times.shape != (batch,) or class_labels.shape != (batch,):
            raise ValueError(
                f"for {batch} latents, timestep has shape {tuple(times.shape)} and class_labels "
                f"{tuple(class_labels.shape)}; "
                f"expected ({batch},)"
            )
        self._check_labels(class_labels)

        def run(side: tuple[int, int], index: Tensor | None) -> Tensor:
            if index is None:
                return self._forward_at(hidden_states, times, class_labels, grid, side)
            return self._forward_at(hidden_states[index], times[index], class_labels[index], grid, side)

        sample = self._by_density(run, timestep=times, grid=grid, density=density)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _check_labels(self, labels: Tensor) -> None:
        if labels.device.type != "cpu" or torch.compiler.is_compiling():
            return
        classes = self.config.num_embeds_ada_norm
        last = classes if self.config.class_dropout_prob > 0 else classes - 1
        outside = labels[(labels < 0) | (labels > last)]
        if outside.numel():
            raise ValueError(
                f"class label {int(outside[0])} is out of range: the model has classes 0..{classes - 1}"
                + (f" and the null class {classes}" if last == classes else "")
            )

    def _forward_at(
        self, latents: Tensor, timestep: Tensor, labels: Tensor, grid: tuple[int, int], side: tuple[int, int]
    ) -> Tensor:
        hidden = self.pos_embed(latents).contiguous()  # as all later tokens: strides are part of a compiled graph
        conditioning = F.silu(self.time_class_embed(timestep, labels, dtype=hidden.dtype))
        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        hidden = run_blocks(
            self.transformer_blocks,
            hidden,
            conditioning,
            grid=grid,
            sparse_grid=side,
            checkpoint=self._gradient_checkpointing_func if checkpointing else None,
        )
        shift, scale = rearrange(self.proj_out_1(conditioning), "b (two d) -> two b 1 d", two=2).unbind(0)
        tokens = self.proj_out_2(ln_modulate(hidden, shift, scale, eps=self.config.output_norm_eps))
        p = self.config.patch_size
        return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=p, q=p)

    # -- from a host

    @classmethod
    def why_not(cls, host: nn.Module) -> list[str]:
        """Why ``host`` cannot become a FlexDiT; empty when it can."""
        if not isinstance(host, DiTTransformer2DModel):
            return [f"{type(host).__name__} is not a diffusers DiTTransformer2DModel"]
        wanted = {
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
            "upcast_attention": False,
            "dropout": 0.0,
        }
        return [
            f"{name} is {host.config[name]!r}, supported is {value!r}"
            for name, value in wanted.items()
            if host.config[name] != value
        ]

    @classmethod
    def from_host(
        cls,
        host: DiTTransformer2DModel | Mapping[str, Any] | str | Path,
        *,
        num_pooling: int | None = None,
        num_sdtm: int | None = None,
        sdtm_group: Sequence[int] | None = None,
        num_dense_top: int | None = None,
        density_table: Any = None,
        timing: Literal["host", "original"] = "host",
        num_attention_heads: int | None = None,
        sample_size: int | None = None,
        class_dropout_prob: float = 0.1,
        check_finite: bool = False,
    ) -> Self:
        """A FlexDiT with the weights of a DiT: block i from block i, W1 = 0, W2 = identity; the host is left untouched.
        The twin of a live host is in its mode (training or eval), every other one in eval mode.

        Args:
            host: a live ``DiTTransformer2DModel``; a state dict in original, diffusers' or the reference FlexDiT's
                names (or a training checkpoint holding one under "ema" or "model"); a ``.pt`` / ``.safetensors`` file;
                a diffusers folder or hub id.
            num_pooling, num_sdtm, sdtm_group, num_dense_top: the layout; all None: the published split of that depth.
            density_table: see the class.
            timing: 'host' keeps the timestep frequencies and eps of a live host or folder, so that a twin without
                sparse layers equals it; 'original' switches to those that the published DiT weights were trained with.
            num_attention_heads, sample_size: for state dicts and files whose shapes do not tell them.
            class_dropout_prob: for state dicts; above 0 the last row of the label table is the null class.
            check_finite: refuse weights that hold NaN or infinity.

        Raises:
            TypeError: another kind of host.
            ValueError: a missing or extra key, a layout of the wrong depth, unequal embedder copies, an unsupported
                host option.
        """
        if timing not in ("host", "original"):
            raise ValueError(f"timing must be 'host' or 'original', got {timing!r}")
        if isinstance(host, (str, Path)):
            host = read_host(host)
        if isinstance(host, nn.Module):
            if reasons := cls.why_not(host):
                error = ValueError if isinstance(host, DiTTransformer2DModel) else TypeError
                raise error(f"FlexDiT cannot be made from this host: {'; '.join(reasons)}")
            own, shape = keys.from_diffusers(host.state_dict()), live_shape(host, timing)
            layout: dict[str, Any] = {}
            training = host.training
        else:
            training = False
            state = keys.unwrap_checkpoint(host)
            own, layout = own_names(state)
            shape = keys.infer_shape(
                own,
                num_attention_heads=num_attention_heads,
                sample_size=sample_size,
                class_dropout_prob=class_dropout_prob,
                pos_embed=state.get("pos_embed"),
            )
        given = {
            "num_pooling": num_pooling,
            "num_sdtm": num_sdtm,
            "sdtm_group": sdtm_group,
            "num_dense_top": num_dense_top,
        }
        split = complete_split(given, layout, shape)
        if not layout:
            return twin_of_dense(
                cls,
                own,
                shape=shape,
                layout=split,
                density_table=density_table,
                check_finite=check_finite,
                training=training,
            )
        if check_finite:
            keys.check_finite(own)
        with init_empty_weights(include_buffers=False):
            model = cls(**shape, **split, density_table=density_table, status="trained")
        fill_exactly(model, own)
        return model.eval()

    from_dit = from_host
