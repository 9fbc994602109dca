"""What the machinery of a noise search costs beside the pipeline alone: best of 8 in one batch, 20 steps, interleaved.

    python benchmarks/search_overhead.py --threads 2 --repeats 12

The search does everything: windowed scheduler, seeds, log on the disk, one verifier (brightness), kept sample; without
``--pictures`` no previews for the contact sheet. Both sides run the same eight noises. The work is per candidate and
batch, whatever the size of the network, so its share falls as the network grows.
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
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pictures", action="store_true")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "search_overhead.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    count, steps = arguments.candidates, arguments.steps
    pipe = FlexDiTPipeline(sparing.create_model(arguments.model, pretrained=True), RespacedScheduler())
    pipe.set_progress_bar_config(disable=True)
    noises = torch.stack([torch.randn(1, 28, 28, generator=torch.Generator().manual_seed(i)) for i in range(count)])
    plain, searched = [], []
    for repeat in range(arguments.repeats + 1):
        began = time.perf_counter()
        pipe([3] * count, num_inference_steps=steps, guidance_scale=1.5, latents=noises.clone(), output_type="pt")
        between = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            engine = NoiseSearch(
                pipe,
                Brightness(0.5),
                Random(count),
                seed=repeat,
                batch_size=count,
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
    middle, extra = statistics.median(ratios), statistics.median(searched) - statistics.median(plain)
    low, _, high = statistics.quantiles(ratios, n=4)
    report = {
        "model": arguments.model,
        "steps": steps,
        "candidates": count,
        "plain_s": statistics.median(plain),
        "search_s": statistics.median(searched),
        "overhead": middle,
        "overhead_interquartile": [low, high],
        "extra_ms_a_candidate": 1e3 * extra / count,
        "machine": f"{platform.machine()} CPU, {arguments.threads} threads, torch {torch.__version__}",
        "date": date.today().isoformat(),
    }
    arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(
        f"pipeline {report['plain_s']:.3f} s, search {report['search_s']:.3f} s: overhead {100 * middle:.1f}% "
        f"[{100 * low:.1f}, {100 * high:.1f}], {report['extra_ms_a_candidate']:.2f} ms a candidate"
    )


if __name__ == "__main__":
    main()
