"""Folded batch norms: the same answers and memories, no norm left where one followed a convolution."""

import pytest
import torch
from continual.test_layers import run_steps
from continual.test_networks import tiny_skeleton, tiny_slow, tiny_x3d
from torch import nn

from sparing import continual as co

NORM = nn.modules.batchnorm._BatchNorm


def with_statistics(network):
    torch.manual_seed(2)
    for module in network.modules():
        if isinstance(module, NORM):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.bias, std=0.2)
    return network


def plain():
    """A convolution with bias whose padding the norm must not reach, one with partial sums, a norm alone."""
    return co.Sequential(
        nn.BatchNorm1d(3),
        co.Conv1d(3, 6, 3, padding=2),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        co.Conv1d(6, 4, 3, formulation="partial", bias=False),
        nn.BatchNorm1d(4),
    ).eval()


@pytest.mark.parametrize(
    ("build", "shape", "left"),
    [
        (plain, (2, 3, 12), 1),
        (tiny_x3d, (1, 3, 22, 32, 32), 0),
        (lambda: tiny_slow("i3d"), (1, 3, 20, 32, 32), 0),
        (lambda: tiny_skeleton(False), (1, 3, 24, 5, 2), None),
    ],
)
def test_steps_and_clips_are_those_of_the_network(build, shape, left):
    network = with_statistics(build())
    folded = co.fold_batch_norm(network)
    before = sum(isinstance(module, NORM) for module in network.modules())
    after = sum(isinstance(module, NORM) for module in folded.modules())
    assert after < before
    assert left is None or after == left
    x = torch.randn(shape)
    frame = (shape[1], *shape[3:])
    with torch.no_grad():
        torch.testing.assert_close(folded(x), network(x), atol=1e-5, rtol=1e-4)
        got, _ = run_steps(folded, x)
        want, _ = run_steps(network, x)
    assert want.shape[2] > 0
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert folded.plan() == network.plan()
    assert co.state_bytes(folded.init_state(2, frame)) == co.state_bytes(network.init_state(2, frame))


def test_the_network_itself_is_left_alone_and_shared_convolutions_are_not_folded():
    network = with_statistics(plain())
    before = {key: value.clone() for key, value in network.state_dict().items()}
    co.fold_batch_norm(network)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    conv = co.Conv1d(3, 3, 1)
    shared = with_statistics(
        co.Sequential(conv, nn.BatchNorm1d(3), conv, nn.ReLU(), co.Conv1d(3, 3, 1), nn.BatchNorm1d(3))
    )
    folded = co.fold_batch_norm(shared.eval())
    assert [isinstance(module, NORM) for module in folded] == [False, True, False, False, False, False]
    x = torch.randn(1, 3, 5)
    torch.testing.assert_close(folded(x), shared(x), atol=1e-5, rtol=1e-4)


def test_what_cannot_be_folded_is_named():
    with pytest.raises(ValueError, match=r"call network\.eval\(\) first"):
        co.fold_batch_norm(plain().train())
    with pytest.raises(ValueError, match="no batch norm of this Sequential follows a convolution"):
        co.fold_batch_norm(co.Sequential(co.Conv1d(3, 3, 1), nn.ReLU(), nn.BatchNorm1d(3)).eval())
