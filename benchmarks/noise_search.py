"""Noise search on the shipped small DiT with real classes: score against NFE, more steps, an independent judge, drafts.

    python benchmarks/noise_search.py --data FASHION_MNIST --out runs/search

Stages, each kept in ``--out`` and skipped when it is there already:

* ``curves``: every algorithm and two verifiers over 20 searches (10 classes x 2 run seeds), about 320 NFE each, against
  the same NFE spent on more denoising steps of one sample. Bands are 95% bootstrap intervals over the searches.
* ``judge``: best of n, n = 1..64, as its own verifier sees it and as a judge sees it that took no part: a small
  convolutional network, of another architecture and trained apart from the verifier.
* ``drafts``: best of 8 by full runs, against drafts (a FlexDiT twin, a step cache, fewer steps) that rank the same
  eight noises, of which only the winner is run in full: share of the gain kept (spread over run seeds), share of
  the cost, rank correlation; 30 searches (10 classes x 3 run seeds).

Verifiers: ``classifier``, the log-probability of the wanted class by the shipped ViT; ``sharpness``, which asks no
network and is easily fooled. Writes results.json, table.md and curves.png.
"""

import argparse
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig
from torch import Tensor

import sparing
from sparing.diffusion import FlexDiTPipeline, RespacedScheduler
from sparing.diffusion.search import NoiseSearch, SearchResult
from sparing.diffusion.search.algorithms import SMC, Evolutionary, Halving, Paths, Random, ZeroOrder
from sparing.diffusion.search.drafts import cached_draft, fewer_steps, rank_correlation, twin_draft
from sparing.diffusion.search.verifiers.classifier import ClassifierLogit
from sparing.diffusion.search.verifiers.image_stats import Sharpness
from sparing.recipes.train_vision import write_json
from sparing.training import TensorImages, open_images

STEPS, GUIDANCE = 20, 1.5
CLASSES = list(range(10))
TWIN, LOW = "flexdit_dit_micro_patch4_28", "flexdit_dit_micro_patch4_28_low"
ALGORITHMS: dict[str, Any] = {
    "random": Random(16),
    "zero_order": ZeroOrder(5, 3),
    "halving": Halving(28, stops=(8, 14, 20), keeps=(10, 6, 1)),
    "paths": Paths(4, 3, start=8, ladder=[(4, 14), (9, 20)]),
    "smc": SMC(13, checks=(8, 12, 16, 20), lam=2.0, jitter=2),
    "evolutionary": Evolutionary(6, children=4, starts=(0, 0.25, 0.5), elites=2),
}
MORE_STEPS = (20, 40, 80, 160, 320)


def pipeline(name: str = "dit_micro_patch4_28") -> FlexDiTPipeline:
    return FlexDiTPipeline(sparing.create_model(name, pretrained=True), RespacedScheduler())


def verifiers() -> dict[str, Any]:
    return {"classifier": ClassifierLogit("vit_micro_patch4_28.demo_fashion"), "sharpness": Sharpness()}


def search(pipe: Any, verifier: Any, algorithm: Any, seed: int, **options: Any) -> list[SearchResult]:
    """One search a class."""
    steps = options.pop("steps", STEPS)
    engine = NoiseSearch(pipe, verifier, algorithm, seed=seed, batch_size=32, previews=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = engine(CLASSES, num_inference_steps=steps, guidance_scale=GUIDANCE)
    assert isinstance(found, list)
    return found


def interval(values: Sequence[float], *, draws: int = 1000) -> tuple[float, float, float]:
    """Mean and its 95% bootstrap interval."""
    sample = torch.tensor(values, dtype=torch.float64)
    index = torch.randint(len(sample), (draws, len(sample)), generator=torch.Generator().manual_seed(0))
    means = sample[index].mean(1).sort().values
    return float(sample.mean()), float(means[int(0.025 * draws)]), float(means[int(0.975 * draws)])


def best_by(result: SearchResult, nfe: int) -> float:
    """Best finished score once ``nfe`` evaluations were spent; NaN before the first is finished."""
    reached = [score for spent, score in result.best_of_prefix() if spent <= nfe]
    return reached[-1] if reached else math.nan


def curves(seeds: Sequence[int]) -> dict[str, Any]:
    pipe, found = pipeline(), {}
    for label, verifier in verifiers().items():
        rows: dict[str, Any] = {}
        for name, algorithm in ALGORITHMS.items():
            results = [result for seed in seeds for result in search(pipe, verifier, algorithm, seed)]
            spent = max(result.nfe for result in results)
            grid = sorted({20, 40, 80, 160, 240, spent})
            points = {}
            for nfe in grid:
                scores = [best_by(result, nfe) for result in results]
                if all(math.isfinite(score) for score in scores):
                    points[nfe] = interval(scores)
            rows[name] = {"nfe": [r.nfe for r in results], "points": points}
            print(f"{label}: {name} {points[spent][0]:.4f} at {spent} NFE", flush=True)
        steps = {}
        for count in MORE_STEPS:
            results = [result for seed in seeds for result in search(pipe, verifier, Random(1), seed, steps=count)]
            steps[count] = interval([result.best.score for result in results])
        rows["more steps"] = {"nfe": list(MORE_STEPS), "points": steps}
        print(f"{label}: {MORE_STEPS[-1]} steps {steps[MORE_STEPS[-1]][0]:.4f}", flush=True)
        found[label] = rows
    return found


def load_judge(out: Path, data: str | None) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """Log-probability of the wanted class by a network that takes no part in any search."""
    from flexdit_quality import build_classifier, train_classifier
    from safetensors.torch import load_file

    path, network = out / "judge.safetensors", build_classifier()
    if path.exists():
        network.load_state_dict(load_file(path))
    else:
        if data is None:
            raise SystemExit("the judge is trained on real images: give --data FASHION_MNIST")
        train, test = (open_images(data, split=split, channels=1) for split in ("train", "test"))
        assert isinstance(train, TensorImages)
        assert isinstance(test, TensorImages)
        network = train_classifier(path, train, test, epochs=8)
    network.eval()

    @torch.inference_mode()
    def judge(images: Tensor, labels: Sequence[int]) -> Tensor:
        logits = network(2 * images - 1).log_softmax(-1)
        return logits[torch.arange(len(images)), torch.tensor(labels)]

    return judge


def judged(seeds: Sequence[int], judge: Callable[[Tensor, Sequence[int]], Tensor]) -> dict[str, Any]:
    pipe, found = pipeline(), {}
    counts = [1, 2, 4, 8, 16, 32, 64]
    for label, verifier in verifiers().items():
        own: dict[int, list[float]] = {n: [] for n in counts}
        outside: dict[int, list[float]] = {n: [] for n in counts}
        right: dict[int, list[float]] = {n: [] for n in counts}
        for seed in seeds:
            for result in search(pipe, verifier, Random(64), seed, keep="all"):
                scores = torch.tensor([candidate.score for candidate in result.candidates])
                samples = torch.stack([c.sample for c in result.candidates if c.sample is not None])
                views = judge(samples, [int(result.prompt)] * len(samples))
                for n in counts:
                    best = int(scores[:n].argmax())
                    own[n].append(float(scores[best]))
                    outside[n].append(float(views[best]))
                    right[n].append(float(views[best].exp() > 0.5))
        found[label] = {
            str(n): {"own": interval(own[n]), "judge": interval(outside[n]), "judge_agrees": interval(right[n])}
            for n in counts
        }
        print(f"{label}: judge {found[label]['1']['judge'][0]:.4f} -> {found[label]['64']['judge'][0]:.4f}", flush=True)
    return found


def drafts(seeds: Sequence[int]) -> dict[str, Any]:
    """Best of 8 by full runs and by drafts; costs in multiply-adds of the denoiser (both guidance halves alike)."""
    pipe, n = pipeline(), 8
    dense = pipe.transformer.flops(count="executed")
    twins = {name: sparing.create_model(name, pretrained=True) for name in (TWIN, LOW)}
    share = {name: twin.flops(count="executed") / dense for name, twin in twins.items()}
    cache = FirstBlockCacheConfig(threshold=0.15)
    ways: dict[str, tuple[Any, float | None]] = {
        "twin, 58% layout": (twin_draft(pipe, twins[TWIN]), share[TWIN]),
        "twin, 44% layout": (twin_draft(pipe, twins[LOW]), share[LOW]),
        "twin, 58% layout, 12 steps": (twin_draft(pipe, twins[TWIN], num_inference_steps=12), share[TWIN] * 12 / STEPS),
        "twin, 44% layout, 12 steps": (twin_draft(pipe, twins[LOW], num_inference_steps=12), share[LOW] * 12 / STEPS),
        "fewer steps: 10": (fewer_steps(10), 10 / STEPS),
        "fewer steps: 6": (fewer_steps(6), 6 / STEPS),
        "cached (FirstBlockCache 0.15)": (cached_draft(pipe, cache), None),  # counted below: what the cache skips
    }
    found: dict[str, Any] = {}
    for label, verifier in verifiers().items():
        full = {
            seed: [[c.score for c in result.candidates] for result in search(pipe, verifier, Random(n), seed)]
            for seed in seeds
        }
        rows = {}
        for name, (draft, cost) in ways.items():
            blocks: list[int] = []
            count = partial(_note, blocks)
            hooks = [block.ff.register_forward_hook(count) for block in pipe.transformer.transformer_blocks]
            rows[name] = _drafted(pipe, verifier, draft, full, n=n)
            if cost is None:  # blocks that ran, less those of the full runs of the winners
                rounds = len(pipe.transformer.transformer_blocks) * STEPS * len(full)
                whole, winners = rounds * math.ceil(n * len(CLASSES) / 32), rounds * math.ceil(len(CLASSES) / 32)
                cost = (len(blocks) - winners) / whole
            for hook in hooks:
                hook.remove()
            rows[name]["cost"] = (n * cost + 1) / n
            print(f"{label}: {name}: keeps {rows[name]['gain_kept']:.3f} at {rows[name]['cost']:.3f}", flush=True)
        gain = mean(max(scores) - mean(scores) for results in full.values() for scores in results)
        found[label] = {"gain": gain, "rows": rows}
    return found


def _note(blocks: list[int], *_: Any) -> None:
    blocks.append(1)


def _drafted(pipe: Any, verifier: Any, draft: Any, full: dict[int, list[list[float]]], *, n: int) -> dict[str, float]:
    """Share of best-of-n's gain that the draft's choice keeps, in all and its spread over run seeds."""
    shares, ranks, kept_all, gain_all = [], [], 0.0, 0.0
    for seed, wanted in full.items():
        kept, gain = 0.0, 0.0
        for result, scores in zip(search(pipe, verifier, Random(n, keep=1), seed, draft=draft), wanted):
            drafted = [candidate.score for candidate in result.candidates if candidate.via == "draft"]
            pick = max(range(n), key=lambda i: (drafted[i], -i))
            kept, gain = kept + scores[pick] - mean(scores), gain + max(scores) - mean(scores)
            ranks.append(rank_correlation(drafted, scores))
        shares.append(kept / gain)
        kept_all, gain_all = kept_all + kept, gain_all + gain
    return {
        "gain_kept": kept_all / gain_all,
        "gain_kept_spread": stdev(shares),
        "rank_correlation": mean(value for value in ranks if math.isfinite(value)),
    }


def table_of(results: dict[str, Any]) -> str:
    def band(values: Sequence[float], digits: int = 3) -> str:
        return f"{values[0]:.{digits}f} [{values[1]:.{digits}f}, {values[2]:.{digits}f}]"

    lines = [
        f"{results['machine']}, {results['date']}; {results['searches']} searches a row, {STEPS} steps, "
        f"guidance {GUIDANCE}.",
        "",
    ]
    lines += ["| algorithm | NFE | classifier (log-probability) | NFE | sharpness |", "|---|---:|---:|---:|---:|"]
    names = list(results["curves"]["classifier"])
    for name in names:
        cells = []
        for label in ("classifier", "sharpness"):
            points = results["curves"][label][name]["points"]
            last = max(points, key=int)
            cells += [str(last), band(points[last])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    first = results["curves"]["classifier"]["random"]["points"]
    start, low = min(first, key=int), results["curves"]["sharpness"]["random"]["points"]
    lines.append(f"| (no search) | {start} | {band(first[start])} | {start} | {band(low[start])} |")
    lines += [
        "",
        "| best of | verifier: classifier | judge | judge above 0.5 | verifier: sharpness | judge | judge above 0.5 |",
    ]
    lines += ["|---:|---:|---:|---:|---:|---:|---:|"]
    for n in results["judge"]["classifier"]:
        cells = [
            band(results["judge"][label][n][key], 2 if key == "judge_agrees" else 3)
            for label in ("classifier", "sharpness")
            for key in ("own", "judge", "judge_agrees")
        ]
        lines.append(f"| {n} | {' | '.join(cells)} |")
    lines += [
        "",
        "| drafts of 8, winner in full | cost | classifier: gain kept | rank correlation | sharpness: gain kept | "
        "rank correlation |",
    ]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for name, row in results["drafts"]["classifier"]["rows"].items():
        other = results["drafts"]["sharpness"]["rows"][name]
        lines.append(
            f"| {name} | {row['cost']:.2f} | {row['gain_kept']:.3f} ± {row['gain_kept_spread']:.3f} | "
            f"{row['rank_correlation']:.2f} | {other['gain_kept']:.3f} ± {other['gain_kept_spread']:.3f} | "
            f"{other['rank_correlation']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.2))
    for axis, label in zip(axes, ("classifier", "sharpness")):
        for name, row in results["curves"][label].items():
            points = sorted((int(nfe), values) for nfe, values in row["points"].items())
            x = [nfe for nfe, _ in points]
            style = {"linestyle": "--", "color": "black"} if name == "more steps" else {"marker": "o", "markersize": 3}
            [line] = axis.plot(x, [values[0] for _, values in points], label=name, **style)
            lows, highs = [v[1] for _, v in points], [v[2] for _, v in points]
            axis.fill_between(x, lows, highs, alpha=0.12, color=line.get_color())
        axis.set_xlabel("NFE (one sample: steps)")
        axis.set_title(f"best score by {label}")
        axis.legend(fontsize=7)
    for label, colour in (("classifier", "tab:blue"), ("sharpness", "tab:red")):
        rows = results["judge"][label]
        x, values = [int(n) for n in rows], [row["judge"] for row in rows.values()]
        axes[2].plot(x, [v[0] for v in values], marker="o", color=colour, label=f"searched by {label}")
        axes[2].fill_between(x, [v[1] for v in values], [v[2] for v in values], alpha=0.15, color=colour)
    axes[2].set_xscale("log", base=2)
    axes[2].set_xlabel("best of n")
    axes[2].set_title("log-probability by a judge that took no part")
    axes[2].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None, help="folder of Fashion-MNIST, for training the judge")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2, help="run seeds; ten classes each")
    parser.add_argument("--draft_seeds", type=int, default=3)
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(Path(__file__).parent))
    seeds, more = range(arguments.seeds), range(arguments.draft_seeds)
    stages: dict[str, Callable[[], dict[str, Any]]] = {
        "curves": lambda: curves(seeds),
        "judge": lambda: judged(seeds, load_judge(out, arguments.data)),
        "drafts": lambda: drafts(more),
    }
    results: dict[str, Any] = {
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s), torch {torch.__version__}",
        "date": date.today().isoformat(),
        "searches": arguments.seeds * len(CLASSES),
    }
    for name, stage in stages.items():
        path = out / f"{name}.json"
        if not path.exists():
            began = time.perf_counter()
            write_json(path, stage())
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        results[name] = json.loads(path.read_text(encoding="utf-8"))
    write_json(out / "results.json", results)
    (out / "table.md").write_text(table_of(results), encoding="utf-8")
    plot(results, out / "curves.png")
    print((out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
