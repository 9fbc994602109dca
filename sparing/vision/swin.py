"""The ordinary parts of a Swin Transformer, for any map size: stems, window blocks, patch merging, weights of a timm
host.

Swin Transformer (Liu et al. 2021). Activations are ``(batch, height, width, channels)``. Parameter names are those of
the published Swin and STViT-R checkpoints; merging sits at the end of stages 0, 1 and 2 (timm keeps it at the start
of 1, 2, 3).

Two window blocks share these names: ours calls ``sparing.kernels``; a twin made from a timm host keeps timm's own
block, so that what was not replaced stays bit-equal to the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn

from sparing.kernels import relative_position_index, window_attention

__all__ = ["ConvStem", "PatchMerging", "PatchStem", "SwinArchitecture", "SwinBlock", "timm_window_block"]

MIN_IMAGE_SIZE = 32  # pixels: below it the stride-32 level would hold less than one position


def check_image(image: Tensor, *, channels: int) -> None:
    """Raise ValueError unless ``image`` is ``(batch, channels, height, width)`` with sides of at least 32 pixels."""
    if image.ndim != 4 or image.shape[1] != channels:
        raise ValueError(f"expected images (batch, {channels}, height, width), got {tuple(image.shape)}")
    height, width = image.shape[-2:]
    if min(height, width) < MIN_IMAGE_SIZE:
        raise ValueError(
            f"image of {height}x{width} pixels is too small: the backbone has stride {MIN_IMAGE_SIZE}, "
            f"so height and width must be at least {MIN_IMAGE_SIZE}"
        )


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zero-pad a map ``(batch, H, W, C)`` on the right and bottom to multiples of ``multiple``."""
    bottom, right = -x.shape[1] % multiple, -x.shape[2] % multiple
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


class _ConvNorm(nn.Module):
    """3x3 stride-2 convolution and BatchNorm (names ``c`` and ``bn`` of the published checkpoints)."""

    def __init__(self, in_channels: int, out_channels: int, **factory: Any) -> None:
        super().__init__()
        self.c = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False, **factory)
        self.bn = nn.BatchNorm2d(out_channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))


class ConvStem(nn.Module):
    """Published STViT-R stem: two 3x3 stride-2 convolutions with BatchNorm and Hardswish; no LayerNorm after.

    ``(batch, in_channels, H, W)`` -> ``(batch, ceil(H/4), ceil(W/4), dim)``, contiguous: the convolutions run channels
    last, a third of the time on a CPU, and the blocks after them need not gather a strided stream.
    """

    def __init__(self, in_channels: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            _ConvNorm(in_channels, dim // 2, **factory),
            nn.Hardswish(),
            _ConvNorm(dim // 2, dim, **factory),
            nn.Hardswish(),
        )

    def forward(self, image: Tensor) -> Tensor:
        return rearrange(self.proj(image.contiguous(memory_format=torch.channels_last)), "b c h w -> b h w c")


class PatchStem(nn.Module):
    """Swin's own stem: patch projection and LayerNorm; images are zero-padded on the right and bottom to whole patches.

    ``(batch, in_channels, H, W)`` -> ``(batch, ceil(H/patch), ceil(W/patch), dim)``.
    """

    def __init__(
        self, in_channels: int, dim: int, *, patch_size: int = 4, norm_eps: float = 1e-5, **factory: Any
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size, **factory)
        self.norm = nn.LayerNorm(dim, eps=norm_eps, **factory)

    def forward(self, image: Tensor) -> Tensor:
        bottom, right = -image.shape[-2] % self.patch_size, -image.shape[-1] % self.patch_size
        if bottom or right:
            image = F.pad(image, (0, right, 0, bottom))
        return self.norm(rearrange(self.proj(image), "b c h w -> b h w c"))


class PatchMerging(nn.Module):
    """Concatenate 2x2 neighbours in the order (row, column) = (0,0), (1,0), (0,1), (1,1), LayerNorm, 4C -> 2C.

    Odd maps are zero-padded on the right and bottom: ``(batch, H, W, C)`` -> ``(batch, ceil(H/2), ceil(W/2), 2C)``.
    """

    def __init__(self, dim: int, *, norm_eps: float = 1e-5, **factory: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=norm_eps, **factory)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(pad_to_multiple(x, 2), "b (h i) (w j) c -> b h w (j i c)", i=2, j=2)
        return self.reduction(self.norm(x))


class _WindowAttention(nn.Module):
    """W-MSA / SW-MSA with a relative position bias table ``((2w-1)^2, heads)``."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        window: int,
        qkv_bias: bool,
        proj_drop: float,
        clip: bool,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.window, self.num_heads, self.clip = window, num_heads, clip
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads, **factory))
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, shift: int) -> Tensor:
        height, width = x.shape[1:3]
        if self.clip and max(height, width) <= self.window:
            return self.proj_drop(self.proj(self._single(self.qkv(x))))
        qkv = self.qkv(pad_to_multiple(x, self.window))  # zeros are padded after norm1, so a padded key is the bias
        table = self.relative_position_bias_table
        out = window_attention(qkv, table, window=self.window, shift=shift, heads=self.num_heads)
        return self.proj_drop(self.proj(out[:, :height, :width]))

    def _single(self, qkv: Tensor) -> Tensor:
        """A map no larger than a window as one window of its own size: no padding, the table's inner offsets."""
        height, width, side = qkv.shape[1], qkv.shape[2], self.window
        index = relative_position_index(side, device=qkv.device).view(side, side, side, side)
        inner = rearrange(index[:height, :width, :height, :width], "i j k l -> (i j) (k l)").long()
        bias = rearrange(self.relative_position_bias_table[inner], "q k h -> h q k")
        return window_attention(qkv, window=(height, width), heads=self.num_heads, rel_bias=bias)


class SwinBlock(nn.Module):
    """Pre-norm Swin block on a map of any size, padded right and bottom to whole windows (padded keys are not masked).

    Args:
        shift: cyclic shift in positions, 0 for W-MSA.
        shift_single_window: also shift a map no larger than one window (the published dense backbone does, the
            classifier does not).
        clip_window: treat a map no larger than a window as one window of its own size instead of padding it.
        layer_scale: initial value of LayerScale, None for none.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        window: int = 7,
        shift: int = 0,
        shift_single_window: bool = False,
        clip_window: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        layer_scale: float | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.window, self.shift, self.shift_single_window = window, shift, shift_single_window
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, **factory)
        self.attn = _WindowAttention(
            dim,
            num_heads=num_heads,
            window=window,
            qkv_bias=qkv_bias,
            proj_drop=proj_drop,
            clip=clip_window,
            **factory,
        )
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **factory)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        if layer_scale is None:
            self.layer_scale_1 = self.layer_scale_2 = None
        else:
            self.layer_scale_1 = nn.Parameter(torch.full((dim,), layer_scale, **factory))
            self.layer_scale_2 = nn.Parameter(torch.full((dim,), layer_scale, **factory))

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (batch, H, W, C) -> the same shape."""
        single = min(x.shape[1:3]) <= self.window
        attended = self.attn(self.norm1(x), 0 if single and not self.shift_single_window else self.shift)
        x = x + self.drop_path(attended if self.layer_scale_1 is None else self.layer_scale_1 * attended)
        mixed = self.mlp(self.norm2(x))
        return x + self.drop_path(mixed if self.layer_scale_2 is None else self.layer_scale_2 * mixed)


def timm_window_block(
    dim: int,
    *,
    num_heads: int,
    window: int,
    shift: int | tuple[int, int],
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    proj_drop: float = 0.0,
    attn_drop: float = 0.0,
    drop_path: float = 0.0,
    norm_eps: float = 1e-5,
    **factory: Any,
) -> SwinTransformerBlock:
    """timm's own Swin block, freed from a fixed input size: masks are built for the map it is given."""

    def norm_layer(width: int, **kwargs: Any) -> nn.LayerNorm:
        return nn.LayerNorm(width, eps=norm_eps, **kwargs)

    return SwinTransformerBlock(
        dim,
        (window, window),
        num_heads=num_heads,
        window_size=window,
        shift_size=shift,
        always_partition=True,  # or the shift would be dropped for this placeholder resolution
        dynamic_mask=True,
        mlp_ratio=mlp_ratio,
        qkv_bias=qkv_bias,
        proj_drop=proj_drop,
        attn_drop=attn_drop,
        drop_path=drop_path,
        norm_layer=norm_layer,
        **factory,
    )


@dataclass(frozen=True, kw_only=True)
class SwinArchitecture:
    """Sizes of a four-stage Swin and how its ordinary blocks are built.

    Args:
        img_size: height and width in pixels; only options that are fixed by it look at it.
        window_size: side of a window, one for all stages or one a stage.
        stem: 'conv' (published STViT-R) or 'patch' (Swin's own).
        window_blocks: 'sparing' (:class:`SwinBlock`) or 'timm' (a host's own blocks).
        use_layer_scale: LayerScale in the ordinary blocks outside a dumbbell stage.
        layer_scale_init: of every block that has LayerScale; 1e-5 from scratch, 1 for pretrained weights.
        shift_single_window: shift odd blocks even where the map is a single window (the published dense form).

    Raises:
        ValueError: sizes that do not fit together, with the numbers.
    """

    img_size: Sequence[int] | int = 224
    patch_size: int = 4
    in_chans: int = 3
    embed_dim: int = 96
    depths: Sequence[int] = (2, 2, 6, 2)
    num_heads: Sequence[int] = (3, 6, 12, 24)
    window_size: Sequence[int] | int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    norm_eps: float = 1e-5
    stem: Literal["conv", "patch"] = "conv"
    window_blocks: Literal["sparing", "timm"] = "sparing"
    use_layer_scale: bool = False
    layer_scale_init: float = 1e-5
    shift_single_window: bool = False
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("depths", self.depths), ("num_heads", self.num_heads), ("window_size", self.windows)):
            if len(value) != 4 or min(value) < 1:
                raise ValueError(f"{name}={list(value)}: four positive numbers are needed, one a stage")
        for stage, heads in enumerate(self.num_heads):
            if self.dim(stage) % heads:
                raise ValueError(f"width {self.dim(stage)} of stage {stage} is no multiple of its {heads} heads")
        known = {"stem": ("conv", "patch"), "window_blocks": ("sparing", "timm")}
        for name, accepted in known.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}={getattr(self, name)!r}, accepted are {' and '.join(map(repr, accepted))}")
        if self.stem == "conv" and self.patch_size != 4:
            raise ValueError(f"patch_size={self.patch_size}: the convolutional stem has stride 4")
        if self.use_layer_scale and self.window_blocks == "timm":
            raise ValueError("use_layer_scale needs window_blocks='sparing': timm's Swin blocks have no LayerScale")

        if self.attn_drop_rate and self.window_blocks == "sparing":
            raise ValueError("attn_drop_rate needs window_blocks='timm': window attention here has no dropout")

    @property
    def windows(self) -> tuple[int, ...]:
        return (self.window_size,) * 4 if isinstance(self.window_size, int) else tuple(self.window_size)

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = (self.img_size,) * 2 if isinstance(self.img_size, int) else tuple(self.img_size)
        return height, width

    def dim(self, stage: int) -> int:
        """Width of a stage."""
        return int(self.embed_dim * 2**stage)

    def map_size(self, stage: int) -> tuple[int, int]:
        """Rows and columns of a stage's map for images of ``img_size``."""
        height, width = (-(-side // (self.patch_size * 2**stage)) for side in self.image_size)
        return height, width

    def arguments(self) -> dict[str, Any]:
        """The constructor's keywords as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    def block_arguments(self, stage: int, index: int) -> dict[str, Any]:
        """Keywords that ordinary and semantic blocks share; drop-path rises linearly over all blocks."""
        place = sum(self.depths[:stage]) + index
        return {
            "num_heads": self.num_heads[stage],
            "mlp_ratio": self.mlp_ratio,
            "qkv_bias": self.qkv_bias,
            "proj_drop": self.proj_drop_rate,
            "drop_path": self.drop_path_rate * place / max(1, sum(self.depths) - 1),
            "norm_eps": self.norm_eps,
        }

    def make_stem(self, **factory: Any) -> nn.Module:
        if self.stem == "conv":
            return ConvStem(self.in_chans, self.embed_dim, **factory)
        size, eps = self.patch_size, self.norm_eps
        return PatchStem(self.in_chans, self.embed_dim, patch_size=size, norm_eps=eps, **factory)

    def make_merging(self, stage: int, **factory: Any) -> PatchMerging | None:
        return PatchMerging(self.dim(stage), norm_eps=self.norm_eps, **factory) if stage < 3 else None

    def make_window_block(
        self, stage: int, index: int, *, shifted: bool, scaled: bool = True, **factory: Any
    ) -> nn.Module:
        """An ordinary block; ``scaled`` says whether ``use_layer_scale`` reaches it."""
        window = self.windows[stage]
        shift = window // 2 if shifted else 0
        shared = {**self.block_arguments(stage, index), **factory}
        if self.window_blocks == "timm":
            rows, columns = (
                0 if side <= window and not self.shift_single_window else shift for side in self.map_size(stage)
            )
            drop = self.attn_drop_rate
            return timm_window_block(self.dim(stage), window=window, shift=(rows, columns), attn_drop=drop, **shared)
        return SwinBlock(
            self.dim(stage),
            window=window,
            shift=shift,
            shift_single_window=self.shift_single_window,
            layer_scale=self.layer_scale_init if self.use_layer_scale and scaled else None,
            **shared,
        )


def swin_unsupported(host: nn.Module) -> list[str]:
    """Why a host cannot lend its weights to a Swin twin, in words; empty when it can."""
    if not isinstance(host, SwinTransformer):
        return [f"{type(host).__name__} is not timm's SwinTransformer (4 stages, pre-norm, relative position bias)"]
    reasons = []
    if len(host.layers) != 4:
        reasons.append(f"{len(host.layers)} stages, the method is defined for 4")
        return reasons
    windows = [tuple(block.window_size) for stage in host.layers for block in stage.blocks]
    if any(height != width for height, width in windows):
        reasons.append(f"windows must be square, got {sorted(set(windows))}")
    norms = [module for name, module in host.named_modules() if name.rsplit(".")[-1] in {"norm1", "norm2"}]
    if not all(isinstance(norm, nn.LayerNorm) for norm in norms):
        reasons.append(f"norms must be LayerNorm, got {sorted({type(norm).__name__ for norm in norms})}")
    if any(block.attn.qkv.out_features != 3 * block.attn.qkv.in_features for s in host.layers for block in s.blocks):
        reasons.append("heads times head_dim must equal the width of every stage")
    if host.global_pool not in {"avg", ""}:
        reasons.append(f"global_pool={host.global_pool!r}, accepted is 'avg'")
    return reasons


def swin_host_config(host: SwinTransformer) -> dict[str, Any]:
    """Architecture of a timm Swin as keyword arguments shared by our Swin twins."""
    blocks = [block for stage in host.layers for block in stage.blocks]
    first = blocks[0]
    last_drop = getattr(blocks[-1].drop_path1, "drop_prob", 0.0)
    image_size = host.patch_embed.img_size
    return {
        "img_size": list(image_size) if image_size is not None else 224,
        "patch_size": host.patch_embed.patch_size[0],
        "in_chans": host.in_chans,
        "embed_dim": host.embed_dim,
        "depths": [len(stage.blocks) for stage in host.layers],
        "num_heads": [stage.blocks[0].attn.num_heads for stage in host.layers],
        "window_size": [stage.blocks[0].window_size[0] for stage in host.layers],
        "mlp_ratio": first.mlp.fc1.out_features / first.mlp.fc1.in_features,
        "qkv_bias": first.attn.qkv.bias is not None,
        "norm_eps": first.norm1.eps,
        "proj_drop_rate": first.attn.proj_drop.p,
        "attn_drop_rate": first.attn.attn_drop.p,
        "drop_path_rate": float(last_drop or 0.0),
        "stem": "patch",
        "window_blocks": "timm",
    }


def swin_host_weights(host: SwinTransformer) -> dict[str, Tensor]:
    """Weights of a timm Swin under the published names: merging at the end of the stage before, ``head.fc`` as
    ``head``.
    """
    renamed = {}
    for name, value in host.state_dict().items():
        if ".downsample." in name:
            stage = int(name.split(".")[1])
            name = name.replace(f"layers.{stage}.", f"layers.{stage - 1}.", 1)
        renamed[name.replace("head.fc.", "head.", 1)] = value.detach().clone()
    return renamed
