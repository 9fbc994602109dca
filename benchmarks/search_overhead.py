"""What the machinery of a noise search costs beside the pipeline alone: best of n in batches of 8, interleaved runs.

    python benchmarks/search_overhead.py --threads 2 --repeats 24 --candidates 8 32

The search does everything: windowed scheduler, seeds, log on the disk, one verifier (brightness), kept sample; without
``--pictures`` no previews for the contact sheet. Both sides run batches of the same size. Some of the work is done once
a search (probing the pipeline), the rest is per candidate and batch, whatever the size of the network, so its share
falls as the network grows.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

import sparing
from sparing.diffusion import FlexDiTPipeline, RespacedScheduler
from sparing.diffusion.search import NoiseSearch
from sparing.diffusion.search.algorithms import Random
from sparing.diffusion.search.verifiers.image_stats import Brightness


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dit_micro_patch4_28")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--candidates", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pictures", action="store_true")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "search_overhead.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipe = FlexDiTPipeline(sparing.create_model(arguments.model, pretrained=True), RespacedScheduler())
    pipe.set_progress_bar_config(disable=True)
    report = {
        "model": arguments.model,
        "steps": arguments.steps,
        "batch": arguments.batch,
        "previews": arguments.pictures,
        "machine": f"{platform.machine()} CPU, {arguments.threads} threads, torch {torch.__version__}",
        "date": date.today().isoformat(),
        "rows": [measure(pipe, count, arguments) for count in arguments.candidates],
    }
    arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(pipe: FlexDiTPipeline, count: int, arguments: argparse.Namespace) -> dict[str, object]:
    """Overhead of best of ``count``: the median of the ratios within a round, its quartiles, and milliseconds."""
    steps, batch = arguments.steps, arguments.batch
    noises = torch.stack([torch.randn(1, 28, 28, generator=torch.Generator().manual_seed(i)) for i in range(batch)])
    plain, searched = [], []
    for repeat in range(arguments.repeats + 1):
        began = time.perf_counter()
        for _ in range(count // batch):
            pipe([3] * batch, num_inference_steps=steps, guidance_scale=1.5, latents=noises.clone(), output_type="pt")
        between = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            engine = NoiseSearch(
                pipe,
                Brightness(0.5),
                Random(count),
                seed=repeat,
                batch_size=batch,
                out_dir=folder,
                progress=False,
                previews=arguments.pictures,
            )
            engine([3], num_inference_steps=steps, guidance_scale=1.5)
            after = time.perf_counter()
        if repeat:  # the first round warms up
            plain.append(between - began)
            searched.append(after - between)
    ratios = [b / a - 1 for a, b in zip(plain, searched)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    extra = 1e3 * (statistics.median(searched) - statistics.median(plain)) / count
    print(
        f"best of {count}: pipeline {statistics.median(plain):.3f} s, search {statistics.median(searched):.3f} s, "
        f"overhead {100 * middle:.1f}% [{100 * low:.1f}, {100 * high:.1f}], {extra:.2f} ms a candidate"
    )
    return {
        "candidates": count,
        "plain_s": statistics.median(plain),
        "search_s": statistics.median(searched),
        "overhead": middle,
        "overhead_interquartile": [low, high],
        "extra_ms_a_candidate": extra,
    }


if __name__ == "__main__":
    main()
