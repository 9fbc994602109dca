"""Cheap samplers that rank noises for the pipeline itself: fewer steps, a step cache, a twin, sparse attention.

A draft need not be good, it must put the candidates into the right order. ``Random(n, keep=k)`` draws n drafts, and
only the k best are run in full from the same noises. Cached drafts are the peer's (CachedSearch, 2026); drafts by a
sparse twin of the very network are ours.

    draft = twin_draft(pipe, flexdit)
    result = NoiseSearch(pipe, verifier, Random(8, keep=1), draft=draft)(prompt)
"""

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparing.diffusion.search.driver import Draft
from sparing.diffusion.search.result import SearchResult
from sparing.diffusion.search.settings import check_whole

__all__ = ["cached_draft", "draft_agreement", "fewer_steps", "rank_correlation", "sparse_draft", "twin_draft"]


def fewer_steps(num_inference_steps: int, **kwargs: Any) -> Draft:
    """The same pipeline with fewer steps, and further arguments of its call (``guidance_scale=1.0`` halves the rows).

    Raises:
        ValueError: no step, or no whole number of them.
    """
    check_whole(num_inference_steps=num_inference_steps)
    if num_inference_steps < 1:
        raise ValueError(f"a draft needs at least one step, got {num_inference_steps}")
    return Draft(kwargs={"num_inference_steps": num_inference_steps, **kwargs})


def twin_draft(pipe: Any, transformer: nn.Module, *, name: str = "transformer", **kwargs: Any) -> Draft:
    """The same pipeline with a twin of its denoiser: a FlexDiT of the DiT, say.

    Args:
        pipe: the search's pipeline; it is not changed, the draft's is a shallow copy that shares all other parts.
        transformer: the twin; moved to the pipeline's device.
        name: of the component that it stands in for.
        kwargs: further arguments of the draft's call (``density=3``, ``num_inference_steps=10``).

    Raises:
        ValueError: the pipeline has no such component, or the twin is no denoiser or works on other latents.
    """
    components = dict(pipe.components)
    if not isinstance(components.get(name), nn.Module):
        parts = ", ".join(key for key, part in components.items() if isinstance(part, nn.Module))
        raise ValueError(f"{type(pipe).__name__} has no denoiser {name!r}; its networks are {parts}")
    takes = inspect.signature(transformer.forward).parameters
    if "timestep" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        raise ValueError(
            f"{type(transformer).__name__} is no denoiser and cannot stand in for the pipeline's {name}: it takes "
            f"{', '.join(takes)}, and no timestep"
        )
    host, twin = getattr(components[name], "config", None), getattr(transformer, "config", None)
    for field in ("in_channels", "sample_size"):
        ours, theirs = getattr(host, field, None), getattr(twin, field, None)
        if ours is not None and theirs is not None and ours != theirs:
            raise ValueError(f"the twin has {field}={theirs}, the pipeline's {name} {ours}: their latents differ")
    other = copy.copy(pipe)
    vars(other)[name] = transformer.to(pipe.device).eval()
    return Draft(pipe=other, kwargs=kwargs)


def cached_draft(pipe: Any, config: Any, *, name: str = "transformer", **kwargs: Any) -> Draft:
    """The same pipeline with a diffusers step cache switched on while drafts are run.

    Args:
        config: e.g. ``diffusers.FirstBlockCacheConfig(threshold=0.2)``.
        name: of the cached component.
        kwargs: further arguments of the draft's call.

    Raises:
        ValueError: the component has no caches, or has one on already.
    """
    denoiser: Any = getattr(pipe, name, None)
    if not hasattr(denoiser, "enable_cache"):
        raise ValueError(f"{name!r} of {type(pipe).__name__} ({type(denoiser).__name__}) takes no diffusers cache")
    if getattr(denoiser, "is_cache_enabled", False):
        raise ValueError(f"a cache is on already in {name!r}; switch it off, the full runs are to be exact")

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        denoiser.enable_cache(config)
        try:
            with denoiser.cache_context("draft"):  # for pipelines that open none themselves
                yield
        finally:
            denoiser.disable_cache()

    return Draft(kwargs=kwargs, around=around)


def sparse_draft(pipe: Any, thresholds: Any, **kwargs: Any) -> Draft:
    """The same pipeline with calibrated block-sparse attention (:func:`sparing.diffusion.apply_sparse`)."""
    from sparing.diffusion.sparse_attention import apply_sparse

    return Draft(kwargs=kwargs, around=lambda: apply_sparse(pipe, thresholds))


def rank_correlation(first: Sequence[float] | Tensor, second: Sequence[float] | Tensor) -> float:
    """Spearman's: the correlation of midranks; NaN where one of them is constant.

    Raises:
        ValueError: fewer than two pairs, or unequal lengths.
    """
    from sparing.diffusion.search.verifiers.ensemble import midranks

    a, b = (torch.as_tensor(values, dtype=torch.float64) for values in (first, second))
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a rank correlation takes two pairs or more of equal number, got {len(a)} and {len(b)}")
    both = midranks(torch.stack([a, b]))
    centred = both - both.mean(dim=1, keepdim=True)
    return float((centred[0] * centred[1]).sum() / centred.square().sum(dim=1).prod().sqrt())


def draft_agreement(result: SearchResult) -> Mapping[str, Any]:
    """What the drafts of a search were worth, from its candidates that were run both ways.

    Returns:
        ``pairs`` (how many), ``rank_correlation`` of draft and full scores (None below three pairs), ``draft_nfe`` and
        ``full_nfe``.
    """
    drafts = {c.id: c for c in result.candidates if c.via == "draft"}
    pairs = [(drafts[c.parent].score, c.score) for c in result.finished if c.parent in drafts]
    return {
        "pairs": len(pairs),
        "rank_correlation": rank_correlation(*zip(*pairs)) if len(pairs) > 2 else None,
        "draft_nfe": sum(c.nfe for c in drafts.values()),
        "full_nfe": sum(c.nfe for c in result.candidates if c.via == "full"),
    }
