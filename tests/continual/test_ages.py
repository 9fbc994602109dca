"""What the host knows of the ages of streams spares masks and changes nothing; seats are emptied row by row."""

import pytest
import torch
from continual.test_layers import plain_network, run_steps, strided_network
from torch import nn

from sparing import continual as co
from sparing.continual import stream_batch
from sparing.continual.timing import Span


def replicating_network():
    torch.manual_seed(0)
    return co.Sequential(
        co.Conv3d(3, 4, 3, padding=(1, 1, 1), temporal_fill="replicate"),
        nn.ReLU(),
        co.Conv3d(4, 4, (3, 1, 1), padding=(2, 0, 0), temporal_fill="replicate"),
        co.MaxPool3d((3, 8, 8), stride=1, padding=(1, 0, 0)),
        co.Flatten(),
    ).eval()


def transformer_behind_a_convolution(partial):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    encoder = co.convert(plain, sequence_len=5)
    encoder.partial = partial
    return co.Sequential(co.Conv1d(3, 8, 3), encoder).eval()


NETWORKS = {
    "padded": (plain_network, (3, 8, 8)),
    "not padded": (lambda: plain_network(padding=0), (3, 8, 8)),
    "strided": (strided_network, (3, 8, 8)),
    "replicate": (replicating_network, (3, 8, 8)),
    "encoder": (lambda: transformer_behind_a_convolution(partial=False), (3,)),
    "attention": (lambda: co.SingleOutputAttention(8, 2, sequence_len=4).eval(), (8,)),
    "partial encoder": (lambda: transformer_behind_a_convolution(partial=True), (3,)),
    "recurrent": (lambda: co.Sequential(co.Conv1d(3, 4, 3), co.GRU(4, 5)).eval(), (3,)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("ahead", [(0, 0, 0), (0, 3, 1)], ids=["together", "apart"])
@torch.no_grad()
def test_knowing_the_youngest_stream_changes_no_bit(name, ahead):
    build, shape = NETWORKS[name]
    network = build()
    state = network.init_state(3, shape)
    generator = torch.Generator().manual_seed(1)
    for now in range(max(ahead)):
        waiting = torch.tensor([now < lead for lead in ahead])
        _, _, state = network.step(torch.randn(3, *shape, generator=generator), state, active=waiting)
    spoken = 0
    for now in range(network.plan().warm_after + 4):
        x = torch.randn(3, *shape, generator=generator)
        assert int(state.clock.min()) == now
        want, valid, after = network.step(x, state)
        got, same, state = network.step(x, state, youngest=now)
        assert torch.equal(valid, same)
        assert torch.equal(want, got)
        for (leaf, a), (_, b) in zip(co.leaves(after.memory), co.leaves(state.memory)):
            assert torch.equal(a, b), leaf
        spoken += int(valid.sum())
    assert spoken > 0


def test_layers_are_told_the_youngest_stream_that_speaks(monkeypatch):
    network = plain_network()
    seen, step = [], network.step_together

    def watched(x, state, *, turn, youngest):
        seen.append((turn, youngest))
        return step(x, state, turn=turn, youngest=youngest)

    monkeypatch.setattr(network, "step_together", watched)
    batch = co.StreamBatch(network, seats=4, frame_shape=(3, 8, 8), tile=4)
    for name in "abc":
        batch.join(name)
    frame = torch.zeros(3, 8, 8)
    for _ in range(2):
        batch.step(dict.fromkeys("abc", frame))
    batch.leave("a")
    batch.step(dict.fromkeys("bc", frame))
    batch.join("d")
    batch.step(dict.fromkeys("bcd", frame))
    batch.step({"b": frame})
    assert seen == [(0, 0), (1, 1), (2, 2), (3, 0), (4, 4)]


@pytest.mark.parametrize("build", [plain_network, strided_network])
def test_streams_beside_empty_and_used_seats_are_as_if_alone(build):
    network = build()
    frames = torch.randn(3, 3, 40, 8, 8, generator=torch.Generator().manual_seed(2))
    batch = co.StreamBatch(network, seats=3, frame_shape=(3, 8, 8), tile=3)
    batch.join("poison")
    batch.join("a")
    said = {"a": [], "b": []}
    for now in range(40):
        if now == 5:  # its seat stays empty, full of NaN, and is then taken by another
            batch.leave("poison")
        if now == 12:
            batch.join("b")
        given = {"a": frames[0, :, now]}
        if now < 5:
            given["poison"] = torch.full((3, 8, 8), float("nan"))
        if now >= 12:
            given["b"] = frames[1, :, now]
        for name, y in batch.step(given).items():
            if name != "poison":
                said[name].append(y)
    with torch.no_grad():
        for name, clip in (("a", frames[0]), ("b", frames[1, :, 12:])):
            alone, _ = run_steps(network, clip[None], lockstep=True)
            torch.testing.assert_close(torch.stack(said[name], 1), alone[0], atol=1e-5, rtol=1e-5)


class Newest(co.Continual, nn.Module):
    """Answers with what it keeps: the memory of the newest frame itself."""

    def _span(self):
        return Span(1, 1, 0, 0, 0)

    def _memory(self, streams, frame_shape, make):
        return {"held": make((streams, *frame_shape))}, frame_shape

    def _step(self, x, memory, tick):
        kept = x.clone()
        return kept, {"held": kept}


@pytest.mark.parametrize("build", [Newest, lambda: co.Delay(2)])
def test_an_answer_stays_when_its_seat_is_emptied(build):
    batch = co.StreamBatch(build().eval(), seats=2, frame_shape=(3,), tile=2)
    batch.join("a")
    said = []
    for _ in range(4):
        said += batch.step({"a": torch.ones(3)}).values()
    assert said
    batch.reset("a")
    assert all(y.eq(1).all() for y in said)
    assert not any(t[0].any() for _, t in co.leaves(batch.state.memory))


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("name", ["padded", "encoder", "attention"])
def test_modes_may_change_while_streams_run(name, made):
    network, shape = NETWORKS[name][0](), NETWORKS[name][1]
    frames = torch.randn(*shape[:1], 24, *shape[1:], generator=torch.Generator().manual_seed(3))
    with torch.inference_mode(made):
        batch = co.StreamBatch(network, seats=2, frame_shape=shape, tile=2)
        batch.join("a")
    for inside in (True, False):
        said = []
        for now, frame in enumerate(frames.unbind(1)):
            with torch.inference_mode(now % 2 == inside):
                said += batch.step({"a": frame}).values()
        with torch.no_grad():
            alone, _ = run_steps(network, frames[None], lockstep=True)
        torch.testing.assert_close(torch.stack(said, 1), alone[0], atol=1e-5, rtol=1e-5)
        batch.reset("a")


@pytest.mark.parametrize("slots", [[1, 1], torch.tensor([1, -1]), torch.tensor([False, True])])
def test_streams_in_lockstep_are_reset_all_or_none(slots):
    state = plain_network().init_state(2, (3, 8, 8), lockstep=True)
    with pytest.raises(ValueError, match="shares one clock"):
        co.reset(state, slots)
    assert co.reset(state._replace(clock=5), torch.tensor([0, -1])).clock == 0


def test_tiles_are_of_one_size_as_near_as_can_be(monkeypatch):
    network = plain_network()
    one = network.plan((3, 8, 8)).bytes_per_stream

    def tile(room):
        monkeypatch.setattr(stream_batch, "TILE_BYTES", room)
        return co.StreamBatch(network, seats=10, frame_shape=(3, 8, 8)).tile

    assert [tile(one * room) for room in (1, 4, 7, 100)] == [4, 4, 5, 10]
