"""Layers and containers: a step says what the offline layer says, on any phase, chunk, fill and precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparing import continual as co


def run_steps(network, x, **options):
    """Outputs of frame-by-frame calls, as (N, C, T', ...)."""
    state = network.init_state(x.shape[0], (x.shape[1], *x.shape[3:]), dtype=x.dtype, **options)
    said = []
    for t in range(x.shape[2]):
        y, valid, state = network.step(x[:, :, t], state)
        if valid if isinstance(valid, bool) else bool(valid.all()):
            said.append(y)
    return torch.stack(said, 2), state


def strided_network():
    torch.manual_seed(0)
    return co.Sequential(
        co.Conv3d(3, 8, 3, stride=(2, 1, 1), padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        co.Residual(co.Conv3d(8, 8, 3, padding=1)),
        co.Conv3d(8, 6, (3, 3, 3), stride=(2, 2, 2), padding=(0, 1, 1)),
        co.AdaptiveAvgPool3d((1, 1, 1), window=2),
        co.Flatten(),
        co.Linear(6, 4),
    ).eval()


def plain_network(padding=1):
    torch.manual_seed(0)
    return co.Sequential(
        co.Conv3d(3, 8, 3, padding=(padding, 1, 1), stride=(1, 2, 2)),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        co.Residual(co.Conv3d(8, 8, 3, padding=(padding, 1, 1)), shrink="centered"),
        co.AvgPool3d((4, 4, 4), stride=1),
        co.Flatten(),
        co.Linear(8, 4),
    ).eval()


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_random_convolution_steps_are_the_offline_outputs(seed, lockstep):
    g = torch.Generator().manual_seed(seed)

    def pick(*options):
        return options[int(torch.randint(len(options), (), generator=g))]

    kernel, dilation, stride = pick(1, 2, 3, 5), pick(1, 1, 2), pick(1, 1, 2, 3)
    padding = int(torch.randint(dilation * (kernel - 1) + 1, (), generator=g))
    torch.manual_seed(seed)
    layer = co.Conv3d(
        4,
        6,
        (kernel, 3, 3),
        stride=(stride, 1, 2),
        padding=(padding, 1, 1),
        dilation=(dilation, 1, 1),
        groups=pick(1, 2),
    )
    x = torch.randn(2, 4, 17, 5, 6)
    want = layer(x)
    got, state = run_steps(layer, x, lockstep=lockstep)
    torch.testing.assert_close(got, want[:, :, : got.shape[2]], atol=1e-5, rtol=1e-5)
    assert got.shape[2] == (17 - 1 - layer.plan().delay) // stride + 1
    rest, valid, _ = layer.flush(state)
    total = got.shape[2] + (0 if rest is None else rest.shape[2])
    assert total == want.shape[2]
    if rest is not None:
        torch.testing.assert_close(rest, want[:, :, got.shape[2] :], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("formulation", ["history", "partial"])
def test_both_formulations_serve_every_precision(formulation, dtype):
    torch.manual_seed(0)
    layer = co.Conv3d(4, 4, 3, padding=1, stride=(1, 2, 2), groups=4, formulation=formulation).to(dtype)
    x = torch.randn(2, 4, 9, 8, 8, dtype=dtype)
    got, _ = run_steps(layer, x)
    assert got.dtype == dtype
    atol = 2e-2 if dtype == torch.bfloat16 else 1e-5  # two bfloat16 roundings of sums of order 1
    torch.testing.assert_close(got, layer(x)[:, :, : got.shape[2]], atol=atol, rtol=atol)


def test_the_smaller_memory_is_chosen():
    strided = co.Conv3d(4, 4, 3, padding=1, stride=(1, 2, 2))
    assert "partial" in strided.init_state(1, (4, 8, 8)).memory
    even = co.Conv3d(4, 4, 3, padding=1)
    assert "history" in even.init_state(1, (4, 8, 8)).memory
    assert even.plan((4, 8, 8)).bytes_per_stream == 2 * 4 * 8 * 8 * 4  # R-1 frames of float32, not (R-1)^2


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_average_pool_can_leave_missing_frames_out_of_the_divisor(padding, stride):
    layer = co.AvgPool2d(
        (3, 2), stride=(stride, 1), padding=(padding if padding < 2 else 1, 1), count_include_pad=False
    )
    x = torch.randn(2, 3, 11, 5)
    want = F.avg_pool2d(x, (3, 2), (stride, 1), (layer.padding[0], 1), count_include_pad=False)
    for lockstep in (False, True):
        got, state = run_steps(layer, x, lockstep=lockstep)
        rest, _, _ = layer.flush(state)
        whole = got if rest is None else torch.cat([got, rest], 2)
        torch.testing.assert_close(whole, want)
        state = layer.init_state(2, (3, 5), lockstep=lockstep)
        chunked, valid, _ = layer.steps(x, state)
        torch.testing.assert_close(chunked[:, :, valid[0]], want[:, :, : int(valid[0].sum())])


def test_dilated_average_is_defined_by_its_taps():
    layer = co.AvgPool1d(3, stride=1, dilation=2)
    x = torch.randn(1, 2, 10)
    want = torch.stack([(x[:, :, t] + x[:, :, t + 2] + x[:, :, t + 4]) / 3 for t in range(6)], 2)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(run_steps(layer, x)[0], want)


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("shrink", ["centered", "lagging", "leading"])
def test_residual_with_part_of_the_padding(kernel, shrink):
    """Every padding between none and (R-1)/2: the reference is right only at its ends."""
    for padding in range((kernel - 1) // 2 + 1):
        torch.manual_seed(0)
        conv = co.Conv1d(4, 4, kernel, padding=padding)
        network = co.Residual(conv, shrink=shrink)
        x = torch.randn(2, 4, 13)
        a = (kernel - 1) // 2 - padding
        kept = {"centered": x[:, :, a : 13 - a], "lagging": x[:, :, : 13 - 2 * a], "leading": x[:, :, 2 * a :]}[shrink]
        want = conv(x) + kept
        torch.testing.assert_close(network(x), want)
        got, state = run_steps(network, x)
        torch.testing.assert_close(got, want[:, :, : got.shape[2]])
        rest, _, _ = network.flush(state)
        assert (0 if rest is None else rest.shape[2]) == padding
        if rest is not None:
            torch.testing.assert_close(rest, want[:, :, got.shape[2] :])


def test_branches_on_other_steps_are_aligned_at_their_input_when_asked():
    torch.manual_seed(0)
    main = co.Sequential(co.Conv1d(3, 4, 3, stride=2, padding=1), nn.ReLU(), co.Conv1d(4, 4, 3, padding=1))
    shortcut = co.Conv1d(3, 4, 1, stride=2)
    with pytest.raises(ValueError, match=r"3 frames before the slowest branch.*align='input'"):
        co.BroadcastReduce(main, shortcut)
    network = co.BroadcastReduce(main, shortcut, align="input")
    x = torch.randn(2, 3, 14)
    for lockstep in (False, True):
        got, state = run_steps(network, x, lockstep=lockstep)
        rest, _, _ = network.flush(state)
        torch.testing.assert_close(torch.cat([got, rest], 2), network(x))


def test_padding_free_network_steps_equal_the_clip_of_the_last_frames():
    network = plain_network(padding=0)
    plan = network.plan()
    assert plan.equals_clip_of_last_frames
    x = torch.randn(1, 3, 14, 8, 8)
    got, _ = run_steps(network, x)
    for i, t in enumerate(range(plan.receptive_field - 1, 14)):
        clip = network(x[:, :, t - plan.receptive_field + 1 : t + 1])
        torch.testing.assert_close(got[:, :, i], clip[:, :, 0], atol=1e-5, rtol=1e-5)


def test_padded_network_steps_differ_from_the_clip_of_the_last_frames():
    """The documented inequality: the clip sees zeros at its border in every layer, the stream sees real frames."""
    network = plain_network(padding=1)
    plan = network.plan()
    assert not plan.equals_clip_of_last_frames
    x = torch.randn(1, 3, 20, 8, 8)
    got, _ = run_steps(network, x)
    clip = network(x[:, :, -plan.receptive_field :])
    assert (got[:, :, -1] - clip[:, :, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("build", [plain_network, strided_network])
def test_first_output_comes_at_the_planned_step(build):
    network = build()
    state = network.init_state(1, (3, 8, 8))
    spoke = []
    for _ in range(16):
        _, valid, state = network.step(torch.randn(1, 3, 8, 8), state)
        spoke.append(bool(valid))
    assert spoke.index(True) == network.plan().first_output_step


def test_skip_tells_delay_and_first_output_apart():
    plan = co.Skip(4).plan()
    assert (plan.delay, plan.first_output_step) == (0, 4)
    x = torch.randn(2, 3, 9)
    got, _ = run_steps(co.Skip(4), x)
    torch.testing.assert_close(got, x[:, :, 4:])


def test_replicate_fill_behind_a_delay():
    torch.manual_seed(0)
    network = co.Sequential(co.Conv1d(2, 3, 3), co.Conv1d(3, 4, 3, padding=1, temporal_fill="replicate"))
    x = torch.randn(2, 2, 9)
    inner = network[0](x)
    want = F.conv1d(torch.cat([inner[:, :, :1], inner], 2), network[1].weight, network[1].bias)
    for lockstep in (False, True):
        got, _ = run_steps(network, x, lockstep=lockstep)
        torch.testing.assert_close(got, want)
        for size in (1, 2, 4, 9):
            state, said = network.init_state(2, (2,), lockstep=lockstep), []
            for part in x.split(size, 2):
                y, valid, state = network.steps(part, state)
                said += [] if y is None else [y[:, :, valid[0]]]
            torch.testing.assert_close(torch.cat(said, 2), want)


def test_clip_gradients_are_those_of_the_plain_network():
    torch.manual_seed(0)
    ours = co.Sequential(co.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), co.AvgPool3d(2)).train()
    plain = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.AvgPool3d(2)).train()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 4, 6, 6)
    for network in (ours, plain):
        network(x).square().sum().backward()
    for a, b in zip(ours.parameters(), plain.parameters()):
        assert torch.equal(a.grad, b.grad)


def test_gradients_flow_through_the_state():
    layer = co.Conv1d(2, 2, 3)
    state = layer.init_state(1, (2,))
    first = torch.randn(1, 2, requires_grad=True)
    y, _, state = layer.step(first, state)
    for _ in range(2):
        y, _, state = layer.step(torch.randn(1, 2), state)
    y.sum().backward()
    assert first.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: co.Conv1d(2, 2, 3, padding=3), ValueError, r"padding 3 is outside 0\.\.2"),
        (lambda: co.Conv1d(2, 2, 3, padding="same"), ValueError, "in numbers"),
        (lambda: co.Conv1d(2, 2, 3, padding_mode="circular"), ValueError, "circular"),
        (lambda: co.Conv1d(2, 2, 3, temporal_fill="ones"), ValueError, "ones"),
        (lambda: co.Conv1d(2, 2, 3, stride=2, formulation="partial"), ValueError, "stride 1"),
        (lambda: co.AvgPool1d(3, ceil_mode=True), ValueError, "ceil_mode"),
        (lambda: co.AvgPool1d(3, divisor_override=2), ValueError, "divisor_override"),
        (lambda: co.AdaptiveAvgPool3d((2, 1, 1), window=4), ValueError, "must be"),
        (lambda: co.Residual(co.Conv1d(2, 2, 3)), ValueError, "loses 2 frames"),
        (lambda: co.Residual(co.Conv1d(2, 2, 4), shrink="centered"), ValueError, "odd receptive field"),
        (
            lambda: co.BroadcastReduce(co.Conv1d(2, 2, 1), co.Conv1d(2, 2, 1, stride=2)),
            ValueError,
            r"one total temporal stride, got \[1, 2\]",
        ),
        (lambda: co.Sequential(nn.Conv1d(2, 2, 3)), TypeError, "0: Conv1d is not known to treat every frame alike"),
        (lambda: co.Sequential(nn.ReLU(), nn.GroupNorm(1, 2)), TypeError, "1: GroupNorm"),
        (lambda: co.Conditional(lambda x: x[:, 0] > 0, co.Conv1d(2, 2, 3)), ValueError, "every frame alike"),
    ],
)
def test_construction_errors_name_what_is_wrong(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_conditional_takes_frames_one_by_one():
    torch.manual_seed(0)
    network = co.Conditional(lambda frame: frame.mean(1) > 0, co.Linear(3, 3))
    x = torch.randn(2, 3, 7)
    got, _ = run_steps(network, x)
    torch.testing.assert_close(got, network(x))
    picked = x.mean(1, keepdim=True) > 0
    torch.testing.assert_close(got, torch.where(picked, network.module(x), x))
