"""Noise search by verifiers that know neither label nor prompt, and what a classifier says that took no part.

    python benchmarks/search_unsupervised.py --out DIR

Best of ``--candidates`` on the shipped small DiT, ten classes by ``--seeds`` run seeds. Per verifier: the classifier's
mean log-probability of the wanted class for the first candidate and for the winner, and the mean of their difference
with its 95% bootstrap interval over the searches. A search that was stopped goes on. Results:
benchmarks/results/search_unsupervised.json.
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from noise_search import interval, pipeline

from sparing.diffusion.search import NoiseSearch
from sparing.diffusion.search.algorithms import Random
from sparing.diffusion.search.verifiers import make_verifier

CLASSIFIER = "vit_micro_patch4_28.demo_fashion"
VERIFIERS = {"self_consistency": f"self_consistency:encoder={CLASSIFIER}", "denoising_error": "denoising_error"}
RESULTS = Path(__file__).parent / "results" / "search_unsupervised.json"


def measure(pipe: Any, text: str, folder: Path, *, seeds: int, candidates: int, steps: int) -> dict[str, Any]:
    first, best, nfe = [], [], 0
    for seed in range(seeds):
        judge = make_verifier(f"classifier:model={CLASSIFIER}")
        search = NoiseSearch(
            pipe, make_verifier(text), Random(candidates), seed=seed, out_dir=folder / str(seed), report=[judge]
        )
        for result in search(list(range(10)), num_inference_steps=steps):
            (scores,) = result.report.values()
            first.append(scores["first"])
            best.append(scores["best"])
            nfe = result.nfe
    gain = interval([b - a for a, b in zip(first, best, strict=True)])
    return {"searches": len(first), "nfe": nfe, "first": mean(first), "winner": mean(best), "gain": gain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the searches' logs")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in ("seeds", "candidates", "steps")}
    pipe, rows = pipeline(), {}
    print("| verifier | NFE | first | winner | gain |\n|---|---:|---:|---:|---:|")
    for name, text in VERIFIERS.items():
        rows[name] = row = measure(pipe, text, arguments.out / name, **sizes)
        middle, low, high = row["gain"]
        print(
            f"| {name} | {row['nfe']} | {row['first']:.3f} | {row['winner']:.3f} | "
            f"{middle:.3f} [{low:.3f}, {high:.3f}] |"
        )
    RESULTS.write_text(json.dumps({"settings": sizes, "verifiers": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
