"""Checkpoints of DiT and FlexDiT: three families of names, one map.

*original* (``facebookresearch/DiT``): ``blocks.{i}.attn.qkv.weight``, ...;
*diffusers* (``DiTTransformer2DModel``): ``transformer_blocks.{i}.attn1.to_q.weight``, ..., the time and class embedders
stored once per block; *reference* (``changsn/SparseDiT``):
``dumbbell_blocks.{k}.token_merge_blocks.{j}.attn.kv.weight``, ...; *own*: diffusers' names in one flat
``transformer_blocks`` with ONE ``time_class_embed``, ``attn1.{to_v,to_out.0}`` only in pooling blocks, ``merge_sparse``
(W1) and ``merge_dense`` (W2) in recover blocks.

A plain DiT in own names is the hub: every conversion goes through it. Nothing here changes the mapping it is given, and
a key that no rule knows, or a key that should be there and is not, is an error.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "check_finite",
    "detect_naming",
    "flexdit_from_plain",
    "from_diffusers",
    "from_original",
    "from_reference",
    "infer_layout",
    "infer_shape",
    "read_checkpoint",
    "to_diffusers",
    "to_original",
    "to_reference",
    "unwrap_checkpoint",
]

State = dict[str, Tensor]

_OUTER = {  # original -> own
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_class_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_class_embed.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "time_class_embed.class_embedder.embedding_table",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_INNER = {  # inside a block, original -> own: one linear to one, or one stacked linear to several
    "adaLN_modulation.1": ("norm1.linear",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "attn.proj": ("attn1.to_out.0",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.v": ("attn1.to_v",),
    "attn.q": ("attn1.to_q",),
    "attn.kv": ("attn1.to_k", "attn1.to_v"),
    "merged_layer1": ("merge_sparse",),
    "merged_layer2": ("merge_dense",),
}
# Which of the stacked names a block of each kind carries in the reference.
_ATTENTION_KEYS = {"pooling": ("attn.v",), "merge": ("attn.q", "attn.kv"), "recover": ("attn.q", "attn.kv")}
_EMBEDDERS = ("timestep_embedder", "class_embedder")
_BLOCK = re.compile(
    r"^(blocks\.\d+|poolingformer_blocks\.\d+|normal_blocks\.\d+"
    r"|dumbbell_blocks\.\d+\.(?:token_merge_blocks|semantic_blocks|token_recover_blocks|normal_blocks)\.\d+)\.(.+)\.(weight|bias)$"
)
_SDTM_PARTS = ("token_merge_blocks", "semantic_blocks", "token_recover_blocks", "normal_blocks")


# -- reading


def unwrap_checkpoint(state: Mapping[str, Any]) -> State:
    """The weights of a training checkpoint ``{"model", "ema", "opt", "args"}``: those of "ema", else "model", else
    "state_dict" (PixArt's); a bare dict as it is.
    """
    for name in ("ema", "model", "state_dict"):
        if name in state and isinstance(state[name], Mapping):
            state = state[name]
            break
    wrong = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if wrong:
        raise ValueError(
            f"checkpoint entry {wrong[0]!r} is not a tensor; expected a state dict, or one under 'ema', 'model' or "
            "'state_dict'"
        )
    return dict(state)


def read_checkpoint(path: str | Path) -> State:
    """A ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file as a state dict on the CPU; nothing is unpickled but
    tensors.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is of another kind or cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return unwrap_checkpoint(load_file(path))
        if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
            # The published training checkpoints hold argparse options beside the tensors; allow that one harmless
            # class.
            import argparse

            with torch.serialization.safe_globals([argparse.Namespace]):
                return unwrap_checkpoint(torch.load(path, map_location="cpu", weights_only=True))
    except ValueError:
        raise
    except Exception as error:  # whatever a damaged file makes the readers raise
        reason = " ".join(str(error).split(".")[0].split()) or "the file is empty or damaged"
        raise ValueError(f"checkpoint {path} cannot be read ({type(error).__name__}): {reason}") from error
    raise ValueError(f"checkpoint {path} has suffix {path.suffix!r}; expected .safetensors, .pt, .pth, .bin or .ckpt")


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Raises ValueError naming the first tensor that holds NaN or infinity."""
    for key, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"weights hold NaN or infinity: first in {key!r}")


def detect_naming(state: Mapping[str, Tensor]) -> str:
    """'original', 'diffusers', 'reference' or 'own', by the presence of a telling key.

    Raises:
        ValueError: when no family's key is there.
    """
    if any(key.startswith("relative_pos_embedder.") for key in state):
        raise ValueError(
            "the checkpoint holds 'relative_pos_embedder.*': FlexDiT with relative position bias (attn_relat_pos "
            "'relat') "
            "is not supported; no published run used it"
        )
    if "blocks.0.attn.qkv.weight" in state:
        return "original"
    if any(key.startswith(("dumbbell_blocks.", "poolingformer_blocks.")) for key in state):
        return "reference"
    if any(key.startswith("time_class_embed.") for key in state):
        return "own"
    if "transformer_blocks.0.attn1.to_q.weight" in state:
        return "diffusers"
    raise ValueError(
        "not a DiT or FlexDiT checkpoint: neither 'blocks.0.attn.qkv.weight' (original DiT), "
        "'transformer_blocks.0.attn1.to_q.weight' (diffusers), 'dumbbell_blocks.*' (reference FlexDiT) nor "
        "'time_class_embed.*' (ours) "
        f"is among its {len(state)} keys"
    )


# -- original and reference names


def _renamed(state: Mapping[str, Tensor], flat: Mapping[str, int]) -> State:
    """Original or reference names -> own names; ``flat`` gives the depth of each block's prefix. ``pos_embed`` is
    regenerated, not kept.
    """
    own: State = {}
    unknown: list[str] = []
    for key, tensor in state.items():
        if key == "pos_embed":
            continue
        outer, _, leaf = key.rpartition(".")
        match = _BLOCK.match(key)
        if outer in _OUTER:
            own[f"{_OUTER[outer]}.{leaf}"] = tensor
        elif match and match[1] in flat and match[2] in _INNER:
            names = _INNER[match[2]]
            for name, part in zip(names, tensor.chunk(len(names)), strict=True):
                own[f"transformer_blocks.{flat[match[1]]}.{name}.{match[3]}"] = part
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"{len(unknown)} unexpected keys in the checkpoint, first {unknown[0]!r}")
    return own


def _restored(own: Mapping[str, Tensor], prefixes: list[str], kinds: list[str]) -> State:
    """Own names -> original or reference names, without ``pos_embed``."""
    state: State = {}
    for original, name in _OUTER.items():
        for leaf in ("weight", "bias"):
            if f"{name}.{leaf}" in own:
                state[f"{original}.{leaf}"] = own[f"{name}.{leaf}"]
    for i, (prefix, kind) in enumerate(zip(prefixes, kinds, strict=True)):
        keys = ["adaLN_modulation.1", "mlp.fc1", "mlp.fc2", "attn.proj", *_ATTENTION_KEYS.get(kind, ("attn.qkv",))]
        keys += ["merged_layer1", "merged_layer2"] if kind == "recover" else []
        for key in keys:
            for leaf in ("weight", "bias"):
                names = [f"transformer_blocks.{i}.{name}.{leaf}" for name in _INNER[key]]
                if leaf == "bias" and names[0] not in own:
                    continue  # a model without biases on q, k and v
                parts = [own[name] for name in names]
                state[f"{prefix}.{key}.{leaf}"] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return state


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    """1 + the largest index after ``prefix`` (0 when there is none)."""
    pattern = re.compile(rf"^{re.escape(prefix)}\.(\d+)\.")
    return max((int(match[1]) + 1 for key in state if (match := pattern.match(key))), default=0)


def from_original(state: Mapping[str, Tensor]) -> State:
    """Original DiT names -> plain own names."""
    return _renamed(state, {f"blocks.{i}": i for i in range(_depth(state, "blocks"))})


def to_original(plain: Mapping[str, Tensor]) -> State:
    """Plain own names -> original DiT names (without ``pos_embed``, a fixed table)."""
    depth = _depth(plain, "transformer_blocks")
    return _restored(plain, [f"blocks.{i}" for i in range(depth)], ["plain"] * depth)


def infer_layout(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """``num_pooling``, ``num_sdtm``, ``sdtm_group``, ``num_dense_top`` and ``num_layers`` of a reference FlexDiT state
    dict.

    Raises:
        ValueError: when its SDTMs are not all alike.
    """
    num_sdtm = _depth(state, "dumbbell_blocks")
    groups = [[_depth(state, f"dumbbell_blocks.{k}.{part}") for part in _SDTM_PARTS] for k in range(num_sdtm)]
    if any(group != groups[0] for group in groups):
        raise ValueError(f"the checkpoint's SDTMs differ in their blocks [merge, sparse, recover, dense]: {groups}")
    group = groups[0] if groups else [1, 3, 1, 1]
    layout: dict[str, Any] = {
        "num_pooling": _depth(state, "poolingformer_blocks"),
        "num_sdtm": num_sdtm,
        "sdtm_group": group,
        "num_dense_top": _depth(state, "normal_blocks"),
    }
    layout["num_layers"] = layout["num_pooling"] + num_sdtm * sum(group) + layout["num_dense_top"]
    return layout


def _reference_prefixes(*, num_pooling: int, num_sdtm: int, sdtm_group: list[int], num_dense_top: int) -> list[str]:
    """The reference's name of every block, in depth order."""
    sdtm = [f"{part}.{j}" for part, size in zip(_SDTM_PARTS, sdtm_group, strict=True) for j in range(size)]
    return [
        *(f"poolingformer_blocks.{i}" for i in range(num_pooling)),
        *(f"dumbbell_blocks.{k}.{name}" for k in range(num_sdtm) for name in sdtm),
        *(f"normal_blocks.{i}" for i in range(num_dense_top)),
    ]


def from_reference(state: Mapping[str, Tensor]) -> tuple[State, dict[str, Any]]:
    """Reference FlexDiT names -> own names, and the layout they imply (``infer_layout``)."""
    detect_naming(state)
    layout = infer_layout(state)
    prefixes = _reference_prefixes(**{key: value for key, value in layout.items() if key != "num_layers"})
    return _renamed(state, {prefix: i for i, prefix in enumerate(prefixes)}), layout


def to_reference(
    own: Mapping[str, Tensor],
    kinds: list[str],
    *,
    num_pooling: int,
    num_sdtm: int,
    sdtm_group: list[int],
    num_dense_top: int,
) -> State:
    """Own FlexDiT names -> those of the reference code (without ``pos_embed``)."""
    prefixes = _reference_prefixes(
        num_pooling=num_pooling, num_sdtm=num_sdtm, sdtm_group=sdtm_group, num_dense_top=num_dense_top
    )
    return _restored(own, prefixes, kinds)


# -- diffusers' names


def from_diffusers(state: Mapping[str, Tensor]) -> State:
    """diffusers' DiT names -> plain own names; the per-block copies of the embedders must be equal.

    Raises:
        ValueError: naming the first block whose copy differs.
    """
    plain: State = {}
    pattern = re.compile(r"^transformer_blocks\.(\d+)\.norm1\.emb\.(.+)$")
    for key, tensor in state.items():
        match = pattern.match(key)
        if not match:
            if key != "pos_embed.pos_embed":
                plain[key] = tensor
            continue
        name = f"time_class_embed.{match[2]}"
        first = state.get(f"transformer_blocks.0.norm1.emb.{match[2]}")
        if first is None:
            raise ValueError(f"the checkpoint holds {key!r} but no 'transformer_blocks.0.norm1.emb.{match[2]}'")
        if not torch.equal(first, tensor):
            raise ValueError(
                f"the time and class embedders are stored once per block and must be equal: block {match[1]} differs "
                "from "
                f"block 0 in {match[2]!r}"
            )
        plain[name] = first
    depth = _depth(state, "transformer_blocks")
    for embedder in {key.partition(".")[2] for key in plain if key.startswith("time_class_embed.")}:
        missing = [i for i in range(depth) if f"transformer_blocks.{i}.norm1.emb.{embedder}" not in state]
        if missing:
            raise ValueError(f"missing key 'transformer_blocks.{missing[0]}.norm1.emb.{embedder}'")
    return plain


def to_diffusers(plain: Mapping[str, Tensor]) -> State:
    """Plain own names -> diffusers' ``DiTTransformer2DModel`` names (loads with ``strict=True``)."""
    state: State = {key: tensor for key, tensor in plain.items() if not key.startswith("time_class_embed.")}
    for i in range(_depth(plain, "transformer_blocks")):
        for key, tensor in plain.items():
            if key.startswith("time_class_embed."):
                state[f"transformer_blocks.{i}.norm1.emb.{key.partition('.')[2]}"] = tensor
    return state


# -- dense -> FlexDiT


def flexdit_from_plain(plain: Mapping[str, Tensor], kinds: list[str], *, attention: str = "attn1") -> State:
    """The initialisation of section 5.2: flat block i from dense block i; pooling blocks drop Q and K; W1 = 0, W2 =
    identity.

    Args:
        plain: dense weights in own names (any model with a flat ``transformer_blocks``).
        kinds: kind of every block.
        attention: name of the self-attention inside a block.

    Raises:
        ValueError: when the number of blocks differs.
    """
    depth = _depth(plain, "transformer_blocks")
    if depth != len(kinds):
        raise ValueError(f"the dense checkpoint has {depth} transformer blocks, the FlexDiT layout {len(kinds)}")
    own = dict(plain)
    for i, kind in enumerate(kinds):
        block = f"transformer_blocks.{i}"
        if kind == "pooling":
            for key in [k for k in own if k.startswith((f"{block}.{attention}.to_q.", f"{block}.{attention}.to_k."))]:
                del own[key]
        if kind == "recover":
            weight = own[f"{block}.{attention}.to_out.0.weight"]
            dim = weight.shape[0]
            own[f"{block}.merge_sparse.weight"] = weight.new_zeros(dim, dim)
            own[f"{block}.merge_sparse.bias"] = weight.new_zeros(dim)
            own[f"{block}.merge_dense.weight"] = torch.eye(dim, dtype=weight.dtype, device=weight.device)
            own[f"{block}.merge_dense.bias"] = weight.new_zeros(dim)
    return own


_PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # DiT-S, -B, -L, -XL (DiT paper, table 1)


def infer_shape(
    own: Mapping[str, Tensor],
    *,
    num_attention_heads: int | None = None,
    sample_size: int | None = None,
    class_dropout_prob: float = 0.1,
    pos_embed: Tensor | None = None,
) -> dict[str, Any]:
    """The architecture that weights in own names imply, as keywords of ``FlexDiTTransformer2DModel``.

    Raises:
        ValueError: when the head count or the sample size cannot be known from the shapes and is not given.
    """
    needed = ("pos_embed.proj.weight", "proj_out_2.weight", "transformer_blocks.0.ff.net.0.proj.weight")
    for key in (*needed, "time_class_embed.class_embedder.embedding_table.weight"):
        if key not in own:
            raise ValueError(f"missing key: nothing in the checkpoint gives {key!r}")
    dim, in_channels, patch, _ = own["pos_embed.proj.weight"].shape
    heads = num_attention_heads or _PUBLISHED_HEADS.get(dim)
    if heads is None or dim % heads:
        raise ValueError(
            f"the number of attention heads cannot be read from the weights (width {dim}): pass num_attention_heads, a "
            "divisor"
        )
    if sample_size is None:
        if pos_embed is None:
            raise ValueError(
                "the checkpoint has no position table: pass sample_size (latent side, 32 at 256 px, 64 at 512 px)"
            )
        sample_size = round(pos_embed.shape[1] ** 0.5) * patch
    rows = own["time_class_embed.class_embedder.embedding_table.weight"].shape[0]
    return {
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": in_channels,
        "out_channels": own["proj_out_2.weight"].shape[0] // patch**2,
        "num_layers": _depth(own, "transformer_blocks"),
        "sample_size": sample_size,
        "patch_size": patch,
        "num_embeds_ada_norm": rows - (1 if class_dropout_prob > 0 else 0),
        "class_dropout_prob": class_dropout_prob,
        "attention_bias": "transformer_blocks.0.attn1.to_v.bias" in own,
        "mlp_ratio": own["transformer_blocks.0.ff.net.0.proj.weight"].shape[0] / dim,
        "frequency_embedding_size": own["time_class_embed.timestep_embedder.linear_1.weight"].shape[1],
    }
