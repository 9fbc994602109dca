"""Which implementation of an op runs, and why: registry, resolution, reasons.

Every op of :mod:`sparing.kernels` has one or more implementations, named by backend. An implementation says in words
why it cannot serve a call (``supports`` returns a list of reasons, empty = it can); reasons are read from shapes,
strides, dtypes, devices and flags only, never from tensor values, so asking costs no device synchronisation.

Resolution: explicit ``backend=`` argument, then :func:`use_backend`, then the environment variables
``SPARING_BACKEND_<OP>`` and ``SPARING_BACKEND``, then ``'auto'``. A named backend either serves or raises
:class:`BackendUnsupported`; ``'auto'`` takes the first of the op's fixed order that serves, so equal inputs always
choose alike.
"""

import importlib.util
import inspect
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("triton", "varlen", "flex", "xformers", "sdpa", "reference")
INSTALLED = {
    name: importlib.util.find_spec(name) is not None for name in ("triton", "xformers", "flash_attn_interface")
}
_WARN_SCORES = 2**24  # a reference attention with more scores than this on CUDA deserves one warning


class BackendUnsupported(RuntimeError):
    """A named backend cannot serve a call. ``reasons`` says why, ``usable`` lists the backends that could."""

    def __init__(self, op: str, backend: str, reasons: Sequence[str], usable: Sequence[str]) -> None:
        self.op, self.backend, self.reasons, self.usable = op, backend, list(reasons), list(usable)
        could = ", ".join(usable) or "none"
        super().__init__(
            f"{op}: backend '{backend}' cannot serve this call: {'; '.join(reasons)}. Usable here: {could}."
        )


def _no_reasons(*args: Any, **kwargs: Any) -> list[str]:
    return []


def _anywhere(device: torch.device) -> list[str]:
    return []


@dataclass(frozen=True)
class Impl:
    """One implementation of an op.

    ``here(device)`` and ``supports(*args, **kwargs)`` return reasons why not; the former depends on the machine
    alone. ``grad``: has a backward. ``deterministic``: the same bits in every run. ``graph_safe``: can be captured in
    a CUDA graph.
    """

    op: str
    backend: str
    fn: Callable[..., Any]
    supports: Callable[..., list[str]] = _no_reasons
    here: Callable[[torch.device], list[str]] = _anywhere
    grad: bool = True
    deterministic: bool = True
    graph_safe: bool = True


@dataclass
class Op:
    """A public function with its implementations, ``auto`` order and the positional arguments that autocast casts."""

    name: str
    public: Callable[..., Any]
    order: Callable[..., Sequence[str]]
    autocast: int = 0
    scores: Callable[..., int] | None = None
    impls: dict[str, Impl] = field(default_factory=dict)


_OPS: dict[str, Op] = {}
_WARNED: set[str] = set()


class _Choice(threading.local):
    """Backends chosen by :func:`use_backend` in this thread: op name (None = every op) -> backend."""

    def __init__(self) -> None:
        self.chosen: dict[str | None, str] = {}
        self.asked: str | None = None  # the op that explain() asks about


_CHOICE = _Choice()


def define_op(
    public: Callable[..., Any],
    *,
    order: Callable[..., Sequence[str]],
    autocast: int = 0,
    scores: Callable[..., int] | None = None,
) -> None:
    """Enter ``public`` in the registry.

    Args:
        public: the function users call; its name is the op's name, its last keyword is ``backend``.
        order: called with the op's arguments, gives the backends that ``'auto'`` tries, best first.
        autocast: this many leading positional tensors are cast to the autocast dtype inside ``torch.autocast``.
        scores: number of attention scores of a call, for the warning when ``'auto'`` falls to ``reference`` on CUDA.
    """
    _OPS[public.__name__] = Op(public.__name__, public, order, autocast, scores)


def register_impl(op: str, backend: str, fn: Callable[..., Any], **properties: Any) -> None:
    """Add an implementation to an op that :func:`define_op` entered; ``properties`` are the fields of :class:`Impl`."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    _OPS[op].impls[backend] = Impl(op, backend, fn, **properties)


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter (``TRITON_INTERPRET=1``, set before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_here(device: torch.device) -> list[str]:
    """Reasons why Triton kernels cannot run on ``device``."""
    if not INSTALLED["triton"]:
        return ["triton is not installed"]
    if interpreting():
        return []
    if device.type != "cuda":
        return [
            f"tensors are on {device.type}; Triton needs CUDA (or TRITON_INTERPRET=1 set before triton is imported)"
        ]
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return [f"needs sm80, device is sm{major}{minor}"]
    return []


def triton_attention_reasons(q: Tensor, *, head_dim: int, max_dim: int) -> list[str]:
    """Reasons that hold for every Triton attention kernel: dtype and (largest) head dim."""
    reasons = []
    if q.dtype == torch.float64 and not interpreting():
        reasons.append("dtype float64 is served in the interpreter only; float32, bfloat16 and float16 are")
    if head_dim > max_dim:
        reasons.append(f"head_dim {head_dim} is above {max_dim}")
    return reasons


def cuda_here(device: torch.device) -> list[str]:
    """Reasons why a CUDA-only library call cannot run on ``device``."""
    return [] if device.type == "cuda" else [f"needs CUDA, tensors are on {device.type}"]


def needs_grad(*args: Any, **kwargs: Any) -> bool:
    """Whether autograd will want a backward through any of the tensors given."""
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(value, Tensor) and value.requires_grad for value in (*args, *kwargs.values()))


def _reasons(op: Op, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    impl = op.impls.get(backend)
    if impl is None:
        return [f"{op.name} has no {backend} implementation"]
    device = args[0].device
    reasons = list(impl.here(device))
    if not impl.grad and needs_grad(*args, **kwargs):
        reasons.append("backward not implemented")
    if not impl.deterministic and device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        reasons.append("not deterministic, and torch.use_deterministic_algorithms(True) is set")
    if not impl.graph_safe and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        reasons.append("cannot be captured in a CUDA graph")
    return reasons + impl.supports(*args, **kwargs)


def _requested(op: Op) -> str:
    """The backend that :func:`use_backend` or the environment asks for this op, else ``'auto'``.

    A choice made for every op holds for the ops that have such a backend; the others stay at ``'auto'``.
    """
    chosen = _CHOICE.chosen
    if op.name in chosen:
        return chosen[op.name]
    if None in chosen:
        return chosen[None] if chosen[None] in op.impls else "auto"
    named = os.environ.get(f"SPARING_BACKEND_{op.name.upper()}")
    if named:
        return named
    everywhere = os.environ.get("SPARING_BACKEND", "auto")
    return everywhere if everywhere in op.impls or everywhere not in BACKENDS else "auto"


def resolve(name: str, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Impl:
    """The implementation that serves this call.

    Raises:
        ValueError: ``backend`` is no known name.
        BackendUnsupported: the named backend cannot serve, or ``'auto'`` found none.
    """
    op = _OPS[name]
    if _CHOICE.asked == name:
        raise _HandedOn(args, kwargs)
    if backend == "auto":
        backend = _requested(op)
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}; known: auto, {', '.join(BACKENDS)}")
        reasons = _reasons(op, backend, args, kwargs)
        if reasons:
            usable = [b for b in BACKENDS if b in op.impls and b != backend and not _reasons(op, b, args, kwargs)]
            raise BackendUnsupported(name, backend, reasons, usable)
        return op.impls[backend]
    refused: list[str] = []
    for candidate in op.order(*args, **kwargs):
        reasons = _reasons(op, candidate, args, kwargs)
        if not reasons:
            if candidate == "reference" and refused and args[0].device.type == "cuda":
                _warn_slow(op, refused, args, kwargs)
            return op.impls[candidate]
        refused += [f"{candidate}: {reason}" for reason in reasons]
    raise BackendUnsupported(name, "auto", refused, [])


def _warn_slow(op: Op, refused: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling() or op.name in _WARNED or op.scores is None:
        return
    if op.scores(*args, **kwargs) > _WARN_SCORES:
        _WARNED.add(op.name)
        warnings.warn(f"{op.name} runs on the slow reference backend: {'; '.join(refused)}", stacklevel=4)


def run(name: str, backend: str, *args: Any, **kwargs: Any) -> Any:
    """Resolve and call. Inside ``torch.autocast`` the leading tensors are cast, and the op's own arithmetic is left
    alone.
    """
    device_type = args[0].device.type
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
        dtype, count = torch.get_autocast_dtype(device_type), _OPS[name].autocast
        args = tuple(_autocast(a, dtype) if i < count else a for i, a in enumerate(args))
        with torch.autocast(device_type, enabled=False):
            return resolve(name, backend, args, kwargs).fn(*args, **kwargs)
    return resolve(name, backend, args, kwargs).fn(*args, **kwargs)


def _autocast(value: Any, dtype: torch.dtype) -> Any:
    castable = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if castable else value


@contextmanager
def use_backend(name: str, op: str | Callable[..., Any] | None = None) -> Iterator[None]:
    """Within this context ops run on backend ``name`` unless a call names another.

    Args:
        name: ``'auto'`` or one of the backends.
        op: an op (its function or name); None = every op that has such a backend.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known: auto, {', '.join(BACKENDS)}")
    key = None if op is None else _named(op).name
    before = dict(_CHOICE.chosen)
    _CHOICE.chosen = {**before, key: name} if key is not None else {None: name}
    try:
        yield
    finally:
        _CHOICE.chosen = before


def _named(op: str | Callable[..., Any]) -> Op:
    from sparing.kernels import load_all

    load_all()
    name = op if isinstance(op, str) else op.__name__
    if name not in _OPS:
        raise ValueError(f"unknown op {name!r}; known: {', '.join(sorted(_OPS))}")
    return _OPS[name]


@dataclass(frozen=True)
class BackendRow:
    """One backend in an :class:`Explanation`. ``priority``: 1 = tried first by ``'auto'``, 0 = never tried by it."""

    backend: str
    supported: bool
    reasons: tuple[str, ...]
    priority: int
    chosen: bool


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``print`` it for a table."""

    op: str
    rows: tuple[BackendRow, ...]

    @property
    def chosen(self) -> str | None:
        """The backend that would run, None when none would."""
        return next((row.backend for row in self.rows if row.chosen), None)

    def __str__(self) -> str:
        lines = [f"{self.op}", f"  {'backend':<10} {'usable':<7} {'priority':<9} why not"]
        for row in self.rows:
            mark = "*" if row.chosen else " "
            reasons = "; ".join(row.reasons) or "-"
            lines.append(
                f"{mark} {row.backend:<10} {'yes' if row.supported else 'no':<7} {row.priority or '-':<9} {reasons}"
            )
        return "\n".join(lines)


class _HandedOn(Exception):
    """Carries the arguments that a public function hands to its implementations out of it."""


def _handed_on(entry: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the op's implementations would be given: the public function may unpack or complete its own arguments."""
    _CHOICE.asked = entry.name
    try:
        entry.public(*args, **kwargs)
    except _HandedOn as found:
        return found.args[0], found.args[1]
    finally:
        _CHOICE.asked = None
    return args, kwargs


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would serve ``op(*args, **kwargs)`` and why the others would not.

    Args:
        op: the public function or its name; the other arguments are those of the call itself, ``backend`` included.
    """
    entry = _named(op)
    signature = inspect.signature(entry.public)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    backend = bound.arguments.pop("backend", "auto")
    args, kwargs = _handed_on(entry, bound.args, bound.kwargs)
    order = list(entry.order(*args, **kwargs))
    reasons = {name: _reasons(entry, name, args, kwargs) for name in BACKENDS}
    wanted = _requested(entry) if backend == "auto" else backend
    candidates = order if wanted == "auto" else [wanted]
    chosen = next((name for name in candidates if not reasons[name]), None)
    ranked = [*order, *(name for name in BACKENDS if name not in order)]
    rows = [
        BackendRow(n, not reasons[n], tuple(reasons[n]), order.index(n) + 1 if n in order else 0, n == chosen)
        for n in ranked
    ]
    return Explanation(entry.name, tuple(rows))


@dataclass(frozen=True)
class Report:
    """What this machine offers: ``versions``, ``devices``, and per device the usable backends of every op."""

    versions: dict[str, str]
    devices: tuple[str, ...]
    notes: tuple[str, ...]
    ops: tuple[tuple[str, str, str, tuple[str, ...]], ...]  # op, device, backend, reasons (empty = usable)

    def __str__(self) -> str:
        lines = ["  ".join(f"{name} {version}" for name, version in self.versions.items()), *self.devices, *self.notes]
        lines += [f"{op:<28} {dev:<5} {back:<10} {'; '.join(why) or 'usable'}" for op, dev, back, why in self.ops]
        return "\n".join(lines)


def report() -> Report:
    """Versions, devices and, for every op and backend, whether it is usable on this machine and why not."""
    from importlib.metadata import PackageNotFoundError, version

    from sparing.kernels import load_all
    from sparing.kernels.triton.config import table_source

    load_all()
    versions = {}
    for package in ("torch", "triton", "xformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    devices = [torch.device("cpu")]
    described = ["cpu: the Triton interpreter is " + ("on" if interpreting() else "off")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
        major, minor = torch.cuda.get_device_capability()
        described.append(f"cuda: {torch.cuda.get_device_name()} (sm{major}{minor})")
    fa3 = "installed" if INSTALLED["flash_attn_interface"] else "not installed"
    notes = [f"FlashAttention-3: {fa3}, never switched on implicitly", f"tuned table: {table_source()}"]
    rows = [
        (name, device.type, backend, tuple(_OPS[name].impls[backend].here(device)))
        for name in sorted(_OPS)
        for device in devices
        for backend in BACKENDS
        if backend in _OPS[name].impls
    ]
    return Report(versions, tuple(described), tuple(notes), tuple(rows))
