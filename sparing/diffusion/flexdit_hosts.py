"""What a FlexDiT is made from: live DiTs, files, folders and hub ids, and the depth layouts that are published."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiTTransformer2DModel

from sparing.diffusion import flexdit_keys as keys

__all__ = ["complete_split", "live_shape", "own_names", "published_split", "read_host"]

# (num_layers, dense side in tokens) -> (num_pooling, num_sdtm, sdtm_group, num_dense_top).
# 28 layers: logs/log_256x256.txt and logs/log_512x512.txt of changsn/SparseDiT. 12: gives the published 14.3 GFLOPs of
# B/2 at 8x8; 24: ours, nothing is published for L.
_SPLITS: dict[tuple[int, int], tuple[int, int, tuple[int, int, int, int], int]] = {
    (28, 16): (1, 4, (1, 3, 1, 1), 3),
    (28, 32): (2, 4, (1, 3, 1, 1), 2),
    (24, 16): (2, 3, (1, 3, 1, 1), 4),
    (24, 32): (2, 3, (1, 3, 1, 1), 4),
    (12, 16): (1, 2, (1, 2, 1, 1), 1),
    (12, 32): (1, 2, (1, 2, 1, 1), 1),
}


def published_split(num_layers: int, grid_side: int) -> dict[str, Any]:
    """The layout of a published depth at a dense grid of ``grid_side`` tokens a side.

    Raises:
        ValueError: when none is known; pass the split then.
    """
    side = 32 if grid_side > 16 else 16
    if (num_layers, side) not in _SPLITS:
        known = sorted({layers for layers, _ in _SPLITS})
        raise ValueError(
            f"no published split for {num_layers} layers (known: {known}); pass num_pooling, num_sdtm, sdtm_group and "
            "num_dense_top with num_pooling + num_sdtm * sum(sdtm_group) + num_dense_top = num_layers"
        )
    pooling, sdtm, group, top = _SPLITS[num_layers, side]
    return {"num_pooling": pooling, "num_sdtm": sdtm, "sdtm_group": list(group), "num_dense_top": top}


def own_names(state: keys.State) -> tuple[keys.State, dict[str, Any]]:
    """Own names of a state dict in any family's names, and the layout when it is a FlexDiT already."""
    naming = keys.detect_naming(state)
    if naming == "original":
        return keys.from_original(state), {}
    if naming == "diffusers":
        return keys.from_diffusers(state), {}
    if naming == "reference":
        own, layout = keys.from_reference(state)
        return own, {key: value for key, value in layout.items() if key != "num_layers"}
    raise ValueError(
        "the state dict is a FlexDiT in our own names: use FlexDiTTransformer2DModel.from_pretrained(folder)"
    )


def read_host(path: str | Path) -> Mapping[str, Any] | DiTTransformer2DModel:
    """A file as a state dict; a diffusers folder (of the model or of its pipeline) or hub id as the live model."""
    folder = Path(path)
    if folder.is_file() or folder.suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors"):
        return keys.read_checkpoint(folder)
    if folder.is_dir() and not (folder / "config.json").exists() and not (folder / "transformer").is_dir():
        raise ValueError(f"folder {folder} holds neither a model's config.json nor a pipeline's transformer/")
    if not folder.is_dir() and str(path).count("/") != 1:
        raise FileNotFoundError(f"{path} is neither a file, a diffusers folder nor a hub id 'owner/name'")
    return _read_diffusers(str(path), subfolder=None if (folder / "config.json").exists() else "transformer")


def _read_diffusers(path: str, *, subfolder: str | None) -> DiTTransformer2DModel:
    """The host that a folder or hub repository holds, complete.

    Raises:
        ValueError: a model of another class, or weights that lack a parameter, have one too many or cannot be read.
    """
    config = DiTTransformer2DModel.load_config(path, subfolder=subfolder)
    named = config.get("_class_name")
    if named == "FlexDiTTransformer2DModel":
        raise ValueError(f"{path} holds a FlexDiT already: use FlexDiTTransformer2DModel.from_pretrained(folder)")
    # what the published DiT folders were written as, before the class was split
    legacy = named == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero"
    if named != DiTTransformer2DModel.__name__ and not legacy:
        raise ValueError(f"{path} holds a model of class {named!r}; a DiTTransformer2DModel is needed")
    try:
        host, info = DiTTransformer2DModel.from_pretrained(path, subfolder=subfolder, output_loading_info=True)
    except (ValueError, OSError):
        raise
    except Exception as error:  # whatever damaged or misshapen weights make the reader raise
        raise ValueError(f"weights of {path} cannot be read ({type(error).__name__}): {error}") from error
    missing = sorted({*info["missing_keys"], *(name for name, value in host.state_dict().items() if value.is_meta)})
    extra = sorted(set(info["unexpected_keys"]) - {"pos_embed.pos_embed"})  # a fixed table, in older files
    if missing or extra:
        parts = [
            f"{len(names)} {what}, first {names[0]!r}"
            for what, names in (("missing", missing), ("unexpected", extra))
            if names
        ]
        raise ValueError(f"weights of {path} do not fit its config: {'; '.join(parts)}")
    return host


def live_shape(host: DiTTransformer2DModel, timing: str) -> dict[str, Any]:
    """Constructor keywords of a live host."""
    config, block = host.config, host.transformer_blocks[0]
    names = (
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "num_layers",
        "sample_size",
        "patch_size",
        "num_embeds_ada_norm",
        "attention_bias",
    )
    shape = {name: config[name] for name in names}
    shape |= {"out_channels": host.out_channels, "class_dropout_prob": block.norm1.emb.class_embedder.dropout_prob}
    if timing == "original":
        warnings.warn(
            "timing='original': timestep frequencies with shift 0 and eps 1e-6 everywhere, as the published DiT "
            "weights were trained; "
            "diffusers' DiTTransformer2DModel runs them with shift 1 and eps 1e-5 before the MLP, so outputs differ "
            "from that host's",
            stacklevel=3,
        )
        return shape
    return shape | {
        "timestep_freq_shift": block.norm1.emb.time_proj.downscale_freq_shift,
        "norm_eps": block.norm3.eps,
        "attention_norm_eps": block.norm1.norm.eps,
        "output_norm_eps": host.norm_out.eps,
    }


def complete_split(given: dict[str, Any], implied: dict[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
    """The layout from what a person gave, else from the checkpoint, else the published one."""
    stated = {name: value for name, value in given.items() if value is not None}
    if implied:
        differing = {
            name: value for name, value in stated.items() if list(_as_list(value)) != list(_as_list(implied[name]))
        }
        if differing:
            raise ValueError(f"the checkpoint is a FlexDiT with {implied}; it cannot be loaded as {differing}")
        return implied
    if not stated:
        return published_split(shape["num_layers"], shape["sample_size"] // shape["patch_size"])
    zeros = {"num_pooling": 0, "num_sdtm": 0, "sdtm_group": [1, 3, 1, 1], "num_dense_top": 0}
    return zeros | stated


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
