"""Custom ops under torch's own checks, torch.compile without graph breaks, torch.export with dynamic sizes, FLOP
counts.
"""

import pytest
import torch
from kernels.calls import CALLS, make, outputs_and_gradients
from torch.export import Dim

from sparing import kernels
from sparing.kernels.dispatch import interpreting
from sparing.kernels.ops.block_sparse_attention import block_sparse_attention_fwd
from sparing.kernels.ops.few_query_attention import few_query_attention_fwd
from sparing.kernels.ops.ring_attention_step import ring_attention_step_op
from sparing.kernels.ops.tiny_attention import tiny_attention_fwd
from sparing.kernels.ops.window_attention import window_attention_fwd

needs_interpreter = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def _samples() -> dict[str, tuple]:
    torch.manual_seed(0)
    block_map = kernels.BlockMap.from_mask(torch.ones(1, 1, 1, 1) > 0, block_q=16, block_k=16)
    lists = (block_map.kv_num, block_map.kv_idx, block_map.q_num, block_map.q_idx)
    q, k, v = _randn(1, 1, 2, 8), _randn(1, 1, 3, 8), _randn(1, 1, 3, 4)
    maps = [_randn(1, 2, 2, 8) for _ in range(3)]
    cache = kernels.RingCache.empty(2, 3, heads=1, head_dim=4)
    new = torch.randn(2, 1, 1, 4)
    flags = torch.tensor([True, False])
    state = (cache.k, cache.v, cache.head, cache.length)
    return {
        "block_sparse": (block_sparse_attention_fwd, (q, k, v, *lists, 16, 16, True, 0.3)),
        "few_query": (few_query_attention_fwd, (q, k, v, _randn(1, 1, 1, 3), None, 0.3, 2)),
        "window": (window_attention_fwd, (*maps, _randn(9, 1), None, True, 1, [2, 2], [1, 1], 0.3)),
        "tiny": (tiny_attention_fwd, (q, k, v, None, 0.3)),
        "ring": (ring_attention_step_op, (new, new, new, *state, flags, flags, None, 3, 0.3)),
    }


@needs_interpreter
@pytest.mark.parametrize("name", ["block_sparse", "few_query", "window", "tiny", "ring"])
def test_opcheck(name):
    op, args = _samples()[name]
    torch.library.opcheck(op, args)


@needs_interpreter
@pytest.mark.parametrize("name", CALLS)
def test_compile_without_graph_breaks_gives_the_same_outputs_and_gradients(name):
    torch._dynamo.reset()
    call = make(name, dtype=torch.float32)
    compiled = torch.compile(call.run, backend="aot_eager", fullgraph=True)
    found = outputs_and_gradients(type(call)(call.op, call.leaves, compiled), backend="triton")
    for a, b in zip(found, outputs_and_gradients(call, backend="triton")):
        assert torch.equal(a, b)


class _Op(torch.nn.Module):
    """An op as a module, for export."""

    def __init__(self, run) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args):
        return self.run(*args)


_BATCH, _TOKENS = Dim("batch", min=1, max=64), Dim("tokens", min=5, max=512)
_QKV = [{0: _BATCH, 2: _TOKENS}] * 3


def _heads_first(batch: int, tokens: int) -> list[torch.Tensor]:
    torch.manual_seed(batch)
    return [torch.randn(batch, 2, tokens, 8) for _ in range(3)]


def _few_query_inputs(batch: int, tokens: int) -> list[torch.Tensor]:
    q, k, v = _heads_first(batch, tokens)
    return [q[:, :, :1], k, v]


def _maps(batch: int, tokens: int) -> list[torch.Tensor]:
    torch.manual_seed(batch)
    return [torch.randn(batch, 4, 2 * tokens, 3 * 8), torch.randn(9, 2)]


def _sparse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    block_map = kernels.predict_block_map(q, k, block_q=4, block_k=4, sim_threshold=-1.0, topk=0.5)
    return kernels.block_sparse_attention(q, k, v, block_map)


def _packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The samples of a batch as segments of one packed sequence."""
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    cu = torch.tensor([0, 2], dtype=torch.int32)
    return kernels.varlen_attention(q, k, v, cu, cu, 2, 2)


EXPORTS = {
    "attention": (kernels.attention, _heads_first, _QKV),
    "attention_weights": (lambda q, k, v: kernels.attention_weights(q, k), _heads_first, _QKV),
    "varlen": (_packed, _heads_first, _QKV),
    # block counts are quotients of the token count; torch's solver cannot prove every guard and infers the range
    "block_sparse": (_sparse, _heads_first, [{0: _BATCH, 2: Dim.AUTO}] * 3),
    "few_query": (kernels.few_query_attention, _few_query_inputs, [{0: _BATCH}, *_QKV[1:]]),
    "tiny": (
        kernels.tiny_attention,
        _few_query_inputs,
        [{0: _BATCH}, *[{0: _BATCH, 2: Dim("few", min=2, max=64)}] * 2],
    ),
    "window": (
        lambda qkv, table: kernels.window_attention(qkv, table, window=2, heads=2, shift=1),
        _maps,
        [{0: _BATCH, 2: 2 * Dim("half", min=2, max=64)}, {}],
    ),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_export_with_dynamic_batch_and_tokens(name):
    run, inputs, dynamic = EXPORTS[name]
    program = torch.export.export(_Op(run), tuple(inputs(2, 6)), dynamic_shapes=(tuple(dynamic),))
    other = inputs(3, 11)
    torch.testing.assert_close(program.module()(*other), run(*other), rtol=1e-5, atol=1e-6)
    kinds = {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert "sparing" not in kinds  # off CUDA an exported graph holds aten nodes only


@pytest.mark.parametrize("name", EXPORTS)
def test_compile_of_the_cpu_path_without_graph_breaks(name):
    run, inputs, _ = EXPORTS[name]
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for sizes in ((2, 6), (3, 11)):
        torch.testing.assert_close(compiled(*inputs(*sizes)), run(*inputs(*sizes)), rtol=1e-5, atol=1e-6)


def test_the_ring_step_compiles_and_updates_its_cache():
    torch._dynamo.reset()
    torch.manual_seed(0)
    caches = [kernels.RingCache.empty(2, 3, heads=1, head_dim=4) for _ in range(2)]
    step = torch.compile(kernels.ring_attention_step, backend="aot_eager", fullgraph=True)
    active = torch.tensor([True, False])
    for _ in range(5):
        new = torch.randn(2, 1, 1, 4)
        torch.testing.assert_close(
            step(new, new, new, caches[0], active=active),
            kernels.ring_attention_step(new, new, new, caches[1], active=active),
        )
    assert torch.equal(caches[0].k, caches[1].k)
    assert caches[0].head.tolist() == [2, 0]


@needs_interpreter
def test_flops_of_custom_ops_are_counted_as_those_of_the_matmuls_they_replace():
    from torch.utils.flop_counter import FlopCounterMode

    import sparing.kernels.flops  # noqa: F401

    q, k, v = torch.randn(1, 2, 4, 8, requires_grad=True), torch.randn(1, 2, 16, 8), torch.randn(1, 2, 16, 8)
    with FlopCounterMode(display=False) as counter:
        out = kernels.few_query_attention(q, k, v, backend="triton")
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 2 * (2 * 4 * 16) * (8 + 8)
    assert counter.get_total_flops() - forward == 2 * (2 * 4 * 16) * (3 * 8 + 2 * 8)
    half = kernels.BlockMap.from_mask(torch.tensor([[[[True, False]]]]), block_q=16, block_k=16)
    q, k = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 32, 8)
    with FlopCounterMode(display=False) as counter:
        kernels.block_sparse_attention(q, k, k, half, backend="triton")
    assert counter.get_total_flops() == 2 * (2 * 16 * 16) * (8 + 8)  # the kept block alone
