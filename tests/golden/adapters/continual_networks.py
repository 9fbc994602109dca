"""Golden cases of the continual networks: X3D, 3-D ResNets, skeletons."""

import torch
from torch import Tensor

from golden.harness import Case
from sparing.continual import resnet3d, skeleton, x3d


def x3d_stage(case: Case, streamed) -> dict[str, Tensor]:
    c = case.config
    stage = x3d.X3DStage(
        c["dim_in"],
        c["dim_out"],
        c["dim_inner"],
        c["num_blocks"],
        spatial_stride=c["spatial_stride"],
        groups=c["groups"],
        temporal_kernel=c["temporal_kernel"],
        se_dim=c["se_dim"],
        se_blocks=tuple(c["se_blocks"]),
        se_scope=c["se_scope"],
        se_window=c.get("temporal_window_size", 1),
        temporal_fill=c["temporal_fill"],
        eps=c["batch_norm_eps"],
    )
    stage.load_state_dict(case.weights)
    results = streamed(stage, case)
    with torch.no_grad():
        if c["temporal_fill"] == "zeros":
            whole = stage(case.inputs["input"], "stream")
            torch.testing.assert_close(whole, results["steps_pad_end"], atol=1e-5, rtol=1e-5)
        return results | {"forward_clip_se": stage(case.inputs["input"])}


def cox3d(case: Case, streamed) -> dict[str, Tensor]:
    c = case.config
    names = (
        "image_size",
        "temporal_window_size",
        "num_classes",
        "in_channels",
        "conv1_dim",
        "conv5_dim",
        "width_factor",
        "depth_factor",
        "bottleneck_factor",
        "se_ratio",
        "channelwise",
        "head_activation",
        "se_scope",
        "temporal_fill",
        "batch_norm_eps",
    )
    network = x3d.CoX3D(**{name: c[name] for name in names})
    network.load_state_dict(x3d.checkpoint_filter_fn(case.weights, network))
    results = streamed(network, case)
    x = case.inputs["input"]
    with torch.no_grad():
        if c["temporal_fill"] == "zeros":
            torch.testing.assert_close(network(x, se="stream"), results["steps_pad_end"], atol=2e-5, rtol=1e-5)
        return results | {"clip_forward": network(x[:, :, : c["temporal_window_size"]])}


def coresnet(case: Case, streamed) -> dict[str, Tensor]:
    c = case.config
    network = resnet3d.CoResNet(
        arch=c["arch"],
        image_size=c["image_size"],
        temporal_window_size=c["temporal_window_size"],
        num_classes=c["num_classes"],
        in_channels=c["in_channels"],
        stage_depths=tuple(c["stage_depths"]),
        width=c["stem_width"],
        num_groups=c["num_groups"],
        stem_temporal_kernel=c["stem_temporal_kernel"],
        stage_temporal_kernels=tuple(tuple(kernels) for kernels in c["stage_temporal_kernels"]),
        pool1=tuple(c["pool1"]),
        head_activation=c["head_activation"],
        temporal_fill=c["temporal_fill"],
        batch_norm_eps=c["batch_norm_eps"],
    )
    network.load_state_dict(resnet3d.checkpoint_filter_fn(case.weights, network))
    results = streamed(network, case)
    with torch.no_grad():
        return results | {"clip_forward": network(case.inputs["input"][:, :, : c["temporal_window_size"]])}


def graph_of(config: dict) -> tuple[int, skeleton.Edges]:
    return config["num_nodes"], tuple((i, j) for i, j in config["inward"])


def skeleton_graph(case: Case, streamed) -> dict[str, Tensor]:
    return {"A": skeleton.skeleton_graph(*graph_of(case.config))}


def cost_gcn_block(case: Case, streamed) -> dict[str, Tensor]:
    c = case.config
    unit = skeleton.GraphConv(
        c["in_channels"], c["out_channels"], skeleton.skeleton_graph(*graph_of(c)), eps=c["batch_norm_eps"]
    )
    block = skeleton.SpatioTemporalBlock(
        unit,
        c["in_channels"],
        c["out_channels"],
        temporal_kernel=c["temporal_kernel"],
        temporal_stride=c["temporal_stride"],
        temporal_padding=c["temporal_padding"],
        residual=c["residual"],
        eps=c["batch_norm_eps"],
    )
    block.load_state_dict(skeleton.checkpoint_filter_fn(case.weights, block))
    results = streamed(block, case)
    with torch.no_grad():
        return results | {"forward": block(case.inputs["input"])}


def cost_gcn(case: Case, streamed) -> dict[str, Tensor]:
    c = case.config
    network = skeleton.CoSkeletonNet(
        lambda k, c_in, c_out, graph: skeleton.GraphConv(c_in, c_out, graph, eps=c["batch_norm_eps"]),
        tuple((r["in_channels"], r["out_channels"], r["temporal_stride"], r["residual"]) for r in c["layers"]),
        graph=graph_of(c),
        num_skeletons=c["num_skeletons"],
        num_classes=c["num_classes"],
        temporal_kernel=c["temporal_kernel"],
        temporal_padding=c["temporal_padding"],
        clip_length=c["clip_length"],
        eps=c["batch_norm_eps"],
    )
    assert (network.pool.kernel_size[0], network.pool.padding[0]) == (c["pool_size"], c["pool_padding"])
    network.load_state_dict(skeleton.checkpoint_filter_fn(case.weights, network))
    results = streamed(network, case)
    x = case.inputs["input"]
    with torch.no_grad():
        clip = network.mean(network.layers(network.enter(x, network.data_bn)))
        torch.testing.assert_close(network.fc(network.pool(clip)), results["steps_pad_end"], atol=5e-5, rtol=1e-5)
        return results | {"clip_forward": network(x[:, :, : c["clip_length"]])}


def adaptive_graph_conv(case: Case, streamed) -> dict[str, Tensor]:
    c = case.config
    unit = skeleton.AdaptiveGraphConv(
        c["in_channels"],
        c["out_channels"],
        skeleton.skeleton_graph(*graph_of(c)),
        coff_embedding=c["coff_embedding"],
        per_frame=c["per_frame"],
        softmax_over=c["softmax_over"],
        aggregation=c["aggregation"],
        eps=c["batch_norm_eps"],
    )
    return _per_frame_unit(unit, case)


def spatial_attention_unit(case: Case, streamed) -> dict[str, Tensor]:
    c = case.config
    unit = skeleton.SpatialAttentionUnit(
        c["in_channels"],
        c["out_channels"],
        torch.zeros(3, c["num_nodes"], c["num_nodes"]),
        num_heads=c["num_heads"],
        dk=c["dk"],
        dv=c["dv"],
        normalise=c["data_normalization"],
        skip=c["skip_connection"],
        eps=c["batch_norm_eps"],
    )
    return _per_frame_unit(unit, case)


def _per_frame_unit(unit: skeleton.GraphUnit, case: Case) -> dict[str, Tensor]:
    unit.load_state_dict(case.weights)
    unit.eval()
    x = case.inputs["input"]
    with torch.no_grad():
        whole = unit(x)
        if getattr(unit, "per_frame", True):
            state = unit.init_state(x.shape[0], (x.shape[1], x.shape[3]))
            steps = torch.stack([unit.step(frame, state)[0] for frame in x.unbind(2)], 2)
            torch.testing.assert_close(steps, whole, atol=1e-5, rtol=1e-5)
    return {"forward": whole}


BUILDERS = {
    "x3d_stage": x3d_stage,
    "cox3d": cox3d,
    "coresnet": coresnet,
    "skeleton_graph": skeleton_graph,
    "cost_gcn_block": cost_gcn_block,
    "cost_gcn": cost_gcn,
    "adaptive_graph_conv": adaptive_graph_conv,
    "spatial_attention_unit": spatial_attention_unit,
}
