"""Neighbours of a noise: the moves of local search (Ma et al. 2025, section on zero-order search).

The paper fixes neither the metric nor how a neighbour is drawn; each rule here is one reading of it, and the log says
which was used. A noise of any shape is one flat vector of D numbers; every rule takes a pivot and a draw v ~ N(0, I) of
the same shape and is exact in the tensors' own precision:

* ``rotate`` keeps the norm and turns by a fixed angle (the rule in the community code of one of the authors),
* ``mix`` keeps the law N(0, I): sqrt(1 - lambda^2) p + lambda v; the default,
* ``shell`` steps a fixed Euclidean distance and comes back to the typical norm sqrt(D); ``shell_free`` does not,
* ``cross`` takes coordinates from two parents at random (evolutionary search), norm set to sqrt(D).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["RULES", "check_radius", "cross", "mix", "neighbour", "rotate", "shell"]


def rotate(pivot: Tensor, draw: Tensor, tau: float = 0.95) -> Tensor:
    """|p| (tau u + sqrt(1 - tau^2) w) with u = p/|p| and w the unit part of the draw that is orthogonal to u.

    Args:
        pivot, draw: tensors of one shape.
        tau: cosine of the angle between pivot and neighbour, in (-1, 1).

    Raises:
        ValueError: ``tau`` out of range, shapes that differ, or a pivot of norm zero.
    """
    check_radius("rotate", tau)
    _check_shapes(pivot, draw)
    norm = _norm(pivot, "rotate")
    direction = pivot / norm
    across = draw - (draw * direction).sum() * direction
    across = across / across.norm()
    return norm * (tau * direction + math.sqrt(1 - tau**2) * across)


def mix(pivot: Tensor, draw: Tensor, radius: float = 0.3) -> Tensor:
    """sqrt(1 - radius^2) p + radius v: of independent N(0, I) again N(0, I); the cosine is about sqrt(1 - radius^2).

    Raises:
        ValueError: ``radius`` outside (0, 1), or shapes that differ.
    """
    check_radius("mix", radius)
    _check_shapes(pivot, draw)
    return math.sqrt(1 - radius**2) * pivot + radius * draw


def shell(pivot: Tensor, draw: Tensor, radius: float = 0.8, *, renorm: bool = True) -> Tensor:
    """p + radius v/|v|: exactly ``radius`` away.

    Such steps let the norm grow (by radius^2 / 2|p| on average); ``renorm`` puts the result back on the typical shell,
    |y| = sqrt(D), where nearly all of N(0, I) lies.

    Raises:
        ValueError: ``radius`` not above 0, or shapes that differ.
    """
    check_radius("shell", radius)
    _check_shapes(pivot, draw)
    moved = pivot + radius * draw / draw.norm()
    return _on_shell(moved, "shell") if renorm else moved


def cross(first: Tensor, second: Tensor, draw: Tensor, share: float = 0.5) -> Tensor:
    """Every coordinate from ``second`` with probability ``share``, else from ``first``; norm set to sqrt(D).

    Raises:
        ValueError: ``share`` outside (0, 1), or shapes that differ.
    """
    check_radius("cross", share)
    _check_shapes(first, draw)
    _check_shapes(second, draw)
    threshold = math.sqrt(2) * torch.erfinv(torch.tensor(1 - 2 * share, dtype=torch.float64)).item()
    return _on_shell(torch.where(draw > threshold, second, first), "cross")


def _shell_free(pivot: Tensor, draw: Tensor, radius: float) -> Tensor:
    return shell(pivot, draw, radius, renorm=False)


# Rules of one parent by the name that recipes carry: f(pivot, draw, radius).
RULES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "rotate": rotate,
    "mix": mix,
    "shell": shell,
    "shell_free": _shell_free,
}


def neighbour(pivot: Tensor, draw: Tensor, *, rule: str, radius: float, other: Tensor | None = None) -> Tensor:
    """The neighbour that ``rule`` makes; ``other`` is the second parent of ``cross``.

    Raises:
        ValueError: an unknown rule, a radius that the rule does not take, or ``cross`` without ``other``.
    """
    check_radius(rule, radius)
    if rule == "cross":
        if other is None:
            raise ValueError("rule 'cross' mixes two noises; the second (other) is missing")
        return cross(pivot, other, draw, radius)
    return RULES[rule](pivot, draw, radius)


def check_radius(rule: str, radius: float) -> None:
    """Raises a ValueError when ``rule`` is unknown or does not take ``radius``."""
    if rule == "rotate":
        if not -1 < radius < 1:
            raise ValueError(f"rotate takes tau (a cosine) in (-1, 1), got {radius}")
    elif rule in ("mix", "cross"):
        if not 0 < radius < 1:
            raise ValueError(f"{rule} takes a radius in (0, 1), got {radius}")
    elif rule in ("shell", "shell_free"):
        if not 0 < radius < math.inf:
            raise ValueError(f"{rule} takes a radius above 0, got {radius}")
    else:
        raise ValueError(f"unknown neighbour rule {rule!r}; known are {', '.join([*RULES, 'cross'])}")


def _check_shapes(pivot: Tensor, draw: Tensor) -> None:
    if pivot.shape != draw.shape:
        raise ValueError(f"noises have shapes {tuple(pivot.shape)} and {tuple(draw.shape)}; they must be the same")


def _norm(noise: Tensor, rule: str) -> Tensor:
    norm = noise.norm()
    if not bool(norm > 0):
        raise ValueError(f"{rule} needs a noise with a direction; this one has norm {float(norm)}")
    return norm


def _on_shell(noise: Tensor, rule: str) -> Tensor:
    return noise * (math.sqrt(noise.numel()) / _norm(noise, rule))
