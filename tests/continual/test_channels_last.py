"""Networks in ``torch.channels_last_3d``: the same outputs, and memories that stay in that order."""

import copy

import pytest
import torch
from continual.test_layers import plain_network, run_steps, strided_network
from continual.test_networks import tiny_x3d

from sparing import continual as co
from sparing.continual import state as states

LAST = torch.channels_last_3d


def histories(state):
    """Memories of frames that are in one of the two orders only."""
    frames = [t for name, t in states.leaves(state.memory) if name.endswith("history")]
    return [t for t in frames if t.shape[1] > 1]


@pytest.mark.parametrize("build", [plain_network, strided_network, tiny_x3d])
def test_steps_and_chunks_equal_those_of_the_plain_order(build):
    network = build()
    last = copy.deepcopy(network).to(memory_format=LAST)
    size = 32 if build is tiny_x3d else 8
    frames = torch.randn(2, 3, 40, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, _ = run_steps(network, frames, lockstep=True)
        for lockstep in (True, False):
            got, _ = run_steps(last, frames, lockstep=lockstep)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        y, _, state = last.steps(frames[:, :, :29], last.init_state(2, (3, size, size), lockstep=True))
        said = [y[:, :, i] for i in range(y.shape[2])]
        for t in range(29, 40):
            y, valid, state = last.step(frames[:, :, t], state)
            said += [y] if valid else []
        torch.testing.assert_close(torch.stack(said, 2), want, atol=1e-5, rtol=1e-4)


def test_memories_keep_the_order_through_steps_seats_and_files(tmp_path):
    network = plain_network().to(memory_format=LAST)
    state = network.init_state(3, (3, 8, 8))
    assert histories(state)
    assert all(t.is_contiguous(memory_format=LAST) for t in histories(state))
    picked = states.gather(state, [2, 0])
    assert all(t.is_contiguous(memory_format=LAST) for t in histories(picked))
    states.save_state(picked, tmp_path / "two.safetensors")
    loaded = states.load_state(tmp_path / "two.safetensors", state)
    frames = torch.randn(6, 2, 3, 8, 8)
    with torch.no_grad():
        for frame in frames:  # the file is in plain order; both go on alike
            y, _, picked = network.step(frame, picked)
            z, _, loaded = network.step(frame, loaded)
            torch.testing.assert_close(y, z)
    for after in (picked, loaded):
        # views of the window that was convolved: in order in all but the streams' distance
        assert all(t.stride(1) == 1 for t in histories(after))


def test_in_place_steps_write_into_memories_of_that_order():
    network = plain_network().to(memory_format=LAST)
    state, twin = network.init_state(2, (3, 8, 8)), network.init_state(2, (3, 8, 8))
    pointers = [t.data_ptr() for t in histories(state)]
    with torch.no_grad():
        for frame in torch.randn(8, 2, 3, 8, 8):
            y, _, state = network.step(frame, state, inplace=True)
            z, _, twin = network.step(frame, twin)
            torch.testing.assert_close(y, z)
    assert [t.data_ptr() for t in histories(state)] == pointers
    assert all(t.is_contiguous(memory_format=LAST) for t in histories(state))


def test_a_batch_of_streams_and_a_compiled_one_say_the_same():
    network = plain_network()
    last = copy.deepcopy(network).to(memory_format=LAST)
    batches = [
        co.StreamBatch(network, seats=5, frame_shape=(3, 8, 8)),
        co.StreamBatch(last, seats=5, frame_shape=(3, 8, 8), tile=2),
        co.StreamBatch(last, seats=5, frame_shape=(3, 8, 8), compile="aot_eager"),
    ]
    frames = torch.randn(12, 5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for batch in batches:
        for name in "abcde":
            batch.join(name)
    for now, frame in enumerate(frames):
        given = {name: row for i, (name, row) in enumerate(zip("abcde", frame)) if (now + i) % 4}
        want, *others = (batch.step(given) for batch in batches)
        for other in others:
            assert other.keys() == want.keys()
            for name in want:
                torch.testing.assert_close(other[name], want[name], atol=1e-5, rtol=1e-4)


def test_folding_and_converting_keep_the_order():
    clip = torch.nn.Sequential(torch.nn.Conv3d(3, 4, 3), torch.nn.BatchNorm3d(4), torch.nn.ReLU()).eval()
    network = co.fold_batch_norm(co.convert(clip.to(memory_format=LAST)))
    convs = [m for m in network.modules() if isinstance(m, torch.nn.Conv3d)]
    assert convs
    assert all(m.weight.is_contiguous(memory_format=LAST) for m in convs)
    x = torch.randn(1, 3, 9, 8, 8)
    with torch.no_grad():
        got, _ = run_steps(network, x, lockstep=True)
        torch.testing.assert_close(got, clip(x), atol=1e-5, rtol=1e-4)
