"""Dense STViT-R against its Swin host, side by side: interleaved rounds of one run.

    python benchmarks/stvit_r.py                                         # Swin-S, 640 x 640, batch 1, CPU
    python benchmarks/stvit_r.py --device cuda --dtype bfloat16 --batch 8 --compile

Compared are the pyramids (four maps), without heads: the timm host, its twin (the host's stem and window blocks), the
twin with our window attention instead of timm's, and the published form (convolutional stem). Prints the comparison and
writes JSON and a plot under benchmarks/results/. Weights are random: cost does not depend on them.
"""

import argparse
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import sparing
from sparing.vision.detection import timm_fpn
from sparing.vision.stvit_r import STViTR
from sparing.zoo.compare import compare

RESULTS = Path(__file__).parent / "results"


class LastMap(nn.Module):
    """All four maps are computed, the last is handed on."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.status = getattr(body, "status", "host")  # as the comparison prints it

    def forward(self, images: Tensor) -> Tensor:
        maps: list[Tensor] = self.body(images)
        return maps[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=["tiny", "small", "base"])
    parser.add_argument("--height", type=int, default=640)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--mask-mode", default="exact", choices=["exact", "reference", "none"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="torch.compile, fullgraph, every model")
    parser.add_argument("--threads", type=int, default=None, help="torch threads on CPU")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    torch.manual_seed(0)
    name = f"swin_{options.size}_patch4_window7_224"
    host = timm.create_model(name)  # timm_fpn lifts the fixed input size
    twin = STViTR.from_host(host, dense=True, mask_mode=options.mask_mode)
    ours = STViTR.from_host(host, dense=True, mask_mode=options.mask_mode, window_blocks="sparing")
    published = sparing.create_model(f"stvit_r_{name}", dense=True, mask_mode=options.mask_mode)
    bodies = {
        name: timm_fpn(host).body,
        "stvit_r twin": twin,
        "stvit_r twin, our windows": ours,
        "stvit_r published form": published,
    }
    dtype = getattr(torch, options.dtype)
    models = {label: LastMap(body).eval().to(options.device, dtype) for label, body in bodies.items()}
    if options.compile:
        for model in models.values():
            model.compile(fullgraph=True)
    images = torch.rand(options.batch, 3, options.height, options.width).to(options.device, dtype)
    comparison = compare(models, inputs=images, repeats=options.repeats, warmup=2, cost_only=list(models))
    print(comparison)
    for row in comparison.rows[1:]:
        print(f"{row.name}: {1 / row.speedup:.2f} of the host's time, {row.flops_ratio:.2f} of its FLOPs")
    mode = "compiled" if options.compile else "eager"
    stem = f"stvit_r_{options.size}_{options.height}x{options.width}_{options.device}_{options.dtype}"
    stem = f"{stem}_b{options.batch}_{mode}"
    RESULTS.mkdir(exist_ok=True)
    comparison.to_json(options.json or RESULTS / f"{stem}.json")
    comparison.plot(options.plot or RESULTS / f"{stem}.png")


if __name__ == "__main__":
    main()
