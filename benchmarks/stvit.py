"""STViT and ToMe against their timm host, side by side: interleaved rounds of one run, ToMe at the FLOPs of STViT.

    python benchmarks/stvit.py                                                   # DeiT-S, batch 8, CPU, eager
    python benchmarks/stvit.py --device cuda --dtype bfloat16 --batch 128 --compile

Prints the comparison, the speed-up of STViT with the spread over rounds, and writes JSON and a plot under
benchmarks/results/. Weights are random unless ``--pretrained`` is given: cost does not depend on them, agreement does
and is then left out.
"""

import argparse
from pathlib import Path

import timm
import torch
from torch import nn

from sparing.vision.stvit import SemanticTokenViT
from sparing.vision.tome import TokenMergingViT
from sparing.zoo.compare import compare
from sparing.zoo.inputs import example_input
from sparing.zoo.profile import count_flops

RESULTS = Path(__file__).parent / "results"


def tome_at(host: nn.Module, flops: int) -> TokenMergingViT:
    """The ToMe twin with the uniform rate whose FLOPs are nearest to ``flops``."""
    twin = TokenMergingViT.from_host(host, r=0).eval()
    image = example_input(host)

    def distance(r: int) -> int:
        twin.rates = r
        return abs(count_flops(twin, image) - flops)

    twin.rates = min(range(1, 41), key=distance)
    return twin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224", help="any timm ViT")
    parser.add_argument("--num-tokens", type=int, default=16)
    parser.add_argument("--keep-prefix", action="store_true", help="keep class and register tokens in the STViT twin")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="torch.compile, fullgraph, every model")
    parser.add_argument("--threads", type=int, default=None, help="torch threads on CPU")
    parser.add_argument("--pretrained", action="store_true", help="published weights of the host")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    torch.manual_seed(0)
    host = timm.create_model(options.model, pretrained=options.pretrained).eval()
    stvit = SemanticTokenViT.from_host(host, num_tokens=options.num_tokens, keep_prefix=options.keep_prefix).eval()
    tome = tome_at(host, count_flops(stvit, example_input(host)))
    models: dict[str, nn.Module] = {
        options.model: host,
        f"stvit {options.num_tokens} tokens": stvit,
        f"tome r={tome.rates[0]}": tome,
    }
    images = example_input(host, batch=options.batch).to(options.device, getattr(torch, options.dtype))
    for model in models.values():
        model.to(options.device, getattr(torch, options.dtype))
        if options.compile:
            model.compile(fullgraph=True)
    comparison = compare(
        models,
        inputs=images,
        repeats=options.repeats,
        warmup=5,
        cost_only=() if options.pretrained else list(models),
    )
    print(comparison)
    twin = comparison.rows[1]
    print(
        f"STViT: {twin.speedup:.2f}x the host (interquartile range {twin.speedup_spread:.2f}), "
        f"bound by FLOPs {1 / twin.flops_ratio:.2f}x"
    )
    mode = "compiled" if options.compile else "eager"
    name = f"stvit_{options.model}_{options.device}_{options.dtype}_b{options.batch}_{mode}"
    RESULTS.mkdir(exist_ok=True)
    comparison.to_json(options.json or RESULTS / f"{name}.json")
    comparison.plot(options.plot or RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
