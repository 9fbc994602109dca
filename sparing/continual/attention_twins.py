"""torch's transformer encoders and attention to their continual twins, with the very same weights."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sparing.continual.attention import SingleOutputAttention
from sparing.continual.encoder import TransformerEncoder
from sparing.continual.place import Place


def encoder_twin(encoder: Any, place: Place) -> nn.Module:
    """``nn.TransformerEncoder`` over a sliding window; every layer must be built as the first one is."""
    _check_window(encoder, place)
    if not len(encoder.layers):
        raise place.refuse(encoder, "has no layers")
    places = [place.inside(f"layers.{i}") for i in range(len(encoder.layers))]
    settings = [_encoder_settings(layer, at) for layer, at in zip(encoder.layers, places)]
    for layer, at, mine in zip(encoder.layers, places, settings):
        differ = [
            f"{name} {mine[name]} (first layer: {value})" for name, value in settings[0].items() if mine[name] != value
        ]
        if differ:
            raise at.refuse(layer, f"is built otherwise than the first layer: {', '.join(differ)}")
    if encoder.norm is not None:
        if type(encoder.norm) is not nn.LayerNorm:
            raise place.refuse(encoder, f"ends in {type(encoder.norm).__name__}; a LayerNorm is known")
        _check_norm(encoder.norm, place.inside("norm"))
    with torch.device("meta"):
        twin = TransformerEncoder(
            sequence_len=place.sequence_len,  # type: ignore[arg-type]
            num_layers=len(encoder.layers),
            final_norm=encoder.norm is not None,
            dropout=encoder.layers[0].dropout.p,
            **settings[0],
        )
    if twin.norm is not None:
        twin.norm.eps = encoder.norm.eps
    return _with_weights_of(encoder, twin)


def _encoder_settings(layer: Any, place: Place) -> dict[str, Any]:
    """The constructor's arguments of one layer's twin. ValueError for a layer that has none."""
    if type(layer) is not nn.TransformerEncoderLayer:
        raise place.refuse(layer, "is not torch's TransformerEncoderLayer")
    names = {F.relu: "relu", F.gelu: "gelu", nn.ReLU: "relu", nn.GELU: "gelu"}
    activation = names.get(layer.activation) or names.get(type(layer.activation))  # type: ignore[call-overload]
    if activation is None or getattr(layer.activation, "approximate", "none") != "none":
        raise place.refuse(layer, f"has activation {layer.activation}; relu and exact gelu are known")
    if layer.linear1.bias is None or layer.self_attn.in_proj_weight is None:
        raise place.refuse(layer, "has no bias, or separate widths of keys and values; torch's defaults are known")
    if layer.self_attn.bias_k is not None or layer.self_attn.add_zero_attn:
        raise place.refuse(layer, "has bias_kv or add_zero_attn, which are not known on a stream")
    for name in ("norm1", "norm2"):
        _check_norm(getattr(layer, name), place.inside(name))
    if layer.norm1.eps != layer.norm2.eps:
        raise place.refuse(layer, f"has two norms of different eps, {layer.norm1.eps} and {layer.norm2.eps}")
    return {
        "d_model": layer.self_attn.embed_dim,
        "num_heads": layer.self_attn.num_heads,
        "dim_feedforward": layer.linear1.out_features,
        "activation": activation,
        "norm_first": layer.norm_first,
        "layer_norm_eps": layer.norm1.eps,
    }


def _check_window(module: nn.Module, place: Place) -> None:
    if place.sequence_len is None:
        raise place.refuse(module, "attends over the whole clip: pass sequence_len=, the window of tokens of a step")
    if not isinstance(place.sequence_len, int) or place.sequence_len < 1:
        raise place.refuse(module, f"sequence_len must be a whole number of tokens, got {place.sequence_len}")


def _check_norm(norm: Any, place: Place) -> None:
    if norm.weight is None or norm.bias is None:
        raise place.refuse(norm, "has no weight or no bias; elementwise_affine=True and bias=True are known")


def attention_twin(attention: Any, place: Place) -> nn.Module:
    """``nn.MultiheadAttention`` over a sliding window, answered for the newest token."""
    _check_window(attention, place)
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        raise place.refuse(attention, "has separate widths, bias_kv or add_zero_attn, which are not known on a stream")
    with torch.device("meta"):
        twin = SingleOutputAttention(
            attention.embed_dim,
            attention.num_heads,
            sequence_len=place.sequence_len,  # type: ignore[arg-type]
            bias=attention.in_proj_bias is not None,
        )
    return _with_weights_of(attention, twin)


def _with_weights_of(module: nn.Module, twin: nn.Module) -> nn.Module:
    """``twin`` with the very parameters of ``module``, so that what is shared stays shared; their keys are the same."""
    assert set(twin.state_dict()) == set(module.state_dict())
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(owner), leaf, parameter)
    return twin
