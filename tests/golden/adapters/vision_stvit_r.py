"""Golden cases of STViT-R on Swin: the published classifier and the published dense backbone.

Every option is read from the case's config and every tensor is found by its role and indices. A backbone case runs as
the reference counts it (``mask_mode`` of the case, project-once keys and values).
"""

from collections.abc import Iterable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from golden.adapters import vision_described as described
from golden.harness import Case, CaseFile, Expected
from sparing.vision.stvit_r import STViTR, load_reference


def cases(case_file: CaseFile) -> Iterable[Case]:
    spec, tensors = case_file.spec, case_file.tensors
    prefix = spec["weights_prefix"]
    yield Case(
        id=f"{case_file.folder}/{case_file.name}",
        kind=spec["model"],
        config=spec["config"],
        weights={name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)},
        inputs=described.inputs(case_file),
        expected={
            name: Expected(tensors[name], atol=entry["atol"], rtol=entry["rtol"])
            for name, entry in spec["outputs"].items()
        },
        options=spec["outputs"],
    )


def _model(case: Case, **form: Any) -> STViTR:
    config = case.config
    same = (
        "patch_size", "in_chans", "embed_dim", "depths", "num_heads", "window_size", "sample_window_size", "mlp_ratio",
        "qkv_bias", "norm_eps", "use_global", "use_conv_pos", "relative_pos", "use_layer_scale",
    )  # fmt: skip
    arguments = {name: config[name] for name in same}
    assert config["center_pooling"] == "adaptive_max"
    assert config["stem"] == "conv3x3_bn_hardswish_x2"
    arguments.update(scope=config["generation2_scope"], shortcut=config["shortcut"])
    return load_reference(STViTR(**arguments, **form), case.weights).eval()


def _classifier(case: Case) -> dict[str, Tensor]:
    config = case.config
    stride = config["key_window_stride"]
    assert config["img_size"] // 16 == config["key_window_size"] + stride  # two windows a side, as in the reference
    model = _model(
        case,
        img_size=config["img_size"],
        num_classes=config["num_classes"],
        key_windows=(config["key_window_size"], 21, 27),
    )
    return _outputs(case, model)


def _backbone(case: Case) -> dict[str, Tensor]:
    config = case.config
    windows = (config["k_window_size_1"], config["k_window_size_2"], config["restore_k_window_size"])
    mode = config["mask_mode"] if config["pad_mask"] else "none"
    model = _model(case, dense=True, out_indices=config["out_indices"], key_windows=windows, mask_mode=mode)
    return _outputs(case, model)


@torch.no_grad()
def _outputs(case: Case, model: STViTR) -> dict[str, Tensor]:
    image = described.image(case.inputs)
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda module, inputs, output: seen.__setitem__(name, output)

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
    result = model(image)
    for handle in handles:
        handle.remove()
    attention = model.attention_maps(image)
    levels = dict(zip(case.config.get("out_indices", ()), result)) if model.dense else {}

    def find(role: str, args: dict[str, Any]) -> Tensor:
        stage = args.get("stage")
        if role == "stem_tokens":
            (first, last), (start, end) = args["batch"], args["tokens"]
            return rearrange(seen["patch_embed"], "b h w c -> b (h w) c")[first:last, start:end]
        if role == "stage_output":  # after patch merging where the stage has one
            out = seen[f"layers.{stage}.downsample"] if stage < 3 else seen[f"layers.{stage}"]
            return rearrange(out, "b h w c -> b (h w) c")
        if role == "block_output":
            return rearrange(seen[f"layers.{stage}.blocks.{args['block']}"], "b h w c -> b (h w) c")
        if role == "attention_map":
            maps = attention[f"layers.{stage}.blocks.{args['block']}"]
            start, end = args["leading"]
            first, last = args.get("queries", (0, maps.shape[2]))
            return maps[start:end, :, first:last]
        if role == "feature_map":
            return levels[args["level"]]
        if role == "pooled":
            return model.forward_head(seen["norm"], pre_logits=True)
        assert role == "logits", f"unknown role {role!r}"
        return result

    return {name: find(entry["role"], entry["args"]) for name, entry in case.options.items()}


BUILDERS = {"stvit_r_swin_classifier": _classifier, "stvit_r_swin_backbone": _backbone}
