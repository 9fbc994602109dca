"""Seats: many live streams in one batch, each as if alone."""

import pytest
import torch
from continual.test_layers import plain_network, run_steps, strided_network
from continual.test_networks import tiny_x3d

from sparing import continual as co


@pytest.mark.parametrize("build", [plain_network, strided_network])
def test_sixty_four_streams_come_and_go_as_if_alone(build):
    network = build()
    generator = torch.Generator().manual_seed(0)
    life = [(int(torch.randint(0, 30, (), generator=generator)), 40) for _ in range(64)]
    frames = torch.randn(64, 3, 40, 8, 8, generator=generator)
    batch = co.StreamBatch(network, seats=64, frame_shape=(3, 8, 8))
    said, given = {str(s): [] for s in range(64)}, [0] * 64
    for now in range(40):
        present = {}
        for s, (start, _) in enumerate(life):
            if now == start:
                batch.join(str(s))
            stalls = (now + s) % 7 == 0
            if now >= start and not stalls:
                present[str(s)] = frames[s, :, given[s]]
                given[s] += 1
        for name, y in batch.step(present).items():
            said[name].append(y)
    with torch.no_grad():
        for s in range(64):
            if not said[str(s)]:
                assert given[s] <= batch.plan.first_output_step
                continue
            alone, _ = run_steps(network, frames[s : s + 1, :, : given[s]], lockstep=True)
            got = torch.stack(said[str(s)], 1)
            assert got.shape[1] == alone.shape[2]
            torch.testing.assert_close(got, alone[0], atol=1e-5, rtol=1e-5)


def test_a_seat_is_empty_again_for_the_next_stream():
    network = plain_network()
    batch = co.StreamBatch(network, seats=1, frame_shape=(3, 8, 8))
    torch.manual_seed(1)
    first, second = torch.randn(9, 3, 8, 8), torch.randn(12, 3, 8, 8)
    batch.join("a")
    for frame in first:
        batch.step({"a": frame})
    batch.leave("a")
    batch.join("b")
    got = [y["b"] for y in (batch.step({"b": frame}) for frame in second) if y]
    with torch.no_grad():
        alone, _ = run_steps(network, second.movedim(0, 1)[None])
    torch.testing.assert_close(torch.stack(got, 1), alone[0])


def test_stalled_streams_time_out_and_free_their_seat():
    now = [0.0]
    batch = co.StreamBatch(plain_network(), seats=2, frame_shape=(3, 8, 8), timeout_s=5, clock=lambda: now[0])
    batch.join("still")
    batch.join("live")
    for now[0] in (1.0, 4.0, 5.0, 5.5):
        batch.step({"live": torch.randn(3, 8, 8)})
    assert batch.streams == ["live"]
    batch.join("new")
    now[0] = 20.0
    assert sorted(batch.time_out()) == ["live", "new"]


def test_a_frame_after_a_long_silence_begins_a_stream_anew():
    now, network = [0.0], plain_network()
    batch = co.StreamBatch(network, seats=2, frame_shape=(3, 8, 8), timeout_s=5, clock=lambda: now[0])
    batch.join("a")
    torch.manual_seed(1)
    frames = torch.randn(3, 12, 8, 8)
    for _ in range(9):
        batch.step({"a": torch.randn(3, 8, 8)})
    now[0] = 1000.0
    said = [y["a"] for y in (batch.step({"a": frame}) for frame in frames.unbind(1)) if y]
    with torch.no_grad():
        want = run_steps(network, frames[None])[0]
        torch.testing.assert_close(torch.stack(said, 1), want[0])
        now[0] = 2000.0
        primed = batch.prime("a", frames)
        torch.testing.assert_close(primed, want[0], atol=1e-5, rtol=1e-5)


def test_a_restored_stream_has_just_been_heard_of(tmp_path):
    now, network = [0.0], plain_network()
    batch = co.StreamBatch(network, seats=2, frame_shape=(3, 8, 8), timeout_s=5, clock=lambda: now[0])
    batch.join("a")
    batch.step({"a": torch.randn(3, 8, 8)})
    batch.save("a", tmp_path / "a")
    now[0] = 100.0
    batch.restore("a", tmp_path / "a")
    batch.join("b")
    batch.step({"b": torch.randn(3, 8, 8)})
    assert batch.streams == ["a", "b"]


@pytest.mark.parametrize("tile", [1, 2])
def test_a_restore_that_fails_seats_nobody(tmp_path, tile):
    network = plain_network()
    batch = co.StreamBatch(network, seats=2, frame_shape=(3, 8, 8), tile=tile)
    co.save_state(network.init_state(1, (3, 8, 8), lockstep=True), tmp_path / "lockstep")
    co.save_state(network.init_state(2, (3, 8, 8)), tmp_path / "two")
    (tmp_path / "empty").write_bytes(b"")
    for name, words in (
        ("lockstep", "lock-step state"),
        ("two", "2 streams"),
        ("empty", "no saved"),
        ("no", "no saved"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            batch.restore("a", tmp_path / name)
        assert batch.streams == []


def test_what_is_no_frame_is_refused_by_stream():
    network = plain_network()
    batch = co.StreamBatch(network, seats=1, frame_shape=(3, 8, 8))
    batch.join("a")
    with pytest.raises(ValueError, match=r"stream 'a': a frame is a tensor, got list"):
        batch.step({"a": [1]})
    with pytest.raises(ValueError, match=r"stream 'a': frames are a tensor .*got list"):
        batch.prime("a", [1])
    with pytest.raises(ValueError, match=r"by stream.*got Tensor"):
        batch.step(torch.randn(3, 8, 8))
    with pytest.raises(ValueError, match=r"torch\.bfloat16 does not fit a network in torch\.float32"):
        co.StreamBatch(network, seats=1, frame_shape=(3, 8, 8), dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"Linear does not run on streams: sparing\.continual\.convert"):
        co.StreamBatch(torch.nn.Linear(2, 2), seats=1, frame_shape=(2,))
    with pytest.raises(TypeError, match=r"expected a clip network, an nn\.Module, got NoneType"):
        co.convert(None)


def test_streams_are_primed_saved_and_restored(tmp_path):
    network = strided_network()
    torch.manual_seed(1)
    frames = torch.randn(1, 3, 30, 8, 8)
    with torch.no_grad():
        alone, _ = run_steps(network, frames)
    batch = co.StreamBatch(network, seats=3, frame_shape=(3, 8, 8))
    batch.join("x")
    said = [batch.prime("x", frames[0, :, :14])]
    batch.save("x", tmp_path / "x.safetensors")
    other = co.StreamBatch(network, seats=2, frame_shape=(3, 8, 8))
    other.join("noise")
    other.restore("x", tmp_path / "x.safetensors")
    for t in range(14, 30):
        y = other.step({"x": frames[0, :, t], "noise": torch.randn(3, 8, 8)})
        said += [y["x"][:, None]] if "x" in y else []
    torch.testing.assert_close(
        torch.cat([part for part in said if part is not None], 1), alone[0], atol=1e-5, rtol=1e-5
    )
    stranger = co.StreamBatch(plain_network(), seats=1, frame_shape=(3, 8, 8))
    with pytest.raises(ValueError, match="another network"):
        stranger.restore("x", tmp_path / "x.safetensors")
    assert stranger.streams == []


def test_a_compiled_batch_says_the_same():
    network = plain_network()
    frames = torch.randn(10, 2, 3, 8, 8)
    plain = co.StreamBatch(network, seats=2, frame_shape=(3, 8, 8))
    compiled = co.StreamBatch(network, seats=2, frame_shape=(3, 8, 8), compile="aot_eager")
    for batch in (plain, compiled):
        batch.join("a")
        batch.join("b")
    for pair in frames:
        want, got = plain.step({"a": pair[0], "b": pair[1]}), compiled.step({"a": pair[0], "b": pair[1]})
        assert list(want) == list(got)
        for name in want:
            torch.testing.assert_close(got[name], want[name], atol=1e-6, rtol=1e-6)


def test_bad_requests_name_the_stream_and_change_nothing():
    batch = co.StreamBatch(plain_network(), seats=1, frame_shape=(3, 8, 8))
    batch.join("a")
    with pytest.raises(ValueError, match="all 1 seats are taken; 'b' cannot join"):
        batch.join("b")
    with pytest.raises(ValueError, match="'a' is seated already"):
        batch.join("a")
    with pytest.raises(ValueError, match="no stream 'b'; seated are 'a'"):
        batch.step({"b": torch.randn(3, 8, 8)})
    with pytest.raises(ValueError, match=r"stream 'a'.*\(3, 8, 8\), got torch.float32 \(3, 9, 8\)"):
        batch.step({"a": torch.randn(3, 9, 8)})
    assert batch.state.clock.tolist() == [0]
    assert batch.step({}) == {}
    with pytest.raises(ValueError, match="timeout_s must be positive"):
        co.StreamBatch(plain_network(), seats=1, frame_shape=(3, 8, 8), timeout_s=0)
    with pytest.raises(ValueError, match="CUDA"):
        co.StreamBatch(plain_network(), seats=1, frame_shape=(3, 8, 8), cuda_graph=True)


def test_exported_steps_round_trip_from_a_cold_start():
    network = tiny_x3d()
    program, manifest = co.export_step(network, (3, 32, 32))
    run = program.module()
    torch.manual_seed(0)
    memories = None
    with torch.no_grad():
        state = network.init_state(3, (3, 32, 32))  # another stream count than it was exported with
        memories = [state.clock, *(t for _, t in co.leaves(state.memory))]
        assert manifest["inputs"][2:] == [name for name, _ in co.leaves(state.memory)]
        assert [tuple(entry["shape"][1:]) for entry in manifest["states"]][1:] == [
            tuple(t.shape[1:]) for _, t in co.leaves(state.memory)
        ]
        for _ in range(50):
            x = torch.randn(3, 3, 32, 32)
            want, valid, state = network.step(x, state)
            y, spoke, *memories = run(x, *memories)
            assert torch.equal(spoke, valid)
            torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)


def test_exported_attention_runs():
    network = co.TransformerEncoder(8, 2, dim_feedforward=8, num_layers=1, sequence_len=3).eval()
    program, _ = co.export_step(network, (8,))
    state = network.init_state(2, (8,))
    memories = [state.clock, *(t for _, t in co.leaves(state.memory))]
    with torch.no_grad():
        for _ in range(6):
            x = torch.randn(2, 8)
            want, valid, state = network.step(x, state)
            y, spoke, *memories = program.module()(x, *memories)
            torch.testing.assert_close(y, want)
            assert torch.equal(spoke, valid)
    with pytest.raises(RuntimeError, match="eval"):
        co.export_step(network.train(), (8,))


@pytest.mark.slow
def test_onnx_step_equals_eager(tmp_path):
    import numpy as np
    import onnxruntime

    network = plain_network()
    manifest = co.export_onnx(network, (3, 8, 8), str(tmp_path / "step.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "step.onnx"))
    state = network.init_state(2, (3, 8, 8))
    values = [state.clock.numpy(), *(t.numpy() for _, t in co.leaves(state.memory))]
    for _ in range(12):
        x = torch.randn(2, 3, 8, 8)
        with torch.no_grad():
            want, valid, state = network.step(x, state)
        names = [entry.name for entry in session.get_inputs()]
        y, spoke, *values = session.run(None, dict(zip(names, [x.numpy(), *values])))
        assert np.array_equal(spoke, valid.numpy())
        np.testing.assert_allclose(y, want.numpy(), atol=1e-5, rtol=1e-4)
    assert manifest["inputs"][:2] == ["x", "clock"]


@pytest.mark.gpu
@pytest.mark.parametrize("build", [plain_network, strided_network, tiny_x3d])
def test_cuda_graph_replay_equals_eager_without_allocation_or_sync(build):
    network = build().cuda()
    shape = (3, 32, 32) if build is tiny_x3d else (3, 8, 8)
    graphed = co.StreamBatch(network, seats=3, frame_shape=shape)
    eager = co.StreamBatch(network, seats=3, frame_shape=shape, cuda_graph=False)
    for batch in (graphed, eager):
        for name in "abc":
            batch.join(name)
    pointers = [t.data_ptr() for _, t in co.leaves(graphed.state.memory)]
    for t in range(40):
        frames = {name: torch.randn(shape, device="cuda") for name in "abc"[: 1 + t % 3]}
        want, got = eager.step(frames), graphed.step(frames)
        assert list(want) == list(got)
        for name in want:
            torch.testing.assert_close(got[name], want[name], atol=1e-5, rtol=1e-5)
    assert pointers == [t.data_ptr() for _, t in co.leaves(graphed.state.memory)]
    state = network.init_state(3, shape)
    x = torch.randn(3, *shape, device="cuda")
    with torch.no_grad():
        for _ in range(3):
            network.step(x, state, inplace=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(1000):
                network.step(x, state, inplace=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == before
