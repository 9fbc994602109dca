"""The dumbbell stage written out as the golden cases describe it: unfold first, project every copy, additive masks of
-1000.

Slow and literal on purpose; it reads a model's weights by their published names and shares no code with the package.
Dense form: :func:`dense_stage`; classification form: :func:`classifier_stage`. Maps are NHWC.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def _norm(w, name, x):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)


def _linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _attend(w, queries, keys, heads, mask=0.0):
    """Cross attention of raw tokens: norm1 on both, scores in the dtype of the weights."""
    q = rearrange(_linear(w, "attn.q", _norm(w, "norm1", queries)), "b n (h d) -> b h n d", h=heads)
    kv = _linear(w, "attn.kv", _norm(w, "norm1", keys))
    k, v = rearrange(kv, "b n (two h d) -> two b h n d", two=2, h=heads)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask
    out = rearrange(scores.softmax(-1) @ v, "b h n d -> b n (h d)")
    return w["layer_scale_1"] * _linear(w, "attn.proj", out)


def _mlp(w, x):
    hidden = F.gelu(_linear(w, "mlp.fc1", _norm(w, "norm2", x)))
    return x + w["layer_scale_2"] * _linear(w, "mlp.fc2", hidden)


def _relative(w, side):
    table = w["attn.relative_position_bias_table"]
    bias = torch.empty(table.shape[1], side**2, side**2, dtype=table.dtype)
    for a in range(side**2):
        for b in range(side**2):
            row, column = a // side - b // side + side - 1, a % side - b % side + side - 1
            bias[:, a, b] = table[row * (2 * side - 1) + column]
    return bias


def _pool(windows, samples):
    maps = rearrange(windows, "b i j c -> b c i j")
    return rearrange(F.adaptive_max_pool2d(maps, samples), "b c i j -> b (i j) c")


def _conv_pos(w, centers, samples):
    maps = rearrange(centers, "b (i j) c -> b c i j", i=samples)
    weight, bias = w["conv_pos.proj.0.weight"], w["conv_pos.proj.0.bias"]
    return centers + rearrange(F.conv2d(maps, weight, bias, padding=1, groups=maps.shape[1]), "b c i j -> b (i j) c")


def _windows(x, size, stride):
    """NHWC -> (B * windows, size, size, C) by plain slicing."""
    out = []
    for image in x:
        for top in range(0, image.shape[0] - size + 1, stride):
            for left in range(0, image.shape[1] - size + 1, stride):
                out.append(image[top : top + size, left : left + size])
    return torch.stack(out)


def _to_map(tokens, rows, columns, samples):
    return rearrange(tokens, "(b h w) (i j) c -> b (h i) (w j) c", h=rows, w=columns, i=samples)


def _semantic_blocks(local, everywhere, semantic, heads, samples, relative):
    batch, height, width, _ = semantic.shape
    tokens = rearrange(semantic, "b (h i) (w j) c -> (b h w) (i j) c", i=samples, j=samples)
    tokens = _mlp(local, tokens + _attend(local, tokens, tokens, heads, _relative(local, samples) if relative else 0.0))
    semantic = _to_map(tokens, height // samples, width // samples, samples)
    tokens = rearrange(semantic, "b i j c -> b (i j) c")
    mask = _relative(everywhere, height) if relative else 0.0
    return _mlp(everywhere, tokens + _attend(everywhere, tokens, tokens, heads, mask)).view(semantic.shape)


def _block_weights(state, index):
    prefix = f"layers.2.blocks.{index}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def classifier_stage(state: dict[str, Tensor], x: Tensor, *, unit: int, config: dict) -> Tensor:
    """Blocks 1 to 5 of unit ``unit`` on the output ``x`` (B, 14, 14, C) of its block 0."""
    heads, samples = config["heads"], config["samples"]
    w = [_block_weights(state, 6 * unit + i) for i in range(6)]
    centers = _pool(_windows(x, 7, 7), samples)
    if config["use_conv_pos"]:
        centers = _conv_pos(w[1], centers, samples)
    keys = torch.cat([centers, _windows(x, 10, 4).flatten(1, 2)], 1)
    s = _attend(w[1], centers, keys, heads) + (centers if config["shortcut"] else 0)
    semantic = _mlp(w[1], _to_map(s, 2, 2, samples))
    s, image = semantic.flatten(1, 2), x.flatten(1, 2)
    query = s + state["layers.2.semantic_token2"] if config["use_global"] and unit == 0 else s
    s = _mlp(w[2], query + _attend(w[2], query, torch.cat([s, image], 1), heads))
    semantic = _semantic_blocks(w[3], w[4], s.view(semantic.shape), heads, samples, config["relative_pos"])
    return _mlp(w[5], image + _attend(w[5], image, semantic.flatten(1, 2), heads)).view(x.shape)


def _reference_mask(size, pad_b, pad_r, low, high, kernel, stride, mode, real):
    mask = torch.zeros(1, *size, 1, dtype=torch.float64)
    if mode == "reference":
        mask[:, -pad_b:, -pad_r:] = -1000.0
        outside = -1000.0
    else:
        mask[:, real[0] :] = float("-inf")
        mask[:, :, real[1] :] = float("-inf")
        outside = float("-inf")
    mask = F.pad(mask, (0, 0, low, high, low, high), value=outside)
    return _windows(mask, kernel, stride).flatten(1)[:, None, None, :]


def dense_stage(state: dict[str, Tensor], x: Tensor, *, unit: int, config: dict) -> Tensor:
    """Blocks 1 to 5 of unit ``unit`` on the output ``x`` (B, H, W, C) of its block 0, masks by
    ``config['mask_mode']``.
    """
    heads, samples, mode = config["heads"], config["samples"], config["mask_mode"]
    batch, height, width, _ = x.shape
    pad_b, pad_r = -height % 7, -width % 7
    padded = F.pad(x, (0, 0, 0, pad_r, 0, pad_b))
    rows, columns = padded.shape[1] // 7, padded.shape[2] // 7
    w = [_block_weights(state, 6 * unit + i) for i in range(6)]

    def keys_of(source, kernel, cell, real):
        low, high = (kernel - cell) // 2, -(-(kernel - cell) // 2)
        keys = _windows(F.pad(source, (0, 0, low, high, low, high)), kernel, cell).flatten(1, 2)
        if mode == "none":
            return keys, 0.0
        mask = _reference_mask(source.shape[1:3], pad_b, pad_r, low, high, kernel, cell, mode, real)
        return keys, mask.repeat(batch, 1, 1, 1).to(x.dtype)

    def recovery_keys(semantic, kernel):
        # the reference pads the semantic map before norm1, so a padded key is norm1(0) here too
        return keys_of(semantic, kernel, samples, semantic.shape[1:3])

    centers = _pool(_windows(padded, 7, 7), samples)
    if config["use_conv_pos"]:
        centers = _conv_pos(w[1], centers, samples)
    keys, mask = keys_of(padded, config["key_windows"][0], 7, (height, width))
    s = _attend(w[1], centers, keys, heads, mask) + (centers if config["shortcut"] else 0)
    semantic = _mlp(w[1], _to_map(s, rows, columns, samples))
    query = rearrange(semantic, "b (h i) (w j) c -> (b h w) (i j) c", i=samples, j=samples)
    keys, mask = keys_of(padded, config["key_windows"][1], 7, (height, width))
    semantic = _mlp(w[2], _to_map(query + _attend(w[2], query, keys, heads, mask), rows, columns, samples))
    semantic = _semantic_blocks(w[3], w[4], semantic, heads, samples, relative=False)
    keys, mask = recovery_keys(semantic, config["key_windows"][2])
    image = _windows(padded, 7, 7).flatten(1, 2)
    out = image + _attend(w[5], image, keys, heads, mask)
    out = rearrange(out, "(b h w) (i j) c -> b (h i) (w j) c", h=rows, w=columns, i=7)[:, :height, :width]
    return _mlp(w[5], out)
