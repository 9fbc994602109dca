"""Zero-order search: a pivot noise, K neighbours, the best becomes the pivot (Ma et al. 2025)."""

from collections.abc import Generator
from typing import Any, Literal

from sparing.diffusion.search.neighbours import RULES, check_radius
from sparing.diffusion.search.protocol import Gaussian, Neighbour, Outcome, Proposal, SearchState
from sparing.diffusion.search.settings import check_numbers, check_whole

__all__ = ["ZeroOrder"]

Mode = Literal["monotone", "literal", "restart"]


class ZeroOrder:
    """NFE = T (1 + rounds * neighbours), and T per restart.

    Args:
        rounds, neighbours: R and K (the paper uses K of 2 to 4).
        rule, radius: how neighbours are made (``sparing.diffusion.search.neighbours``), by a rule of one parent.
        mode: 'monotone': the pivot moves only to a strictly better neighbour; 'literal' (the paper's words): always to
            the best one; 'restart': as monotone, and a round without success moves it to fresh noise.
        adapt: halve the radius after a failed round, grow it by 1.2 after success, never above ``radius``. Not for
            'rotate', whose radius is a cosine.

    Raises:
        ValueError: numbers below 1, an unknown mode or rule, a radius that the rule does not take.
    """

    name = "zero_order"

    def __init__(
        self,
        rounds: int = 8,
        neighbours: int = 4,
        *,
        rule: str = "mix",
        radius: float = 0.3,
        mode: Mode = "monotone",
        adapt: bool = False,
    ) -> None:
        check_whole(rounds=rounds, neighbours=neighbours)
        check_numbers(radius=radius)
        if rounds < 1 or neighbours < 1:
            raise ValueError(f"rounds and neighbours must be at least 1, got {rounds} and {neighbours}")
        if mode not in ("monotone", "literal", "restart"):
            raise ValueError(f"mode must be monotone, literal or restart, got {mode!r}")
        if rule not in RULES:  # 'cross' takes two parents
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
        check_radius(rule, radius)
        if adapt and rule == "rotate":
            raise ValueError("adapt scales a distance; the radius of 'rotate' is a cosine. Use mix or shell")
        self.rounds, self.neighbours, self.rule, self.radius = rounds, neighbours, rule, radius
        self.mode, self.adapt = mode, adapt

    def config(self) -> dict[str, Any]:
        names = ("name", "rounds", "neighbours", "rule", "radius", "mode", "adapt")
        return {name: getattr(self, name) for name in names}

    def run(self, state: SearchState) -> Generator[list[Proposal], list[Outcome], int | None]:
        end, radius = state.num_steps, self.radius
        [pivot] = yield [Proposal(state.first_noises("zero_order", 1)[0], 0, end, stage="zero_order")]
        everything = [pivot]
        for r in range(self.rounds):
            around = yield [
                Proposal(
                    Neighbour(pivot.id, self.rule, radius, state.seed("zero_order", r + 1, k)),
                    0,
                    end,
                    parent=pivot.id,
                    stage="zero_order",
                    round=r + 1,
                    index=k,
                )
                for k in range(self.neighbours)
            ]
            everything += around
            here, *scores = state.score([pivot, *around]).tolist()  # one pool: ensembles rank the pivot along
            best = max(range(self.neighbours), key=lambda k: (scores[k], -k))
            improved = scores[best] > here
            if improved or self.mode == "literal":
                pivot = around[best]
            elif self.mode == "restart" and r + 1 < self.rounds:
                seed = state.seed("restart", r, 0)
                [pivot] = yield [Proposal(Gaussian(seed), 0, end, stage="restart", round=r + 1)]
                everything.append(pivot)
            if self.adapt:
                radius = min(self.radius, 1.2 * radius) if improved else radius / 2
        return state.best(everything).id
