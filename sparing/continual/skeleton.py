"""CoST-GCN, CoAGCN and CoS-TR: action recognition on streams of skeletons.

Hedegaard, Heidari and Iosifidis, *Continual Spatio-Temporal Graph Convolutional Networks* (Pattern Recognition 2023),
on ST-GCN (Yan et al., AAAI 2018), AGCN (Shi et al., CVPR 2019) and S-TR (Plizzari et al., 2021). Ten blocks of a
spatial unit per frame and a 9-tap temporal convolution. The starred forms have no temporal padding and no temporal
stride, so a step equals the clip network on the last R frames; the plain ones keep the clip network's strides and
padding.

Clips (N, C, T, V, S) with V joints of S skeletons to (N, classes); frames (streams, C, V, S) to (streams, classes).
Inside the network the skeletons lie beside each other on the joint axis, (N, C, T, S * V), so every memory has one
row per stream.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from sparing.continual.container import Branches, Chain, Part, Sequential, named_sequential, residual_crop
from sparing.continual.conv import Conv2d
from sparing.continual.per_frame import Linear, PerFrameLayer
from sparing.continual.pool import AvgPool1d
from sparing.continual.timing import Tick
from sparing.zoo.registry import register_model

Edges = tuple[tuple[int, int], ...]

# Sensor skeletons: joints, edges (joint, its neighbour towards the centre), from 0.
NTU: tuple[int, Edges] = (
    25,
    (
        (0, 1), (1, 20), (2, 20), (3, 2), (4, 20), (5, 4), (6, 5), (7, 6), (8, 20), (9, 8), (10, 9), (11, 10),
        (12, 0), (13, 12), (14, 13), (15, 14), (16, 0), (17, 16), (18, 17), (19, 18),
        (21, 22), (22, 7), (23, 24), (24, 11),
    ),
)  # fmt: skip
KINETICS: tuple[int, Edges] = (
    18,
    (
        (4, 3), (3, 2), (7, 6), (6, 5), (13, 12), (12, 11), (10, 9), (9, 8), (11, 5),
        (8, 2), (5, 1), (2, 1), (0, 1), (15, 0), (14, 0), (17, 15), (16, 14),
    ),
)  # fmt: skip
PLAIN_LAYERS = (64, 64, 64, 64, 128, 128, 128, 256, 256, 256)
STRIDED = (5, 8)  # layers of stride 2 in the plain networks, counted from 1


def skeleton_graph(num_nodes: int, inward: Edges) -> Tensor:
    """Adjacency (3, V, V): self, inward, outward; an edge (i, j) sets ``A[j, i]``; the last two column-normalised."""

    def normalised(edges: Edges) -> Tensor:
        a = torch.zeros(num_nodes, num_nodes)
        for i, j in edges:
            if not (0 <= i < num_nodes and 0 <= j < num_nodes):
                raise ValueError(f"edge ({i}, {j}) is outside the {num_nodes} joints")
            a[j, i] = 1
        return a / a.sum(0).clamp(min=1)

    return torch.stack([torch.eye(num_nodes), normalised(inward), normalised(tuple((j, i) for i, j in inward))])


class GraphUnit(PerFrameLayer, nn.Module):
    """What spatial units share: a function of (N, C, T, S * V) that treats every frame alike."""

    A: Tensor

    def __init__(self, graph: Tensor) -> None:
        super().__init__()
        self.register_buffer("A", graph.clone())

    def _frame(self, x: Tensor) -> Tensor:
        return self.forward(x.unsqueeze(2)).squeeze(2)

    def _by_skeleton(self, x: Tensor) -> Tensor:
        return rearrange(x, "n c t (s v) -> n c t s v", v=self.A.shape[-1])


def _residual(in_channels: int, out_channels: int, eps: float) -> nn.Module:
    if in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels, eps=eps))


def _conv_init(conv: nn.Conv2d, branches: int = 1) -> None:
    nn.init.normal_(conv.weight, std=math.sqrt(2 / (conv.weight.numel() * branches)))
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]


class GraphConv(GraphUnit):
    """ST-GCN: ``relu(bn(sum_i conv_i(x (A_i * M_i))) + r(x))`` with a learned mask M."""

    def __init__(self, in_channels: int, out_channels: int, graph: Tensor, *, eps: float = 1e-5) -> None:
        super().__init__(graph)
        self.graph_attn = nn.Parameter(torch.ones_like(graph))
        self.g_conv = nn.ModuleList(nn.Conv2d(in_channels, out_channels, 1) for _ in graph)
        self.bn = nn.BatchNorm2d(out_channels, eps=eps)
        self.gcn_residual = _residual(in_channels, out_channels, eps)
        for conv in self.g_conv:
            _conv_init(conv, len(graph))  # type: ignore[arg-type]
        nn.init.constant_(self.bn.weight, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.einsum("n c t s v, k v w -> k n c t s w", self._by_skeleton(x), self.A * self.graph_attn)
        parts = [conv(part.flatten(3)) for conv, part in zip(self.g_conv, mixed)]
        return torch.relu(self.bn(sum(parts[1:], parts[0])) + self.gcn_residual(x))


class AdaptiveGraphConv(GraphUnit):
    """AGCN: the graph is ``A_i + M_i + softmax(a_i(x)^T b_i(x))``.

    Args:
        per_frame: correlate joints frame by frame also in clip mode (starred form: a step equals the clip).
            Otherwise clip mode correlates over all frames of the clip, and a step over its one frame.
        softmax_over: 'source' or 'target' joint. The published plain form uses 'source', the starred form 'target'.
        aggregation: 'joints' mixes joints by the graph; 'row_sum' scales every joint by its row of the graph,
            which is what the published starred form computes (kept for its checkpoints).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        graph: Tensor,
        *,
        coff_embedding: int = 4,
        per_frame: bool = True,
        softmax_over: str = "source",
        aggregation: str = "joints",
        eps: float = 1e-5,
    ) -> None:
        super().__init__(graph)
        if softmax_over not in ("source", "target"):
            raise ValueError(f"softmax_over must be 'source' or 'target', got {softmax_over!r}")
        if aggregation not in ("joints", "row_sum"):
            raise ValueError(f"aggregation must be 'joints' or 'row_sum', got {aggregation!r}")
        self.per_frame, self.softmax_over, self.aggregation = per_frame, softmax_over, aggregation
        self.inter = out_channels // coff_embedding
        self.graph_attn = nn.Parameter(torch.full_like(graph, 1e-6))
        self.a_conv = nn.ModuleList(nn.Conv2d(in_channels, self.inter, 1) for _ in graph)
        self.b_conv = nn.ModuleList(nn.Conv2d(in_channels, self.inter, 1) for _ in graph)
        self.g_conv = nn.ModuleList(nn.Conv2d(in_channels, out_channels, 1) for _ in graph)
        self.bn = nn.BatchNorm2d(out_channels, eps=eps)
        self.gcn_residual = _residual(in_channels, out_channels, eps)
        for conv in self.g_conv:
            _conv_init(conv, len(graph))  # type: ignore[arg-type]
        nn.init.constant_(self.bn.weight, 1e-6)

    def _frame(self, x: Tensor) -> Tensor:
        return self.forward(x.unsqueeze(2)).squeeze(2)

    def _steps(self, x: Tensor | None, memory: dict, tick: Tick, end: bool) -> tuple[Tensor | None, dict]:
        return (None if x is None else self.forward(x, per_frame=True)), memory  # whatever the size of the chunk

    def forward(self, x: Tensor, *, per_frame: bool | None = None) -> Tensor:
        skeletons = self._by_skeleton(x)
        alone = self.per_frame if per_frame is None else per_frame
        total: Tensor | None = None
        for i, conv in enumerate(self.g_conv):
            a, b = self._by_skeleton(self.a_conv[i](x)), self._by_skeleton(self.b_conv[i](x))
            if alone:
                alike = torch.einsum("n c t s v, n c t s w -> n t s v w", a, b) / self.inter
            else:
                alike = torch.einsum("n c t s v, n c t s w -> n s v w", a, b)[:, None] / (self.inter * x.shape[2])
            alike = alike.softmax(-2 if self.softmax_over == "source" else -1)
            graph = alike + self.A[i] + self.graph_attn[i]
            if self.aggregation == "joints":
                mixed = torch.einsum(
                    "n c t s v, n t s v w -> n c t s w", skeletons, graph.expand(-1, x.shape[2], *[-1] * 3)
                )
            else:
                mixed = skeletons * graph.sum(-1)[:, None]
            part = conv(mixed.flatten(3))
            total = part if total is None else total + part
        return torch.relu(self.bn(total) + self.gcn_residual(x))


class SpatialAttention(nn.Module):
    """Projections of the S-TR unit (keys ``qkv_conv``, ``attn_out``)."""

    def __init__(self, in_channels: int, dk: int, dv: int) -> None:
        super().__init__()
        self.qkv_conv = nn.Conv2d(in_channels, 2 * dk + dv, 1)
        self.attn_out = nn.Conv2d(dv, dv, 1)


class SpatialAttentionUnit(GraphUnit):
    """S-TR: multi-head self-attention over the joints of each frame."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        graph: Tensor,
        *,
        num_heads: int = 8,
        dk: int | None = None,
        dv: int | None = None,
        normalise: bool = True,
        skip: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(graph)
        self.dk = out_channels // 4 if dk is None else dk
        self.dv = out_channels if dv is None else dv
        if self.dk % num_heads or self.dv % num_heads:
            raise ValueError(f"dk {self.dk} and dv {self.dv} must be divisible by num_heads {num_heads}")
        self.num_heads, self.skips = num_heads, skip and in_channels == out_channels
        self.data_bn = nn.BatchNorm1d(in_channels * graph.shape[-1], eps=eps) if normalise else None
        self.attention_conv = SpatialAttention(in_channels, self.dk, self.dv)
        self.bn = nn.BatchNorm2d(out_channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        n, _, t, joints = x.shape
        v = self.A.shape[-1]
        normed = x
        if self.data_bn is not None:
            normed = self.data_bn(rearrange(x, "n c t (s v) -> (n t s) (c v)", v=v))
            normed = rearrange(normed, "(n t s) (c v) -> n c t (s v)", n=n, t=t, v=v)
        qkv = self.attention_conv.qkv_conv(normed)
        q, k, values = (
            rearrange(part, "n (h d) t (s v) -> n t s h v d", h=self.num_heads, v=v)
            for part in qkv.split([self.dk, self.dk, self.dv], 1)
        )
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)
        out = self.attention_conv.attn_out(rearrange(weights @ values, "n t s h v d -> n (h d) t (s v)"))
        return torch.relu(self.bn(out + x if self.skips else out))


class SpatioTemporalBlock(Branches, nn.Module):
    """``relu(tcn(gcn(x)) + r(x))``; without temporal padding the shortcut is cropped to its centre.

    Args:
        unit: the spatial unit.
        residual: 'none', 'identity' or 'conv'.
    """

    def __init__(
        self,
        unit: nn.Module,
        in_channels: int,
        out_channels: int,
        *,
        temporal_kernel: int = 9,
        temporal_stride: int = 1,
        temporal_padding: int = 4,
        residual: str = "identity",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if residual not in ("none", "identity", "conv"):
            raise ValueError(f"residual must be 'none', 'identity' or 'conv', got {residual!r}")
        self.kind = residual
        self.gcn = unit
        self.tcn = _temporal(out_channels, out_channels, temporal_kernel, temporal_stride, temporal_padding, eps)
        if residual == "conv":
            self.residual = _temporal(in_channels, out_channels, 1, temporal_stride, 0, eps)
        self.crop = None if residual == "none" else residual_crop(self.tcn.span(), "centered")
        self.relu = nn.ReLU()
        self._align()

    def branches(self) -> list[list[Part]]:
        branches: list[list[Part]] = [[("gcn", self.gcn), ("tcn", self.tcn)]]
        if self.kind != "none":
            shortcut: list[Part] = [("residual", self.residual)] if self.kind == "conv" else []
            branches.append([*shortcut, ("crop", self.crop)] if self.crop is not None else shortcut)
        return branches

    def join(self, outputs: list[Tensor]) -> Tensor:
        return self.relu(sum(outputs[1:], outputs[0]))


def _temporal(in_channels: int, out_channels: int, kernel: int, stride: int, padding: int, eps: float) -> Sequential:
    conv = Conv2d(in_channels, out_channels, (kernel, 1), stride=(stride, 1), padding=(padding, 0))
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return named_sequential(t_conv=conv, bn=nn.BatchNorm2d(out_channels, eps=eps))


class CoSkeletonNet(Chain, nn.Module):
    """Blocks of spatial and temporal units over skeletons, with a sliding mean at the end.

    Args:
        unit: makes the spatial unit of layer k (from 1): ``unit(k, in_channels, out_channels, graph)``.
        layers: (in_channels, out_channels, temporal_stride, residual) of each block.
        graph: joints and edges.
        temporal_padding: 4 keeps the length of a clip; 0 makes a step equal to the clip network.
        clip_length: frames of the clip network; it sets the pool.
        pool_size, pool_padding: frames of the sliding mean and zeros before it; None = from ``clip_length``.
            ``pool_padding=0`` makes it a mean over real frames only (the published networks begin with means of many
            zeros).
    """

    def __init__(
        self,
        unit: Callable[[int, int, int, Tensor], nn.Module],
        layers: tuple[tuple[int, int, int, str], ...],
        *,
        graph: tuple[int, Edges] = NTU,
        num_skeletons: int = 2,
        num_classes: int = 60,
        temporal_kernel: int = 9,
        temporal_padding: int = 4,
        clip_length: int = 300,
        pool_size: int | None = None,
        pool_padding: int | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        adjacency = skeleton_graph(*graph)
        self.num_joints, self.num_skeletons = graph[0], num_skeletons
        self.data_bn = nn.BatchNorm1d(num_skeletons * layers[0][0] * graph[0], eps=eps)
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for k, (c_in, c_out, stride, residual) in enumerate(layers, 1):
            blocks[f"layer{k}"] = SpatioTemporalBlock(
                unit(k, c_in, c_out, adjacency),
                c_in,
                c_out,
                temporal_kernel=temporal_kernel,
                temporal_stride=stride,
                temporal_padding=temporal_padding,
                residual=residual,
                eps=eps,
            )
        self.layers = Sequential(blocks)
        trunk = self.layers.span()
        ends = clip_length - trunk.receptive_field
        size = math.ceil((ends + 2 * trunk.padding + 1) / trunk.stride) if pool_size is None else pool_size
        if size < 1:
            raise ValueError(f"clip_length {clip_length} is shorter than the trunk's {trunk.receptive_field} frames")
        zeros = max(0, size - math.ceil((ends + trunk.padding + 1) / trunk.stride))
        self.pool = AvgPool1d(size, stride=1, padding=zeros if pool_padding is None else pool_padding)
        self.clip_length = clip_length
        self.enter = _Enter()
        self.mean = _MeanJoints()
        self.fc = Linear(layers[-1][1], num_classes)
        nn.init.normal_(self.fc.weight, std=math.sqrt(2 / num_classes))
        self.pretrained_cfg = {"kind": f"skeletons ({num_skeletons} of {graph[0]} joints a frame)"}

    def parts(self) -> list[Part]:
        return [("layers", self.layers), ("mean", self.mean), ("pool", self.pool), ("fc", self.fc)]

    def _memory(
        self, streams: int, frame_shape: tuple[int, ...], make: Callable[..., Tensor]
    ) -> tuple[dict, tuple[int, ...]]:
        want = (self.data_bn.num_features // self.num_joints // self.num_skeletons, self.num_joints, self.num_skeletons)
        if frame_shape != want:
            raise ValueError(f"frames must be (channels, joints, skeletons) = {want}, got {frame_shape}")
        return super()._memory(streams, (want[0], want[1] * want[2]), make)

    def _step(self, x: Tensor, memory: dict, tick: Tick) -> tuple[Tensor | None, dict]:
        return super()._step(self.enter(x.unsqueeze(2), self.data_bn).squeeze(2), memory, tick)

    def _steps(self, x: Tensor | None, memory: dict, tick: Tick, end: bool) -> tuple[Tensor | None, dict]:
        return super()._steps(None if x is None else self.enter(x, self.data_bn), memory, tick, end)

    def forward(self, x: Tensor) -> Tensor:
        """A clip (N, C, T, V, S) to scores (N, classes): the mean over all its frames, joints and skeletons."""
        x = self.layers(self.enter(x, self.data_bn))
        return nn.functional.linear(x.mean((2, 3)), self.fc.weight, self.fc.bias)


class _Enter(nn.Module):
    """Normalise the features of a frame in the order (skeleton, joint, channel); lay skeletons side by side."""

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        c, skeletons = x.shape[1], x.shape[4]
        x = norm(rearrange(x, "n c t v s -> n (s v c) t"))
        return rearrange(x, "n (s v c) t -> n c t (s v)", s=skeletons, c=c)


class _MeanJoints(PerFrameLayer, nn.Module):
    """Mean over the joints of all skeletons."""

    def _frame(self, x: Tensor) -> Tensor:
        return x.mean(-1)

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-1)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Clip and Co* checkpoints (container segments ``0.0.`` and ``0.1.``) to our keys."""
    state_dict = state_dict.get("state_dict", state_dict)
    pattern = r"(^|\.)0\.[01]\.(?=(?:gcn|tcn|residual)\.)"
    return {re.sub(pattern, r"\1", key): value for key, value in state_dict.items()}


def published_layers(in_channels: int = 3, *, starred: bool = False) -> tuple[tuple[int, int, int, str], ...]:
    """The ten blocks of the published networks; the starred forms have no temporal stride."""
    rows = []
    before = in_channels
    for k, width in enumerate(PLAIN_LAYERS, 1):
        stride = 2 if k in STRIDED and not starred else 1
        residual = "none" if k == 1 else "identity" if before == width and stride == 1 else "conv"
        rows.append((before, width, stride, residual))
        before = width
    return tuple(rows)


def _unit_st_gcn(k: int, c_in: int, c_out: int, graph: Tensor) -> nn.Module:
    return GraphConv(c_in, c_out, graph)


def _unit_agcn(starred: bool, aggregation: str) -> Callable[[int, int, int, Tensor], nn.Module]:
    axis = "target" if aggregation == "row_sum" else "source"
    return lambda k, c_in, c_out, graph: AdaptiveGraphConv(
        c_in, c_out, graph, per_frame=starred, softmax_over=axis, aggregation=aggregation
    )


def _unit_s_tr(k: int, c_in: int, c_out: int, graph: Tensor) -> nn.Module:
    return GraphConv(c_in, c_out, graph) if k < 4 else SpatialAttentionUnit(c_in, c_out, graph)


def _build(unit: Callable[[int, int, int, Tensor], nn.Module], starred: bool, kwargs: dict[str, Any]) -> CoSkeletonNet:
    in_channels = kwargs.pop("in_channels", 3)
    options = {"temporal_padding": 0 if starred else 4, **kwargs}
    return CoSkeletonNet(unit, published_layers(in_channels, starred=starred), **options)


@register_model
def co_st_gcn(pretrained: bool = False, **kwargs: Any) -> CoSkeletonNet:
    """CoST-GCN: ST-GCN's weights, one prediction every 4 frames."""
    return _build(_unit_st_gcn, False, kwargs)


@register_model
def co_st_gcn_star(pretrained: bool = False, **kwargs: Any) -> CoSkeletonNet:
    """CoST-GCN*: no padding, no stride; one prediction per frame, equal to the clip network on the last 300 frames."""
    return _build(_unit_st_gcn, True, kwargs)


@register_model
def co_agcn(pretrained: bool = False, *, aggregation: str = "joints", **kwargs: Any) -> CoSkeletonNet:
    """CoAGCN: adaptive graphs; a step correlates the joints of its own frame."""
    return _build(_unit_agcn(False, aggregation), False, kwargs)


@register_model
def co_agcn_star(pretrained: bool = False, *, aggregation: str = "joints", **kwargs: Any) -> CoSkeletonNet:
    """CoAGCN*; ``aggregation='row_sum'`` for the published checkpoints."""
    return _build(_unit_agcn(True, aggregation), True, kwargs)


@register_model
def co_s_tr(pretrained: bool = False, **kwargs: Any) -> CoSkeletonNet:
    """CoS-TR: self-attention over joints from the fourth block on."""
    return _build(_unit_s_tr, False, kwargs)


@register_model
def co_s_tr_star(pretrained: bool = False, **kwargs: Any) -> CoSkeletonNet:
    """CoS-TR*: no padding, no stride."""
    return _build(_unit_s_tr, True, kwargs)
