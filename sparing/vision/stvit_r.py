"""STViT-R: a Swin Transformer whose deep stage runs on semantic tokens and still gives its feature maps back.

Chang et al., "Making Vision Transformers Efficient from A Token Sparsification View", CVPR 2023; code of the authors at
github.com/changsn/STViT-R and github.com/changsn/STViT-R-Object-Detection.

Stages 0, 1 and 3 are ordinary Swin. Stage 2 is a chain of six-layer dumbbell units (``dumbbell.py``). One class and one
set of weights serve two forms: the classifier (image -> logits) and the dense backbone (image of any size -> four NCHW
maps of strides 4 to 32, each after its own LayerNorm). Keys and values are projected once per token and gathered
afterwards, which makes the dense form cheaper than Swin; the published code unfolds first and costs more than Swin.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from einops import rearrange
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import FeatureInfo
from torch import Tensor, nn

from sparing._compat import take_indices
from sparing.vision.dumbbell import GenerationBlock, RecoveryBlock, SemanticBlock
from sparing.vision.swin import (
    SwinArchitecture,
    check_image,
    swin_host_config,
    swin_host_weights,
    swin_unsupported,
)
from sparing.vision.swin_stages import UnitOptions, dumbbell_depth_reason, dumbbell_stage, ordinary_stage
from sparing.zoo.registry import register_model
from sparing.zoo.twins import Status, Twin
from sparing.zoo.weights import read_state

__all__ = ["STViTR", "checkpoint_filter_fn", "load_reference"]

DUMBBELL_STAGE = 2
_STUBS = ("yacs.config.CfgNode",)  # the training configuration inside the published classification files
_BUFFERS = ("relative_position_index", "attn_mask")  # constants that published files carry
_FORM_KEYS = ("norm.", "head.", "norm0.", "norm1.", "norm2.", "norm3.")  # what the two forms do not share


class STViTR(Twin, nn.Module):
    """STViT-R on Swin, as a classifier or (``dense=True``) as a pyramid backbone for images of any size.

    Args:
        num_classes: of the classifier, 0 for none.
        dense: return maps instead of logits.
        out_indices: which levels the dense form returns.
        sample_window_size: side of each window's set of semantic tokens; 'all' keeps ordinary Swin blocks everywhere.
        scope, shortcut: None takes what was published for the form: 'global' without, 'window' with the shortcut.
        mask_mode, key_windows, use_global, use_conv_pos, relative_pos: see
            :class:`~sparing.vision.swin_stages.UnitOptions`.
        drop_rate: dropout before the classifier.
        architecture: sizes, stem and rates of :class:`~sparing.vision.swin.SwinArchitecture`.

    Raises:
        ValueError: a depth of stage 2 that is no multiple of 6, or sizes and options that do not fit, with the numbers.
    """

    method: ClassVar[str] = "stvit_r"
    training: ClassVar[Literal["none", "required"]] = "required"

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        dense: bool = False,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        sample_window_size: int | Literal["all"] = 3,
        scope: Literal["global", "window"] | None = None,
        shortcut: bool | None = None,
        mask_mode: Literal["exact", "reference", "none"] = "exact",
        key_windows: Sequence[int] | None = None,
        use_global: bool = False,
        use_conv_pos: bool = False,
        relative_pos: bool = False,
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **architecture: Any,
    ) -> None:
        super().__init__()
        if not out_indices or not set(out_indices) <= {0, 1, 2, 3}:
            raise ValueError(f"out_indices={tuple(out_indices)}, accepted are levels 0 to 3")
        if sample_window_size != "all" and not isinstance(sample_window_size, int):
            raise ValueError(f"sample_window_size={sample_window_size!r}, accepted are an int or 'all'")
        factory = {"device": device, "dtype": dtype}
        sizes = SwinArchitecture(**{"shift_single_window": dense, **architecture})
        self.architecture = sizes
        self._knobs: dict[str, Any] = {
            "sample_window_size": sample_window_size,
            "scope": scope or ("window" if dense else "global"),
            "mask_mode": mask_mode,
            "shortcut": dense if shortcut is None else shortcut,
            "key_windows": None if key_windows is None else list(key_windows),
            "use_global": use_global,
            "use_conv_pos": use_conv_pos,
            "relative_pos": relative_pos,
        }
        self.status: Status = "exact" if sample_window_size == "all" else "converted, not trained"
        self.dense, self.out_indices = dense, tuple(out_indices)
        self.in_chans, self.num_classes, self.embed_dim = sizes.in_chans, num_classes, sizes.embed_dim
        self.global_pool, self.drop_rate = "avg", drop_rate
        self.num_features = self.head_hidden_size = sizes.dim(3)
        self.pretrained_cfg = self.default_cfg = _cfg(
            input_size=(sizes.in_chans, *sizes.image_size), num_classes=num_classes
        )

        self.patch_embed = sizes.make_stem(**factory)
        self.layers = nn.ModuleList(
            dumbbell_stage(sizes, stage, UnitOptions(**self._knobs), **factory)
            if stage == DUMBBELL_STAGE and sample_window_size != "all"
            else ordinary_stage(sizes, stage, **factory)
            for stage in range(4)
        )
        infos = [
            {"num_chs": sizes.dim(stage), "reduction": sizes.patch_size * 2**stage, "module": f"layers.{stage}"}
            for stage in range(4)
        ]
        self.feature_info = FeatureInfo(infos, self.out_indices) if dense else infos
        if dense:
            for stage in self.out_indices:
                self.add_module(f"norm{stage}", nn.LayerNorm(sizes.dim(stage), eps=sizes.norm_eps, **factory))
        else:
            self.norm = nn.LayerNorm(self.num_features, eps=sizes.norm_eps, **factory)
            self.head_drop = nn.Dropout(drop_rate)
            self.head = nn.Linear(self.num_features, num_classes, **factory) if num_classes else nn.Identity()
        self.apply(initialise)

    # ---- forward ---------------------------------------------------------------------------------------------------

    def _maps(self, image: Tensor) -> list[Tensor]:
        """Stage outputs before merging, (B, H, W, C) each."""
        check_image(image, channels=self.in_chans)
        x, maps = self.patch_embed(image), []
        for stage in self.layers:
            x = stage(x)
            maps.append(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps

    def forward_features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H/32, W/32, C), after the last LayerNorm (of level 3 in the dense form)."""
        last = self._maps(image)[-1]
        norm = getattr(self, "norm3", None) if self.dense else self.norm
        return last if norm is None else norm(last)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, h, w, C) -> logits (B, num_classes), or the mean over positions (B, C) with ``pre_logits``."""
        if self.dense:
            raise ValueError("the dense form has no classifier: create it with dense=False for logits")
        pooled = self.head_drop(x.mean((1, 2)))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """
        Args:
            image: (B, 3, H, W); the dense form takes any H, W of at least 32 pixels.

        Returns:
            Logits (B, num_classes); or the maps of ``out_indices``, (B, C, ceil(H/4), ceil(W/4)), then half of that
            each.
        """
        if not self.dense:
            return self.forward_head(self.forward_features(image))
        maps = self._maps(image)
        return [
            rearrange(getattr(self, f"norm{i}")(maps[i]), "b h w c -> b c h w").contiguous() for i in self.out_indices
        ]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage outputs as timm gives them: NCHW maps, or raster tokens 'NLC'; ``norm`` applies the norms that the
        form has.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}, accepted are 'NCHW' and 'NLC'")
        take, _ = take_indices(len(self.layers), indices)
        maps = self._maps(x)
        pattern = "b h w c -> b c h w" if output_fmt == "NCHW" else "b h w c -> b (h w) c"
        taken = [rearrange(self._level_norm(i)(maps[i]) if norm else maps[i], pattern).contiguous() for i in take]
        return taken if intermediates_only else (self._level_norm(3)(maps[-1]), taken)

    def _level_norm(self, level: int) -> nn.Module:
        name = f"norm{level}" if self.dense else "norm"
        return (
            getattr(self, name)
            if (self.dense and hasattr(self, name)) or (not self.dense and level == 3)
            else nn.Identity()
        )

    @torch.no_grad()
    def attention_maps(self, image: Tensor) -> dict[str, Tensor]:
        """Attention of every dumbbell block, by module name: (windows or batch, heads, queries, keys)."""
        seen: dict[str, tuple[Any, ...]] = {}
        cross = (GenerationBlock, SemanticBlock, RecoveryBlock)
        blocks = {name: module for name, module in self.named_modules() if isinstance(module, cross)}
        handles = [
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs))
            for name, module in blocks.items()
        ]
        try:
            self._maps(image)
        finally:
            for handle in handles:
                handle.remove()
        return {name: blocks[name](*inputs, weights=True) for name, inputs in seen.items()}

    # ---- timm's contract -------------------------------------------------------------------------------------------

    def get_classifier(self) -> nn.Module:
        return nn.Identity() if self.dense else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new linear head of ``num_classes`` (0 for none); pooling is always the mean."""
        if self.dense:
            raise ValueError("the dense form has no classifier to reset")
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool={global_pool!r}, accepted is 'avg'")
        like = self.norm.weight
        self.num_classes = num_classes
        head = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )
        self.head = head.apply(initialise)

    def no_weight_decay(self) -> set[str]:
        names = ("relative_position_bias_table", "semantic_token2")
        return {name for name, _ in self.named_parameters() if name.endswith(names)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks: Any = r"^layers\.(\d+)" if coarse else [(r"^layers\.(\d+)\.\w+\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.layers:
            stage.grad_checkpointing = enable

    # ---- twin's contract -------------------------------------------------------------------------------------------

    @property
    def knobs(self) -> dict[str, Any]:
        return dict(self._knobs)

    @classmethod
    def why_not(cls, host: nn.Module) -> list[str]:
        reasons = swin_unsupported(host)
        if not reasons and (reason := dumbbell_depth_reason(len(host.layers[DUMBBELL_STAGE].blocks))):
            reasons = [reason]
        return reasons

    @classmethod
    def from_host(cls, host: nn.Module, **knobs: Any) -> Self:
        """Twin of a timm ``SwinTransformer``: its stem, blocks, mergings, norm and head; LayerScale starts at 1.

        Blocks 1 to 5 of a unit take the host's block of the same index: q and kv are the rows of its qkv; its relative
        position table has no use in a cross block and is dropped. The other blocks are timm's own, with its weights.
        ``dense=True`` gives the backbone, with fresh norms per level.

        Raises:
            TypeError: another kind of host; ValueError: a Swin that the method cannot serve; both say why.
        """
        if reasons := swin_unsupported(host):
            raise TypeError(f"STViT-R cannot be built from this {type(host).__name__}: {'; '.join(reasons)}")
        config = {**swin_host_config(host), "layer_scale_init": 1.0, "shortcut": True}  # type: ignore[arg-type]
        like = next(host.parameters())
        config.update(num_classes=host.num_classes, drop_rate=host.head.drop.p, device=like.device, dtype=like.dtype)
        twin = cls(**{**config, **knobs})
        twin.load_host_weights(swin_host_weights(host))  # type: ignore[arg-type]
        twin.pretrained_cfg = twin.default_cfg = getattr(host, "pretrained_cfg", None) or twin.pretrained_cfg
        return twin.train(host.training)

    def load_host_weights(self, weights: dict[str, Tensor]) -> None:
        """Copy the weights of a host under our names: of :func:`~sparing.vision.swin.swin_host_weights`, or the state
        dict of a twin with ``sample_window_size='all'``. What the host lacks keeps its values.
        """
        own = self.state_dict()
        given: dict[str, Tensor] = {}
        for name, value in weights.items():
            if name.startswith("patch_embed.") and self.architecture.stem == "conv":
                continue  # a convolutional stem has no source in the host
            if name in own:
                given[name] = value
            elif ".attn.qkv." in name:
                block, tail = name.split(".attn.qkv.")
                third = value.shape[0] // 3
                given[f"{block}.attn.q.{tail}"], given[f"{block}.attn.kv.{tail}"] = value.split([third, 2 * third])
        self.load_state_dict(given, strict=False)

    def twin_config(self) -> dict[str, Any]:
        form = {"num_classes": self.num_classes, "dense": self.dense, "out_indices": list(self.out_indices)}
        arguments = {**self.architecture.arguments(), **form, "drop_rate": self.drop_rate}
        return {"knobs": self.knobs, "host": {"architecture": "swin", "arguments": arguments}}

    @classmethod
    def from_twin_config(cls, config: dict[str, Any]) -> Self:
        return cls(**config["host"]["arguments"], **config["knobs"])


def initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ---- published checkpoints ------------------------------------------------------------------------------------------


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Published classification or detection state dict -> our keys: the backbone alone, constants dropped, counters
    added.
    """
    if any(name.startswith("backbone.") for name in state):
        state = {n.removeprefix("backbone."): value for n, value in state.items() if n.startswith("backbone.")}
    state = {name: value for name, value in state.items() if not name.endswith(_BUFFERS)}
    counters = {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    return {**{name: value for name, value in counters.items() if name not in state}, **state}


def load_reference(model: STViTR, source: str | Path | dict[str, Tensor]) -> STViTR:
    """Load a published STViT-R checkpoint, of classification or detection, into a classifier or a dense backbone.

    Only what the two forms do not share may be left over: ``norm``, ``head`` (classifier) and ``norm0`` .. ``norm3``
    (dense) keep their initialisation when the file is of the other form.

    Raises:
        ValueError: other keys are missing or unexpected, or shapes differ; the message names them.
        FileNotFoundError: no such file.
    """
    state = checkpoint_filter_fn(source if isinstance(source, dict) else read_state(source, stubs=_STUBS), model)
    own = model.state_dict()
    same_form = all(name in state for name in own if name.startswith(_FORM_KEYS))
    other = () if same_form else _FORM_KEYS  # of the other form: its norms and head stay as they are
    parts = {
        "missing": [name for name in own if name not in state and not name.startswith(other)],
        "unexpected": [name for name in state if name not in own and not name.startswith(_FORM_KEYS)],
        "of another shape": [name for name in own if name in state and own[name].shape != state[name].shape],
    }
    if any(parts.values()):
        said = "; ".join(f"{len(names)} {what}: {', '.join(names[:5])}" for what, names in parts.items() if names)
        raise ValueError(f"this checkpoint does not fit the model: {said}")
    kept = {name: value for name, value in state.items() if name in own and not name.startswith(other)}
    model.load_state_dict({**own, **kept})
    model.status = "trained" if same_form else model.status
    return model


# ---- entry points ---------------------------------------------------------------------------------------------------


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "", "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7), "crop_pct": 0.9,
        "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj.0.c", "classifier": "head", **kwargs,
    }  # fmt: skip


_SIZES: dict[str, dict[str, Any]] = {  # drop-path of the classifier and of the dense form
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "drop_path": (0.2, 0.2)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "drop_path": (0.3, 0.2)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "drop_path": (0.4, 0.3)},
}


def _create(size: str, *, features_only: bool = False, host_pretrained: bool = False, **kwargs: Any) -> STViTR:
    """``features_only`` (timm's) is the dense form; ``host_pretrained`` starts from the published Swin of that size."""
    kwargs = {"dense": features_only, **kwargs}
    if host_pretrained:
        import timm

        return STViTR.from_host(timm.create_model(f"swin_{size}_patch4_window7_224", pretrained=True), **kwargs)
    arguments = dict(_SIZES[size])
    drop_path = arguments.pop("drop_path")[int(kwargs["dense"])]
    return STViTR(**{**arguments, "drop_path_rate": drop_path, **kwargs})


@register_model(timm=True)
def stvit_r_swin_tiny_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> STViTR:
    """STViT-R-Swin-T: one dumbbell unit (configuration published, no result published)."""
    return _create("tiny", **kwargs)


@register_model(timm=True)
def stvit_r_swin_small_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> STViTR:
    """STViT-R-Swin-S: three dumbbell units, published options and stem."""
    return _create("small", **kwargs)


@register_model(timm=True)
def stvit_r_swin_base_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> STViTR:
    """STViT-R-Swin-B: three dumbbell units, published options and stem."""
    return _create("base", **kwargs)
