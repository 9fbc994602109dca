"""The hosts of the vision twins: which live timm ViTs can be converted, what they are made of, and how to build them
again.

A twin keeps timm's parameter names and timm's contract because it *is* a timm ``VisionTransformer`` that took over the
modules of (a copy of) its host. So that it can be saved and come back without the host, ``describe_vit`` reads every
constructor argument off the live modules, builds a second model from them on the meta device and compares the two,
module by module: type, settings, parameter names and shapes. What it cannot describe it refuses, naming the first
difference.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import timm.layers as timm_layers
import torch
from timm.layers import Attention, GluMlp, LayerScale, Mlp, PatchDropout, PatchEmbed, SwiGLU, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

__all__ = [
    "adopt",
    "build_vit",
    "check_same_class",
    "check_vit",
    "describe_vit",
    "drop_prefix_tokens",
    "model_name",
]

VIT_CLASSES: dict[str, type[VisionTransformer]] = {
    "VisionTransformer": VisionTransformer,
    "VisionTransformerDistilled": VisionTransformerDistilled,
}
# A subclass that changes one of these computes something else than the class whose modules a twin takes over.
_COMPUTATION = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")
# timm models whose blocks take a rotary embedding: semantic tokens have no grid cell to rotate by (spec A4, EVA).
_ROTARY_CLASSES = ("Eva",)
_MLP_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "Mlp": Mlp,
    "GluMlp": GluMlp,
    "SwiGLUPacked": SwiGLUPacked,
    "SwiGLU": SwiGLU,
}


# --- Which hosts ------------------------------------------------------------------------------------------------------


def model_name(model: nn.Module) -> str:
    """The name timm knows ``model`` by, else its class name."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return config.get("architecture") or type(model).__name__


def vit_class(host: VisionTransformer) -> type[VisionTransformer]:
    """The timm class that computes what ``host`` computes."""
    return next(cls for cls in type(host).__mro__ if cls in VIT_CLASSES.values())


def check_vit(host: nn.Module, *, method: str) -> None:
    """Raise unless ``host`` is a timm ViT made of pre-norm sequential blocks.

    Raises:
        TypeError: ``host`` is not a timm ViT, or is a subclass that overrides the computation (a twin for example).
        NotImplementedError: it is one, of a kind that ``method`` does not handle (block class and model are named).
    """
    name = model_name(host)
    if type(host).__name__ in _ROTARY_CLASSES:
        raise NotImplementedError(
            f"{method} does not handle {name} (class {type(host).__name__}): its blocks rotate queries and keys by "
            f"their grid position, and merged or semantic tokens have none"
        )
    if not isinstance(host, VisionTransformer):
        raise TypeError(f"{method} takes a timm VisionTransformer, got {type(host).__name__} ({name})")
    base = vit_class(host)
    changed = [n for n in _COMPUTATION if getattr(type(host), n) is not getattr(base, n)]
    if changed:
        raise TypeError(
            f"{method} takes a plain timm {base.__name__}; {type(host).__name__} ({name}) has its own "
            f"{', '.join(changed)}"
        )
    for index, block in enumerate(host.blocks):
        if type(block).forward is not Block.forward:
            raise NotImplementedError(
                f"{method} needs pre-norm sequential blocks; blocks.{index} of {name} is a {type(block).__name__}"
            )
        if type(block.attn).forward is not Attention.forward:
            raise NotImplementedError(
                f"{method} needs timm's Attention; blocks.{index}.attn of {name} is a {type(block.attn).__name__}"
            )
    if not hasattr(host.patch_embed, "dynamic_feat_size"):
        raise NotImplementedError(
            f"{method} needs a patch embedding with a grid; {name} has a {type(host.patch_embed).__name__}"
        )


# --- Taking a host over -----------------------------------------------------------------------------------------------


def check_same_class(twin: VisionTransformer, host: VisionTransformer) -> None:
    """Raise TypeError unless ``twin`` extends the timm class of ``host``: its embedding and head are that class's."""
    if vit_class(twin) is not vit_class(host):
        raise TypeError(
            f"{type(twin).__name__} extends {vit_class(twin).__name__}, the host is a {vit_class(host).__name__}; "
            "from_host and taking_over choose the right class"
        )


def adopt(twin: nn.Module, host: nn.Module) -> None:
    """Let ``twin`` (fresh, of a subclass of the host's class) own the modules, parameters and attributes of ``host``.

    ``host`` must be a copy that nobody else uses.
    """
    nn.Module.__init__(twin)
    # A host that was compiled in place calls its own compiled forward; the twin has another.
    twin.__dict__.update({k: v for k, v in vars(host).items() if k != "_compiled_call_impl"})


def drop_prefix_tokens(vit: VisionTransformer) -> None:
    """Remove class and register tokens from ``vit`` in place, and their rows of the position embedding (spec A4).

    A head that read the class token reads the mean of the remaining tokens instead.
    """
    if vit.pos_embed is not None and not vit.no_embed_class:
        rows = vit.pos_embed.detach()[:, vit.num_prefix_tokens :].clone()
        vit.pos_embed = nn.Parameter(rows, requires_grad=vit.pos_embed.requires_grad)
    vit.cls_token = None
    vit.reg_token = None
    vit.has_class_token = False
    vit.num_prefix_tokens = vit.num_reg_tokens = 0
    if isinstance(vit.patch_drop, PatchDropout):
        vit.patch_drop.num_prefix_tokens = 0
    if vit.global_pool == "token":
        vit.global_pool = "avg"


# --- Description and rebuilding ---------------------------------------------------------------------------------------


def describe_vit(vit: VisionTransformer, *, own: tuple[str, ...] = ()) -> dict[str, Any]:
    """Class and constructor arguments of a live timm ViT, as JSON-able values for ``build_vit``.

    Args:
        vit: the model, or a twin that adopted one.
        own: names of the direct children and parameters that the twin added and that are no part of the host.

    Raises:
        ValueError: the model differs from anything its constructor builds; the first difference is named.
    """
    base = vit_class(vit)
    description = {"class": base.__name__, "arguments": _arguments(vit)}
    difference = _first_difference(vit, build_vit(description, device="meta"), own)
    if difference:
        raise ValueError(f"{model_name(vit)} cannot be described by the arguments of {base.__name__}: {difference}")
    return description


def build_vit(
    description: Mapping[str, Any], *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> VisionTransformer:
    """The timm ViT that ``describe_vit`` described, freshly initialised.

    Raises:
        ValueError: an unknown class, layer or argument.
    """
    arguments = dict(description["arguments"])
    if description["class"] not in VIT_CLASSES:
        raise ValueError(f"unknown ViT class {description['class']!r}; known are {sorted(VIT_CLASSES)}")
    for name in ("img_size", "patch_size"):
        arguments[name] = tuple(arguments[name]) if isinstance(arguments[name], list) else arguments[name]
    if arguments["mlp_layer"] not in _MLP_LAYERS:
        raise ValueError(f"unknown mlp_layer {arguments['mlp_layer']!r}; known are {sorted(_MLP_LAYERS)}")
    arguments["mlp_layer"] = _MLP_LAYERS[arguments["mlp_layer"]]
    arguments["norm_layer"] = _norm_from(arguments["norm_layer"])
    arguments["embed_norm_layer"] = _norm_from(arguments["embed_norm_layer"])
    arguments["act_layer"] = _layer_class(arguments["act_layer"])
    return VIT_CLASSES[description["class"]](**arguments, device=device, dtype=dtype)


def _arguments(vit: VisionTransformer) -> dict[str, Any]:
    """Every constructor argument, read off the modules (first block; ``_first_difference`` sees blocks that differ)."""
    embed, first, last = vit.patch_embed, vit.blocks[0], vit.blocks[-1]
    if type(embed) is not PatchEmbed:
        raise ValueError(f"{model_name(vit)} has a {type(embed).__name__} for patch_embed; PatchEmbed is accepted")
    attn, mlp = first.attn, first.mlp
    mlp_layer, hidden = _mlp_kind(mlp)
    return {
        "img_size": list(embed.img_size) if embed.img_size is not None else None,
        "patch_size": list(embed.patch_size),
        "in_chans": embed.proj.in_channels,
        "num_classes": vit.num_classes,
        "global_pool": vit.global_pool,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": attn.num_heads,
        "mlp_ratio": _ratio(hidden, vit.embed_dim),
        "qkv_bias": attn.qkv.bias is not None,
        "qk_norm": not isinstance(attn.q_norm, nn.Identity),
        "scale_attn_norm": not isinstance(attn.norm, nn.Identity),
        "scale_mlp_norm": not isinstance(mlp.norm, nn.Identity),
        "proj_bias": attn.proj.bias is not None,
        # The start value of LayerScale is overwritten by the weights; 1e-5 only says that the blocks have one.
        "init_values": 1e-5 if isinstance(first.ls1, LayerScale) else None,
        "class_token": vit.cls_token is not None,
        "pos_embed": "none" if vit.pos_embed is None else "learn",
        "no_embed_class": vit.no_embed_class,
        "reg_tokens": vit.num_reg_tokens,
        "pre_norm": not isinstance(vit.norm_pre, nn.Identity),
        "final_norm": not (isinstance(vit.norm, nn.Identity) and isinstance(vit.fc_norm, nn.Identity)),
        "fc_norm": not isinstance(vit.fc_norm, nn.Identity),
        "pool_include_prefix": vit.pool_include_prefix,
        "dynamic_img_size": vit.dynamic_img_size,
        "dynamic_img_pad": embed.dynamic_img_pad,
        "drop_rate": vit.head_drop.p,
        "pos_drop_rate": vit.pos_drop.p,
        "patch_drop_rate": vit.patch_drop.prob if isinstance(vit.patch_drop, PatchDropout) else 0.0,
        "proj_drop_rate": attn.proj_drop.p,
        "attn_drop_rate": attn.attn_drop.p,
        "drop_path_rate": float(getattr(last.drop_path1, "drop_prob", 0.0)),
        "embed_norm_layer": _norm_spec(embed.norm),
        "norm_layer": _norm_spec(first.norm1),
        "act_layer": _layer_name(mlp.act),
        "mlp_layer": mlp_layer,
    }


def _mlp_kind(mlp: nn.Module) -> tuple[str, int]:
    """Name in ``_MLP_LAYERS`` and ``hidden_features`` of a block's MLP."""
    if type(mlp) is GluMlp:
        return ("GluMlp" if mlp.gate_last else "SwiGLUPacked"), mlp.fc1.out_features
    if type(mlp) is Mlp:
        return "Mlp", mlp.fc1.out_features
    if type(mlp) is SwiGLU:
        return "SwiGLU", mlp.fc1_g.out_features
    raise ValueError(f"blocks have a {type(mlp).__name__} for mlp; {', '.join(_MLP_LAYERS)} are accepted")


def _ratio(hidden: int, width: int) -> float:
    """A ratio for which timm's ``int(width * ratio)`` gives ``hidden`` exactly."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _layer_name(layer: nn.Module) -> str:
    """``torch.NAME`` or ``timm.NAME`` of a norm or activation class."""
    cls = type(layer)
    for prefix, room in (("torch", nn), ("timm", timm_layers)):
        if getattr(room, cls.__name__, None) is cls:
            return f"{prefix}.{cls.__name__}"
    raise ValueError(f"layer class {cls.__module__}.{cls.__name__} is neither in torch.nn nor in timm.layers")


def _layer_class(name: str) -> type[nn.Module]:
    prefix, _, class_name = name.partition(".")
    cls: Any = getattr({"torch": nn, "timm": timm_layers}.get(prefix), class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"unknown layer {name!r}; expected torch.NAME or timm.NAME of a module class")
    return cls


def _norm_spec(norm: nn.Module) -> dict[str, Any] | None:
    return (
        None if isinstance(norm, nn.Identity) else {"name": _layer_name(norm), "eps": float(getattr(norm, "eps", 1e-6))}
    )


def _norm_from(spec: Mapping[str, Any] | None) -> Callable[..., nn.Module] | None:
    if spec is None:
        return None
    layer: Callable[..., nn.Module] = _layer_class(spec["name"])
    return partial(layer, eps=spec["eps"])


def _first_difference(live: nn.Module, rebuilt: nn.Module, own: tuple[str, ...]) -> str:
    """Empty when ``rebuilt`` has the modules, settings and parameters of ``live``, else the first difference."""

    def is_host(name: str) -> bool:
        return name.split(".")[0] not in own

    live_modules = {n: m for n, m in live.named_modules() if n and is_host(n)}
    modules = {n: m for n, m in rebuilt.named_modules() if n}
    for name in sorted(live_modules.keys() ^ modules.keys()):
        present, absent = ("model", "rebuilt one") if name in live_modules else ("rebuilt model", "model")
        return f"module {name} is in the {present} and not in the {absent}"
    for name, module in modules.items():
        if type(live_modules[name]) is not type(module):
            return f"{name} is a {type(live_modules[name]).__name__}, rebuilt as {type(module).__name__}"
        settings, other = _settings(live_modules[name]), _settings(module)
        for key in settings.keys() | other.keys():
            if settings.get(key) != other.get(key):
                return f"{name}.{key} is {settings.get(key)!r}, rebuilt as {other.get(key)!r}"
    live_state = {n: tuple(t.shape) for n, t in live.state_dict().items() if is_host(n)}
    state = {n: tuple(t.shape) for n, t in rebuilt.state_dict().items()}
    for name in sorted(live_state.keys() | state.keys()):
        if live_state.get(name) != state.get(name):
            return f"{name} has shape {live_state.get(name)}, rebuilt {state.get(name)}"
    return ""


def _settings(module: nn.Module) -> dict[str, Any]:
    """The plain values that decide what ``module`` computes: no private ones, no state of use, no start values."""
    skipped = ("training", "init_values", "fused_attn", "grad_checkpointing", "distilled_training", "inplace")

    def plain(value: Any) -> bool:
        return isinstance(value, bool | int | float | str | torch.Size) or (
            isinstance(value, tuple) and all(isinstance(v, bool | int | float | str) for v in value)
        )

    def rounded(value: Any) -> Any:
        return round(value, 7) if isinstance(value, float) else value

    return {k: rounded(v) for k, v in vars(module).items() if not k.startswith("_") and k not in skipped and plain(v)}
