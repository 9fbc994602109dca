"""Pruning adapters: what is frozen, what is learned, pruning and fusing commute, plain layers come out."""

import pytest
import torch
from torch import nn

from sparing.continual import adapters


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()


@pytest.mark.parametrize("method", ["splora", "sppara"])
def test_adapted_networks_learn_and_fuse_into_the_same_layers(method):
    plain = network()
    adapted = adapters.adapt(network(), method=method, rank=2)
    frozen = {name: p.clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    assert set(frozen) == {"0.weight", "5.weight"}
    x = torch.randn(4, 3, 6, 6)
    optimiser = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        adapted(x).square().sum().backward()
        optimiser.step()
    assert all(torch.equal(p, frozen[name]) for name, p in adapted.named_parameters() if name in frozen)
    with torch.no_grad():
        want = adapted(x)
        assert (want - plain(x)).abs().max() > 1e-4
        fused = adapters.fuse(adapted)
        torch.testing.assert_close(fused(x), want, atol=1e-6, rtol=1e-6)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [type(layer) for layer in fused] == [type(layer) for layer in plain]


def test_training_and_evaluation_agree_and_unfuse_gives_the_host_back():
    host = nn.Linear(6, 5)
    layer = adapters.SPLoRALinear(host, rank=2)
    nn.init.normal_(layer.adapter.cols)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x), atol=1e-6, rtol=1e-5)
    assert torch.equal(layer.unfuse().weight, host.weight)


def test_pruning_commutes_with_fusing_in_convolutions():
    layer = adapters.SPLoRAConv(nn.Conv2d(6, 8, 3), rank=3)
    nn.init.normal_(layer.adapter.cols)
    whole = layer.fuse().weight
    out_kept, in_kept = torch.rand(8) > 0.4, torch.rand(6) > 0.3
    layer.prune(out_kept=out_kept, in_kept=in_kept)
    torch.testing.assert_close(layer.fuse().weight, whole[out_kept][:, in_kept], atol=1e-6, rtol=1e-6)
    kept_in, kept_out = int(in_kept.sum()), int(out_kept.sum())
    assert layer.learned_parameters() == 3 * (kept_in + kept_out) + kept_out


def test_prototypes_are_shared_where_they_are_given_and_nowhere_else():
    shared = adapters.Prototypes(5, (2, 3))
    one = adapters.SPLoPALinear(nn.Linear(6, 4), block_shape=(2, 3), prototypes=shared)
    two = adapters.SPLoPALinear(nn.Linear(9, 4), block_shape=(2, 3), prototypes=shared)
    own = adapters.SPLoPALinear(nn.Linear(6, 4), block_shape=(2, 3), num_prototypes=5)
    assert one.adapter.prototypes is two.adapter.prototypes
    assert own.adapter.prototypes is not shared
    kept = torch.tensor([[True, False], [False, True]])
    one.prune_blocks(kept)
    assert torch.equal(one.block_importance() > 0, kept)


def test_ranks_and_first_values_are_the_published_ones():
    layer = adapters.SPLoRALinear(nn.Linear(50, 40), rank=0.25)
    assert layer.adapter.rows.shape == (1, 10, 50)
    assert layer.adapter.rows.abs().max() <= (10 * 50) ** -0.5
    assert layer.adapter.cols.abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: adapters.SPLoRAConv(nn.Conv2d(2, 2, 2)), ValueError, r"odd and equal, got \(2, 2\)"),
        (lambda: adapters.SPPaRAConv(nn.Conv2d(2, 2, (3, 5))), ValueError, r"got \(3, 5\)"),
        (lambda: adapters.SPLoRAConv(nn.Linear(2, 2)), TypeError, "got Linear"),
        (lambda: adapters.SPLoRALinear(nn.Conv1d(2, 2, 1)), TypeError, "got Conv1d"),
        (lambda: adapters.SPLoRALinear(nn.Linear(2, 2), rank=0), ValueError, "got 0"),
        (lambda: adapters.SPLoPALinear(nn.Linear(7, 4), block_shape=(2, 3)), ValueError, "do not divide"),
        (
            lambda: adapters.SPLoRALinear(nn.Linear(2, 3)).prune(out_kept=torch.ones(2, dtype=torch.bool)),
            ValueError,
            "3 entries",
        ),
        (
            lambda: adapters.SPLoRALinear(nn.Linear(2, 3)).prune(in_kept=torch.zeros(2, dtype=torch.bool)),
            ValueError,
            "keeps none",
        ),
        (lambda: adapters.adapt(network(), method="lora"), ValueError, "'lora'"),
    ],
)
def test_errors_name_what_is_wrong(make, error, words):
    with pytest.raises(error, match=words):
        make()


def shuffled(net):
    """Adapters with values that show in the outputs."""
    for name, parameter in net.named_parameters():
        if "adapter" in name:
            nn.init.normal_(parameter, std=0.3)
    return net


def test_a_module_in_two_places_stays_one_module():
    layer = nn.Linear(4, 4)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    keys = list(net.state_dict())
    shuffled(adapters.adapt(net, rank=1))
    assert type(net[0]) is adapters.SPLoRALinear
    assert net[0] is net[2]
    x = torch.randn(3, 4)
    want = net(x)
    fused = adapters.fuse(net)
    assert type(fused[0]) is nn.Linear
    assert fused[0] is fused[2]
    assert list(fused.state_dict()) == keys
    torch.testing.assert_close(fused(x), want, atol=1e-6, rtol=1e-6)


def test_a_shared_module_that_is_skipped_in_one_place_is_left_alone():
    layer = nn.Linear(4, 4)
    net = adapters.adapt(nn.Sequential(layer, nn.Linear(4, 4), layer), rank=1, skip=("2",))
    assert net[0] is net[2] is layer
    assert layer.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["splora", "sppara", "splopa"])
def test_adapters_have_the_dtype_of_their_host(method, dtype):
    net = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(8, 8)).to(dtype)
    shuffled(adapters.adapt(net, method=method, rank=1, block_shape=(4, 4), num_prototypes=2)).eval()
    assert {p.dtype for p in net.parameters()} == {dtype}
    x = torch.randn(2, 4, 8, dtype=dtype)
    want = net(x)
    assert torch.equal(adapters.fuse(net)(x), want)  # the same sum in the same dtype


def test_block_importance_of_small_half_precision_weights_is_not_zero():
    layer = adapters.SPLoPALinear(nn.Linear(4, 4).half(), block_shape=(2, 2), num_prototypes=1)
    nn.init.constant_(layer.stored_weight, 1e-4)
    nn.init.zeros_(layer.adapter.pos_weights)
    torch.testing.assert_close(layer.block_importance(), torch.full((2, 2), 4e-8), atol=0, rtol=1e-2)


def test_a_layer_that_reads_weights_without_calling_its_linears_gets_the_adapted_ones():
    torch.manual_seed(0)
    layer = shuffled(adapters.adapt(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), rank=2))
    x = torch.randn(2, 3, 8)
    want = layer(x)
    with torch.no_grad():  # torch's inference path, which hands the weights to one kernel
        torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)


def test_attention_keeps_dtype_and_mode_and_takes_tokens_without_a_batch():
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True).double().eval()
    layer = shuffled(adapters.SPLoRAMultiheadAttention(plain, rank=2))
    fused = layer.fuse()
    assert (layer.training, fused.training) == (False, False)
    assert fused.in_proj_weight.dtype == torch.float64
    x = torch.randn(8, 8, dtype=torch.float64)  # as many tokens as width: a wrong transpose would pass unseen
    torch.testing.assert_close(layer(x, x, x)[0], fused(x, x, x)[0], atol=1e-6, rtol=1e-6)


def test_a_failing_adapt_leaves_the_network_as_it_was():
    net = nn.Sequential(nn.Linear(4, 40), nn.Linear(40, 2))
    with pytest.raises(ValueError, match="layer '1': rank must be at least 1"):
        adapters.adapt(net, rank=0.1)
    assert [type(layer) for layer in net] == [nn.Linear, nn.Linear]
    assert all(p.requires_grad for p in net.parameters())


def test_loading_a_part_of_a_network_does_not_bring_dropped_blocks_back():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    adapters.adapt(net, method="splopa", block_shape=(4, 4), num_prototypes=2)
    kept = torch.tensor([[True, False], [True, True]])
    net[0].prune_blocks(kept)
    net.load_state_dict({"1.bias": torch.zeros(2)}, strict=False)
    assert torch.equal(net[0].kept, kept)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: adapters.SPLoRALinear(nn.Linear(4, 4), rank=2.7), "whole number, or below 1 .* got 2.7"),
        (lambda: adapters.SPLoRALinear(nn.Linear(4, 4), rank=1).prune(out_kept=torch.tensor([0, 7])), r"got \[0, 7\]"),
        (lambda: adapters.SPLoRALinear(nn.Linear(4, 4), rank=1).prune(in_kept=torch.ones(4)), "got torch.float32"),
        (lambda: adapters.adapt(adapters.adapt(network(), rank=1), rank=1), "'0' carries an adapter already"),
        (lambda: adapters.adapt(nn.Linear(4, 4), rank=1), "got a single Linear"),
        (lambda: adapters.BlockLinear(nn.Linear(4, 4), block_shape=(2, 2)).prune(), "use prune_blocks"),
    ],
)
def test_requests_that_cannot_be_met_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_layers_with_a_reparametrised_weight_are_refused():
    layer = nn.utils.spectral_norm(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="made of bias, weight_orig"):
        adapters.SPLoRALinear(layer, rank=1)
