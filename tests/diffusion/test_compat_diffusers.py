"""Private and experimental names of diffusers that ``sparing._compat`` touches; checked with diffusers 0.42.1."""

import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import nn

from sparing import _compat


def test_a_registered_block_tells_caches_where_its_hidden_states_are():
    from diffusers.hooks._helpers import TransformerBlockRegistry

    class Block(nn.Module):
        def forward(self, hidden_states, other=None):
            return hidden_states

    _compat.register_cacheable_block(Block)
    metadata = TransformerBlockRegistry.get(Block)
    assert metadata.return_hidden_states_index == 0
    assert metadata.return_encoder_hidden_states_index is None
    assert metadata._get_parameter_from_args_kwargs("hidden_states", (7,), {"other": 8}) == 7


def test_the_active_backend_is_none_until_a_person_chooses_one():
    assert _compat.active_attention_backend() is None
    with attention_backend("_native_math"):
        assert _compat.active_attention_backend().value == "_native_math"
    assert _compat.active_attention_backend() is None


def test_the_dispatcher_is_fed_in_its_own_layout():
    q, k, v = (torch.randn(2, 3, n, 8, generator=torch.Generator().manual_seed(n)) for n in (5, 7, 7))
    mask = torch.randn(2, 1, 5, 7)
    want = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    got = _compat.dispatch_attention(q, k, v, attention_mask=mask, backend="native")
    torch.testing.assert_close(got, want)


def test_a_backend_of_ours_is_known_to_diffusers_and_falls_to_the_native_one_outside_its_context():
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    from sparing.diffusion.sparse_attention import BACKEND, _backend

    member = _compat.register_attention_backend(BACKEND, _backend)
    assert member is _compat.register_attention_backend(BACKEND, _backend)
    assert member is AttentionBackendName("sparing_sparse")
    q, k, v = (torch.randn(2, 9, 3, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    want = dispatch_attention_fn(q, k, v, backend="native")
    torch.testing.assert_close(dispatch_attention_fn(q, k, v, backend=BACKEND), want)
    with attention_backend(BACKEND):
        torch.testing.assert_close(dispatch_attention_fn(q, k, v), want)
    assert _compat.active_attention_backend() is None
