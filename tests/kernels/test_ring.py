"""The ring step against full attention over each stream's own history."""

import pytest
import torch

from sparing.kernels import RingCache, attention, ring_attention_step
from sparing.kernels.dispatch import interpreting


def _run(
    backend: str, steps: int, *, seed: int, streams: int = 3, window: int = 5, heads: int = 2, dim: int = 4
) -> float:
    """Largest error over random steps of 1-3 tokens with resets and inactive streams."""
    generator = torch.Generator().manual_seed(seed)
    cache = RingCache.empty(streams, window, heads=heads, head_dim=dim, tokens_per_step=3)
    age_bias = torch.randn(heads, window, generator=generator)
    history: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(streams)]
    worst = 0.0
    for _ in range(steps):
        tokens = int(torch.randint(1, 4, (), generator=generator))
        q, k, v = (torch.randn(streams, tokens, heads, dim, generator=generator) for _ in range(3))
        active = torch.rand(streams, generator=generator) < 0.7
        reset = torch.rand(streams, generator=generator) < 0.05
        before = cache.k.clone(), cache.head.clone()
        out = ring_attention_step(q, k, v, cache, active=active, reset=reset, age_bias=age_bias, backend=backend)
        for s in range(streams):
            if reset[s]:
                history[s].clear()
            if not active[s]:
                assert not out[s].any()
                assert torch.equal(cache.k[s], before[0][s])
                assert reset[s] or cache.head[s] == before[1][s]
                continue
            for j in range(tokens):
                history[s].append((k[s, j], v[s, j]))
                seen = history[s][-window:]
                keys, values = (torch.stack([pair[i] for pair in seen], 1)[None] for i in (0, 1))
                bias = age_bias[:, : len(seen)].flip(1).view(1, heads, 1, -1)
                wanted = attention(q[s, j].view(1, heads, 1, dim), keys, values, bias=bias, backend="reference")
                worst = max(worst, float((out[s, j] - wanted[0, :, 0]).abs().max()))
    return worst


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_two_hundred_random_steps_equal_full_attention_over_each_window(backend):
    assert _run(backend, 200, seed=0) < 2e-6


@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
def test_random_steps_of_the_triton_kernel_equal_full_attention_over_each_window():
    assert _run("triton", 20, seed=1, streams=2, heads=1) < 2e-6


@pytest.mark.slow
@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
def test_two_hundred_random_steps_of_the_triton_kernel():
    assert _run("triton", 200, seed=0) < 2e-6


def test_a_call_with_several_tokens_equals_single_steps():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 1, 4) for _ in range(3))
    many, single = (RingCache.empty(2, 4, heads=1, head_dim=4, tokens_per_step=3) for _ in range(2))
    for _ in range(3):
        out = ring_attention_step(q, k, v, many)
        ones = [ring_attention_step(q[:, j : j + 1], k[:, j : j + 1], v[:, j : j + 1], single) for j in range(3)]
        torch.testing.assert_close(out, torch.cat(ones, 1))
    assert torch.equal(many.k, single.k)


def test_the_state_lives_on_and_the_outputs_carry_no_gradient():
    cache = RingCache.empty(1, 2, heads=1, head_dim=4)
    place = cache.k.data_ptr(), cache.head.data_ptr()
    x = torch.randn(1, 1, 1, 4, requires_grad=True)
    assert not ring_attention_step(x, x, x, cache).requires_grad
    assert (cache.k.data_ptr(), cache.head.data_ptr()) == place
    assert cache.length.tolist() == [1]
    cache.clear()
    assert cache.length.tolist() == [0]


def test_under_autocast_the_inputs_take_the_dtype_of_the_cache():
    cache = RingCache.empty(1, 2, heads=1, head_dim=4)
    x = torch.randn(1, 1, 1, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ring_attention_step(x, x, x, cache).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="share one dtype"):
        ring_attention_step(x, x, x, cache)


def test_what_does_not_fit_the_cache_is_named():
    cache = RingCache.empty(2, 4, heads=1, head_dim=4)
    x = torch.randn(2, 2, 1, 4)
    with pytest.raises(ValueError, match="2 tokens a step over a window of 4 need capacity 5, the cache has 4"):
        ring_attention_step(x, x, x, cache)
    with pytest.raises(ValueError, match=r"q and k_new must be \(2, T, 1, 4\)"):
        ring_attention_step(x[:1, :1], x[:1, :1], x[:1, :1], cache)
    with pytest.raises(ValueError, match=r"active must be bool of shape \(2,\)"):
        ring_attention_step(x[:, :1], x[:, :1], x[:, :1], cache, active=torch.ones(2))
