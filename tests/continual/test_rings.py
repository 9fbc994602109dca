"""Histories of a batch as rings: the same outputs whatever streams do, and histories in order for who takes one out."""

import pytest
import torch
from continual.test_layers import plain_network, run_steps
from torch import nn

from sparing import continual as co
from sparing.continual import rings


def tower(conv, channels=6, *, kernel=3, groups=1, padding=0):
    """Three convolutions with a norm between them; frames (channels, ...)."""
    torch.manual_seed(0)
    around = {co.Conv1d: (), co.Conv2d: (1,), co.Conv3d: (3, 3)}[conv]
    pads = (padding, *(size // 2 for size in around))
    layers = [conv(channels, channels, (kernel, *around), padding=pads, groups=groups) for _ in range(3)]
    return co.Sequential(layers[0], nn.ReLU(), co.Residual(layers[1], shrink="lagging"), layers[2]).eval()


SHAPES = {co.Conv1d: (6,), co.Conv2d: (6, 40), co.Conv3d: (6, 9, 10)}


def kept_as_rings(batch):
    """Names of the memories that a batch keeps as rings."""
    like = dict(co.leaves(batch._like.memory))
    return [name for name, leaf in co.leaves(batch._tiles[0].memory) if rings.is_ring(leaf, like[name])]


def alone(network, clip):
    with torch.no_grad():
        return run_steps(network, clip[None], lockstep=True)[0][0]


@pytest.mark.parametrize("conv", SHAPES)
@pytest.mark.parametrize(("kernel", "groups", "padding"), [(2, 1, 0), (3, 1, 1), (3, 6, 0), (5, 2, 2), (4, 3, 0)])
def test_streams_that_come_stall_and_go_are_as_if_alone(conv, kernel, groups, padding):
    network = tower(conv, kernel=kernel, groups=groups, padding=padding)
    shape = SHAPES[conv]
    generator = torch.Generator().manual_seed(1)
    batch = co.StreamBatch(network, seats=5, frame_shape=shape, tile=3)
    clips, said, seated = {}, {}, []
    for now in range(60):
        if seated and now % 9 == 8:
            batch.leave(seated.pop(0))
        while len(seated) < 5 - (now % 4 == 0):
            name = str(len(clips))
            clips[name], said[name] = [], []
            batch.join(name)
            seated.append(name)
        given = {}
        for place, name in enumerate(seated):
            if (now * 7 + place * 3) % 5:  # a fifth of them stalls
                given[name] = torch.randn(shape, generator=generator)
                clips[name].append(given[name])
        for name, y in batch.step(given).items():
            said[name].append(y)
    if conv is not co.Conv1d:
        assert kept_as_rings(batch)
    spoken = 0
    for name, frames in clips.items():
        if said[name]:
            want = alone(network, torch.stack(frames, 1))
            torch.testing.assert_close(torch.stack(said[name], 1), want, atol=1e-5, rtol=1e-5)
            spoken += 1
    assert spoken > 4


def test_small_frames_before_large_weights_are_moved_and_not_turned():
    batch = co.StreamBatch(tower(co.Conv1d), seats=2, frame_shape=(6,), tile=2)
    batch.join("a")
    batch.step({"a": torch.randn(6)})
    assert kept_as_rings(batch) == []


@pytest.mark.parametrize("steps", range(1, 8))
def test_a_stream_that_is_taken_out_has_its_history_in_order(tmp_path, steps):
    network = plain_network()
    frames = torch.randn(3, 24, 8, 8, generator=torch.Generator().manual_seed(2))
    batch = co.StreamBatch(network, seats=2, frame_shape=(3, 8, 8), tile=2)
    batch.join("other")
    batch.step({"other": frames[:, 0]})  # slots are not those of a stream that begins with the batch
    batch.join("a")
    for frame in frames[:, :steps].unbind(1):
        batch.step({"a": frame, "other": frame})
    assert kept_as_rings(batch)
    state = network.init_state(1, (3, 8, 8))
    with torch.no_grad():
        for frame in frames[:, :steps].unbind(1):
            _, _, state = network.step(frame[None], state)
    seen = co.gather(batch.state, [1])
    assert seen.clock.tolist() == [steps]
    for (name, got), (_, want) in zip(co.leaves(seen.memory), co.leaves(state.memory)):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, msg=name)

    batch.save("a", tmp_path / "a")
    elsewhere = co.StreamBatch(network, seats=1, frame_shape=(3, 8, 8))
    elsewhere.restore("a", tmp_path / "a")
    said = [y["a"] for y in (elsewhere.step({"a": frame}) for frame in frames[:, steps:].unbind(1)) if y]
    batch.restore("a", tmp_path / "a")
    primed = batch.prime("a", frames[:, steps : steps + 5])
    last = [batch.step({"a": frame})["a"] for frame in frames[:, steps + 5 :].unbind(1)]
    want = alone(network, frames)
    torch.testing.assert_close(torch.stack(said, 1), want[:, -len(said) :], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.stack(last, 1), want[:, -len(last) :], atol=1e-5, rtol=1e-5)
    if primed is not None:
        ends = want.shape[1] - len(last)
        torch.testing.assert_close(primed, want[:, ends - primed.shape[1] : ends], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("turn", range(6))
@pytest.mark.parametrize("taps", [2, 3, 5])
def test_a_ring_and_its_history_are_each_others_inverse(taps, turn):
    history = torch.arange(2.0 * taps - 2).view(1, 2, taps - 1)
    ring = rings.to_ring(history, turn)
    assert torch.equal(rings.from_ring(ring, turn), history)
    assert ring[0, 0, turn % taps] == 0  # the oldest, which step `turn` overwrites
    assert torch.equal(ring[:, :, (turn - 1) % taps], history[:, :, -1])
    ring[:, :, turn % taps] = 9
    weight = torch.randn(4, 2, taps)
    window = torch.cat([history, torch.full((1, 2, 1), 9.0)], 2)
    got = torch.einsum("nct,oct->no", ring, rings.turned(weight, turn))
    torch.testing.assert_close(got, torch.einsum("nct,oct->no", window, weight))


def test_weights_that_change_between_steps_are_used_at_once():
    network = plain_network(padding=0)
    frames = torch.randn(3, 20, 8, 8, generator=torch.Generator().manual_seed(4))
    batch = co.StreamBatch(network, seats=1, frame_shape=(3, 8, 8))
    batch.join("a")
    for frame in frames[:, :11].unbind(1):
        batch.step({"a": frame})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
        state = network.init_state(1, (3, 8, 8))
    batch.reset("a")
    for frame in frames.unbind(1):
        with torch.no_grad():
            want, valid, state = network.step(frame[None], state)
        got = batch.step({"a": frame})
        assert bool(valid) == bool(got)
        if got:
            torch.testing.assert_close(got["a"], want[0], atol=1e-5, rtol=1e-5)
