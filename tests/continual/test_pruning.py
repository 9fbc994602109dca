"""Structured pruning: which channels go together, what is important, what is left, what stays gone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock

from sparing.continual import adapters, pruning
from sparing.continual.channel_groups import channel_groups, count_weights, prune_group, resize_as

X = (torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5)),)


class Gated(nn.Module):
    """A depthwise convolution between two others, and a squeeze-excitation gate."""

    def __init__(self):
        super().__init__()
        self.widen, self.deep, self.narrow = (
            nn.Conv2d(8, 12, 1),
            nn.Conv2d(12, 12, 3, padding=1, groups=12),
            nn.Conv2d(12, 8, 1),
        )
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)

    def forward(self, x):
        y = F.silu(self.deep(F.relu(self.widen(x))))
        gate = self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        return x + self.narrow(y * gate)


def network():
    """Residual block, gated block, flattening head: every way in which channels are tied here."""
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(6, 8, 1, stride=2), nn.BatchNorm2d(8))
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        BasicBlock(6, 8, stride=2, downsample=shortcut),
        Gated(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
        nn.ReLU(),
        nn.Linear(10, 4),
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.running_mean, 0.0, 0.3)
    return net.eval()


def some(groups, seed=1):
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(group.size, generator=generator) > 0.4 for group in groups]
    for mask in masks:
        mask[0] = True
    return masks


def test_groups_hold_all_that_is_tied():
    found = {tuple(sorted(group.producers)): group for group in channel_groups(network(), X)}
    tied = found["1.conv2", "1.downsample.0", "2.narrow"]
    assert tied.size == 8
    assert tied.norms == ["1.bn2", "1.downsample.1"] or set(tied.norms) == {"1.bn2", "1.downsample.1"}
    assert set(tied.consumers) == {("2.widen", 1), ("5", 4)}  # four places a channel behind the flattening
    gated = found["2.excite", "2.widen"]
    assert (gated.depthwise, set(gated.consumers)) == (["2.deep"], {("2.squeeze", 1), ("2.narrow", 1)})
    assert set(found) == {
        *[("0.0",), ("1.conv1",), ("2.squeeze",), ("5",)],
        *[("1.conv2", "1.downsample.0", "2.narrow"), ("2.excite", "2.widen")],
    }
    skipped = channel_groups(network(), X, skip=("5",))
    assert all("5" not in group.producers for group in skipped)


def test_a_pruned_network_is_the_network_that_ignores_the_dropped_channels():
    net = network()
    groups = channel_groups(net, X)
    ignoring = copy.deepcopy(net)
    masks = some(groups)
    with torch.no_grad():
        for group, mask in zip(groups, masks, strict=True):
            for name, repeat in group.consumers:
                weight = ignoring.get_submodule(name).weight
                weight.mul_(mask.repeat_interleave(repeat).view(1, -1, *[1] * (weight.ndim - 2)))
        want = ignoring(*X)
        assert (want - net(*X)).abs().max() > 1e-3
        before = count_weights(net)
        assert pruning._weights_left(net, groups, masks, ()) < before
        predicted = pruning._weights_left(net, groups, masks, ())
        pruning.prune_channels(net, groups, masks)
        torch.testing.assert_close(net(*X), want, atol=1e-5, rtol=1e-5)
    assert count_weights(net) == predicted
    assert net[0][0].out_channels == int(masks[0].sum()) == net[0][1].num_features
    assert net[2].deep.groups == net[2].deep.in_channels == len(net[2].deep.weight)


class Mixing(nn.Module):
    """Three layers whose outputs meet what channels cannot be followed through."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.qkv, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 16), nn.Linear(16, 8)
        self.left, self.right, self.out = nn.Linear(8, 5), nn.Linear(8, 5), nn.Linear(10, 3)

    def forward(self, x):
        x = self.norm(self.embed(x))
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.down(F.gelu(self.up(x)))
        return self.out(torch.cat([self.left(x), self.right(x)], -1))


def test_what_is_not_understood_is_not_pruned():
    groups = channel_groups(Mixing(), (torch.randn(2, 7, 6),))
    assert [(group.producers, group.consumers) for group in groups] == [(["up"], [("down", 1)])]


def test_tied_weights_are_left_alone():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 2))
    net[2].weight = net[0].weight
    assert [group.producers for group in channel_groups(net, (torch.randn(3, 6),))] == [["4"]]


@pytest.mark.parametrize("method", ["splora", "sppara"])
def test_pruning_a_whole_adapted_network_commutes_with_fusing(method):
    net = network()
    groups = channel_groups(net, X)
    adapters.adapt(net, method=method, rank=2, skip=("7",))
    for name, parameter in net.named_parameters():
        if "adapter" in name:
            nn.init.normal_(parameter, std=0.1)
    fused = adapters.fuse(copy.deepcopy(net))
    again = copy.deepcopy(groups)
    pruning.prune_channels(net, groups, some(groups))
    pruning.prune_channels(fused, again, some(again))
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(*X), fused(*X), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(adapters.fuse(net)(*X), fused(*X), atol=1e-5, rtol=1e-5)
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in fused.state_dict().items()}


def test_a_fresh_network_takes_the_sizes_of_a_pruned_state():
    net = network()
    groups = channel_groups(net, X)
    pruning.prune_channels(net, groups, some(groups))
    fresh = resize_as(network(), net.state_dict())
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(*X), net(*X))
    assert fresh[5].in_features == net[5].in_features < 32
    with pytest.raises(ValueError, match=r"0\.0\.weight is \(6, 3, 3, 3\) in the file, \(5, 3, 3, 3\) in the network"):
        resize_as(nn.Sequential(nn.Sequential(nn.Conv2d(3, 5, 3))), {"0.0.weight": torch.zeros(6, 3, 3, 3)})
    with pytest.raises(ValueError, match=r"has 9\.weight, which this Sequential does not have"):
        resize_as(network(), {"9.weight": torch.zeros(1)})


def small():
    """x -> 3 hidden channels -> 2 outputs, with weights that can be reckoned by hand."""
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, -1.0]]))
        net[2].weight.copy_(torch.tensor([[1.0, 1.0, 5.0], [0.0, 3.0, 5.0]]))
    return net


def backward(net, batch):
    x, labels = batch
    logits = net(x)
    return F.cross_entropy(logits, labels), logits.gather(1, labels[:, None]).sum()


BATCH = (torch.tensor([[1.0, 2.0], [3.0, 1.0]]), torch.tensor([0, 1]))


def importance(criterion, net=None, **extra):
    net = net or small()
    groups = channel_groups(net, (torch.randn(3, 2),))
    return pruning.channel_importance(net, groups, criterion=criterion, batches=[BATCH], backward=backward, **extra)[0]


def test_magnitude_counts_rows_and_columns_of_the_adapted_weight():
    want = torch.tensor([(1 + 1) / 2, (4 + 10) / 2, (2 + 50) / 2])
    torch.testing.assert_close(importance("magnitude"), want / want.mean())
    net = small()
    groups = channel_groups(net, (torch.randn(3, 2),))
    adapters.adapt(net, rank=1)
    with torch.no_grad():
        net[0].adapter.rows.fill_(1.0)
        net[0].adapter.cols.copy_(torch.tensor([[[3.0], [0.0], [0.0]]]))
        net[2].adapter.cols.zero_()
    adapted = pruning.channel_importance(net, groups)[0]
    want[0] = (16 + 9 + 1) / 2
    torch.testing.assert_close(adapted, want / want.mean())


def test_gradient_and_taylor_follow_the_loss():
    net = small()
    loss, _ = backward(net, BATCH)
    loss.backward()
    rows, columns = (net[0].weight, net[0].weight.grad), (net[2].weight.mT, net[2].weight.grad.mT)
    for criterion, value in (("gradient", lambda w, g: g.pow(2)), ("taylor", lambda w, g: (w * g).abs())):
        want = torch.stack([value(*rows).sum(1), value(*columns).sum(1)]).mean(0).detach()
        torch.testing.assert_close(importance(criterion), want / want.mean())
    assert importance("taylor")[2] == 0  # never active on this batch, whatever its weights


def test_relevance_is_activation_times_gradient_of_the_true_class():
    # activations (1, 4, 0) and (3, 2, 0); true classes 0 and 1
    want = torch.tensor([1 * 1.0 + 3 * 0.0, 4 * 1.0 + 2 * 3.0, 0.0])
    torch.testing.assert_close(importance("relevance"), want / want.mean())


def test_random_importance_is_a_function_of_the_seed():
    one, same, other = importance("random", seed=3), importance("random", seed=3), importance("random", seed=4)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_importance_leaves_the_network_as_it_was():
    net = small()
    before = copy.deepcopy(net.state_dict())
    importance("taylor", net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("criterion", ["magnitude", "gradient", "taylor", "relevance"])
@pytest.mark.parametrize("scale", [1e-4, 100.0])  # squares of both leave the range of fp16
def test_importance_in_half_precision_ranks_as_in_full(dtype, criterion, scale):
    net, few = small(), [BATCH, BATCH]
    with torch.no_grad():
        net[0].weight.mul_(scale)
        net[2].weight.mul_(scale)
    groups = channel_groups(net, (torch.randn(3, 2),))
    half = copy.deepcopy(net).to(dtype)

    def run(net, batch):  # a loss that is linear in the logits, so that the gradients have the weights' own scale
        logits = net(batch[0].to(net[0].weight.dtype)).float()
        truth = logits.gather(1, batch[1][:, None]).sum()
        return -truth, truth

    want, got = (
        pruning.channel_importance(x, groups, criterion=criterion, batches=few, backward=run)[0] for x in (net, half)
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=0.02, rtol=0.03)  # weights and activations have 8 bits
    assert want.max() > 0.5


@pytest.mark.parametrize("criterion", ["magnitude", "gradient", "taylor", "relevance"])
def test_importance_that_is_not_finite_is_refused(criterion):
    net = small()
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"{criterion} of 0 is NaN or infinite"):
        importance(criterion, net)
    net = blocks("splopa")
    with torch.no_grad():
        net[2].stored_weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="magnitude of 2 is NaN or infinite"):
        pruning.block_importance(net)


def test_relevance_of_a_layer_that_the_backward_function_does_not_call_is_refused():
    def elsewhere(net, batch):
        logits = F.linear(F.relu(net[0](batch[0])), net[2].weight)
        return logits.sum(), logits.sum()

    groups = channel_groups(small(), X_FLAT)
    with pytest.raises(ValueError, match="layer '2' was not called"):
        pruning.channel_importance(small(), groups, criterion="relevance", batches=[BATCH], backward=elsewhere)


def test_bad_masks_are_refused_before_anything_is_dropped():
    net = blocks("splopa")
    for kept, words in (
        (SOME_BLOCKS | {"7": torch.ones(1, 1).bool()}, r"kept names \['7'\], .* those are \['0', '2'\]"),
        ({"0": SOME_BLOCKS["0"]}, r"kept lacks \['2'\]"),
        (SOME_BLOCKS | {"2": torch.ones(3, 1).bool()}, r"kept\['2'\] must be bool \(1, 3\), got torch.bool \(3, 1\)"),
    ):
        with pytest.raises(ValueError, match=words):
            pruning.prune_blocks(net, kept)
    assert bool(net[0].kept.all())
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    groups = channel_groups(net, (torch.randn(3, 4),))
    good, empty = torch.tensor([True] * 3 + [False] * 3), torch.zeros(6).bool()
    with pytest.raises(ValueError, match="one mask for each of 2 groups, got 1"):
        pruning.prune_channels(net, groups, [good])
    with pytest.raises(ValueError, match="keep one of its 6 channels"):
        pruning.prune_channels(net, groups, [good, empty])
    assert net[0].out_features == 6


@pytest.mark.parametrize("scope", ["global", "group"])
@pytest.mark.parametrize("share", [0.7, 0.3])
def test_the_most_important_channels_that_fit_are_kept(scope, share):
    net = network()
    groups = channel_groups(net, X)
    scores = pruning.channel_importance(net, groups)
    weights = int(share * count_weights(net))
    masks = pruning.choose_channels(net, groups, scores, weights=weights, scope=scope, least=2)
    for score, mask in zip(scores, masks, strict=True):
        assert int(mask.sum()) >= 2
        assert not (~mask).any() or score[mask].topk(2).values.min() >= score[~mask].max()
        if scope == "group":
            assert abs(mask.float().mean() - torch.cat(masks).float().mean()) < 0.35
    pruning.prune_channels(net, groups, masks)
    assert 0.6 * weights < count_weights(net) <= weights


def test_global_choice_compares_groups_and_spends_the_whole_budget():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    groups = channel_groups(net, (torch.randn(3, 4),))
    scores = [torch.arange(6.0) + 1, 10 * (torch.arange(6.0) + 1)]
    masks = pruning.choose_channels(net, groups, scores, weights=45, least=1)
    assert [mask.tolist() for mask in masks] == [[False, False, False, True, True, True], [True] * 6]  # 12 + 18 + 12
    with pytest.raises(ValueError, match=r"4 weights cannot be reached .* 1 channel\(s\) in each of 2 groups 7 of 72"):
        pruning.choose_channels(net, groups, scores, weights=4)


def test_schedules_end_at_the_density():
    assert pruning.density_schedule(0.125, stages=3) == pytest.approx([0.5, 0.25, 0.125])
    assert pruning.density_schedule(0.1, stages=3, shape="linear") == pytest.approx([0.7, 0.4, 0.1])
    assert pruning.density_schedule(0.1, stages=2, shape="cubic") == pytest.approx([0.1 + 0.9 / 8, 0.1])


SOME_BLOCKS = {"0": torch.tensor([[1, 0], [1, 0], [0, 0]]).bool(), "2": torch.tensor([[1, 1, 0]]).bool()}


def blocks(kind, **extra):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3))
    return adapters.adapt(net, method=kind, block_shape=(4, 4), num_prototypes=3, skip=("4",), **extra)


@pytest.mark.parametrize("kind", ["splopa", "fine_blocks"])
def test_dropped_blocks_stay_gone_and_the_rest_learns(kind):
    net = blocks(kind)
    layers = [net[0], net[2]]
    scores = pruning.block_importance(net)
    assert [score.shape for score in scores.values()] == [(3, 2), (1, 3)]
    kept = pruning.choose_blocks(scores, density=5 / 9)
    pruning.prune_blocks(net, kept)
    assert sum(int(layer.kept.sum()) for layer in layers) == 5
    best = torch.cat([score.flatten() for score in scores.values()]).topk(5).values.min()
    assert all(bool(((scores[name] >= best) == mask).all()) for name, mask in kept.items())
    assert count_weights(net, skip=("4",)) == 5 * 16
    again = pruning.choose_blocks(pruning.block_importance(net), density=3 / 9)
    assert all(bool((mask <= kept[name]).all()) for name, mask in again.items())

    net = blocks(kind)
    pruning.prune_blocks(net, SOME_BLOCKS)
    layers = [net[0], net[2]]
    before = [layer.adapted_weight().detach().clone() for layer in layers]
    optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        net(torch.randn(5, 8)).square().sum().backward()
        optimiser.step()
    for layer, old in zip(layers, before, strict=True):
        mask = layer.kept.repeat_interleave(4, 0).repeat_interleave(4, 1)
        new = layer.fuse().weight
        assert not new[~mask].any()
        assert (new - old)[mask].abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["splopa", "fine_blocks"])
def test_dropped_blocks_are_stored_and_come_back(kind):
    net = blocks(kind)
    assert not any("kept" in key for key in net.state_dict())  # the published keys as long as nothing is dropped
    pruning.prune_blocks(net, pruning.choose_blocks(pruning.block_importance(net, criterion="random"), density=0.5))
    fresh = blocks(kind)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh[0].kept, net[0].kept)
    assert not bool(fresh[0].kept.all())
    fresh.load_state_dict(blocks(kind).state_dict())
    assert bool(fresh[0].kept.all())


def test_learned_parameters_count_what_can_change():
    net = blocks("splopa")
    prototypes, biases, head = 3 * (4 + 4), 12 + 4, 4 * 3 + 3
    assert adapters.learned_parameters(net) == prototypes + 3 * (6 + 3) + biases + head
    pruning.prune_blocks(net, SOME_BLOCKS)
    assert adapters.learned_parameters(net) == prototypes + 3 * 4 + biases + head
    fine = blocks("fine_blocks")
    pruning.prune_blocks(fine, SOME_BLOCKS)
    assert adapters.learned_parameters(fine) == 16 * 4 + biases + head


def test_depthwise_adapters_keep_the_same_channels_on_both_sides():
    layer = adapters.SPLoRAConv(nn.Conv2d(5, 5, 3, groups=5, padding=1), rank=2)
    nn.init.normal_(layer.adapter.cols)
    kept = torch.tensor([True, False, True, True, False])
    x = torch.randn(2, 5, 6, 6)
    want = layer(x)[:, kept]
    layer.prune(out_kept=kept, in_kept=kept)
    torch.testing.assert_close(layer(x[:, kept]), want, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="same channels at its input and its output"):
        layer.prune(out_kept=torch.tensor([True, True, False]), in_kept=torch.tensor([True, False, True]))
    with pytest.raises(ValueError, match=r"groups=2\) are pruned by whole groups"):
        adapters.SPLoRAConv(nn.Conv2d(4, 4, 3, groups=2)).prune(out_kept=torch.tensor([True, False, True, True]))


def test_adapters_freeze_tables_and_leave_the_skipped_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.body, self.head = nn.Parameter(torch.zeros(3, 4)), nn.Linear(4, 4), nn.Linear(4, 2)

    net = adapters.adapt(Net(), rank=1, skip=("head",))
    learned = {name for name, p in net.named_parameters() if p.requires_grad}
    assert learned == {"body.bias", "body.adapter.rows", "body.adapter.cols", "head.weight", "head.bias"}
    assert type(net.head) is nn.Linear


def choose(scores, **options):
    return pruning.choose_channels(small(), channel_groups(small(), X_FLAT), scores, weights=6, **options)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: pruning.density_schedule(0.0, stages=1), r"in \(0, 1\], got 0.0"),
        (lambda: pruning.density_schedule(0.5, stages=0), "at least 1, got 0"),
        (lambda: pruning.density_schedule(0.5, stages=1, shape="sudden"), "geometric, linear, cubic, got 'sudden'"),
        (lambda: pruning.channel_importance(small(), [], criterion="luck"), "taylor, relevance, random, got 'luck'"),
        (lambda: pruning.channel_importance(small(), [], criterion="taylor"), "'taylor' needs batches"),
        (lambda: pruning.block_importance(small()), "no layer whose blocks can be pruned"),
        (
            lambda: pruning.block_importance(blocks("splopa"), criterion="relevance", batches=[0], backward=backward),
            "ranks channels, not blocks",
        ),
        (lambda: pruning.choose_blocks({"a": torch.ones(2, 2)}, density=0.2), "keeps none of 4 blocks"),
        (lambda: pruning.choose_channels(small(), [], [], weights=1, scope="all"), "'global' or 'group', got 'all'"),
        (lambda: pruning.choose_channels(small(), [], [], weights=1), "there are no groups of channels"),
        (lambda: choose([torch.ones(3)], least=0), "least must be at least 1, got 0"),
        (lambda: choose([torch.ones(2)]), r"of shapes \[\(3,\)\], got \[\(2,\)\]"),
        (lambda: choose([]), r"one tensor for each group, of shapes \[\(3,\)\], got \[\]"),
        (lambda: choose([torch.tensor([1.0, float("nan"), 2.0])]), "score of 0 is NaN or infinite"),
        (lambda: importance("magnitude", power=0), "power must be positive and finite, got 0"),
        (lambda: pruning.choose_blocks({"a": torch.ones(2, 2)}, density=2), r"in \(0, 1\], got 2"),
        (lambda: pruning.choose_blocks({"a": torch.ones(2, 2)}, density=float("nan")), r"in \(0, 1\], got nan"),
        (lambda: pruning.choose_blocks({"a": torch.ones(2, 2)}, density=-0.5), r"in \(0, 1\], got -0.5"),
        (lambda: pruning.choose_blocks({}, density=0.5), "no scores of blocks"),
        (lambda: pruning.choose_blocks({"a": torch.full((2, 2), torch.nan)}, density=0.5), "scores of a hold NaN"),
        (lambda: adapters.Prototypes(0, (4, 4)), "count of prototypes must be at least 1, got 0"),
        (lambda: adapters.Prototypes(2, (4, 0)), "block_shape of prototypes must be at least 1, got 0"),
        (
            lambda: prune_group(small(), channel_groups(small(), X_FLAT)[0], torch.zeros(3, dtype=torch.bool)),
            r"keep one of its 3 channels at least \(0\)",
        ),
        (
            lambda: prune_group(small(), channel_groups(small(), X_FLAT)[0], torch.ones(2, dtype=torch.bool)),
            r"bool \(3,\), got torch.bool \(2,\)",
        ),
        (lambda: adapters.adapt(small(), skip=("head",)), r"skip names \['head'\]"),
        (lambda: adapters.adapt(small(), method="splopa", block_shape=(7, 7)), "takes an adapter of method 'splopa'"),
        (lambda: blocks("splopa")[0].prune_blocks(torch.ones(2, 2, dtype=torch.bool)), r"bool \(3, 2\), got"),
    ],
)
def test_bad_requests_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


X_FLAT = (torch.randn(3, 2),)
