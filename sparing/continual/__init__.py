"""Continual inference: clip networks that run on live streams."""

from sparing.continual.attention import RetroactiveAttention, SingleOutputAttention
from sparing.continual.container import BroadcastReduce, Conditional, Residual, Sequential, named_sequential
from sparing.continual.conv import Conv1d, Conv2d, Conv3d
from sparing.continual.convert import convert
from sparing.continual.delay import Delay, Skip
from sparing.continual.encoder import TransformerEncoder, encoder_filter_fn
from sparing.continual.explain import explain
from sparing.continual.export import export_onnx, export_step
from sparing.continual.folding import fold_batch_norm
from sparing.continual.log_mel import LogMel, hops_of
from sparing.continual.module import Continual, Plan, Stream
from sparing.continual.per_frame import GLU, Flatten, LayerNorm, Linear, LogSoftmax, PerFrame, Softmax
from sparing.continual.pool import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
)
from sparing.continual.positional import RecyclingPositionalEncoding, cyclic_table
from sparing.continual.recurrent import GRU, LSTM, RNN
from sparing.continual.state import StreamState, gather, leaves, load_state, reset, save_state, scatter, state_bytes
from sparing.continual.stream_batch import StreamBatch

__all__ = [
    "GLU",
    "GRU",
    "LSTM",
    "RNN",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "BroadcastReduce",
    "Conditional",
    "Continual",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Delay",
    "Flatten",
    "LayerNorm",
    "Linear",
    "LogMel",
    "LogSoftmax",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "PerFrame",
    "Plan",
    "RecyclingPositionalEncoding",
    "Residual",
    "RetroactiveAttention",
    "Sequential",
    "SingleOutputAttention",
    "Skip",
    "Softmax",
    "Stream",
    "StreamBatch",
    "StreamState",
    "TransformerEncoder",
    "convert",
    "cyclic_table",
    "encoder_filter_fn",
    "explain",
    "export_onnx",
    "export_step",
    "fold_batch_norm",
    "gather",
    "hops_of",
    "leaves",
    "load_state",
    "named_sequential",
    "reset",
    "save_state",
    "scatter",
    "state_bytes",
]
