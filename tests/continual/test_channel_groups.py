"""Channel groups where modules are called twice, keep no statistics, share tensors, or are named to be spared."""

import copy

import pytest
import torch
from torch import nn

from sparing.continual import adapters, pruning
from sparing.continual.channel_groups import channel_groups, count_weights

X = (torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5)),)


class Reusing(nn.Module):
    """Calls ``again`` behind each of two convolutions; ``first`` calls it on the input as well."""

    def __init__(self, again, *, first=False, width=6):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, 2, 1)
        self.again, self.first = again, first

    def forward(self, x):
        x = self.again(x) if self.first else x
        return self.last(self.again(self.two(self.again(self.one(x)).relu())))


def network(again, **options):
    torch.manual_seed(0)
    net = Reusing(again, **options)
    for tensor in (*net.again.parameters(), *net.again.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return net.eval()


def ignoring(net, groups, masks):
    """The network with the columns of dropped channels at zero."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for group, mask in zip(groups, masks, strict=True):
            for name, repeat in group.consumers:
                weight = net.get_submodule(name).weight
                weight.mul_(mask.repeat_interleave(repeat).view(1, -1, *[1] * (weight.ndim - 2)))
    return net


def some(groups):
    return [torch.arange(group.size) % 3 != 1 for group in groups]


@pytest.mark.parametrize(
    ("again", "tied"),
    [
        (nn.BatchNorm2d(6), True),
        (nn.BatchNorm2d(6, affine=False), True),
        (nn.BatchNorm2d(6, track_running_stats=False), True),
        (nn.Conv2d(6, 6, 3, padding=1, groups=6), True),
        (nn.BatchNorm2d(6, affine=False, track_running_stats=False), False),  # no tensor names it in the graph
        (nn.InstanceNorm2d(6, affine=True, track_running_stats=True), False),
        (nn.GroupNorm(2, 6), False),
    ],
)
def test_a_layer_that_is_called_twice_ties_what_it_passes_on_or_is_left_whole(again, tied):
    net = network(again)
    groups = channel_groups(net, X)
    assert [group.producers for group in groups] == ([["one", "two"]] if tied else [])
    masks = some(groups)
    want = ignoring(net, groups, masks)(*X)
    before = net(*X)
    pruning.prune_channels(net, groups, masks)
    torch.testing.assert_close(net(*X), want, atol=1e-5, rtol=1e-5)
    assert (net.last.in_channels, net.one.out_channels) == ((4, 4) if tied else (6, 6))
    assert torch.equal(before, want) is not tied
    if tied and hasattr(net.again, "num_features"):
        assert net.again.num_features == 4


@pytest.mark.parametrize(
    "again", [nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.Conv2d(3, 3, 3, padding=1)]
)
def test_what_also_reads_the_networks_input_keeps_its_width(again):
    net = network(again, first=True, width=3)
    groups = channel_groups(net, X)
    pruning.prune_channels(net, groups, some(groups))
    assert net(*X).shape == (3, 2, 8, 8)
    assert net.one.out_channels == net.two.out_channels == 3


@pytest.mark.parametrize("share", ["parameters", "buffers", "module"])
def test_norms_that_share_tensors_are_left_whole(share):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
    )
    if share == "parameters":
        net[3].weight = net[1].weight
    elif share == "buffers":
        net[3].running_var = net[1].running_var
    else:
        net[3] = net[1]
    assert channel_groups(net, X) == []


def test_norms_without_running_statistics_are_cut_like_others():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(5, 4)
    groups = channel_groups(net, (x,))
    masks = some(groups)
    want = ignoring(net, groups, masks)(x)
    pruning.prune_channels(net, groups, masks)
    torch.testing.assert_close(net(x), want, atol=1e-6, rtol=1e-5)
    assert net[1].num_features == 4


@pytest.mark.parametrize("training", [True, False])
def test_every_part_stays_in_the_mode_it_was_in(training):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).train(training)
    net[1].train(not training)
    modes = [module.training for module in net.modules()]
    groups = channel_groups(net, X)
    pruning.channel_importance(net, groups)
    assert [module.training for module in net.modules()] == modes
    adapters.adapt(net, rank=1)
    for index in (0, 3):
        assert {module.training for module in net[index].modules()} == {training}
    pruning.prune_channels(net, groups, some(groups))
    adapters.fuse(net)
    assert [module.training for module in net.modules()] == modes


def test_a_failed_export_leaves_the_modes_too():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    net[1].eval()
    with pytest.raises(RuntimeError):
        channel_groups(net, (torch.randn(2, 5, 8, 8),))
    assert [module.training for module in net.modules()] == [True, True, False]


def headed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    net.head = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 2)))
    return net


def test_naming_a_container_spares_all_that_it_holds():
    x = (torch.randn(3, 4),)
    assert [group.producers for group in channel_groups(headed(), x)] == [["0"], ["head.0"]]
    groups = channel_groups(headed(), x, skip=("head",))
    assert [group.producers for group in groups] == [["0"]]
    assert count_weights(headed(), skip=("head",)) == 4 * 6
    scores = pruning.channel_importance(headed(), groups)
    masks = pruning.choose_channels(headed(), groups, scores, weights=12, skip=("head",))
    assert int(masks[0].sum()) == 3
    wrapped = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.Conv2d(4, 2, 1))
    assert channel_groups(wrapped, X, skip=("0",)) == []
    assert channel_groups(wrapped, X, skip=("0.1",)) == []  # a norm's outputs are those of the layer before it


@pytest.mark.parametrize("name", ["heads", "", "head.7"])
def test_names_that_match_nothing_are_refused(name):
    net, x = headed(), (torch.randn(3, 4),)
    groups = channel_groups(net, x)
    words = rf"skip names \['{name}'\], which this Sequential does not have"
    with pytest.raises(ValueError, match=words):
        channel_groups(net, x, skip=(name,))
    with pytest.raises(ValueError, match=words):
        count_weights(net, skip=("head", name))
    with pytest.raises(ValueError, match=words):
        pruning.choose_channels(net, groups, pruning.channel_importance(net, groups), weights=20, skip=(name,))
    with pytest.raises(ValueError, match=words):
        adapters.adapt(net, rank=1, skip=(name,))


def test_a_network_that_carries_adapters_is_refused_by_path():
    net = adapters.adapt(headed(), rank=1, skip=("0",))
    with pytest.raises(ValueError, match=r"head\.0 carries an adapter: find the groups before"):
        channel_groups(net, (torch.randn(3, 4),))
