"""Attention on streams: every step is torch's attention or encoder over the window, for as long as the stream runs."""

import pytest
import torch
from continual.test_layers import run_steps
from torch import nn

from sparing import continual as co
from sparing.continual import oadtr


def torch_encoder(layers, width=16, heads=4, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, heads, 24, dropout=0.0, batch_first=True, **options)
    encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder


def our_encoder(reference, layers, window, **options):
    network = co.TransformerEncoder(16, 4, dim_feedforward=24, num_layers=layers, sequence_len=window, **options).eval()
    network.load_state_dict(reference.state_dict())
    return network


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_encoder_equals_torch_on_the_window_for_many_windows(layers, norm_first):
    window = 6
    reference = torch_encoder(layers, norm_first=norm_first)
    network = our_encoder(reference, layers, window, norm_first=norm_first)
    x = torch.randn(2, 16, 12 * window)
    with torch.no_grad():
        got, _ = run_steps(network, x)
        want = torch.stack(
            [reference(x[:, :, t - window + 1 : t + 1].mT)[:, -1] for t in range(window - 1, x.shape[2])], 2
        )
    error = (got - want).abs().amax((0, 1))
    assert error.max() < 1e-4
    assert error[-window:].max() < 10 * error[:window].max() + 1e-6  # no drift growth


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_partial_windows_answer_from_the_first_token(layers):
    reference = torch_encoder(layers)
    network = our_encoder(reference, layers, 5, partial=True)
    x = torch.randn(2, 16, 11)
    with torch.no_grad():
        want = torch.stack([reference(x[:, :, max(0, t - 4) : t + 1].mT)[:, -1] for t in range(11)], 2)
        for lockstep in (False, True):
            got, _ = run_steps(network, x, lockstep=lockstep)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
            state = network.init_state(2, (16,), lockstep=lockstep)
            first, _, state = network.steps(x[:, :, :7], state)
            second, _, _ = network.steps(x[:, :, 7:], state)
            torch.testing.assert_close(torch.cat([first, second], 2), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("update", ["recompute", "incremental"])
def test_retroactive_attention_stays_finite_and_right_at_any_scale(update, scale):
    """Where the reference recurrence is NaN (inputs of scale 6 and 10), both forms follow the softmax."""
    torch.manual_seed(0)
    network = co.RetroactiveAttention(32, 4, sequence_len=16, update=update)
    x = scale * torch.randn(1, 32, 400)
    with torch.no_grad():
        got, _ = run_steps(network, x)
        want = network.double()(x.double())
    # Outputs grow with the inputs; float32 rounds logits of several hundred to 1e-5, which the exponential passes on.
    torch.testing.assert_close(got.double(), want, atol=4e-5 * max(scale, 1), rtol=1e-4)


@pytest.mark.parametrize("layers", [1, 2])
def test_streams_of_different_age_attend_alone(layers):
    network = our_encoder(torch_encoder(layers), layers, 5)
    torch.manual_seed(1)
    x = torch.randn(3, 16, 20)
    alone, _ = run_steps(network, x)
    said = [[] for _ in range(3)]
    state = network.init_state(3, (16,))
    joins = (0, 4, 9)
    with torch.no_grad():
        for now in range(20):
            active = torch.tensor([now >= join for join in joins])
            frame = torch.stack([x[s, :, max(now - join, 0)] for s, join in enumerate(joins)])
            frame = torch.where(active[:, None], frame, float("nan"))
            y, valid, state = network.step(frame, state, active=active, inplace=True)
            for s in range(3):
                if valid[s]:
                    said[s].append(y[s].clone())
    for s in range(3):
        torch.testing.assert_close(torch.stack(said[s], 1), alone[s, :, : len(said[s])], atol=1e-6, rtol=1e-6)
        assert len(said[s]) == 20 - joins[s] - 4


def test_attention_behind_a_delay_counts_only_real_tokens():
    torch.manual_seed(0)
    network = co.Sequential(co.Conv1d(16, 16, 3), co.SingleOutputAttention(16, 4, sequence_len=4)).eval()
    x = torch.randn(2, 16, 12)
    with torch.no_grad():
        want = network(x)
        for lockstep in (False, True):
            torch.testing.assert_close(run_steps(network, x, lockstep=lockstep)[0], want, atol=1e-5, rtol=1e-5)
            state = network.init_state(2, (16,), lockstep=lockstep)
            said = []
            for part in x.split([1, 4, 7], 2):
                y, valid, state = network.steps(part, state)
                said += [] if y is None else [y[:, :, valid[0]]]
            torch.testing.assert_close(torch.cat(said, 2), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [oadtr.co_oadtr_b1, oadtr.co_oadtr_b3])
def test_oadtr_compiles_whole_and_positions_recycle(build):
    torch.manual_seed(0)
    network = build(dim_feature=10, num_classes=4, embed_dim=16, num_heads=2, mlp_dim=16, sequence_len=4).eval()
    x = torch.randn(2, 10, 20)  # the table has 7 rows and wraps twice
    compiled = torch.compile(network.step, fullgraph=True, backend="aot_eager")
    state, said = network.init_state(2, (10,)), []
    with torch.no_grad():
        for t in range(20):
            with torch.compiler.set_stance("default" if t < 3 else "fail_on_recompile"):
                y, valid, state = compiled(x[:, :, t], state)
            if bool(valid.all()):
                said.append(y)
        for i, t in enumerate(range(3, 20)):
            want = network(x[:, :, t - 3 : t + 1], start=(t - 3) % 7)[:, :, 0]
            torch.testing.assert_close(said[i], want, atol=1e-5, rtol=1e-5)


def test_published_step_costs():
    """Section 8.3: 9.571 M and 10.620 M multiply-adds for one block, by the formula of section 3.3."""
    for features, want in (("activitynet", 9.571e6), ("kinetics", 10.620e6)):
        width, n, heads, ff, f_in = 1024, 64, 8, 1024, oadtr.FEATURES[features]
        d = width // heads
        formula = f_in * width + 3 * width**2 + heads * (2 * n * d + 2 * d) + width * (width + 1) + 2 * width * ff
        assert abs(formula - want) < 1e3
        with torch.device("meta"):
            network = oadtr.co_oadtr_b1(features=features)
        weights = sum(p.numel() for name, p in network.named_parameters() if p.ndim == 2 and "head" not in name)
        assert weights + heads * (2 * n * d + 2 * d) + width == formula


def test_library_keys_of_one_and_two_blocks_load():
    network = co.TransformerEncoder(16, 4, dim_feedforward=24, num_layers=2, sequence_len=6)
    names = {
        "layers.0.self_attn.": "layers.0.0.fn.self_attn.",
        "layers.0.norm": "layers.0.1.fn.norm",
        "layers.0.linear": "layers.0.1.fn._ff_block.fn.linear",
        "layers.1.self_attn.": "layers.1.fn.0.self_attn.",
        "layers.1.linear": "layers.1.fn.1._ff_block.1.linear",
    }
    theirs = {}
    for key, tensor in network.state_dict().items():
        new = key
        for ours, library in names.items():
            new = new.replace(ours, library)
        if key.startswith("layers.1.norm"):
            new = (
                key.replace("layers.1.norm", "layers.1.fn.1.norm")
                .replace(".weight", ".fn.weight")
                .replace(".bias", ".fn.bias")
            )
        theirs[new] = tensor
    assert set(theirs).isdisjoint(network.state_dict())
    back = co.encoder_filter_fn(theirs, network)
    assert set(back) == set(network.state_dict())
    assert all(torch.equal(back[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("kind", [co.RNN, co.GRU, co.LSTM])
def test_recurrent_layers_carry_their_state(kind):
    torch.manual_seed(0)
    network = co.Sequential(co.Conv1d(3, 4, 3, stride=2), kind(4, 5, num_layers=2)).eval()
    x = torch.randn(2, 3, 15)
    with torch.no_grad():
        want = network(x)
        for lockstep in (False, True):
            got, _ = run_steps(network, x, lockstep=lockstep)
            torch.testing.assert_close(got, want[:, :, : got.shape[2]], atol=1e-5, rtol=1e-5)
        state = network.init_state(2, (3,))
        chunks = []
        for part in x.split([4, 5, 6], 2):
            y, valid, state = network.steps(part, state)
            chunks.append(y[:, :, valid[0]])
        torch.testing.assert_close(torch.cat(chunks, 2), got, atol=1e-5, rtol=1e-5)


def test_bfloat16_encoder_stays_near_float32():
    network = our_encoder(torch_encoder(1), 1, 8)
    x = torch.randn(1, 16, 1000)
    with torch.no_grad():
        want, _ = run_steps(network, x)
        got, _ = run_steps(network.bfloat16(), x.bfloat16())
    tail = slice(-50, None)
    error = (got[:, :, tail].float() - want[:, :, tail]).norm() / want[:, :, tail].norm()
    assert error < 2e-2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: co.SingleOutputAttention(16, 4, sequence_len=6, query_index=-7), r"query_index must be in -6\.\.-1"),
        (lambda: co.SingleOutputAttention(16, 4, sequence_len=6, query_index=6), "got 6"),
        (lambda: co.SingleOutputAttention(16, 4, sequence_len=0), "at least 1"),
        (lambda: co.SingleOutputAttention(16, 3, sequence_len=6), "not divisible by num_heads 3"),
        (lambda: co.RetroactiveAttention(16, 4, sequence_len=6, update="fast"), "'fast'"),
        (
            lambda: co.TransformerEncoder(16, 4, dim_feedforward=8, num_layers=1, sequence_len=4, activation="swish"),
            "swish",
        ),
        (lambda: oadtr.CoOadTR(sequence_len=64, num_embeds=32), "at least the window 64, got 32"),
        (lambda: co.cyclic_table(7, 5), "even embed_dim"),
        (lambda: co.LSTM(4, 5, bidirectional=True), "bidirectional"),
        (
            lambda: co.SingleOutputAttention(16, 4, sequence_len=6)(torch.randn(1, 16, 4)),
            "4 tokens, fewer than the window of 6",
        ),
        (
            lambda: co.SingleOutputAttention(16, 4, sequence_len=6).init_state(1, (8,)),
            r"tokens \(16,\), got frames \(8,\)",
        ),
    ],
)
def test_errors_name_what_is_wrong(make, words):
    with pytest.raises(ValueError, match=words):
        make()
