"""Golden cases of STViT on a plain ViT: reference weights routed through a timm ViT and its twin."""

from collections.abc import Iterable
from functools import partial

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from golden.adapters import vision_described as described
from golden.harness import Case, CaseFile
from sparing.vision.semantic_pooling import OffsetPooling, WeightedPooling
from sparing.vision.stvit import SemanticTokenViT

_POOLINGS = {
    **dict.fromkeys(("intra_window_weighted", "weighted"), "weighted"),
    **dict.fromkeys(("avg", "mean", "adaptive_avg", "adaptive_avg_pool"), "avg"),
    **dict.fromkeys(("max", "adaptive_max", "adaptive_max_pool"), "max"),
}


def cases(case_file: CaseFile) -> Iterable[Case]:
    yield Case(
        f"{case_file.folder}/{case_file.name}",
        case_file.spec["model"],
        case_file.spec["config"],
        described.weights(case_file),
        described.inputs(case_file),
        described.expected(case_file),
        {"roles": described.outputs_by_role(case_file)},
    )


def host_from(config: dict, *, layer_scale: bool) -> VisionTransformer:
    """The timm ViT of a described configuration."""
    return VisionTransformer(
        img_size=config["img_size"],
        patch_size=config["patch_size"],
        in_chans=config["in_chans"],
        num_classes=config["num_classes"],
        global_pool=config["global_pool"],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        qkv_bias=config["qkv_bias"],
        init_values=1.0 if layer_scale else None,
        class_token=config["class_token"],
        fc_norm=False,
        norm_layer=partial(LayerNorm, eps=config["norm_eps"]),
    )


def host_and_new_weights(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Reference keys to timm's for the host, and to the twin's for pooling and global centers."""
    host: dict[str, Tensor] = {}
    new: dict[str, Tensor] = {}
    names = {"layer_scale_1": "ls1.gamma", "layer_scale_2": "ls2.gamma"}
    pool = {
        "pool.gen_mask.0.weight": "center_pooling.conv.weight",
        "pool.gen_mask.0.bias": "center_pooling.conv.bias",
        "pool.gen_mask.1.norm.weight": "center_pooling.norm.weight",
        "pool.gen_mask.1.norm.bias": "center_pooling.norm.bias",
        "semantic_token2": "global_centers",
    }
    for key, value in weights.items():
        if key in pool:
            new[pool[key]] = value
        elif key == "pool.gen_mask.3.weight":
            new["center_pooling.logit.weight"] = value.flatten(1)
        elif ".attn.q." in key:
            host[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat(
                [value, weights[key.replace(".attn.q.", ".attn.kv.")]]
            )
        elif ".attn.kv." not in key:
            head, _, tail = key.rpartition(".")
            host[f"{head}.{names[tail]}" if tail in names else key] = value
    return host, new


def _pair(value: int | list[int]) -> tuple[int, int]:
    """(rows, columns) of an option that is one number or one an axis."""
    first, second = (value, value) if isinstance(value, int) else value
    return first, second


def build(case: Case) -> dict[str, Tensor]:
    config = case.config
    weights, new = host_and_new_weights(case.weights)
    host = host_from(config, layer_scale=config["layer_scale"])
    host.load_state_dict(weights)
    twin = SemanticTokenViT.from_host(
        host,
        num_tokens=tuple(config["semantic_grid"]),
        base_depth=config["base_depth"],
        generation_depth=config["stgm_depth"],
        pooling=_POOLINGS[config["center_pooling"]],
        inter_window=config["inter_window_offset"],
    ).eval()
    if not config["use_global"] and twin.global_centers is not None:
        torch.nn.init.zeros_(twin.global_centers)
        new.pop("global_centers", None)
    if twin.global_centers is None:
        new.pop("global_centers", None)
    pooling = twin.center_pooling
    if isinstance(pooling, OffsetPooling):  # the offset starts as the identity and has no described weights
        pooling = pooling.pooling
        new = {key.replace("center_pooling.", "center_pooling.pooling."): value for key, value in new.items()}
    missing, unexpected = twin.load_state_dict(new, strict=False)
    assert not unexpected, unexpected
    if isinstance(pooling, WeightedPooling):
        assert not [key for key in missing if key.endswith(("conv.weight", "logit.weight"))] or config.get(
            "inter_window_offset"
        ), missing
        pooling.mask_value = config["pool_mask_value"]
        pooling.norm.eps = config["pool_norm_eps"]
        pooling.cell, pooling.pad = _pair(config["pool_cell"]), _pair(config["pool_pad"])
    semantic_depth = len(twin.blocks) - twin.base_depth - twin.generation_depth
    assert config.get("semantic_depth", semantic_depth) == semantic_depth
    assert tuple(config.get("grid_size", twin.patch_embed.grid_size)) == tuple(twin.patch_embed.grid_size)
    images = described.image(case.inputs)
    with torch.no_grad():
        trace = twin.trace(images)
        normed = twin.norm(trace.tokens)
        single = {
            "embed": trace.embedded,
            "base_output": trace.base,
            "pool_weights": trace.pool_weights,
            "centers": trace.centers,
            "tokens": trace.tokens,
            "tokens_normed": normed,
            "pooled": twin.forward_head(normed, pre_logits=True),
            "logits": twin(images),
        }
    results: dict[str, Tensor] = {}
    for name, (role, args) in case.options["roles"].items():
        if role == "semantic_tokens":
            step = args["stgm_layer"] - 1
            tokens = trace.semantic[step]
            if case.expected[name].tensor.shape[1] != tokens.shape[1]:  # described with the prefix tokens in front
                tokens = torch.cat([trace.prefix[step], tokens], dim=1)
            results[name] = tokens
        elif role == "attention_map":
            results[name] = trace.attention[args["stgm_layer"] - 1]
        elif single.get(role) is not None:
            results[name] = single[role]
    return results


BUILDERS = {"stvit_vit_classifier": build}
