"""Telling one network from another without reading all of it."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparing._compat import uncompiled

__all__ = ["network_fingerprint", "short_hash"]

_SAMPLED = 64  # tensors of a network of which values are read


def short_hash(*parts: bytes) -> str:
    """16 hexadecimal digits of the parts together."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def network_fingerprint(network: nn.Module) -> str:
    """Hash of a network's configuration, the names and shapes of its weights, and of one number of each of up to 64 of
    them. A fine-tune changes all weights, so this tells it apart; it is no proof against one that changes a few.
    Compiled or not, a network is the same; buffers are left out, some are only made by the first forward.
    """
    network = uncompiled(network)
    config = getattr(network, "config", None)
    entries = dict(config) if isinstance(config, Mapping) else {}
    shown = sorted((key, repr(value)) for key, value in entries.items() if not key.startswith("_"))
    state = list(network.named_parameters())
    names = repr([(name, tuple(value.shape)) for name, value in state])
    plain = [value for _, value in state if type(value) in (Tensor, nn.Parameter) and value.numel()]
    real = [value for value in plain if value.device.type != "meta"]  # offloaded, or packed by a quantiser: names only
    stride = max(1, -(-len(real) // _SAMPLED))
    chosen = [value.detach().flatten()[value.numel() // 2].float() for value in real[::stride]]
    numbers = torch.stack([number.to(chosen[0].device) for number in chosen]).cpu().numpy().tobytes() if chosen else b""
    return short_hash(type(network).__name__.encode(), repr(shown).encode(), names.encode(), numbers)
