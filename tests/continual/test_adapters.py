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
