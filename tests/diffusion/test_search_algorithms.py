"""Algorithms on closed forms: what best-of-N, local search and steering are worth, and what they refuse."""

import copy
import math
import warnings
from statistics import mean

import diffusers
import pytest
import torch

from sparing.diffusion.search.algorithms import (
    ALGORITHMS,
    PRESETS,
    SMC,
    Evolutionary,
    Halving,
    Paths,
    Random,
    ZeroOrder,
)
from sparing.diffusion.search.levels import Levels, coefficients, probe, renoise
from sparing.diffusion.search.neighbours import mix, neighbour, rotate, shell
from sparing.diffusion.search.protocol import Continue, Gaussian, Neighbour, Outcome, SearchState
from sparing.diffusion.search.resampling import Steering, systematic
from sparing.diffusion.search.seeds import gaussian

# Expected maximum of N standard normals, and its variance.
MAXIMUM = {1: (0.0, 1.0), 2: (0.564189584, 0.681690114), 4: (1.029375373, 0.491715237), 16: (1.765991393, 0.295009809)}


def play(algorithm, score, *, shape=(1,), prompt="", **state):
    """(best score, proposals) of a search whose sample is ``score(noise)``; recipes are resolved by the real rules."""
    state = SearchState(num_steps=10, prompt=prompt, **state)
    noises, scores, proposals = [], [], []
    plan = algorithm.run(state)
    try:
        asked = next(plan)
        while True:
            outcomes = []
            for proposal in asked:
                recipe = proposal.recipe
                if isinstance(recipe, Gaussian):
                    noise = gaussian(shape, recipe.seed)
                elif isinstance(recipe, Neighbour):
                    draw = gaussian(shape, recipe.seed)
                    noise = neighbour(noises[recipe.parent], draw, rule=recipe.rule, radius=recipe.radius)
                else:
                    noise = noises[recipe.parent]
                noises.append(noise)
                scores.append(float(score(noise)))
                proposals.append(proposal)
                outcomes.append(Outcome(len(scores) - 1, {"v": scores[-1]}))
            asked = plan.send(outcomes)
    except StopIteration as end:
        best = max(scores) if end.value is None else scores[end.value]
        return best, proposals


@pytest.mark.parametrize("n", MAXIMUM)
def test_best_of_n_on_an_affine_sampler_is_the_expected_maximum(n):
    """Gaussian data N(0.7, 0.5^2) under 20 Euler steps: x_0 = 0.464247500734 z + 0.7."""
    repeats, slope = 1500, 0.464247500734
    found = [play(Random(n), lambda z: slope * z + 0.7, prompt=k)[0] for k in range(repeats)]
    expected, variance = MAXIMUM[n]
    error = 4 * slope * math.sqrt(variance / repeats)
    assert mean(found) == pytest.approx(0.7 + slope * expected, abs=error)


def test_zero_order_beats_random_after_ten_rounds_and_not_after_two():
    """Linear verifier in 16 dimensions, rotate 0.95, four neighbours: 2.45 against best-of-41's 2.17."""

    def after(rounds):
        algorithm = ZeroOrder(rounds, 4, rule="rotate", radius=0.95)
        return mean(play(algorithm, lambda z: z[0], shape=(16,), prompt=k)[0] for k in range(600))

    ten, two = after(10), after(2)
    assert ten == pytest.approx(2.4505, abs=0.13)
    assert ten > 2.25
    assert two == pytest.approx(0.6241, abs=0.15)
    assert two < 1.485  # best of nine at equal cost


@pytest.mark.parametrize(
    ("algorithm", "nfe"),
    [
        (Random(7), 70),
        (Halving(8, stops=(4, 7, 10), keeps=(4, 2, 1)), 8 * 4 + 4 * 3 + 2 * 3),
        (ZeroOrder(3, 2), 10 * (1 + 3 * 2)),
        (SMC(4, checks=(0.4, 1.0)), 40),
    ],
    ids=lambda a: getattr(a, "name", ""),
)
def test_costs_are_the_formulas(algorithm, nfe):
    _, proposals = play(algorithm, lambda z: z[0], stochastic=True)
    assert sum(p.stop - p.start + p.exact for p in proposals) == nfe


def test_restarts_cost_a_run_each_and_never_lose_the_best():
    scores = iter([5.0, *[0.0] * 100])
    best, proposals = play(ZeroOrder(3, 2, mode="restart"), lambda z: next(scores))
    assert best == 5.0
    assert [p.stage for p in proposals].count("restart") == 2  # none after the last round
    assert len(proposals) == 1 + 3 * 2 + 2


def test_an_adaptive_radius_shrinks_after_failure_and_grows_back():
    scores = iter([5.0, 0.0, 0.0, 6.0, 0.0, 0.0, 0.0])
    _, proposals = play(ZeroOrder(3, 2, radius=0.4, adapt=True), lambda z: next(scores))
    assert [p.recipe.radius for p in proposals[1::2]] == pytest.approx([0.4, 0.2, 0.24])


def test_the_same_state_gives_the_same_proposals():
    for kind in (Random(4), ZeroOrder(2, 2), Halving(4, stops=(5, 10), keeps=(2, 1))):
        first, again = (play(kind, lambda z: z[0], run_seed=3)[1] for _ in range(2))
        assert first == again
        assert first != play(kind, lambda z: z[0], run_seed=4)[1]


def test_steering_agrees_with_importance_weighting_at_the_same_steps():
    """Ancestral sampling of a Gaussian mixture tilted by exp(1.5 x): weighted means with and without resampling."""
    steps, count, lam = 50, 4096, 1.5
    weights, means, spread = torch.tensor([0.3, 0.7]).double(), torch.tensor([-1.5, 0.8]).double(), 0.35
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bars = [*torch.cumprod(1 - betas, 0)[torch.arange(steps - 1, -1, -1) * (1000 // steps)].tolist(), 1.0]

    def denoise(x, bar):
        a, b2 = math.sqrt(bar), 1 - bar
        variance = a * a * spread**2 + b2
        log = weights.log() - (x[:, None] - a * means).square() / (2 * variance)
        return (log.softmax(-1) * (means + a * spread**2 / variance * (x[:, None] - a * means))).sum(-1)

    def walk(seed, steered):
        draws = torch.Generator().manual_seed(seed)
        x = torch.randn(count, generator=draws, dtype=torch.float64)
        checks = set(range(5, steps + 1, 5)) if steered else {steps}
        steering = Steering("diff", [lam] * len(checks), ess_threshold=0.5)
        for i in range(steps):
            bar, after = bars[i], bars[i + 1]
            clean = denoise(x, bar)
            eps = (x - math.sqrt(bar) * clean) / math.sqrt(1 - bar)
            noise = math.sqrt((1 - after) / (1 - bar) * (1 - bar / after))
            x = math.sqrt(after) * clean + math.sqrt(max(1 - after - noise**2, 0.0)) * eps
            x = x + noise * torch.randn(count, generator=draws, dtype=torch.float64)
            if i + 1 in checks:
                logs = steering.update(x if i + 1 == steps else clean)
                if i + 1 < steps:
                    x = x[steering.resample(float(torch.rand((), generator=draws)))]
        return float((logs.softmax(0) * x).sum())

    steered, plain = (mean(walk(seed, kind) for seed in range(20)) for kind in (True, False))
    assert steered == pytest.approx(plain, abs=0.02)
    assert steered > 0.8  # and well away from the untilted mean of 0.11


def test_systematic_resampling_keeps_shares():
    logs = torch.tensor([0.1, 0.2, 0.3, 0.4]).double().log()
    counts = torch.zeros(4)
    for k in range(500):
        counts += torch.bincount(systematic(logs, (k + 0.5) / 500), minlength=4)
    assert (counts / counts.sum()).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=2e-3)


# -- levels


def _beta_table(scheduler):
    return [coefficients("vp", float(scheduler.alphas_cumprod[int(t)])) for t in scheduler.timesteps]


def _sigmas_ve(scheduler):
    return [coefficients("ve", float(s)) for s in scheduler.sigmas[: len(scheduler.timesteps)]]


def _sigmas_flow(scheduler):
    return [coefficients("flow", float(s)) for s in scheduler.sigmas[: len(scheduler.timesteps)]]


LEVELS = {
    "DDPMScheduler": ("vp", _beta_table),
    "DDIMScheduler": ("vp", _beta_table),
    "PNDMScheduler": ("vp", None),
    "LCMScheduler": ("vp", _beta_table),
    "TCDScheduler": ("vp", _beta_table),
    "DPMSolverMultistepScheduler": ("vp", _beta_table),
    "DPMSolverSinglestepScheduler": ("vp", _beta_table),
    "DEISMultistepScheduler": ("vp", _beta_table),
    "UniPCMultistepScheduler": ("vp", _beta_table),
    "SASolverScheduler": ("vp", _beta_table),
    "CogVideoXDDIMScheduler": ("vp", None),
    "CogVideoXDPMScheduler": ("vp", None),
    "UnCLIPScheduler": ("vp", None),
    "EulerDiscreteScheduler": ("ve", _sigmas_ve),
    "EulerAncestralDiscreteScheduler": ("ve", _sigmas_ve),
    "HeunDiscreteScheduler": ("ve", None),
    "KDPM2DiscreteScheduler": ("ve", None),
    "KDPM2AncestralDiscreteScheduler": ("ve", None),
    "EDMEulerScheduler": ("ve", _sigmas_ve),
    "EDMDPMSolverMultistepScheduler": ("ve", _sigmas_ve),
    "CMStochasticIterativeScheduler": ("ve", _sigmas_ve),
    "FlowMatchEulerDiscreteScheduler": ("flow", _sigmas_flow),
    "FlowMatchHeunDiscreteScheduler": ("flow", None),
    "FlowMatchLCMScheduler": ("flow", _sigmas_flow),
}


@pytest.mark.parametrize("name", LEVELS)
def test_probed_levels_are_the_schedulers_own(name):
    kind = getattr(diffusers, name, None)
    if kind is None:
        pytest.skip(f"this diffusers has no {name}")
    family, analytic = LEVELS[name]
    scheduler = kind()
    scheduler.set_timesteps(12)
    before = copy.deepcopy(vars(scheduler))
    levels = probe(scheduler)
    assert levels.family == family
    assert levels.num_steps == len(scheduler.timesteps)
    assert set(vars(scheduler)) == set(before)
    noises = [b for _, b in levels.pairs]
    assert noises == sorted(noises, reverse=True)
    rule = {"flow": lambda a, b: a + b, "vp": lambda a, b: a * a + b * b, "ve": lambda a, b: a}[family]
    assert all(abs(rule(a, b) - 1) < 1e-4 for a, b in levels.pairs)
    if analytic is not None:
        for found, wanted in zip(levels.pairs, analytic(scheduler)):
            assert found == pytest.approx(wanted, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize(("family", "first", "second"), [("flow", 0.3, 0.7), ("vp", 0.8, 0.3), ("ve", 0.5, 3.0)])
def test_renoising_has_the_law_of_the_noisier_level(family, first, second):
    count, draws = 100_000, torch.Generator().manual_seed(0)
    x0, eps, xi = (torch.randn(count, generator=draws, dtype=torch.float64) for _ in range(3))
    x0 = 1.3 + 0.4 * x0
    one, two = coefficients(family, first), coefficients(family, second)
    x = renoise(one[0] * x0 + one[1] * eps, xi, one, two)
    variance = (0.4 * two[0]) ** 2 + two[1] ** 2
    assert float(x.mean()) == pytest.approx(1.3 * two[0], abs=4 * math.sqrt(variance / count))
    assert float(x.var()) == pytest.approx(variance, abs=4 * variance * math.sqrt(2 / count))


def test_renoising_to_a_cleaner_level_is_refused():
    with pytest.raises(ValueError, match="cleaner"):
        renoise(torch.zeros(2), torch.zeros(2), coefficients("flow", 0.7), coefficients("flow", 0.3))
    with pytest.raises(ValueError, match="nothing to re-noise"):
        renoise(torch.zeros(2), torch.zeros(2), coefficients("flow", 1.0), coefficients("flow", 1.0))


# -- refusals


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Random(0), "n = 0"),
        (lambda: Random(4, keep=5), "n = 4, got 5"),
        (lambda: Halving(4, stops=(5, 10), keeps=(8, 1)), "from n = 4"),
        (lambda: ZeroOrder(2, 2, rule="rotate", radius=1.0), "got 1.0"),
        (lambda: ZeroOrder(2, 2, rule="mix", radius=0.0), "got 0.0"),
        (lambda: ZeroOrder(2, 2, rule="mix", radius=1.5), "got 1.5"),
        (lambda: ZeroOrder(2, 2, rule="warp"), "'warp'"),
        (lambda: ZeroOrder(2, 2, mode="lazy"), "'lazy'"),
        (lambda: ZeroOrder(2, 2, rule="rotate", radius=0.9, adapt=True), "cosine"),
        (lambda: Paths(forward=0.4, backward=0.3), "each round must make progress"),
        (lambda: SMC(1), "got 1 and 0"),
        (lambda: SMC(4, lam=[1.0, 2.0]), "2 numbers for 4 checks"),
        (lambda: Evolutionary(3, elites=4), "at most population"),
        (lambda: Random(2.5), "n must be a whole number, got 2.5"),
        (lambda: Random("abc"), "n must be a whole number, got 'abc'"),
        (lambda: Random(4, keep=True), "keep must be a whole number, got True"),
        (lambda: Halving(4, stops=[2, 4], keeps=[1.5, 1]), r"keeps\[0\] must be a whole number, got 1.5"),
        (lambda: Halving(4, stops=[2, 4], keeps=2), "keeps must be a list of numbers, got 2"),
        (lambda: Halving(4, stops=[2, math.inf], keeps=[2, 1]), r"stops\[1\] must be a finite number, got inf"),
        (lambda: ZeroOrder(2.5), "rounds must be a whole number, got 2.5"),
        (lambda: ZeroOrder(2, 2, radius="far"), "radius must be a finite number, got 'far'"),
        (lambda: ZeroOrder(2, 2, rule="cross"), "rule must be one of rotate, mix, shell, shell_free, got 'cross'"),
        (lambda: SMC(4, checks="ab"), "checks must be a list of numbers, got 'ab'"),
        (lambda: SMC(4, lam="x"), r"lam must be a list of numbers, got 'x'"),
        (lambda: SMC(4, ess_threshold="x"), "ess_threshold must be a finite number, got 'x'"),
        (lambda: Evolutionary(3.5), "population must be a whole number, got 3.5"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(build, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        build()


def test_ladders_that_do_not_fit_the_schedule_are_refused():
    levels = Levels(tuple(coefficients("flow", 1 - i / 10) for i in range(11)), "flow")
    state = SearchState(num_steps=10, levels=levels.pairs, family="flow")
    with pytest.raises(ValueError, match=r"level 1\.5 is off the schedule's range"):
        next(Paths(start=1.5).run(state))
    with pytest.raises(ValueError, match=r"makes no progress \(indices"):
        next(Paths(start=0.5, forward=0.01, backward=0.02).run(state))
    with pytest.raises(ValueError, match=r"got \(6, 4\)"):
        next(Paths(start=5, ladder=[(6, 4)]).run(state))
    with pytest.raises(ValueError, match="even indices only, not at 5"):
        next(Halving(4, stops=(5, 10), keeps=(2, 1)).run(SearchState(num_steps=10, order=2, scheduler="Heun")))
    with pytest.raises(ValueError, match=r"2\.5 is neither an index of the schedule nor a share of it"):
        next(Halving(4, stops=(2.5, 10), keeps=(2, 1)).run(state))


@pytest.mark.parametrize("rule", [rotate, mix, shell])
def test_neighbours_keep_what_they_promise(rule):
    pivot, draw = gaussian((4, 16, 16), 1).double(), gaussian((4, 16, 16), 2).double()
    radius = {"rotate": 0.95, "mix": 0.3, "shell": 0.8}[rule.__name__]
    moved = rule(pivot, draw, radius)
    cosine = float((moved * pivot).sum() / moved.norm() / pivot.norm())
    if rule is rotate:
        assert float(moved.norm()) == pytest.approx(float(pivot.norm()))
        assert cosine == pytest.approx(0.95)
    elif rule is mix:
        assert cosine == pytest.approx(math.sqrt(1 - 0.09), abs=0.02)
    else:
        assert float(moved.norm()) == pytest.approx(32.0)
        assert float((shell(pivot, draw, radius, renorm=False) - pivot).norm()) == pytest.approx(0.8)


def test_presets_name_algorithms_that_take_their_settings():
    for name, preset in PRESETS.items():
        algorithm = ALGORITHMS[preset["algorithm"]](**preset["kwargs"])
        assert algorithm.config()["name"] == preset["algorithm"], name


def test_halving_goes_on_with_the_best():
    best, proposals = play(Halving(8, stops=(4, 10), keeps=(2, 1)), lambda z: z[0])
    second = [p for p in proposals if p.round == 1]
    firsts = sorted(range(8), key=lambda i: -float(gaussian((1,), proposals[i].recipe.seed)))[:2]
    assert {p.recipe for p in second} == {Continue(i) for i in firsts}
    assert best == pytest.approx(max(float(gaussian((1,), p.recipe.seed)) for p in proposals[:8]))


def test_halving_warns_of_stops_in_the_first_fifth_of_the_noise_range():
    levels = tuple(coefficients("flow", 1 - i / 10) for i in range(11))
    state = SearchState(num_steps=10, levels=levels, family="flow")
    with pytest.warns(UserWarning, match="after 1 of 10 entries the noise is above 80% of what it was at first"):
        next(Halving(4, stops=(1, 2, 10), keeps=(3, 2, 1)).run(state))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        next(Halving(4, stops=(3, 10), keeps=(2, 1)).run(state))
        next(Halving(4, stops=(1, 10), keeps=(2, 1)).run(SearchState(num_steps=10)))  # unknown levels say nothing
        for scheduler in (diffusers.DDIMScheduler(), diffusers.EulerDiscreteScheduler()):  # late enough by default
            scheduler.set_timesteps(20)
            levels = probe(scheduler)
            next(Halving().run(SearchState(num_steps=20, levels=levels.pairs, family=levels.family)))
