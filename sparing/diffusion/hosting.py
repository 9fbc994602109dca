"""What the FlexDiT twins of the three hosts share besides their blocks: status and knobs, input checks, weight
filling.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig
from torch import Tensor, nn

from sparing.diffusion import flexdit_keys as keys
from sparing.diffusion.blocks import BlockSparseAttnProcessor, depth_layout, set_block_sparse_attention
from sparing.diffusion.density import DensityTable
from sparing.diffusion.density_control import DensityControlled, default_table

__all__ = [
    "FlexDiTTwin",
    "check_text_batch",
    "fill_exactly",
    "latent_grid",
    "reasons_against",
    "text_bias",
    "twin_of_dense",
]

_SPLIT = ("num_pooling", "num_sdtm", "sdtm_group", "num_dense_top")


class FlexDiTTwin(DensityControlled):
    """Mixin of a FlexDiT: layout and status in the config, the knobs, and the caches that compose with sparse tokens.

    The model stands before diffusers' mixins and calls ``_configure`` first in its ``__init__``.
    """

    training: ClassVar[Any] = "required"
    layout: list[Any]
    transformer_blocks: nn.ModuleList

    def _configure(self, num_layers: int, *, sample_size: int, patch_size: int, status: str | None) -> None:
        """Checks layout and density table and writes them, complete, into the config."""
        config = self.config
        self.layout = depth_layout(num_layers, **{name: config[name] for name in _SPLIT})
        if sample_size % patch_size:
            raise ValueError(f"sample_size {sample_size} is not a multiple of patch_size {patch_size}")
        if config.density_table is None:
            table = default_table(self.base_grid)
        else:
            table = DensityTable.of(
                config.density_table, grid=self.base_grid, num_train_timesteps=config.num_train_timesteps
            )
        untrained = "converted, not trained" if self.has_sparse_layers else "exact"
        self._store(density_table=table.to_list(), sdtm_group=list(config.sdtm_group), status=status or untrained)

    @property
    def has_sparse_layers(self) -> bool:
        return bool(self.config.num_pooling or self.config.num_sdtm)

    @property
    def status(self) -> str:
        """'exact', 'converted, not trained' or 'trained'; stored in the config."""
        return self.config.status

    @status.setter
    def status(self, value: str) -> None:
        self._store(status=value)

    @property
    def knobs(self) -> dict[str, Any]:
        """Depth layout and density schedule, as JSON."""
        return {name: self.config[name] for name in (*_SPLIT, "density_table")}

    def _mean_over_schedule(self, cost: Any, grid: tuple[int, int]) -> int:
        """``cost(side)`` averaged over all training timesteps of the model's density table."""
        total = sum(
            (end - start) * cost(self._scaled((h, w), grid)) for start, end, h, w in self.density_table.ranges()
        )
        return round(total / self.config.num_train_timesteps)

    def enable_cache(self, config: Any) -> None:
        """Step caches of diffusers (``FirstBlockCacheConfig``, ``MagCacheConfig``, ...) on top of sparse tokens.

        Raises:
            ValueError: for a cache that would keep sparse activations while the density changes, or that has no dense
                first block.
        """
        _check_cache_config(config, layout=self.layout, constant_density=self.density_table.is_constant)
        super().enable_cache(config)  # type: ignore[misc]

    def set_block_sparse_attention(self, enabled: bool | None = True, **prediction: Any) -> None:
        """Block-sparse self-attention in the dense blocks, with the keywords of ``BlockSparseAttnProcessor``; None or
        False: exact attention again.
        """
        set_block_sparse_attention(self.transformer_blocks, BlockSparseAttnProcessor(**prediction) if enabled else None)


def twin_of_dense(
    cls: Any,
    plain: Mapping[str, Tensor],
    *,
    shape: Mapping[str, Any],
    layout: Mapping[str, Any],
    density_table: Any,
    check_finite: bool,
    training: bool = False,
) -> Any:
    """A FlexDiT of class ``cls`` initialised from dense weights in own names (section 5.2), built without spare memory.

    It is in the mode ``training``: that of a live host, eval for weights from a file.

    Raises:
        ValueError: a layout of another depth, NaN when ``check_finite``, missing or extra weights.
    """
    if check_finite:
        keys.check_finite(plain)
    kinds = depth_layout(shape["num_layers"], **layout)
    with init_empty_weights(include_buffers=False):
        model = cls(**shape, **layout, density_table=density_table)
    fill_exactly(model, keys.flexdit_from_plain(plain, list(kinds)))
    return model.train(training)


def latent_grid(latents: Tensor, *, in_channels: int, patch_size: int) -> tuple[int, int]:
    """The token grid of latents ``(..., in_channels, H, W)`` with one or more leading axes folded into the batch.

    Raises:
        ValueError: naming the shape and what is expected.
    """
    expected = f"(batch, {in_channels}, H, W) with H and W multiples of {patch_size}"
    if latents.ndim != 4 or latents.shape[1] != in_channels:
        raise ValueError(f"latents have shape {tuple(latents.shape)}; expected {expected}")
    height, width = latents.shape[-2:]
    if height % patch_size or width % patch_size or not height or not width:
        raise ValueError(f"latents of {height}x{width} do not divide into patches of {patch_size}; expected {expected}")
    return height // patch_size, width // patch_size


def check_text_batch(batch: int, *, timestep: Tensor, text: Tensor, mask: Tensor | None, channels: int | None) -> None:
    """Raises ValueError unless there is one timestep ``(batch,)``, one text ``(batch, L, channels)`` and one mask row
    for every sample.
    """
    if timestep.shape != (batch,) or text.ndim != 3 or text.shape[0] != batch:
        raise ValueError(
            f"for {batch} latents, timestep has shape {tuple(timestep.shape)} and encoder_hidden_states "
            f"{tuple(text.shape)}; expected ({batch},) and ({batch}, L, {channels})"
        )
    if channels is not None and text.shape[2] != channels:
        raise ValueError(f"encoder_hidden_states have shape {tuple(text.shape)}; expected ({batch}, L, {channels})")
    if mask is not None and (mask.shape[0], mask.shape[-1]) != tuple(text.shape[:2]):
        raise ValueError(
            f"a text mask has shape {tuple(mask.shape)}; for text {tuple(text.shape)}, expected {tuple(text.shape[:2])}"
        )


def text_bias(mask: Tensor | None, *, dtype: torch.dtype) -> Tensor | None:
    """A text mask as the hosts take it, ``(batch, L)`` with 1 = keep or an additive bias ``(batch, 1, L)``, as an
    additive bias ``(batch, 1, 1, L)``. Like the hosts, hidden keys get -10000, not minus infinity.
    """
    if mask is None:
        return None
    if mask.ndim == 2:
        mask = ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)
    if mask.ndim != 3:
        raise ValueError(f"a text mask has shape (batch, L) or (batch, 1, L), got {tuple(mask.shape)}")
    return mask.unsqueeze(1)


def reasons_against(host: nn.Module, host_class: Any, **further: tuple[Any, ...]) -> list[str]:
    """Why a host of adaLN-single blocks cannot become a FlexDiT; ``further`` names more options and their allowed
    values.
    """
    if not isinstance(host, host_class):
        return [f"{type(host).__name__} is not a diffusers {host_class.__name__}"]
    allowed: dict[str, tuple[Any, ...]] = {
        "activation_fn": ("gelu-approximate",),
        "norm_type": ("ada_norm_single",),
        "norm_elementwise_affine": (False,),
        "dropout": (0.0,),
        "upcast_attention": (False,),
    } | further
    config: Any = host.config
    return [
        f"{name} is {config[name]!r}, supported is {values[0]!r}"
        for name, values in allowed.items()
        if name in config and config[name] not in values
    ]


def fill_exactly(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies ``state`` into a model built without memory; every parameter must be given, and nothing else.

    Raises:
        ValueError: listing missing and unexpected names, or the first shape that differs.
    """
    wanted = dict(model.named_parameters())
    missing = sorted(set(wanted) - set(state))
    extra = sorted(set(state) - set(wanted))
    if missing or extra:
        parts = [
            f"{len(names)} {what}, first {names[0]!r}"
            for what, names in (("missing", missing), ("unexpected", extra))
            if names
        ]
        raise ValueError(f"weights do not fit the model: {'; '.join(parts)}")
    for name, parameter in wanted.items():
        if parameter.shape != state[name].shape:
            raise ValueError(
                f"weight {name!r} has shape {tuple(state[name].shape)}, the model needs {tuple(parameter.shape)}"
            )
    copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    model.load_state_dict(copies, strict=False, assign=True)
    first = next(iter(copies.values()))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device=first.device, dtype=first.dtype))


def _check_cache_config(config: Any, *, layout: Sequence[str], constant_density: bool) -> None:
    """Whether a diffusers step cache composes with sparse tokens.

    First-block and MagCache keep the residual over all remaining blocks, which starts and ends on dense tokens. Others
    keep activations inside blocks: those of sparse tokens have another size after a change of density.

    Raises:
        ValueError: saying why not.
    """
    if isinstance(config, (FirstBlockCacheConfig, MagCacheConfig)):
        if layout and layout[0] == "merge":
            raise ValueError(
                f"{type(config).__name__} compares the input and output of the first block, which must both be dense: "
                "the layout starts with a merge block; use num_pooling >= 1"
            )
        return
    if not constant_density and "merge" in layout:
        raise ValueError(
            f"{type(config).__name__} keeps activations inside blocks, and this model's sparse token count changes "
            "with the timestep; "
            "use FirstBlockCacheConfig or MagCacheConfig, or a constant density"
        )
