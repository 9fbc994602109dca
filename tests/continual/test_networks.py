"""The networks: published plans, costs, memories, keys; compiled; precise at low precision."""

import re

import pytest
import torch
from continual.test_layers import run_steps
from torch import nn

from sparing import continual as co
from sparing.continual import resnet3d, skeleton, x3d

TINY_X3D = {
    "image_size": 32,
    "temporal_window_size": 3,
    "num_classes": 5,
    "conv1_dim": 8,
    "conv5_dim": 16,
    "width_factor": 1.0,
    "depth_factor": 0.3,
}
TINY_GRAPH = (5, ((0, 1), (1, 2), (2, 3), (2, 4)))


def randomise(network):
    """Weights and statistics that let something through (X3D's last norms start at zero, ST-GCN's at 1e-6)."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
    return network.eval()


def tiny_x3d(**options):
    torch.manual_seed(0)
    return randomise(x3d.CoX3D(**{**TINY_X3D, **options}))


def tiny_slow(arch="slow"):
    return randomise(
        resnet3d.CoResNet(
            arch=arch, image_size=32, temporal_window_size=4, num_classes=5, stage_depths=(1, 1, 2, 1), width=4
        )
    )


def tiny_skeleton(starred, unit=None, layers=None):
    kinds = layers or ((3, 6, 1, "none"), (6, 6, 1, "identity"), (6, 8, 1 if starred else 2, "conv"))
    return randomise(
        skeleton.CoSkeletonNet(
            unit or (lambda k, a, b, g: skeleton.GraphConv(a, b, g)),
            kinds,
            graph=TINY_GRAPH,
            num_classes=4,
            temporal_kernel=5,
            temporal_padding=0 if starred else 2,
            clip_length=16,
        )
    )


def _adaptive_unit(k, c_in, c_out, graph):
    return skeleton.AdaptiveGraphConv(c_in, c_out, graph, per_frame=False)


def _attention_unit(k, c_in, c_out, graph):
    if k == 1:
        return skeleton.GraphConv(c_in, c_out, graph)
    return skeleton.SpatialAttentionUnit(c_in, c_out, graph, num_heads=2, dk=2, dv=c_out)


@pytest.mark.parametrize(
    ("build", "window", "delay", "field"),
    [
        (x3d.co_x3d_s, 13, 40, 69),
        (x3d.co_x3d_s, 64, 91, 120),
        (x3d.co_x3d_m, 16, 43, 72),
        (x3d.co_x3d_m, 64, 91, 120),
        (x3d.co_x3d_l, 16, 72, 130),
        (x3d.co_x3d_l, 64, 120, 178),
        (resnet3d.co_slow_r50, 8, 16, 26),
        (resnet3d.co_slow_r50, 64, 72, 82),
        (resnet3d.co_i3d_r50, 8, 24, 42),
        (resnet3d.co_i3d_r50, 64, 80, 98),
    ],
)
def test_published_delays_and_receptive_fields(build, window, delay, field):
    with torch.device("meta"):
        plan = build(temporal_window_size=window).plan()
    assert (plan.delay, plan.receptive_field) == (delay, field)


def test_published_skeleton_plans():
    with torch.device("meta"):
        plain, starred = skeleton.co_st_gcn(), skeleton.co_st_gcn_star()
    trunk = plain.layers.plan()
    assert (trunk.receptive_field, trunk.padding, trunk.period) == (153, 76, 4)
    assert (plain.pool.kernel_size[0], plain.pool.padding[0]) == (75, 19)
    assert (starred.layers.plan().receptive_field, starred.pool.kernel_size[0]) == (81, 220)
    assert starred.plan().receptive_field == 300
    assert starred.plan().equals_clip_of_last_frames
    assert not plain.plan().equals_clip_of_last_frames


def step_macs(network, frame_shape):
    """Multiply-adds of convolutions and linear layers of one step, from the shapes that really run (on meta)."""
    from torch.utils.flop_counter import FlopCounterMode

    state = network.init_state(1, frame_shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.step(torch.empty(1, *frame_shape, device="meta"), state)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(("size", "want"), [("xs", 152.7e6), ("s", 152.7e6), ("m", 297.5e6), ("l", 1149.9e6)])
def test_published_step_macs_of_x3d(size, want):
    with torch.device("meta"):
        network = x3d._build(size, {"temporal_window_size": 64}).eval()
    got = step_macs(network, (3, network.image_size, network.image_size))
    assert abs(got - want) < 0.01 * want  # no k-fold overcount: the convolutions that run are the clip's, divided by T


def test_published_step_macs_of_slow_and_skeletons():
    with torch.device("meta"):
        slow, star = resnet3d.co_slow_r50(temporal_window_size=64).eval(), skeleton.co_st_gcn_star().eval()
    assert abs(step_macs(slow, (3, 256, 256)) - 6815.5e6) < 0.01 * 6815.5e6
    got, v, head = step_macs(star, (3, 25, 2)), 25, 256 * 60
    formula, before = 0, 3
    for k, width in enumerate(skeleton.PLAIN_LAYERS, 1):
        changes = before != width
        formula += v * (3 * (before * v + before * width) + changes * before * width + 9 * width**2)
        formula += v * (k > 1 and changes) * before * width
        before = width
    assert 2 * formula == 158_990_000 or abs(2 * formula - 158.99e6) < 5e3
    assert got - head == 2 * formula


def test_state_memory_is_minimal():
    """Section 6.1: 8.8 MB of convolutions and 1.4 MB of delays for CoX3D-S, plus the ring of the pool."""
    for size, want in (("s", 8.8e6 + 1.4e6), ("m", 17.2e6 + 2.7e6), ("l", 58.1e6 + 10.8e6)):
        with torch.device("meta"):
            network = x3d._build(size, {"temporal_window_size": 64})
        pool = 63 * 432 * 4
        got = network.plan((3, network.image_size, network.image_size)).bytes_per_stream - pool
        assert got < 1.1 * want


def test_x3d_checkpoints_load_without_missing_or_unexpected_keys():
    network = tiny_x3d()
    published = {}
    for key, value in network.state_dict().items():
        head, _, tail = key.partition("pathway0_res0.")
        published[f"{head}pathway0_res0.0.1.{tail}" if tail else key] = value
    assert set(published) != set(network.state_dict())
    found = network.load_state_dict(x3d.checkpoint_filter_fn({"model_state": published}, network))
    assert not found.missing_keys
    assert not found.unexpected_keys
    with torch.device("meta"):
        assert len(x3d.co_x3d_l().state_dict()) == 1146


def test_slow_checkpoints_load_under_pytorchvideo_names():
    network = tiny_slow()
    published = {}
    for key, value in network.state_dict().items():
        new = key.replace("pathway0_res", "res_blocks.")
        new = new.replace("branch1.", "branch1_conv.").replace("branch1_bn.", "branch1_norm.")
        published["blocks." + new.replace("projection", "proj")] = value
    found = network.load_state_dict(resnet3d.checkpoint_filter_fn({"model_state": published}, network))
    assert not found.missing_keys
    assert not found.unexpected_keys


def _slowfast_names(key):
    """Our key to SlowFast's (the names into which its Caffe2 files are read): s1 stem, s2..s5 stages, head."""
    stage, _, rest = key.partition(".")
    if stage == "5":
        return f"head.{rest}"
    if stage == "0":
        return "s1.pathway0_stem." + rest.replace("norm.", "bn.")
    rest = re.sub(r"branch2\.conv_([abc])\.", r"branch2.\1.", rest)
    return f"s{int(stage) + 1}." + re.sub(r"branch2\.norm_([abc])\.", r"branch2.\1_bn.", rest)


def _pytorchvideo_names(key):
    """Our key to pytorchvideo's: its I3D counts the pool behind the first stage as block 2."""
    stage, _, rest = key.partition(".")
    rest = rest.replace("pathway0_res", "res_blocks.").replace("projection", "proj")
    rest = rest.replace("branch1.", "branch1_conv.").replace("branch1_bn.", "branch1_norm.")
    return f"blocks.{int(stage) + (int(stage) > 1)}.{rest}"


@pytest.mark.parametrize("names", [_slowfast_names, _pytorchvideo_names])
def test_i3d_checkpoints_load_under_published_names(names):
    network = tiny_slow("i3d")
    published = {
        names(key): torch.randn_like(value, dtype=torch.float32) for key, value in network.state_dict().items()
    }
    assert len(published) == len(network.state_dict())
    assert set(published).isdisjoint(network.state_dict())
    mapped = resnet3d.checkpoint_filter_fn({"model_state": published}, network)
    found = network.load_state_dict(mapped)
    assert not found.missing_keys
    assert not found.unexpected_keys
    assert all(torch.equal(mapped[key], published[names(key)]) for key in network.state_dict())


@pytest.mark.parametrize("scope", ["frame", "clip", "causal"])
def test_squeeze_excitation_scopes_equal_the_stream_computation(scope):
    network = tiny_x3d(se_scope=scope)
    x = torch.randn(2, 3, 22, 32, 32)
    with torch.no_grad():
        want = network(x, se="stream")
        for lockstep in (False, True):
            got, state = run_steps(network, x, lockstep=lockstep)
            rest, _, _ = network.flush(state)
            torch.testing.assert_close(torch.cat([got, rest], 2), want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "build",
    [
        tiny_x3d,
        lambda: tiny_skeleton(False),
        pytest.param(lambda: tiny_slow("i3d"), marks=pytest.mark.slow),
        pytest.param(lambda: tiny_slow("slow"), marks=pytest.mark.slow),
        pytest.param(lambda: tiny_skeleton(False, _adaptive_unit), marks=pytest.mark.slow),
        pytest.param(lambda: tiny_skeleton(True, _attention_unit), marks=pytest.mark.slow),
    ],
    ids=["x3d", "st_gcn", "i3d", "slow", "agcn", "s_tr"],
)
def test_networks_compile_whole_without_recompiling(build):
    network = build()
    frame = (3, 5, 2) if isinstance(network, skeleton.CoSkeletonNet) else (3, 32, 32)
    x = torch.randn(2, 3, 12, *frame[1:])
    compiled = torch.compile(network.step, fullgraph=True, backend="aot_eager")
    state = reference = network.init_state(2, frame)
    with torch.no_grad():
        for t in range(12):
            with torch.compiler.set_stance("default" if t < 3 else "fail_on_recompile"):
                y, valid, state = compiled(x[:, :, t], state)
            want, same, reference = network.step(x[:, :, t], reference)
            assert torch.equal(valid, same)
            torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)


def test_starred_network_steps_equal_the_clip_of_the_last_frames():
    network = tiny_skeleton(True)
    x = torch.randn(2, 3, 21, 5, 2)
    with torch.no_grad():
        got, _ = run_steps(network, x)
        for i in range(6):
            torch.testing.assert_close(got[:, :, i], network(x[:, :, i : i + 16]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("aggregation", ["joints", "row_sum"])
def test_adaptive_graphs_mix_joints_only_when_they_aggregate_joints(aggregation):
    torch.manual_seed(0)
    graph = skeleton.skeleton_graph(*TINY_GRAPH)
    unit = skeleton.AdaptiveGraphConv(4, 8, graph, softmax_over="target", aggregation=aggregation)
    unit = randomise(unit)
    x = torch.randn(1, 4, 3, 5)
    moved = x.clone()
    moved[..., 4] += 1
    changed = (unit(moved) - unit(x)).abs().amax((0, 1, 2)) > 1e-6
    assert bool(changed[4])
    assert bool(changed[:4].any()) == (aggregation == "joints")


def test_plain_adaptive_graphs_step_frame_by_frame_whatever_the_chunk():
    network = tiny_skeleton(False, _adaptive_unit)
    x = torch.randn(1, 3, 25, 5, 2)
    got, _ = run_steps(network, x)
    with torch.no_grad():
        for size in (1, 4, 25):
            state, said = network.init_state(1, (3, 5, 2)), []
            for part in x.split(size, 2):
                y, valid, state = network.steps(part, state)
                said += [] if y is None else [y[:, :, valid[0]]]
            torch.testing.assert_close(torch.cat(said, 2), got, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_bfloat16_x3d_stays_near_float32(steps):
    network = tiny_x3d(head_activation="none")
    torch.manual_seed(1)
    x = torch.randn(1, 3, steps, 32, 32)
    with torch.no_grad():
        want, _ = run_steps(network, x)
        got, _ = run_steps(network.bfloat16(), x.bfloat16())
    error = (got[:, :, -10:].float() - want[:, :, -10:]).norm() / want[:, :, -10:].norm()
    assert error < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_drift_in_a_hundred_thousand_steps(dtype):
    """What is said at the end of long streams equals streams that begin one receptive field earlier."""
    torch.manual_seed(0)
    network = co.Sequential(
        co.Conv1d(4, 8, 3, padding=1),
        nn.ReLU(),
        co.AvgPool1d(9, stride=1),
        co.TransformerEncoder(8, 2, dim_feedforward=16, num_layers=2, sequence_len=8),
    )
    network = network.eval().to(dtype)
    state = network.init_state(4, (4,), dtype=dtype)
    field = network.plan().receptive_field
    with torch.inference_mode():
        for _ in range(1000):
            frames = torch.randn(100, 4, 4, dtype=dtype)
            for frame in frames:
                y, valid, state = network.step(frame, state, inplace=True)
        assert field < len(frames)
        fresh = network.init_state(4, (4,), dtype=dtype)
        for frame in frames[-(field + 2) :]:
            z, _, fresh = network.step(frame, fresh)
    assert bool(valid.all())
    torch.testing.assert_close(y, z, atol=1e-6, rtol=1e-6)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="se_scope must be one of frame, clip, causal, got 'video'"):
        tiny_x3d(se_scope="video")
    with pytest.raises(ValueError, match=r"frames must be \(C, 32, 32\), got \(3, 64, 64\)"):
        tiny_x3d().init_state(1, (3, 64, 64))
    with pytest.raises(ValueError, match="got 'fast'"):
        resnet3d.CoResNet(arch="fast")
    with pytest.raises(ValueError, match=r"= \(3, 5, 2\), got \(3, 25, 2\)"):
        tiny_skeleton(True).init_state(1, (3, 25, 2))
    with pytest.raises(ValueError, match="'mean'"):
        skeleton.AdaptiveGraphConv(4, 8, skeleton.skeleton_graph(*TINY_GRAPH), aggregation="mean")
