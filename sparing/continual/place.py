"""Where a module of a clip network stands while it is converted, and what no copy of its layers could keep."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

Converter = Callable[[nn.Module, "Place"], nn.Module]


@dataclass(frozen=True)
class Place:
    """Where a module stands, and what the user said about the conversion."""

    path: str
    pool_window: int | None
    sequence_len: int | None
    per_frame: bool
    converters: Mapping[type, Converter]
    flattened: bool = False  # frames are (C,) from here on
    # What modules became, by module and form of the frames: one that stands in several places is one in the twin too.
    # (The module is kept beside its twin, so that its id stays its own.)
    done: dict[tuple[int, bool], tuple[nn.Module, nn.Module]] = field(default_factory=dict)

    def inside(self, name: str, *, flattened: bool | None = None) -> "Place":
        path = f"{self.path}.{name}" if self.path else name
        return replace(self, path=path, flattened=self.flattened if flattened is None else flattened)

    def refuse(self, module: nn.Module, why: str) -> ValueError:
        return ValueError(f"{self.path or 'the network'} ({type(module).__name__}): {why}")


def children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every child by its name, one that stands in two places twice (``named_children`` leaves it out)."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def check_plain(module: nn.Module, place: Place | None = None) -> None:
    """Refuse what a copy of the layers would lose: weights that are computed or do not exist yet, hooks, and a
    forward of one's own. Types that the user converts are the user's.

    Raises:
        ValueError: with the path and the fix.
    """
    place = place or Place("", None, None, False, {})
    if any(kind in place.converters for kind in type(module).__mro__):
        return
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
        raise place.refuse(module, "has no weights yet: run the clip network on one clip first")
    if is_parametrized(module):
        names = sorted(module.parametrizations)  # type: ignore[arg-type]
        raise place.refuse(
            module,
            f"computes its {', '.join(names)} by a parametrization: fuse it first with "
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {names[0]!r})",
        )
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    if hooks:
        hook = getattr(hooks[0], "__name__", type(hooks[0]).__name__)
        remove = _REMOVE.get(hook, "the handle that registering it returned, or make it a module of the network")
        raise place.refuse(module, f"has a forward hook ({hook}), which no step would call: remove it with {remove}")
    if "forward" in vars(module):
        raise place.refuse(module, f"has a forward that was set on the module: {OWN_WAY}")
    for name, child in children(module):
        check_plain(child, place.inside(name))


# Hooks of torch that compute a weight, and what takes them off.
_REMOVE = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm(module)",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm(module)",
}
OWN_WAY = "pass converters={its type: function}, or wrap it in PerFrame if its output at a frame depends on it only"
# Methods in which a layer's forward is spread over its class.
_FORWARD = ("forward", "_conv_forward", "__call__")


def same_forward(module: nn.Module, kind: type) -> bool:
    """Whether a subclass computes what ``kind`` does: it may be built otherwise, but not run otherwise."""
    return all(getattr(type(module), name, None) is getattr(kind, name, None) for name in _FORWARD)
