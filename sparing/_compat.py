"""The only file that touches private or experimental names of the libraries we stand on.

Every function has a test in ``tests/test_compat*.py`` that names the upstream version it was checked with. Nothing is
imported before it is used.
"""

import logging
from typing import Any

# -- xformers (tests/test_compat_xformers.py)


def quieten_xformers() -> None:
    """Keeps xformers' complaint about its missing extensions off the terminal; call before anything imports diffusers.

    Checked with xformers 0.0.35 on torch 2.11: its wheel is built for torch 2.10, and diffusers imports it.
    """
    logging.getLogger("xformers").setLevel(logging.ERROR)


# -- timm (tests/test_compat_timm.py)


def take_indices(num_features: int, indices: int | list[int] | tuple[int, ...] | None = None) -> tuple[list[int], int]:
    """timm's reading of ``indices`` in ``forward_intermediates``: an int means the last so many, None all, and negative
    ones count from the end. Returns the indices, and the largest of them.

    Checked with timm 1.0.31, which keeps it in a private module.
    """
    from timm.models._features import feature_take_indices

    return feature_take_indices(num_features, indices)


# -- diffusers (tests/diffusion/test_compat_diffusers.py)


def register_cacheable_block(block_class: type) -> None:
    """Tells diffusers' step caches that ``block_class.forward(hidden_states, ...)`` returns the new hidden states, one
    tensor.
    """
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    metadata = TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None)
    TransformerBlockRegistry.register(model_class=block_class, metadata=metadata)


def active_attention_backend() -> Any:
    """The backend of diffusers' ``with attention_backend(...)`` or global default, None while it is the native one."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    backend, _ = _AttentionBackendRegistry.get_active_backend()
    return None if backend == AttentionBackendName.NATIVE else backend


def dispatch_attention(query: Any, key: Any, value: Any, *, attention_mask: Any = None, backend: Any = None) -> Any:
    """diffusers' attention dispatcher on our layout: q, k, v ``(batch, heads, tokens, head_dim)``, additive mask."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    out = dispatch_attention_fn(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=attention_mask, backend=backend
    )
    return out.transpose(1, 2)


def register_attention_backend(name: str, function: Any) -> Any:
    """Adds a backend to diffusers' attention registry, once, and returns its enum member.

    Afterwards ``model.set_attention_backend(name)`` and ``with attention_backend(name)`` know it. The registry is
    keyed by an enumeration that is closed to outsiders, so the member is added to it by hand.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    if name not in AttentionBackendName._value2member_map_:
        member = str.__new__(AttentionBackendName, name)
        member._name_, member._value_ = name.upper(), name
        AttentionBackendName._member_map_[member._name_] = member
        AttentionBackendName._value2member_map_[name] = member
        AttentionBackendName._member_names_.append(member._name_)
        _AttentionBackendRegistry.register(member)(function)
    return AttentionBackendName(name)


def call_attention_backend(backend: Any, **arguments: Any) -> Any:
    """diffusers' dispatcher with its own arguments, on ``backend`` or, when that is None, on the active one.

    A backend of ours that is itself the active one falls to the native one, since it would call itself.
    """
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _AttentionBackendRegistry,
        dispatch_attention_fn,
    )

    if backend is None:
        backend, _ = _AttentionBackendRegistry.get_active_backend()
    if str(getattr(backend, "value", backend)).startswith("sparing_"):
        backend = AttentionBackendName.NATIVE
    return dispatch_attention_fn(**arguments, backend=backend)


def forget_position(scheduler: Any) -> Any:
    """The diffusers scheduler, made to look its timesteps up again instead of counting steps; returned."""
    for name in ("_begin_index", "_step_index"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, None)
    return scheduler


def uncompiled(module: Any) -> Any:
    """The module that ``torch.compile(module)`` wrapped, or the module itself.

    The wrapper hands attributes on, but it is of none of the module's classes and names weights with a prefix.
    """
    return getattr(module, "_orig_mod", module)
