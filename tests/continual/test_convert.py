"""Conversion: same keys, same clip function, steps equal to the stream; refusals say where and what to do."""

import pytest
import torch
from continual.test_layers import run_steps
from torch import nn

from sparing import continual as co
from sparing.continual.twin import ContinualTwin


def clip_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(3, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.Sequential(nn.MaxPool3d((1, 2, 2)), nn.Conv3d(8, 6, 3, padding=(0, 1, 1), stride=(2, 1, 1))),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(6, 4),
    ).eval()


def test_a_sequential_keeps_its_keys_and_its_clip_function():
    plain = clip_network()
    twin = co.convert(plain, pool_window=3)
    assert list(twin.state_dict()) == list(plain.state_dict())
    assert isinstance(plain[0], nn.Conv3d)
    assert not isinstance(plain[0], co.Continual)
    x = torch.randn(2, 3, 7, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(twin(x)[:, :, 0], plain(x))
        features = plain[:4](torch.cat([x, x], 2))
        want = torch.stack([plain[4:](features[:, :, i : i + 3]) for i in range(features.shape[2] - 2)], 2)
        got, _ = run_steps(twin, torch.cat([x, x], 2))
        torch.testing.assert_close(got, want[:, :, : got.shape[2]], atol=1e-5, rtol=1e-5)
        assert got.shape[2] >= 2


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18"])
def test_torchvision_video_resnets_convert(name):
    import torchvision

    with torch.device("meta"):
        plain = getattr(torchvision.models.video, name)(num_classes=5).eval()
        twin = co.convert(plain, pool_window=2)
    assert set(twin.state_dict()) == set(plain.state_dict())
    assert twin.plan().period == (1 if name == "mc3_18" else 8)
    small = plain.__class__(
        torchvision.models.video.resnet.BasicBlock,
        [torchvision.models.video.resnet.Conv3DSimple] * 4,
        [1, 1, 1, 1],
        torchvision.models.video.resnet.BasicStem,
        num_classes=5,
    )
    if name == "r3d_18":
        small.eval()
        twin = co.convert(small, pool_window=2)
        x = torch.randn(1, 3, 48, 16, 16)
        with torch.no_grad():
            torch.testing.assert_close(twin(x[:, :, :16])[:, :, 0], small(x[:, :, :16]), atol=1e-5, rtol=1e-5)
            trunk = small.layer4(small.layer3(small.layer2(small.layer1(small.stem(x))))).mean((3, 4))
            want = torch.stack([small.fc(trunk[:, :, i : i + 2].mean(2)) for i in range(trunk.shape[2] - 1)], 2)
            for lockstep in (False, True):
                got, _ = run_steps(twin, x, lockstep=lockstep)
                assert got.shape[2] >= 2
                torch.testing.assert_close(got, want[:, :, : got.shape[2]], atol=1e-4, rtol=1e-4)


def test_a_block_with_another_activation_is_refused_by_path():
    import torchvision

    with torch.device("meta"):
        plain = torchvision.models.video.r3d_18(num_classes=5).eval()
    plain.layer2[1].relu = nn.SiLU()
    with pytest.raises(ValueError, match=r"layer2\.1\.relu \(SiLU\): stands where torchvision's block has its ReLU"):
        co.convert(plain, pool_window=2)
    with pytest.raises(TypeError, match="VideoResNet does not run on streams: convert it first"):
        co.explain(plain)


@pytest.mark.parametrize("change", ["stride", "eps", "none"])
def test_a_changed_video_network_is_not_saved_as_the_stock_one(change):
    import torchvision

    with torch.device("meta"):
        plain = torchvision.models.video.r3d_18(num_classes=5).eval()
        if change == "stride":
            plain.stem[0].stride = (1, 1, 1)
        if change == "eps":
            plain.layer1[0].conv1[1].eps = 1e-2
        twin = ContinualTwin.from_host(plain, pool_window=2)
    if change == "none":
        assert twin.twin_config()["host"]["architecture"] == "torchvision/r3d_18"
        return
    with pytest.raises(ValueError, match="cannot be rebuilt by name"):
        twin.twin_config()


def test_torchvision_s3d_converts():
    import torchvision

    with torch.device("meta"):
        plain = torchvision.models.video.s3d(num_classes=5).eval()
        twin = co.convert(plain, pool_window=3)
    assert set(twin.state_dict()) == set(plain.state_dict())
    assert twin.plan().period == 8


@pytest.mark.parametrize("layers", [1, 3])
def test_torch_encoders_convert(layers):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, activation="gelu", batch_first=True)
    plain = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(16), enable_nested_tensor=False).eval()
    twin = co.convert(plain, sequence_len=5)
    assert set(twin.state_dict()) == set(plain.state_dict())
    x = torch.randn(2, 16, 9)
    with torch.no_grad():
        got, _ = run_steps(twin, x)
        want = torch.stack([plain(x[:, :, i : i + 5].mT)[:, -1] for i in range(5)], 2)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_layer_that_stands_in_two_places_keeps_its_weights_and_gets_two_memories():
    torch.manual_seed(0)
    conv, relu = nn.Conv1d(4, 4, 3, padding=1), nn.ReLU()
    plain = nn.Sequential(conv, relu, conv, relu, nn.Sequential(conv, nn.BatchNorm1d(4)), nn.Sequential(relu)).eval()
    twin = co.convert(plain)
    assert list(twin.state_dict()) == list(plain.state_dict())
    assert twin[0].weight is twin[2].weight is twin[4][0].weight
    x = torch.randn(2, 4, 12)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), plain(x))
        torch.testing.assert_close(run_steps(twin, x)[0], plain(x)[:, :, :-3], atol=1e-5, rtol=1e-5)
    rows = [line.split()[0] for line in co.explain(twin, (4,)).splitlines() if "Conv1d" in line]
    assert rows == ["0", "2", "4.0"]
    hand = co.Sequential(twin[0], twin[0])
    torch.testing.assert_close(run_steps(hand, x)[0], hand(x)[:, :, :-2], atol=1e-5, rtol=1e-5)


def torch_encoder(layers=2, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()


def changed(change, layers=2):
    network = torch_encoder(layers)
    change(network)
    return network


def another_layer(**options):
    sizes = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True} | options
    return lambda network: network.layers.__setitem__(1, nn.TransformerEncoderLayer(**sizes))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (another_layer(nhead=4), r"layers\.1 .*otherwise than the first layer: num_heads 4 \(first layer: 2\)"),
        (another_layer(norm_first=True), r"layers\.1 .*norm_first True"),
        (another_layer(activation="gelu"), r"layers\.1 .*activation gelu"),
        (another_layer(layer_norm_eps=0.1), r"layers\.1 .*layer_norm_eps 0\.1"),
        (another_layer(dim_feedforward=32), r"layers\.1 .*dim_feedforward 32"),
        (lambda network: setattr(network, "norm", nn.LayerNorm(8, elementwise_affine=False)), r"norm \(LayerNorm\)"),
        (lambda network: setattr(network.layers[1].norm2, "eps", 0.5), r"layers\.1 .*two norms of different eps"),
        (lambda network: setattr(network, "layers", nn.ModuleList()), r"the network \(Transf\w+\): has no layers"),
    ],
)
def test_encoders_that_are_not_the_same_all_through_are_refused_by_path(change, words):
    with pytest.raises(ValueError, match=words):
        co.convert(changed(change), sequence_len=4)
    with pytest.raises(ValueError, match="sequence_len must be a whole number of tokens, got 0"):
        co.convert(torch_encoder(), sequence_len=0)


def test_the_final_norm_has_its_own_eps_and_tied_layers_stay_tied():
    plain = torch_encoder()
    plain.layers[1] = plain.layers[0]
    plain.norm = nn.LayerNorm(8, eps=0.5)
    twin = co.convert(plain, sequence_len=4)
    assert twin.layers[1].linear1.weight is twin.layers[0].linear1.weight
    assert twin.layers[0].linear1.weight is not plain.layers[0].linear1.weight
    assert ContinualTwin.why_not(plain) == []
    x = torch.randn(1, 8, 6)
    with torch.no_grad():
        want = torch.stack([plain(x[:, :, i : i + 4].mT)[:, -1] for i in range(3)], 2)
        torch.testing.assert_close(run_steps(twin, x)[0], want, atol=1e-5, rtol=1e-5)


def test_a_frozen_norm_stays_frozen():
    network = clip_network().train()
    network[1].eval()
    twin = co.convert(network, pool_window=3)
    assert (twin.training, twin[1].training, twin[6].training) == (True, False, True)
    state = twin.init_state(1, (3, 8, 8))
    twin.step(torch.randn(1, 3, 8, 8), state)  # which batch statistics would refuse
    assert not any(part.training for part in co.convert(network.eval(), pool_window=3).modules())


class Odd(nn.Module):
    def forward(self, x):
        return x.flip(2)


class Skip(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Standardised(nn.Conv1d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2), keepdim=True), self.bias)


class Scaled(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return 2 * super()._conv_forward(x, weight, bias)


class Flipped(nn.ReLU):
    def forward(self, x):
        return super().forward(x.flip(2))


class Named(nn.Conv1d):
    """Built otherwise, run as its base."""

    def __init__(self, width):
        super().__init__(width, width, 3)


def hooked(where):
    module = nn.Sequential(nn.Sequential(nn.Conv1d(2, 2, 3), nn.ReLU()))
    target = {"conv": module[0][0], "relu": module[0][1], "whole": module}[where]
    if where == "conv":
        target.register_forward_hook(lambda module, given, out: 2 * out)
    else:
        target.register_forward_pre_hook(lambda module, given: given)
    return module


def patched():
    module = nn.Sequential(nn.ReLU())
    module[0].forward = lambda x: x.flip(2)
    return module


OWN = "has a forward of its own"


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: nn.Sequential(Skip(nn.Conv1d(2, 2, 3, padding=1))), rf"0 \(Skip\): {OWN}, not that of Sequential"),
        (lambda: nn.Sequential(nn.ReLU(), Standardised(2, 2, 3)), rf"1 \(Standardised\): {OWN}.*converters="),
        (lambda: nn.Sequential(Scaled(2, 2, 3)), rf"0 \(Scaled\): {OWN}"),
        (lambda: nn.Sequential(Flipped()), rf"0 \(Flipped\): {OWN}"),
        (lambda: patched(), r"0 \(ReLU\): has a forward that was set on the module"),
        (lambda: hooked("conv"), r"0\.0 \(Conv1d\): has a forward hook \(<lambda>\), which no step would call: remove"),
        (lambda: hooked("relu"), r"0\.1 \(ReLU\): has a forward hook"),
        (lambda: hooked("whole"), r"the network \(Sequential\): has a forward hook"),
        (lambda: nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), r"0 \(BatchNorm1d\).*mix streams"),
    ],
)
def test_what_a_copy_of_the_layers_would_lose_is_refused_by_path(build, words):
    with pytest.raises(ValueError, match=words):
        co.convert(build())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (nn.utils.parametrizations.weight_norm, r"weight by a parametrization: fuse it first with .*remove_param"),
        (nn.utils.parametrizations.spectral_norm, r"remove_parametrizations\(module, 'weight'\)"),
        (nn.utils.weight_norm, r"hook \(WeightNorm\).*remove_weight_norm"),
        (nn.utils.spectral_norm, r"hook \(SpectralNorm\).*remove_spectral_norm"),
        (lambda conv: nn.LazyConv1d(2, 3), r"has no weights yet: run the clip network on one clip"),
    ],
)
def test_weights_that_are_computed_or_not_there_yet_are_refused_by_path(change, words):
    network = nn.Sequential(nn.ReLU(), nn.Sequential(change(nn.Conv1d(2, 2, 3))))
    with pytest.raises(ValueError, match=rf"1\.0 \(\w*Conv1d\): .*{words}"):
        co.convert(network)
    assert "1.0" in ContinualTwin.why_not(network)[0]


def test_subclasses_that_run_as_their_base_convert():
    torch.manual_seed(0)
    network = nn.Sequential(Named(2), nn.SyncBatchNorm(2), nn.ReLU6()).eval()
    x = torch.randn(1, 2, 7)
    with torch.no_grad():
        torch.testing.assert_close(run_steps(co.convert(network), x)[0], network(x), atol=1e-6, rtol=1e-5)


def test_a_batch_norm_without_statistics_is_no_part_of_a_stream():
    with pytest.raises(TypeError, match="1: BatchNorm1d is not known to treat every frame alike"):
        co.Sequential(co.Conv1d(2, 2, 3), nn.BatchNorm1d(2, track_running_stats=False))


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (nn.Sequential(nn.ReLU(), nn.Sequential(Odd())), {}, r"1\.0 \(Odd\): has no continual form; pass converters="),
        (nn.Sequential(nn.Conv3d(2, 2, 3), nn.GroupNorm(1, 2)), {}, r"1 \(GroupNorm\): takes its statistics over time"),
        (nn.Sequential(nn.InstanceNorm3d(2)), {}, "per_frame=True"),
        (
            nn.Sequential(nn.AdaptiveAvgPool3d(1)),
            {},
            r"0 \(AdaptiveAvgPool3d\): pools the whole clip: pass pool_window=",
        ),
        (nn.Sequential(nn.Linear(2, 2)), {}, "acts on the last axis"),
        (nn.Sequential(nn.LayerNorm(2)), {}, "time among them"),
        (nn.Sequential(nn.Softmax(2)), {}, "runs over axis 2"),
        (nn.Sequential(nn.AvgPool3d(2, ceil_mode=True)), {}, r"0 \(AvgPool3d\).*ceil_mode"),
        (nn.Sequential(nn.Conv1d(2, 2, 3, padding=3)), {}, r"0 \(Conv1d\).*padding 3 is outside 0\.\.2"),
        (nn.Sequential(nn.ReLU()), {"time_dim": 1}, "time must be axis 2.*got time_dim=1"),
        (nn.Sequential(nn.LogSoftmax(-1)), {}, "runs over axis -1"),
        (nn.Sequential(nn.InstanceNorm1d(2)), {"per_frame": True}, r"0 \(InstanceNorm1d\): .*one value a channel"),
        (nn.Sequential(nn.LSTM(2, 2)), {}, r"0 \(LSTM\): .*use continual\.LSTM"),
        (nn.Sequential(nn.AdaptiveMaxPool1d(1, return_indices=True)), {"pool_window": 2}, "returns indices"),
        (
            nn.Sequential(nn.AdaptiveAvgPool1d(1)),
            {"pool_window": 1.5},
            r"0 \(Adapt\w+\): window must be a whole .*1\.5",
        ),
        (nn.Sequential(nn.AdaptiveAvgPool1d(1)), {"pool_window": 0}, r"0 \(Adapt\w+\): window must be a whole .*0"),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1), {}, "pass sequence_len="),
    ],
)
def test_refusals_name_the_path_and_the_fix(module, options, words):
    with pytest.raises(ValueError, match=words):
        co.convert(module, **options)


def test_norms_over_time_are_taken_frame_by_frame_when_asked():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.GroupNorm(1, 4))
    twin = co.convert(plain, per_frame=True)
    x = torch.randn(2, 4, 5, 3, 3)
    want = torch.stack([plain(x[:, :, t]) for t in range(5)], 2)
    torch.testing.assert_close(twin(x), want)
    torch.testing.assert_close(run_steps(twin, x)[0], want)
    assert next(iter(plain.state_dict())) == "0.weight"


@pytest.mark.parametrize(
    ("build", "window"),
    [
        (lambda: nn.Sequential(nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(1)), nn.Linear(4, 3)), 5),
        (lambda: nn.Sequential(nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten()), nn.Softmax(-1)), 5),
        (lambda: nn.Sequential(nn.Conv1d(4, 4, 2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)), 4),
        (lambda: nn.Sequential(nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.LogSoftmax(1)), 5),
        (lambda: nn.Sequential(nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(4, 6), nn.GLU(-1)), 5),
    ],
)
def test_heads_of_every_form_convert(build, window):
    torch.manual_seed(0)
    plain = build().eval()
    twin = co.convert(plain, pool_window=window)
    x = torch.randn(2, 4, 9, *((3, 3) if "3d" in str(plain) else ()))
    with torch.no_grad():
        torch.testing.assert_close(twin(x)[:, :, 0], plain(x))
        want = torch.stack([plain(x[:, :, i : i + 5]) for i in range(5)], 2)
        torch.testing.assert_close(run_steps(twin, x)[0], want, atol=1e-5, rtol=1e-5)


def test_time_that_is_flattened_into_features_is_refused_by_path():
    network = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4), nn.Flatten(1), nn.Linear(48, 3))
    with pytest.raises(ValueError, match=r"3 \(Linear\): takes 48 features, a frame has 4: flattening time"):
        co.convert(network)
    space = nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.Sequential(nn.Flatten(1), nn.Linear(4 * 8 * 9, 3)))
    with pytest.raises(ValueError, match=r"1\.1 \(Linear\): takes 288 features, a frame has 36"):
        co.convert(space).plan((4, 3, 3))


@pytest.mark.parametrize("pool", [nn.AvgPool3d(3), nn.MaxPool3d(3)])
def test_frames_too_small_for_a_layer_are_refused_by_path(pool):
    twin = co.convert(nn.Sequential(nn.Conv3d(3, 4, 3), nn.Sequential(nn.ReLU(), pool)))
    for say in (twin.plan, lambda shape: co.explain(twin, shape)):
        with pytest.raises(ValueError, match=r"0 \(Conv3d\): frames \(3, 2, 5\) are too small for kernel \(3, 3, 3\)"):
            say((3, 2, 5))
        with pytest.raises(ValueError, match=r"1\.1 \((Avg|Max)Pool3d\): frames \(4, 2, 2\) do not fit: .*too small"):
            say((3, 4, 4))
    assert twin.plan((3, 5, 5)).receptive_field == 5
    wide = co.Residual(
        co.Sequential(co.Conv2d(2, 2, 3, padding=(1, 1)), co.Conv2d(2, 2, (1, 3))), shortcut=co.Conv2d(2, 2, (1, 3))
    )
    with pytest.raises(ValueError, match=r"module\.1 \(Conv2d\): frames \(2, 2\) are too small"):
        wide.plan((2, 2))


@pytest.mark.parametrize("layer", [nn.LogSoftmax(1), nn.GLU(1), nn.Softmax(1)])
def test_layers_over_channels_convert(layer):
    x = torch.randn(2, 4, 6, 3, 3)
    twin = co.convert(nn.Sequential(layer))
    torch.testing.assert_close(twin(x), layer(x))
    torch.testing.assert_close(run_steps(twin, x)[0], layer(x))


def test_further_types_convert_by_the_users_function():
    twin = co.convert(nn.Sequential(Odd(), nn.ReLU()), converters={Odd: lambda module, place: nn.Identity()})
    x = torch.randn(1, 2, 3)
    torch.testing.assert_close(run_steps(twin, x)[0], x.relu())


def test_explain_lists_layers_and_says_what_a_step_equals():
    twin = co.convert(clip_network(), pool_window=3)
    text = co.explain(twin, (3, 8, 8))
    row = next(line for line in text.splitlines() if line.startswith("0 "))
    assert row.split() == ["0", "Conv3d", "3", "1", "1", "1", str(2 * 3 * 8 * 8 * 4)]
    assert "first output at step 7, then every 2" in text
    assert "not the clip network on the last 9 frames" in text
    assert "no temporal padding" in co.explain(co.convert(nn.Sequential(nn.Conv1d(2, 2, 3))))
