"""sparing: efficient twins of dense vision, diffusion, video-language and audio models.

This is the face of the package. Its names resolve on first use (PEP 562), so that ``import sparing`` loads neither
torch nor any other dependency, and ``sparing models`` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparing.zoo.cards import ModelCard
    from sparing.zoo.compare import Comparison, compare
    from sparing.zoo.profile import Profile, profile
    from sparing.zoo.registry import create_model, list_models, model_card, register_model
    from sparing.zoo.twins import load, methods, twin

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "ModelCard",
    "Profile",
    "__version__",
    "compare",
    "create_model",
    "list_models",
    "load",
    "methods",
    "model_card",
    "profile",
    "register_model",
    "twin",
]

_ROOMS = {
    "Comparison": "sparing.zoo.compare",
    "Profile": "sparing.zoo.profile",
    "compare": "sparing.zoo.compare",
    "profile": "sparing.zoo.profile",
    "ModelCard": "sparing.zoo.cards",
    "create_model": "sparing.zoo.registry",
    "list_models": "sparing.zoo.registry",
    "load": "sparing.zoo.twins",
    "methods": "sparing.zoo.twins",
    "model_card": "sparing.zoo.registry",
    "register_model": "sparing.zoo.registry",
    "twin": "sparing.zoo.twins",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'sparing' has no attribute {name!r}; it offers {', '.join(sorted(_ROOMS))}")
    value = getattr(import_module(_ROOMS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
