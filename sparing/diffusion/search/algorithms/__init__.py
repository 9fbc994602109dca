"""Search algorithms: plain arithmetic on proposals and scores; none imports a torch model or diffusers."""

from sparing.diffusion.search.algorithms.evolutionary import Evolutionary
from sparing.diffusion.search.algorithms.paths import Paths
from sparing.diffusion.search.algorithms.random import Halving, Random
from sparing.diffusion.search.algorithms.smc import SMC
from sparing.diffusion.search.algorithms.zero_order import ZeroOrder

__all__ = ["ALGORITHMS", "PRESETS", "SMC", "Evolutionary", "Halving", "Paths", "Random", "ZeroOrder"]

# Name on the command line and in logs -> class.
ALGORITHMS = {kind.name: kind for kind in (Random, Halving, ZeroOrder, Paths, SMC, Evolutionary)}

# Published settings: keyword arguments of the pipeline ("call") and of the algorithm, never code. From the paper as a
# third-party write-up gives them (sit, flux, pixart) and from the community code tt-scale-flux (sdxl, sd1.5, ltx, wan).
_NEGATIVE = {"negative_prompt": "bad quality, worse quality, degenerate quality"}
_SDXL = {"call": _NEGATIVE, "algorithm": "random", "kwargs": {"n": 126}}
PRESETS = {
    "sit-xl-256": {
        "call": {"num_inference_steps": 25, "guidance_scale": 1.0},  # Heun: 2 * 25 - 1 NFE a search run
        "algorithm": "zero_order",
        "kwargs": {"neighbours": 4},
    },
    "sit-xl-256-paths": {
        "call": {"num_inference_steps": 25, "guidance_scale": 1.0},
        "algorithm": "paths",
        "kwargs": {"start": 0.11, "forward": 0.78, "backward": 0.81},
    },
    "flux.1-dev": {
        "call": {"num_inference_steps": 30, "guidance_scale": 3.5},
        "algorithm": "random",
        "kwargs": {"n": 96},
    },
    "pixart-sigma": {
        "call": {"num_inference_steps": 30, "guidance_scale": 4.5},
        "algorithm": "random",
        "kwargs": {"n": 96},
    },
    "sdxl": _SDXL,
    "sd1.5": _SDXL,
    "ltx": {"call": {"num_inference_steps": 50}, "algorithm": "random", "kwargs": {"n": 30}},
    "wan": {"call": {"num_inference_steps": 50, "guidance_scale": 5.0}, "algorithm": "random", "kwargs": {"n": 30}},
}
