"""Training-free block-sparse attention for a person's own diffusers model, calibrated so that it does not ruin
pictures.

Idea (SpargeAttn, arXiv 2502.18137, with the calibration its users asked for): of every self-attention, predict from
block means which blocks of scores matter (:func:`sparing.kernels.predict_block_map`) and compute those alone. How
much may be dropped differs from layer to layer, so :func:`calibrate_sparse` (in
:mod:`sparing.diffusion.sparse_calibration`) measures the output error of candidate thresholds layer by layer and step
by step and keeps, per layer, the sparsest that holds the bound; a layer that none holds stays dense. Cross-attention,
masked attention, the first and last blocks and the first steps stay dense always.

:func:`apply_sparse` turns thresholds on for one ``with`` block. Models that use diffusers' attention dispatcher get
the attention backend ``"sparing_sparse"``; models that call PyTorch's attention themselves (DiT, PixArt) get
attention processors that wrap their own. Everything has gradients, so a model may also be fine-tuned under its own
sparsity.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparing import _compat
from sparing.kernels import block_sparse_attention, predict_block_map

__all__ = [
    "BACKEND",
    "BlockThreshold",
    "SparseThresholds",
    "apply_sparse",
    "attention_sites",
]

BACKEND = "sparing_sparse"
DENOISERS = ("transformer", "unet", "transformer_2")


@dataclass(frozen=True)
class BlockThreshold:
    """How one layer chooses its blocks; exactly one of ``cdf`` and ``topk`` is given.

    Attributes:
        sim_threshold: blocks whose rows have a mean cosine at or below this are always computed; -1 trusts every
            block's mean.
        cdf: keep the best key blocks of a row while their predicted share is at most this.
        topk: keep this share of the key blocks of a row; 1.0 keeps all.
    """

    sim_threshold: float
    cdf: float | None = None
    topk: float | None = None


@dataclass(frozen=True)
class SparseThresholds:
    """What calibration found: everything :func:`apply_sparse` needs, and the measurements it rests on.

    Attributes:
        layers: attention module -> threshold; None = dense.
        block_q: query rows of a block; ``block_k`` key rows.
        block_k: key rows of a block.
        dense_steps: share of the denoising steps, from the first, that stay dense.
        max_error: the bound calibration was asked for: relative L2 error of a layer's attention output.
        report: measurements: per layer and step errors and densities, end-to-end error, times in seconds.
    """

    layers: dict[str, BlockThreshold | None]
    block_q: int = 128
    block_k: int = 64
    dense_steps: float = 0.25
    max_error: float | None = None
    report: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "SparseThresholds":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is no such JSON.
        """
        try:
            found = json.loads(Path(path).read_text())
            layers = {name: None if t is None else BlockThreshold(**t) for name, t in found.pop("layers").items()}
            return cls(layers=layers, **found)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no sparse attention thresholds: {error}") from error


@dataclass(frozen=True)
class AttentionSite:
    """One attention module of a denoiser. ``block``: the repeated block it belongs to; ``dense``: why it is never
    sparse."""

    name: str
    module: nn.Module
    block: str
    dense: str | None


# What the attention of a layer becomes: (site name, step, q, k, v, scale, dense) -> output, all (batch, heads,
# tokens, head_dim).
Act = Callable[[str, int, Tensor, Tensor, Tensor, float | None, Callable[[], Tensor]], Tensor]


def attention_sites(pipe: Any, *, dense_first: int = 1, dense_last: int = 1) -> list[AttentionSite]:
    """The attention modules of a pipeline's denoisers (or of a denoiser itself), in order.

    Args:
        pipe: a diffusers pipeline, or its denoiser.
        dense_first: this many repeated blocks from the first are marked dense.
        dense_last: this many from the last.

    Raises:
        ValueError: no denoiser, or no attention module in it.
    """
    found: list[tuple[str, nn.Module]] = []
    for prefix, model in _denoisers(pipe):
        for path, module in model.named_modules():
            if hasattr(module, "processor") and callable(getattr(module, "set_processor", None)):
                found.append((prefix + path, module))
    if not found:
        raise ValueError(
            f"{type(pipe).__name__} has no attention modules with processors; expected a diffusers denoiser"
        )
    blocks = list(dict.fromkeys(_block_of(name) for name, _ in found))
    ends = {*blocks[:dense_first], *(blocks[-dense_last:] if dense_last else [])}
    sites = []
    for name, module in found:
        why = "cross-attention" if getattr(module, "is_cross_attention", False) else None
        if why is None and _block_of(name) in ends:
            why = "first or last block"
        sites.append(AttentionSite(name, module, _block_of(name), why))
    return sites


@contextmanager
def apply_sparse(pipe: Any, thresholds: SparseThresholds) -> Iterator[None]:
    """Within this context the pipeline's self-attention is block-sparse as calibrated; afterwards it is as it was.

    Args:
        pipe: the diffusers pipeline, or its denoiser alone (for fine-tuning: without a scheduler every call counts as
            a late step, so that training sees the sparsity).
        thresholds: from :func:`calibrate_sparse` or :meth:`SparseThresholds.load`.

    Raises:
        ValueError: the thresholds name layers that this model does not have.
    """
    known = {site.name for site in attention_sites(pipe)}
    unknown = [name for name in thresholds.layers if name not in known]
    if unknown:
        raise ValueError(f"thresholds name layers that {type(pipe).__name__} does not have: {', '.join(unknown[:3])}")

    def act(
        name: str, step: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, dense: Callable[[], Tensor]
    ) -> Tensor:
        threshold = thresholds.layers.get(name)
        if threshold is None or step < progress.dense_until(thresholds.dense_steps):
            return dense()
        return sparse_attention(
            q, k, v, threshold, block_q=thresholds.block_q, block_k=thresholds.block_k, scale=scale
        )[0]

    with attached(pipe, act) as progress:
        yield


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, threshold: BlockThreshold, *, block_q: int, block_k: int, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention over predicted blocks, and the density of the prediction (0-d, on the device). Differentiable in q,
    k, v."""
    block_map = predict_block_map(
        q, k, block_q=block_q, block_k=block_k, sim_threshold=threshold.sim_threshold, cdf=threshold.cdf,
        topk=threshold.topk, scale=scale,
    )  # fmt: skip
    out = block_sparse_attention(q, k, v, block_map, scale=scale)
    assert isinstance(out, Tensor)
    return out, block_map.density()


class Progress:
    """Which denoising step a pipeline is at, counted at its scheduler: no tensor is read.

    Attributes:
        step: finished steps of the run at hand.
        steps: steps of the run; None without a scheduler.
    """

    def __init__(self, scheduler: Any | None) -> None:
        self.scheduler, self.step = scheduler, 0

    @property
    def steps(self) -> int | None:
        """Steps of the run at hand."""
        return None if self.scheduler is None else len(self.scheduler.timesteps)

    def dense_until(self, share: float) -> int:
        """First step that may be sparse; -1 without a scheduler."""
        return -1 if self.steps is None else math.ceil(share * self.steps)


@contextmanager
def attached(pipe: Any, act: Act) -> Iterator[Progress]:
    """Route every self-attention of ``pipe`` through ``act``; everything is put back afterwards, also after an
    exception."""
    progress = Progress(getattr(pipe, "scheduler", None))
    with ExitStack() as stack:
        if progress.scheduler is not None:
            stack.enter_context(_counted(progress))
        for site in attention_sites(pipe, dense_first=0, dense_last=0):
            if site.dense is None:
                stack.enter_context(_routed(site, act, progress))
        yield progress


def _denoisers(pipe: Any) -> list[tuple[str, nn.Module]]:
    if isinstance(pipe, nn.Module):
        return [("", pipe)]
    found = [(name, getattr(pipe, name, None)) for name in DENOISERS]
    models = [(name, model) for name, model in found if isinstance(model, nn.Module)]
    if not models:
        raise ValueError(
            f"{type(pipe).__name__} has none of {', '.join(DENOISERS)}; give a diffusers pipeline or denoiser"
        )
    return [("" if number == 0 else f"{name}.", model) for number, (name, model) in enumerate(models)]


def _block_of(name: str) -> str:
    """``transformer_blocks.3.attn1`` -> ``transformer_blocks.3``."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match.group(1) if match else name


@contextmanager
def _counted(progress: Progress) -> Iterator[None]:
    """Count the scheduler's steps through its own ``step`` and ``set_timesteps``."""
    scheduler = progress.scheduler
    step, set_timesteps = scheduler.step, scheduler.set_timesteps  # type: ignore[union-attr]

    @functools.wraps(step)
    def counted_step(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        progress.step += 1
        return result

    @functools.wraps(set_timesteps)
    def counted_set(*args: Any, **kwargs: Any) -> Any:
        progress.step = 0
        return set_timesteps(*args, **kwargs)

    with _patched(scheduler, "step", counted_step), _patched(scheduler, "set_timesteps", counted_set):
        yield


@contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute on the instance, and put back exactly what was there, or nothing where nothing was."""
    own = vars(owner)
    missing = name not in own
    before = own.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def _routed(site: AttentionSite, act: Act, progress: Progress) -> Iterator[None]:
    processor: Any = site.module.processor
    if hasattr(processor, "_attention_backend"):
        member = _compat.register_attention_backend(BACKEND, _backend)
        before = processor._attention_backend
        frame = _Frame(site.name, act, progress, before)
        hooks = [
            site.module.register_forward_pre_hook(frame.enter, with_kwargs=True),
            site.module.register_forward_hook(frame.leave, always_call=True),
        ]
        try:
            with _patched(processor, "_attention_backend", member):
                yield
        finally:
            for hook in hooks:
                hook.remove()
        return
    site.module.set_processor(SparseAttnProcessor(processor, site.name, act, progress))  # type: ignore[operator]
    try:
        yield
    finally:
        site.module.set_processor(processor)  # type: ignore[operator]


# The layer whose attention is being computed, innermost last: diffusers' backends are functions of q, k and v alone.
_FRAMES: list["_Frame"] = []


@dataclass
class _Frame:
    """A dispatching layer: entered and left by its module's hooks. ``backend``: what it used before."""

    name: str
    act: Act
    progress: Progress
    backend: Any
    crossed: bool = False

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.crossed = _crosses(module, args, kwargs)
        _FRAMES.append(self)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _FRAMES and _FRAMES[-1] is self:  # absent when entering another hook of the module raised
            _FRAMES.pop()


def _crosses(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call attends to other tokens than its own; joint attention (text and image together) does not."""
    other = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
    return other is not None and getattr(module, "added_kv_proj_dim", None) is None


def _backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The diffusers backend: ``(batch, tokens, heads, head_dim)``. Outside of :func:`apply_sparse` it is the native
    one."""
    frame = _FRAMES[-1] if _FRAMES else None

    def dense() -> Tensor:
        return _compat.call_attention_backend(
            None if frame is None else frame.backend, query=query, key=key, value=value, attn_mask=attn_mask,
            dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip

    plain = attn_mask is None and dropout_p == 0.0 and not is_causal and key.shape == query.shape
    if frame is None or frame.crossed or not plain:
        return dense()
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    out = frame.act(frame.name, frame.progress.step, q, k, v, scale, lambda: dense().transpose(1, 2))
    return out.transpose(1, 2)


class SparseAttnProcessor:
    """Wraps a processor that calls PyTorch's attention itself: that one call goes through ``act``, the rest is
    untouched."""

    def __init__(self, processor: Any, name: str, act: Act, progress: Progress) -> None:
        self.processor, self.name, self.act, self.progress = processor, name, act, progress
        self.__call__ = processor.__call__  # type: ignore[method-assign]  # diffusers reads its signature to know which arguments may be passed

    def __call__(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _crosses(attn, args, kwargs):
            return self.processor(attn, *args, **kwargs)
        with _SDPACalls(self):
            return self.processor(attn, *args, **kwargs)


class _SDPACalls(TorchFunctionMode):
    """Hands the ``scaled_dot_product_attention`` calls made inside to a layer's ``act``."""

    def __init__(self, owner: SparseAttnProcessor) -> None:
        super().__init__()
        self.owner = owner

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        given = dict(zip(names, args)) | kwargs
        q, k, v = (given[name] for name in names[:3])
        special = given.get("attn_mask") is not None or given.get("dropout_p") or given.get("is_causal")
        if special or q.ndim != 4 or q.shape != k.shape:
            return func(*args, **kwargs)
        owner = self.owner
        return owner.act(owner.name, owner.progress.step, q, k, v, given.get("scale"), lambda: func(*args, **kwargs))
