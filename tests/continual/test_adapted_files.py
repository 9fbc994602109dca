"""Adapted networks before fusing are stored, loaded and copied: shared tensors stay shared, pruned sizes come back."""

import copy

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from sparing.continual import adapters, pruning
from sparing.continual.channel_groups import channel_groups, resize_as

X = torch.randn(3, 8, 6, 6, generator=torch.Generator().manual_seed(2))


def linear(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(288, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    return adapters.adapt(net, method="splopa", block_shape=(4, 4), num_prototypes=3, skip=("5",))


def plain(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(8, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.Conv2d(12, 12, 3, padding=1, groups=12),
        nn.ReLU(),
        nn.Conv2d(12, 6, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    ).eval()


def moved(net):
    """Adapters with values that show."""
    for name, parameter in net.named_parameters():
        if "adapter" in name:
            nn.init.normal_(parameter, std=0.3)
    return net


def test_shared_prototypes_are_stored_once_and_loaded_as_one(tmp_path):
    net = moved(linear(0))
    pruning.prune_blocks(net, pruning.choose_blocks(pruning.block_importance(net), density=0.5))
    save_model(net, tmp_path / "model.safetensors")
    assert sum("prototypes.rows" in key for key in load_file(tmp_path / "model.safetensors")) == 1
    fresh = linear(1)
    load_model(fresh, tmp_path / "model.safetensors")
    assert torch.equal(fresh(X), net(X))
    assert fresh[1].adapter.prototypes is fresh[3].adapter.prototypes
    assert torch.equal(fresh[1].kept, net[1].kept)
    with pytest.raises(RuntimeError, match="share memory"):  # says to take save_model
        save_file(net.state_dict(), tmp_path / "other.safetensors")


def test_a_copy_shares_its_prototypes_with_itself_and_not_with_the_original():
    net = moved(linear(0))
    pruning.prune_blocks(net, pruning.choose_blocks(pruning.block_importance(net), density=0.5))
    again = copy.deepcopy(net)
    assert again[1].adapter.prototypes is again[3].adapter.prototypes is not net[1].adapter.prototypes
    assert torch.equal(again(X), net(X))
    nn.init.zeros_(again[1].adapter.prototypes.rows)
    assert not torch.equal(again(X), net(X))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("method", ["splora", "sppara"])
def test_a_pruned_adapted_network_comes_back_from_its_file(tmp_path, method, turned):
    net = plain(0)
    groups = channel_groups(net, (X,))
    moved(adapters.adapt(net, method=method, rank=2, skip=("8",)))
    pruning.prune_channels(net, groups, [torch.arange(group.size) % 3 != 1 for group in groups])
    save_model(net, tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    if turned:  # files may have their keys in any order
        state = dict(reversed(state.items()))
    fresh = resize_as(adapters.adapt(plain(1), method=method, rank=2, skip=("8",)), state)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(X), net(X))
    assert fresh[2].groups == 8
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in net.parameters()]
    fused = adapters.fuse(fresh)
    torch.testing.assert_close(fused(X), net(X), atol=1e-5, rtol=1e-5)


def test_an_adapter_of_another_rank_or_a_larger_layer_does_not_fit():
    state = adapters.adapt(plain(0), rank=2, skip=("8",)).state_dict()
    with pytest.raises(ValueError, match=r"0\.adapter\.rows is \(1, 2, 8\) in the file, \(1, 3, 8\) in the network"):
        resize_as(adapters.adapt(plain(0), rank=3, skip=("8",)), state)
    small = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.Flatten())
    with pytest.raises(ValueError, match=r"0\.weight is \(12, 8, 3, 3\) in the file, \(4, 8, 3, 3\) in the network"):
        resize_as(adapters.adapt(small, rank=2), {"0.weight": state["0.weight"]})


def test_a_state_without_pickled_code_loads(tmp_path):
    net = moved(linear(0))
    torch.save(net.state_dict(), tmp_path / "state.pt")
    fresh = linear(1)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh(X), net(X))
