"""Entry points of STViT and ToMe twins of timm ViTs: ``stvit_<host>`` and ``tome_<host>``, registered here and with
timm.

``sparing.create_model('stvit_deit_small_patch16_224', num_tokens=16)`` or, once ``sparing.vision`` is imported,
``timm.create_model`` with the same name. Keywords that are no knobs of the method go to timm's own entry point of the
host (``num_classes``, ``img_size``, ``drop_path_rate``, ...); ``host_pretrained=True`` starts from the host's published
weights, and ``features_only=True`` gives timm's feature extractor.
"""

import inspect
from functools import partial
from typing import Any

import timm
from timm.models import build_model_with_cfg
from torch import nn

from sparing.vision.stvit import SemanticTokenViT
from sparing.vision.tome import TokenMergingViT
from sparing.zoo.registry import register_model

__all__ = ["VIT_HOSTS"]

VIT_HOSTS = (
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "deit_base_patch16_384",
    "deit_tiny_distilled_patch16_224",
    "deit_small_distilled_patch16_224",
    "deit_base_distilled_patch16_224",
    "deit3_small_patch16_224",
    "deit3_small_patch16_384",
    "deit3_base_patch16_224",
    "deit3_base_patch16_384",
    "deit3_large_patch16_224",
    "vit_small_patch16_224",
    "vit_small_patch16_384",
    "vit_base_patch16_224",
    "vit_base_patch16_384",
    "vit_large_patch16_224",
    "vit_large_patch16_384",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_clip_384",
    "vit_large_patch14_clip_224",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_siglip_384",
    "vit_large_patch16_siglip_256",
    "vit_so400m_patch14_siglip_384",
    "vit_so150m_patch16_reg4_gap_256",
    "vit_small_patch14_dinov2",
    "vit_base_patch14_dinov2",
    "vit_large_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch14_reg4_dinov2",
    "vit_large_patch14_reg4_dinov2",
)
_METHODS: dict[str, type[SemanticTokenViT] | type[TokenMergingViT]] = {
    "stvit": SemanticTokenViT,
    "tome": TokenMergingViT,
}
# Where a host's weights are; a twin's own are not there.
_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "architecture", "tag")

# timm reads the preprocessing of a registered name here.
default_cfgs: dict[str, dict[str, Any]] = {
    f"{method}_{host}": {k: v for k, v in timm.get_pretrained_cfg(host).to_dict().items() if k not in _SOURCES}
    for method in _METHODS
    for host in VIT_HOSTS
}


def _build(method: str, host: str, host_pretrained: bool, knobs: dict[str, Any], **host_arguments: Any) -> nn.Module:
    model = timm.create_model(host, pretrained=host_pretrained, **host_arguments)
    twin = _METHODS[method].taking_over(model, **knobs)
    if isinstance(twin, SemanticTokenViT) and not host_pretrained:
        twin.reset_semantic_parameters(from_scratch=True)
    return twin


def _register(method: str, host: str) -> None:
    name = f"{method}_{host}"
    knob_names = [p for p in inspect.signature(_METHODS[method].__init__).parameters if p not in ("self", "host")]

    def entry_point(pretrained: bool = False, *, host_pretrained: bool = False, **kwargs: Any) -> nn.Module:
        knobs = {key: kwargs.pop(key) for key in knob_names if key in kwargs}
        return build_model_with_cfg(
            partial(_build, method, host, host_pretrained, knobs),
            name,
            False,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **kwargs,
        )

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = f"{_METHODS[method].__name__} of timm's {host}; its constructor's keywords are the knobs."
    register_model(timm=True)(entry_point)


for _method in _METHODS:
    for _host in VIT_HOSTS:
        _register(_method, _host)
