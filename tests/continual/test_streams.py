"""Many streams in one batch: each on its own clock, isolated from the others, compiled, saved and restored."""

import pytest
import torch
from continual.test_layers import plain_network, run_steps, strided_network
from torch import nn

from sparing import continual as co


@pytest.mark.parametrize("build", [plain_network, strided_network])
def test_streams_that_join_and_leave_are_as_if_alone(build):
    network = build()
    torch.manual_seed(1)
    streams = [torch.randn(1, 3, 24, 8, 8) for _ in range(3)]
    joins, leaves = (0, 4, 9), (24, 12, 24)
    alone = [run_steps(network, x)[0] for x in streams]
    said = [[] for _ in streams]
    state = network.init_state(4, (3, 8, 8))
    for now in range(24):
        x = torch.full((4, 3, 8, 8), float("nan"))
        active = torch.zeros(4, dtype=torch.bool)
        for slot, (frames, join, leave) in enumerate(zip(streams, joins, leaves)):
            if join <= now < leave:
                x[slot], active[slot] = frames[0, :, now - join], True
        y, valid, state = network.step(x, state, active=active)
        assert not bool((valid & ~active).any())
        for slot in range(3):
            if valid[slot]:
                said[slot].append(y[slot])
    for slot, (join, leave) in enumerate(zip(joins, leaves)):
        plan = network.plan()
        assert len(said[slot]) == max((leave - join - 1 - plan.first_output_step) // plan.period + 1, 0)
        if said[slot]:
            want = alone[slot][0, :, : len(said[slot])]
            torch.testing.assert_close(torch.stack(said[slot], 1), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("build", [plain_network, strided_network])
def test_reset_of_one_slot_leaves_the_others_bit_for_bit(build):
    network = build()
    torch.manual_seed(1)
    state = network.init_state(3, (3, 8, 8))
    for _ in range(9):
        _, _, state = network.step(torch.randn(3, 3, 8, 8), state)
    fresh = co.reset(state, [1])
    blank = network.init_state(3, (3, 8, 8))
    for (name, a), (_, b), (_, c) in zip(co.leaves(state.memory), co.leaves(fresh.memory), co.leaves(blank.memory)):
        assert torch.equal(a[[0, 2]], b[[0, 2]]), name
        assert torch.equal(b[1], c[1]), name
    assert fresh.clock.tolist() == [9, 0, 9]


def test_inactive_streams_keep_their_state_bit_for_bit():
    network = strided_network()
    state = network.init_state(2, (3, 8, 8))
    for _ in range(5):
        _, _, state = network.step(torch.randn(2, 3, 8, 8), state)
    _, _, after = network.step(torch.randn(2, 3, 8, 8), state, active=torch.tensor([True, False]))
    for (name, a), (_, b) in zip(co.leaves(state.memory), co.leaves(after.memory)):
        assert torch.equal(a[1], b[1]), name
    assert after.clock.tolist() == [6, 5]


def test_a_nan_frame_stays_in_its_stream_and_leaves_with_the_receptive_field():
    network = plain_network()
    torch.manual_seed(1)
    clean = torch.randn(3, 3, 20, 8, 8)
    dirty = clean.clone()
    dirty[1, :, 4] = float("nan")
    want, _ = run_steps(network, clean)
    got, _ = run_steps(network, dirty)
    assert torch.equal(got[[0, 2]], want[[0, 2]])
    assert bool(got[1].isnan().any())
    torch.testing.assert_close(got[1, :, -1], want[1, :, -1])


@pytest.mark.parametrize("build", [plain_network, strided_network])
def test_step_compiles_whole_and_does_not_recompile(build):
    network = build()
    compiled = torch.compile(network.step, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 12, 8, 8)
    want, _ = run_steps(network, x)
    state, said = network.init_state(2, (3, 8, 8)), []
    with torch.no_grad():
        for t in range(12):
            with torch.compiler.set_stance("default" if t < 3 else "fail_on_recompile"):
                y, valid, state = compiled(x[:, :, t], state)
            if bool(valid.all()):
                said.append(y)
    torch.testing.assert_close(torch.stack(said, 2), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [plain_network, strided_network])
def test_in_place_steps_keep_their_tensors(build):
    network = build()
    x = torch.randn(2, 3, 12, 8, 8)
    want, _ = run_steps(network, x)
    state, said = network.init_state(2, (3, 8, 8)), []
    pointers = [t.data_ptr() for _, t in co.leaves(state.memory)] + [state.clock.data_ptr()]
    with torch.no_grad():
        for t in range(12):
            y, valid, state = network.step(x[:, :, t], state, inplace=True)
            if bool(valid.all()):
                said.append(y.clone())
    assert pointers == [t.data_ptr() for _, t in co.leaves(state.memory)] + [state.clock.data_ptr()]
    torch.testing.assert_close(torch.stack(said, 2), want, atol=1e-6, rtol=1e-6)


def buffer_networks():
    """Networks whose memories could be views of the frame that they were given: delays of one and more frames,
    convolutions and pools of two frames, and parts that hand their input on."""
    torch.manual_seed(0)
    return {
        "residual": co.Residual(co.Conv1d(2, 2, 3, padding=1)),
        "wide residual": co.Residual(co.Conv1d(2, 2, 5, padding=2)),
        "branches": co.BroadcastReduce(
            co.Conv1d(2, 2, 3, padding=1), co.Sequential(nn.Dropout(0.5)), reduce="concat", align="input"
        ),
        "delay": co.Sequential(co.Delay(1)),
        "delays": co.Sequential(co.Delay(1), nn.Identity(), co.Delay(1)),
        "identity": co.Sequential(nn.Identity()),
        "conv": co.Sequential(co.Conv1d(2, 2, 2), co.Conv1d(2, 3, 1)),
        "replicate": co.Sequential(co.Conv1d(2, 2, 2, temporal_fill="replicate")),
        "pools": co.Sequential(co.MaxPool1d(2, 1), co.AvgPool1d(2, 1), co.MaxPool1d(1, 1)),
        "strided": co.Sequential(co.Delay(1), co.Conv1d(2, 2, 3, stride=2, padding=1), co.Delay(1)),
        "attention": co.Sequential(co.SingleOutputAttention(2, 1, sequence_len=1)),
        "encoder": co.TransformerEncoder(2, 1, dim_feedforward=4, num_layers=2, sequence_len=2),
        "recurrent": co.Sequential(co.GRU(2, 2), co.Delay(1)),
    }


@pytest.mark.parametrize("how", ["step", "lock-step", "in place", "batch", "batch of tiles"])
@pytest.mark.parametrize("name", list(buffer_networks()))
def test_frames_may_come_in_one_buffer(name, how):
    network = buffer_networks()[name].eval()
    x = torch.randn(2, 2, 17)
    want, buffer, said = run_steps(network, x)[0], torch.empty(2, 2), []
    with torch.no_grad():
        if how.startswith("batch"):
            batch = co.StreamBatch(network, seats=2, frame_shape=(2,), tile=1 if "tiles" in how else 2)
            batch.join("a")
            batch.join("b")
            for frame in x.unbind(2):
                buffer.copy_(frame)
                spoken = batch.step({"a": buffer[0], "b": buffer[1]})
                said += [torch.stack([spoken["a"], spoken["b"]])] if spoken else []
        else:
            state = network.init_state(2, (2,), lockstep=how == "lock-step" or name == "recurrent")
            for frame in x.unbind(2):
                y, valid, state = network.step(buffer.copy_(frame), state, inplace=how == "in place")
                said += [y if name != "identity" else y.clone()] if bool(torch.as_tensor(valid).all()) else []
                buffer.fill_(float("nan"))
    torch.testing.assert_close(torch.stack(said, 2), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("build", [plain_network, strided_network])
def test_functional_steps_leave_the_given_state_untouched(build):
    network = build()
    state = network.init_state(2, (3, 8, 8))
    for _ in range(5):
        _, _, state = network.step(torch.randn(2, 3, 8, 8), state)
    before = [t.clone() for _, t in co.leaves(state.memory)]
    network.step(torch.randn(2, 3, 8, 8), state)
    network.steps(torch.randn(2, 3, 4, 8, 8), state)
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, co.leaves(state.memory)))


@pytest.mark.parametrize("build", [plain_network, strided_network])
def test_chunks_continue_streams_of_different_age(build):
    network = build()
    torch.manual_seed(1)
    x = torch.randn(2, 3, 22, 8, 8)
    alone = [run_steps(network, x[:1, :, :15])[0], run_steps(network, x[1:])[0]]
    with torch.no_grad():
        state = network.init_state(2, (3, 8, 8))
        said = [[], []]
        for t in range(7):  # the second stream is 7 frames older
            y, valid, state = network.step(x[:, :, t], state, active=torch.tensor([False, True]))
            if valid[1]:
                said[1].append(y[1])
        chunk = torch.stack([x[0, :, :15], x[1, :, 7:]])
        for part in chunk.split([4, 1, 10], 2):
            y, valid, state = network.steps(part, state)
            for slot in range(2):
                said[slot] += [] if y is None else list(y[slot][:, valid[slot]].unbind(1))
    for slot in range(2):
        torch.testing.assert_close(torch.stack(said[slot], 1), alone[slot][0], atol=1e-5, rtol=1e-5)


def test_a_single_stream_is_saved_and_restored(tmp_path):
    network = strided_network()
    torch.manual_seed(1)
    x = torch.randn(3, 3, 20, 8, 8)
    state = network.init_state(3, (3, 8, 8))
    for t in range(9):
        _, _, state = network.step(x[:, :, t], state)
    co.save_state(co.gather(state, [1]), tmp_path / "camera.safetensors")
    other = network.init_state(2, (3, 8, 8))
    back = co.load_state(tmp_path / "camera.safetensors", other)
    other = co.scatter(other, [0], back)
    for t in range(9, 20):
        y, valid, state = network.step(x[:, :, t], state)
        z, moved, other = network.step(torch.stack([x[1, :, t], x[0, :, t]]), other)
        assert bool(valid[1]) == bool(moved[0])
        if valid[1]:
            torch.testing.assert_close(z[0], y[1], atol=1e-6, rtol=1e-6)


def test_the_state_of_another_network_is_refused(tmp_path):
    one, two = plain_network(), strided_network()
    state = one.init_state(1, (3, 8, 8))
    co.save_state(state, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="another network"):
        co.load_state(tmp_path / "one.safetensors", two.init_state(1, (3, 8, 8)))
    with pytest.raises(ValueError, match="another network"):
        co.load_state(tmp_path / "one.safetensors", one.init_state(1, (3, 7, 7)))
    with pytest.raises(ValueError, match="another network"):
        co.scatter(two.init_state(2, (3, 8, 8)), [0], state)
    with pytest.raises(FileNotFoundError, match="no saved stream"):
        co.load_state(tmp_path / "none.safetensors", state)


def test_files_that_are_no_saved_stream_are_refused_by_name(tmp_path):
    from safetensors.torch import save_file

    network = co.Sequential(co.Conv1d(2, 2, 3), co.Conv1d(2, 2, 3))
    state = network.init_state(1, (2,))
    co.save_state(state, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for name, data in (("truncated", whole[:-9]), ("head", whole[:5]), ("empty", b""), ("garbage", b"hello" * 99)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name} is no saved stream, or a truncated one"):
            co.load_state(tmp_path / name, state)
    save_file({"x": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="weights is no saved stream: it holds other tensors"):
        co.load_state(tmp_path / "weights", state)
    with pytest.raises(ValueError, match="is a folder"):
        co.load_state(tmp_path, state)
    with pytest.raises(ValueError, match="is a folder"):
        co.save_state(state, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent to save"):
        co.save_state(state, tmp_path / "absent" / "file")


def test_bad_frames_are_refused_with_expected_and_received():
    network = plain_network()
    state = network.init_state(2, (3, 8, 8))
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\).*got \(2, 3, 9, 8\)"):  # another size mid-stream
        network.step(torch.randn(2, 3, 9, 8), state)
    with pytest.raises(ValueError, match=r"got \(3, 3, 8, 8\)"):
        network.step(torch.randn(3, 3, 8, 8), state)
    with pytest.raises(ValueError, match=r"goes to steps\(\)"):
        network.step(torch.randn(2, 3, 1, 8, 8), state)
    with pytest.raises(ValueError, match="chunk"):
        network.steps(torch.randn(2, 3, 8, 8), state)
    with pytest.raises(TypeError, match=r"float32.*got torch\.float64"):
        network.step(torch.randn(2, 3, 8, 8, dtype=torch.float64), state)
    with pytest.raises(TypeError, match="StreamState from init_state, got dict"):
        network.step(torch.randn(2, 3, 8, 8), {})
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        network.step(torch.randn(2, 3, 8, 8), state, active=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"frames \(C, H, W\) with C = 3, got \(3, 8\)"):
        network.init_state(2, (3, 8))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        network.init_state(0, (3, 8, 8))
    with pytest.raises(IndexError, match=r"\[5\] are outside 0\.\.1"):
        co.reset(state, [5])
    with pytest.raises(ValueError, match="one clock"):
        co.reset(network.init_state(2, (3, 8, 8), lockstep=True), [0])


def test_batch_statistics_need_leave():
    network = plain_network().train()
    state = network.init_state(2, (3, 8, 8))
    with pytest.raises(RuntimeError, match="1 would use batch statistics"):
        network.step(torch.randn(2, 3, 8, 8), state)
    network.step(torch.randn(2, 3, 8, 8), state, allow_train=True)


def test_stateful_wrapper_is_the_functional_form():
    network = plain_network()
    x = torch.randn(2, 3, 12, 8, 8)
    want, _ = run_steps(network, x)
    stream = co.Stream(network, streams=2, frame_shape=(3, 8, 8))
    with torch.no_grad():
        said = [y for y, valid in (stream(frame) for frame in x.unbind(2)) if bool(valid.all())]
        rest, _ = stream.flush()
    torch.testing.assert_close(torch.cat([torch.stack(said, 2), rest], 2), network(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.stack(said, 2), want)
    assert stream.state.clock.tolist() == [0, 0]


def test_deep_copies_and_pickled_weights_keep_stepping():
    import copy

    network = copy.deepcopy(plain_network())
    assert isinstance(network[0], nn.Conv3d)
    plain = nn.Conv3d(3, 8, 3, padding=1, stride=(1, 2, 2))
    plain.load_state_dict({k.removeprefix("0."): v for k, v in network.state_dict().items() if k.startswith("0.")})
    x = torch.randn(1, 3, 5, 8, 8)
    torch.testing.assert_close(plain(x), network[0](x))
