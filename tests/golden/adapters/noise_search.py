"""Noise search on closed-form diffusions: the real levels, neighbours, algorithms, weights, ranks and seeds."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from golden.adapters.noise_search_analytic import Driver, Mixture, grid
from golden.harness import Case, CaseFile, Expected
from sparing.diffusion.search.algorithms import Halving, Paths, Random, ZeroOrder
from sparing.diffusion.search.levels import coefficients, predict_x0, probe, renoise_coefficients
from sparing.diffusion.search.protocol import SearchState
from sparing.diffusion.search.resampling import Steering
from sparing.diffusion.search.seeds import candidate_seed, gaussian
from sparing.diffusion.search.verifiers.analytic import Linear, LogDensity
from sparing.diffusion.search.verifiers.ensemble import midranks, minmax_scores, z_scores

_FLOAT32 = 1e-5  # where a diffusers scheduler does the steps


def cases(case_file: CaseFile) -> Iterable[Case]:
    spec, tensors = case_file.spec, case_file.tensors
    inputs = {name: tensors[name] for name in spec["inputs"]}
    base, kind, config = f"{case_file.folder}/{case_file.name}", spec["model"], spec["config"]
    expected = {
        name: Expected(tensors[name], atol=entry.get("atol", 0.0), rtol=entry.get("rtol", 0.0))
        for name, entry in spec["outputs"].items()
    }
    for name, value in spec.get("expected", {}).items():  # plain numbers beside the tensors
        values = value.items() if isinstance(value, dict) else [(None, value)]
        for key, number in values:
            expected[f"{name}.{key}" if key else name] = Expected(torch.tensor(number))
    yield Case(base, kind, config, {}, inputs, expected)
    if kind == "trajectories":
        for family in config["families"]:
            wanted = {
                name: Expected(tensors[name], atol=_FLOAT32, rtol=_FLOAT32)
                for name in (f"{family}.states", f"{family}.x0_hats", f"{family}.x0")
                if name in tensors
            }
            options = {"family": family}
            yield Case(f"{base}[diffusers {family}]", "scheduler", config, {}, inputs, wanted, options)


def _mixture(case: Case) -> Mixture:
    return Mixture(*(case.inputs[f"gmm.{name}"] for name in ("weights", "means", "covs")))


def _grid(case: Case, family: str) -> Tensor:
    return grid(family, case.config["num_steps"], case.config["grids"][family])


def _verifier(case: Case, name: str) -> Callable[[Tensor], Tensor]:
    """``(..., d) -> (...)``."""
    if name == "linear":
        verifier: Any = Linear(case.inputs["verifier.c"])
    elif name == "log_density":
        verifier = LogDensity(_mixture(case))
    else:
        assert name == "neg_sq_dist", f"verifier {name!r}"
        return lambda x: -(x - case.inputs["verifier.target"]).square().sum(-1)
    return lambda x: verifier.measure(x.reshape(-1, x.shape[-1]), [""] * x[..., 0].numel()).reshape(x.shape[:-1])


def _denoiser(case: Case) -> dict[str, Tensor]:
    mixture, results = _mixture(case), {}
    for family in case.config["families"]:
        targets = {"flow": "velocity", "vp": "v_prediction", "ve": "epsilon"}
        rows: dict[str, list[Tensor]] = {}
        for level, x in zip(case.inputs[f"{family}.level"].tolist(), case.inputs[f"{family}.x"]):
            a, b = coefficients(family, level)
            clean = mixture.denoise(x, a, b)
            eps = (x - a * clean) / b
            network = {"velocity": eps - clean, "v_prediction": a * eps - b * clean, "epsilon": eps}
            predicted = predict_x0(network[targets[family]], x, (a, b), prediction=targets[family], family=family)
            torch.testing.assert_close(predicted, clean, atol=1e-9, rtol=1e-9)
            found = {
                "a": torch.tensor(a, dtype=torch.float64),
                "b": torch.tensor(b, dtype=torch.float64),
                "x0_hat": clean,
                "eps": eps,
                "score": mixture.score(x, a, b),
                "log_prob": mixture.log_prob(x, a, b),
                "velocity": network["velocity"],
                "v": network["v_prediction"],
            }
            for name, value in found.items():
                rows.setdefault(name, []).append(value)
        results |= {f"{family}.{name}": torch.stack(values) for name, values in rows.items()}
    return results


def _trajectories(case: Case) -> dict[str, Tensor]:
    config, z, results = case.config, case.inputs["z"], {}
    for family in config["families"]:
        driver = Driver(_mixture(case), family, _grid(case, family), _verifier(case, "linear"))
        states, estimates = driver.walk(driver.start(z), 0, config["num_steps"])
        results |= {
            f"{family}.grid": driver.levels,
            f"{family}.states": torch.stack(states),
            f"{family}.x0_hats": torch.stack(estimates),
            f"{family}.x0": states[-1],
        }
        for name in config["verifiers"]:
            verifier = _verifier(case, name)
            results[f"{family}.score.{name}"] = verifier(states[-1])
            winners = [_best_of(case, family, verifier, n) for n in range(1, len(z) + 1)]
            results[f"{family}.best_prefix.{name}"] = torch.tensor(winners)
    return results | _heun(case) | _halving(case)


def _best_of(case: Case, family: str, verifier: Callable[[Tensor], Tensor], n: int) -> int:
    driver = Driver(_mixture(case), family, _grid(case, family), verifier)
    state = driver.search_state()
    driver.draws = {state.seed("random", 0, k): z for k, z in enumerate(case.inputs["z"])}
    winner, _ = driver.run(Random(n))
    assert driver.nfe == n * case.config["num_steps"]
    return winner


def _heun(case: Case) -> dict[str, Tensor]:
    family = case.config["heun"]["family"]
    driver = Driver(_mixture(case), family, _grid(case, family), _verifier(case, "linear"))
    x, nfe = driver.start(case.inputs["z"]), 0
    slopes = {"ve": lambda x, s: (x - driver.mixture.denoise(x, 1.0, s)) / s}
    slopes["flow"] = lambda x, s: (x - driver.mixture.denoise(x, 1 - s, s)) / s
    slope, levels = slopes[family], driver.levels.tolist()
    for here, there in pairwise(levels):
        first = slope(x, here)
        euler, nfe = x + (there - here) * first, nfe + 1
        if there > 0:
            x, nfe = x + (there - here) * (first + slope(euler, there)) / 2, nfe + 1
        else:
            x = euler
    return {f"{family}_heun.x0": x, f"{family}_heun.nfe": torch.tensor(nfe)}


def _halving(case: Case) -> dict[str, Tensor]:
    options, z = case.config["halving"], case.inputs["z"]
    driver = Driver(
        _mixture(case), options["family"], _grid(case, options["family"]), _verifier(case, options["verifier"])
    )
    state = driver.search_state()
    driver.draws = {state.seed("halving", 0, k): noise for k, noise in enumerate(z)}
    winner, rounds = driver.run(Halving(len(z), stops=options["stops"], keeps=options["keeps"]))
    results = {"halving.final_x0": driver.state[winner][None], "halving.nfe": torch.tensor(driver.nfe)}
    ranking: list[int] = []
    for k, ids in enumerate(rounds):
        if ranking:  # the file lists survivors best first, the algorithm runs them by number
            ids = sorted(ids, key=lambda i: ranking.index(driver.proposals[i].index))
        scores = torch.tensor([driver.scores[i] for i in ids], dtype=torch.float64)
        candidates = torch.tensor([driver.proposals[i].index for i in ids])
        results |= {f"halving.stage{k}.ids_in": candidates, f"halving.stage{k}.scores": scores}
        order = scores.argsort(descending=True, stable=True)[: options["keeps"][k]]
        results[f"halving.stage{k}.kept"] = candidates[order]
        ranking = candidates[order].tolist()
        if k + 1 < len(rounds):  # the algorithm itself went on with exactly these
            assert {driver.proposals[i].index for i in rounds[k + 1]} == set(candidates[order].tolist())
    assert driver.proposals[winner].index == int(results[f"halving.stage{len(rounds) - 1}.kept"][0])
    return results


def _scheduler(case: Case) -> dict[str, Tensor]:
    """The three diffusers schedulers, float32, fed with the closed-form network at the levels probed from them."""
    family, steps, options = case.options["family"], case.config["num_steps"], case.config["grids"]
    if family == "flow":
        scheduler: Any = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=_grid(case, family)[:-1].tolist())
    elif family == "vp":
        vp = options["vp"]
        scheduler = DDIMScheduler(
            num_train_timesteps=vp["num_train_timesteps"],
            beta_start=vp["beta_start"],
            beta_end=vp["beta_end"],
            clip_sample=False,
            set_alpha_to_one=True,
            steps_offset=0,
        )
        scheduler.set_timesteps(steps)
    else:
        ve = options["ve"]
        scheduler = EDMEulerScheduler(
            sigma_min=ve["sigma_min"], sigma_max=ve["sigma_max"], rho=ve["rho"], sigma_data=0.5
        )
        scheduler.set_timesteps(steps)
    mixture, levels = _mixture(case), probe(scheduler)
    assert levels.family == family
    x = case.inputs["z"].float() * (_grid(case, "ve")[0].float() if family == "ve" else 1.0)
    states, estimates = [], []
    for i, timestep in enumerate(scheduler.timesteps):
        a, b = levels.pairs[i]
        clean = mixture.denoise(x.double(), a, b)
        eps = (x.double() - a * clean) / b
        if family == "ve":  # what EDM's preconditioned network returns
            data = scheduler.config.sigma_data
            skip, out = data**2 / (b**2 + data**2), b * data / (b**2 + data**2) ** 0.5
            output = (clean - skip * x.double()) / out
            scheduler.scale_model_input(x, timestep)
        else:
            output = eps - clean if family == "flow" else eps
        x = scheduler.step(output.float(), timestep, x).prev_sample
        states.append(x)
        estimates.append(clean)
    return {f"{family}.states": torch.stack(states), f"{family}.x0_hats": torch.stack(estimates), f"{family}.x0": x}


def _zero_order(case: Case) -> dict[str, Tensor]:
    config, inputs, family = case.config, case.inputs, case.config["family"]
    results: dict[str, Tensor] = {"grid": _grid(case, family)}
    for rule, radius in config["rules"].items():
        name = "shell_free" if rule == "shell" and not config["renorm"] else rule
        for mode in config["modes"]:
            driver = Driver(_mixture(case), family, _grid(case, family), _verifier(case, config["verifier"]))
            state = driver.search_state()
            driver.draws = {state.seed("zero_order", 0, 0): inputs["pivot0"]}
            for r, row in enumerate(inputs["xi"]):
                driver.draws |= {state.seed("zero_order", r + 1, k): draw for k, draw in enumerate(row)}
                driver.draws[state.seed("restart", r, 0)] = inputs["restart_noise"][r]
            algorithm = ZeroOrder(config["rounds"], config["neighbours"], rule=name, radius=radius, mode=mode)
            winner, rounds = driver.run(algorithm)
            trace = _zero_order_trace(driver, rounds, winner, mode)
            results |= {f"trace.{rule}.{mode}.{key}": value for key, value in trace.items()}
            results[f"neighbours.{rule}"] = torch.stack([driver.noise[i] for i in rounds[1]])
    return results


def _zero_order_trace(driver: Driver, rounds: list[list[int]], winner: int, mode: str) -> dict[str, Tensor]:
    """What happened, read off the proposals: the pivot of a round is the parent of its neighbours."""
    stages = [driver.proposals[ids[0]].stage for ids in rounds]
    searched = [ids for ids, stage in zip(rounds, stages) if stage == "zero_order"][1:]
    restarted = {driver.proposals[ids[0]].round - 1: ids for ids, stage in zip(rounds, stages) if stage == "restart"}
    pivots = [driver.proposals[ids[0]].parent for ids in searched]
    top = max(searched[-1], key=lambda i: (driver.scores[i], -i))  # nobody descends from the last pivot
    pivots.append(top if mode == "literal" or driver.scores[top] > driver.scores[pivots[-1]] else pivots[-1])
    accepted, best = [], [driver.scores[0]]
    for r, ids in enumerate(searched):
        kept = -2 if mode == "restart" else -1
        accepted.append(ids.index(pivots[r + 1]) if pivots[r + 1] in ids else kept)
        best.append(max(best[-1], *(driver.scores[i] for i in [*ids, *restarted.get(r, [])])))
    return {
        "pivots": torch.stack([driver.noise[i] for i in pivots]),
        "pivot_scores": torch.tensor([driver.scores[i] for i in pivots], dtype=torch.float64),
        "neighbour_scores": torch.tensor([[driver.scores[i] for i in ids] for ids in searched], dtype=torch.float64),
        "best_score": torch.tensor(best, dtype=torch.float64),
        "accepted": torch.tensor(accepted),
        "best_noise": driver.noise[winner],
        "nfe": torch.tensor(driver.nfe),
    }


def _paths(case: Case) -> dict[str, Tensor]:
    config, family = case.config, case.config["family"]
    ladder, first = config["ladder"], config["start_index"]
    counts = {}
    for exact in (False, True):
        driver = Driver(_mixture(case), family, _grid(case, family), _verifier(case, config["verifier"]))
        state = driver.search_state()
        driver.draws = {state.seed("paths", 0, n): z for n, z in enumerate(case.inputs["z"])}
        for r, slots in enumerate(case.inputs["xi"]):
            rows = slots.flatten(0, 1)
            driver.draws |= {state.seed("paths", r + 1, row): draw for row, draw in enumerate(rows)}
        algorithm = Paths(
            config["num_paths"],
            config["branches"],
            start=first,
            ladder=ladder,
            exact=exact,
            renoise=config["renoise"],
        )
        winner, rounds = driver.run(algorithm)
        counts[exact] = driver.nfe
        if exact == (config["x_prediction"] == "exact"):
            chosen, result, ids = driver, winner, rounds
    results = {"grid": chosen.levels, "start.x": torch.stack([chosen.state[i] for i in ids[0]])}
    current = first
    for r, (back, land) in enumerate(ladder):
        rows = ids[r + 1]
        pair = renoise_coefficients(chosen.pair(current), chosen.pair(back))
        scores = torch.tensor([chosen.scores[i] for i in rows], dtype=torch.float64)
        if r + 1 < len(ladder):
            parents = [chosen.proposals[i].parent for i in ids[r + 2][:: config["branches"]]]
            kept = [rows.index(parent) for parent in parents]
        else:
            kept = scores.argsort(descending=True, stable=True)[: config["num_paths"]].tolist()
            assert rows[kept[0]] == result
        results |= {
            f"round{r}.alpha_beta": torch.tensor(pair, dtype=torch.float64),
            f"round{r}.renoised": torch.stack([chosen.started[i] for i in rows]),
            f"round{r}.landed": torch.stack([chosen.state[i] for i in rows]),
            f"round{r}.x0_hat": torch.stack([chosen.clean[i] for i in rows]),
            f"round{r}.scores": scores,
            f"round{r}.kept": torch.tensor(kept),
        }
        current = land
    plain = Driver(chosen.mixture, family, chosen.levels, chosen.verifier)
    ends = plain.walk(plain.start(case.inputs["z"]), 0, config["num_steps"])[0][-1]
    return results | {
        "final.x0": chosen.state[result],
        "final.score": torch.tensor(chosen.scores[result], dtype=torch.float64),
        "final.best_start_only": plain.verifier(ends).max(),
        "nfe": torch.tensor(counts[config["x_prediction"] == "exact"]),
        "nfe_free_xpred": torch.tensor(counts[False]),
    }


def _ranks(case: Case) -> dict[str, Tensor]:
    scores, weights = case.inputs["scores"], case.inputs["weights"]
    ranks = midranks(scores)
    results = {
        "ranks": ranks,
        "mean_rank": ranks.mean(0),
        "weighted_mean_rank": (weights[:, None] * ranks).sum(0) / weights.sum(),
        "mean_z": z_scores(scores).mean(0),
        "mean_minmax": minmax_scores(scores).mean(0),
    }
    winners = {f"winner.{name}": value.argmax() for name, value in results.items() if name != "ranks"}
    order = results["mean_rank"].argsort(descending=True, stable=True)
    return {**results, **winners, "order_by_mean_rank": order}


def _smc(case: Case) -> dict[str, Tensor]:
    config, results = case.config, {}
    for potential in config["potentials"]:
        steering = Steering(potential, [config["lam"]] * config["num_checks"], ess_threshold=config["ess_threshold"])
        for k, rewards in enumerate(case.inputs["rewards"]):
            results[f"{potential}.{k}.logw"] = steering.update(rewards)
            results[f"{potential}.{k}.ess"] = steering.effective_sample_size
            results[f"{potential}.{k}.ancestors"] = steering.resample(float(case.inputs["u"][k]))
    mixture, c, lam = _mixture(case), case.inputs["tilt.c"], float(case.inputs["tilt.lam"])
    along = mixture.covs @ c
    log = mixture.weights.log() + lam * mixture.means @ c + lam**2 * along @ c / 2
    means = mixture.means + lam * along
    return results | {
        "base.mean": mixture.weights @ mixture.means,
        "tilt.weights": log.softmax(0),
        "tilt.means": means,
        "tilt.mean": log.softmax(0) @ means,
        "tilt.log_z": log.logsumexp(0),
    }


def _seeds(case: Case) -> dict[str, Tensor]:
    seeds = [candidate_seed(*parts) for parts in case.config["parts"]]
    run_seed, prompt, stage, round_, index = case.config["parts"][0]
    assert SearchState(1, run_seed=run_seed, prompt=prompt).seed(stage, round_, index) == seeds[0]
    noise = torch.stack([gaussian(case.config["noise_shape"], seed) for seed in seeds])
    return {"seeds": torch.tensor(seeds), "noise": noise}


BUILDERS = {
    "gmm_denoiser": _denoiser,
    "trajectories": _trajectories,
    "scheduler": _scheduler,
    "zero_order": _zero_order,
    "paths": _paths,
    "rank_ensemble": _ranks,
    "smc": _smc,
    "seeds": _seeds,
}
