"""Random networks, random comings and goings: a stream in a batch is as if alone, and what was answered stays."""

import contextlib
import copy
import random

import pytest
import torch
from torch import nn

from sparing import continual as co

CONV = {1: co.Conv1d, 2: co.Conv2d, 3: co.Conv3d}
AVERAGE = {1: co.AvgPool1d, 2: co.AvgPool2d, 3: co.AvgPool3d}
MAXIMUM = {1: co.MaxPool1d, 2: co.MaxPool2d, 3: co.MaxPool3d}
SHAPE = {1: (), 2: (7,), 3: (6, 5)}
MODES = (contextlib.nullcontext, torch.no_grad, torch.inference_mode)


def random_conv(rng, dims, channels, *, plain=False):
    """A convolution that keeps the channels; ``plain``: neither strides nor dilation nor replicate fill."""
    kernel, around = rng.choice((1, 2, 3, 3, 4, 5)), rng.choice((1, 3))
    stride, dilation = (1, 1) if plain else (rng.choice((1, 1, 1, 2)), rng.choice((1, 1, 1, 2)))
    fill = "zeros" if plain else rng.choice(("zeros", "zeros", "zeros", "replicate"))
    sums = kernel > 1 and stride == dilation == 1 and fill == "zeros"
    return CONV[dims](
        channels,
        channels,
        (kernel, *[around] * (dims - 1)),
        stride=(stride, *[1] * (dims - 1)),
        padding=(rng.randint(0, dilation * (kernel - 1)), *[around // 2] * (dims - 1)),
        dilation=(dilation, *[1] * (dims - 1)),
        groups=rng.choice((1, 1, 2, channels)),
        temporal_fill=fill,
        formulation=rng.choice(("auto", "history", "partial") if sums else ("auto", "history")),
    )


def random_pool(rng, dims, kinds):
    kernel, flat = rng.choice((1, 2, 3, 4)), [1] * (dims - 1)
    padding = (rng.randint(0, kernel // 2), *[0] * (dims - 1))
    return kinds[dims]((kernel, *flat), stride=(rng.choice((1, 1, 2)), *flat), padding=padding)


def random_residual(rng, dims, channels):
    kernel, rest = rng.choice((3, 5)), dims - 1
    padding = (rng.randint(0, kernel // 2), *[1] * rest)
    conv = CONV[dims](channels, channels, (kernel, *[3] * rest), padding=padding, groups=rng.choice((1, channels)))
    return co.Residual(conv, shrink=rng.choice(("centered", "lagging", "leading")))


def random_branches(rng, dims, channels):
    convs = [random_conv(rng, dims, channels, plain=True) for _ in range(2)]
    reduce, align = rng.choice(("sum", "prod", "max")), rng.choice(("input", "output"))
    return co.BroadcastReduce(*convs, reduce=reduce, align=align)


def random_token_layer(rng, channels):
    n, partial = rng.randint(1, 6), rng.random() < 0.4
    kind = rng.choice(("GRU", "LSTM", "RNN", "single", "queried", "encoder", "encoder", "positions"))
    if kind == "single":
        return co.SingleOutputAttention(channels, 2, sequence_len=n, partial=partial)
    if kind == "queried":
        return co.SingleOutputAttention(channels, 2, sequence_len=n, query_index=-rng.randint(1, n))
    if kind == "encoder":
        blocks = rng.choice((1, 2, 3))
        sizes = {"dim_feedforward": 5, "num_layers": blocks, "sequence_len": n}
        return co.TransformerEncoder(channels, 2, **sizes, partial=partial)
    if kind == "positions":
        return co.RecyclingPositionalEncoding(channels, rng.randint(1, 9))
    return getattr(co, kind)(channels, channels, num_layers=rng.choice((1, 2)))


def random_part(rng, dims, channels):
    makers = [random_conv] * 5 + [random_residual, random_branches]
    made = rng.choice([*makers, AVERAGE, MAXIMUM, "relu", "delay", "skip", "linear", *["tokens"] * (5 * (dims == 1))])
    if callable(made):
        return made(rng, dims, channels)
    if isinstance(made, dict):
        return random_pool(rng, dims, made)
    if made == "tokens":
        return random_token_layer(rng, channels)
    if made == "delay":
        return co.Delay(rng.randint(0, 3), lead=rng.choice((0, 0, 1)))
    if made == "relu":
        return rng.choice((nn.ReLU(inplace=True), nn.Tanh(), nn.Identity()))
    return co.Skip(rng.randint(0, 3)) if made == "skip" else co.Linear(channels, channels)


def random_network(rng):
    """(network in float64 with a parameter, shape of its frames)."""
    while True:
        dims, channels = rng.choice((1, 2, 3, 3)), rng.choice((4, 6))
        shape = (channels, *SHAPE[dims])
        with contextlib.suppress(ValueError):  # parts that do not fit together
            parts = [random_part(rng, dims, channels) for _ in range(rng.randint(1, 6))]
            if dims == 1 and rng.random() < 0.2:
                update = rng.choice(("recompute", "incremental"))
                parts.append(co.RetroactiveAttention(channels, 2, sequence_len=rng.randint(2, 4), update=update))
            network = co.Sequential(*parts, nn.PReLU()).double().eval()
            network.init_state(1, shape)
            if network.plan().warm_after < 30:
                last = dims == 3 and rng.random() < 0.5
                return network.to(memory_format=torch.channels_last_3d) if last else network, shape


class Alone:
    """A stream by itself: in lock-step for what it says, with a clock of its own for what it remembers."""

    def __init__(self, network, shape):
        self.network = network
        self.said, self.held = (network.init_state(1, shape, lockstep=lockstep) for lockstep in (True, False))

    @torch.no_grad()
    def step(self, frame):
        y, valid, self.said = self.network.step(frame[None].clone(), self.said)
        _, _, self.held = self.network.step(frame[None].clone(), self.held)
        return y[0] if valid else None

    @torch.no_grad()
    def prime(self, frames):
        y, _, self.said = self.network.steps(frames[None], self.said)
        _, _, self.held = self.network.steps(frames[None], self.held)
        return None if y is None else y[0]


class World:
    """Two batches of one network, the streams in them, and every stream beside them on its own."""

    def __init__(self, seed, folder):
        self.rng, self.folder = random.Random(seed), folder
        torch.manual_seed(seed)
        self.network, self.shape = random_network(self.rng)
        self.alone = copy.deepcopy(self.network)
        self.batches = [self._batch(), self._batch()]
        self.lone, self.poisoned, self.saved, self.promised, self.spoken = {}, set(), [], [], 0

    def _batch(self):
        seats = self.rng.randint(1, 7)
        with self.rng.choice(MODES)():
            tile = self.rng.choice((None, self.rng.randint(1, seats)))
            return co.StreamBatch(self.network, seats=seats, frame_shape=self.shape, tile=tile)

    def frame(self, name):
        if name in self.poisoned and self.rng.random() < 0.5:
            return torch.full(self.shape, float("nan"), dtype=torch.float64)
        return torch.randn(self.shape, dtype=torch.float64)

    def same(self, got, want, name):
        assert (got is None) == (want is None)
        if want is not None and name not in self.poisoned:
            self.spoken += 1
            torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)

    def event(self):
        at, kind = self.rng.randrange(2), self.rng.choice(("join", "join", "seated", "restore", "copy"))
        batch = self.batches[at]
        seated, new = batch.streams, f"{len(self.lone)}"
        if kind == "join" and len(seated) < batch.seats:
            batch.join(new)
            self.lone[new] = Alone(self.alone, self.shape)
            self.poisoned |= {new} if self.rng.random() < 0.2 else set()
        elif kind == "restore" and self.saved and len(seated) < batch.seats:
            path, self.lone[new] = (copy.copy(part) for part in self.rng.choice(self.saved))
            batch.restore(new, path)
        elif kind == "copy" and not torch.is_inference_mode_enabled():
            self.batches[at] = copy.deepcopy(batch)
            batch.step({name: torch.full(self.shape, float("nan"), dtype=torch.float64) for name in seated})
        elif kind == "seated" and seated:
            self.event_of(batch, self.rng.choice(seated))

    def event_of(self, batch, name):
        kind = self.rng.choice(("leave", "reset", "save", "prime", "look"))
        if kind == "leave":
            batch.leave(name)
        elif kind == "reset":
            batch.reset(name)
            self.lone[name] = Alone(self.alone, self.shape)
        elif kind == "save" and name not in self.poisoned:
            self.saved.append((self.folder / f"{len(self.saved)}", copy.copy(self.lone[name])))
            batch.save(name, self.saved[-1][0])
        elif kind == "prime":
            frames = torch.stack([self.frame(name) for _ in range(self.rng.randint(1, 8))], 1)
            with contextlib.suppress(ValueError):  # recurrent layers behind a delay, incremental attention
                said = batch.prime(name, frames)
                self.same(said, self.lone[name].prime(frames), name)
        elif kind == "look" and name not in self.poisoned:
            state, seat = batch.state, batch._seat_of[name]
            assert state.clock[seat] == self.lone[name].held.clock[0]
            for (leaf, got), (_, want) in zip(co.leaves(state.memory), co.leaves(self.lone[name].held.memory)):
                torch.testing.assert_close(got[seat], want[0], atol=1e-9, rtol=1e-9, msg=leaf)
                self.promised.append((got, got.clone()))

    def step(self, batch):
        share = self.rng.choice((0.2, 0.5, 0.9, 1))
        given = {name: self.frame(name) for name in batch.streams if self.rng.random() < share}
        sent = {name: frame.clone() for name, frame in given.items()}
        said = batch.step(sent)
        for name, frame in given.items():
            sent[name].fill_(7)  # buffers are used again
            self.same(said.get(name), self.lone[name].step(frame), name)
        self.promised += [(y, y.clone()) for y in said.values()]


@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 200))])
def test_streams_in_random_networks_are_as_if_alone(tmp_path, seed):
    world = World(seed, tmp_path)
    for _ in range(45):
        with world.rng.choice(MODES)():
            world.event()
            world.event()
            for batch in world.batches:
                world.step(batch)
    assert world.spoken
    for given, then in world.promised:
        assert torch.equal(given.nan_to_num(1.25), then.nan_to_num(1.25))


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_recurrent_memories_keep_their_precision_under_autocast(kind):
    torch.manual_seed(0)
    network = getattr(co, kind)(4, 4, num_layers=2).eval()
    frames = torch.randn(12, 4)
    batch = co.StreamBatch(network, seats=3, frame_shape=(4,), tile=3)
    for name in "abc":
        batch.join(name)
    state, said = network.init_state(1, (4,)), []
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        batch.prime("c", frames.T)
        for now, frame in enumerate(frames):
            present = "abc" if now % 2 else "ab"
            said.append(batch.step(dict.fromkeys(present, frame))["a"])
            want, _, state = network.step(frame[None], state)
            torch.testing.assert_close(said[-1], want[0], atol=2e-2, rtol=2e-2)
    assert {leaf.dtype for _, leaf in co.leaves(batch.state.memory)} == {torch.float32}
    batch.step({"a": frames[0]})  # goes on without autocast


@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), co.Sequential(nn.ReLU(inplace=True), co.Conv1d(3, 3, 2))])
def test_layers_in_place_behind_a_delay_leave_its_memory(first):
    network = co.Sequential(co.Delay(1), first).eval()
    state = network.init_state(1, (3,))
    with torch.inference_mode():
        _, _, state = network.step(-torch.ones(1, 3), state)
    with torch.no_grad():
        network.step(torch.ones(1, 3), state)
    assert state.memory["0"]["held"].eq(-1).all()


def test_where_few_of_a_tile_have_a_frame_only_they_are_stepped(monkeypatch):
    torch.manual_seed(0)
    network, widths = co.Sequential(co.Conv3d(3, 3, 3), co.Conv3d(3, 3, 3)).eval(), []
    step = network.step_together
    monkeypatch.setattr(network, "step_together", lambda x, *a, **k: (widths.append(len(x)), step(x, *a, **k))[1])
    batch = co.StreamBatch(network, seats=8, frame_shape=(3, 9, 9), tile=8)
    for name in "abcdef":
        batch.join(name)
    frame = torch.zeros(3, 9, 9)
    for present in ("a", "abc", "abcd", "abcdef"):
        batch.step(dict.fromkeys(present, frame))
    assert widths == [1, 3, 8, 8]
    assert batch.state.clock.tolist()[:6] == [4, 3, 3, 2, 1, 1]
