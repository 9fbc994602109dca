"""Host, STViT and ToMe side by side on real images that come with the package: accuracy, cost, and a picture.

    sparing demo            # or: python -m sparing.recipes.demo --out sparing-demo

Needs no network. The host is a small ViT trained on Fashion-MNIST, its STViT twin was fine-tuned from it, its ToMe
twin is
made here and needs no training. The same cost columns follow for a DeiT-S of real size with random weights, whose
accuracy
is therefore not stated. At 28 x 28 pixels the mechanism can be seen; nothing here speaks for ImageNet.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparing
from sparing.recipes.demo_picture import draw_regions
from sparing.training import TensorImages, read_idx, write_json
from sparing.vision.micro import FASHION_CLASSES, FASHION_MEAN, FASHION_STD
from sparing.zoo.compare import Comparison
from sparing.zoo.weights import SHIPPED

__all__ = ["equal_cost_rate", "run_demo", "sample_images"]

HOST, TWIN = "vit_micro_patch4_28.demo_fashion", "stvit_vit_micro_patch4_28.demo_fashion"
SAMPLES = SHIPPED / "samples"
_MEASURED = "top1_fashion_mnist_test_percent"


def run_demo(
    out: str | Path = "sparing-demo",
    *,
    repeats: int = 20,
    real_size: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the demo, say its tables, write ``demo.json`` and ``semantic_tokens.png`` into ``out``.

    Args:
        out: folder, made when it is not there.
        repeats: interleaved timing rounds of the small models; DeiT-S gets a fifth of them.
        real_size: also measure DeiT-S and its twins.
        say: prints one piece of text.

    Returns:
        What demo.json holds.
    """
    started = time.perf_counter()
    out = Path(out)
    images, labels = sample_images()
    host, twin = sparing.create_model(HOST, pretrained=True), sparing.create_model(TWIN, pretrained=True)
    rate = equal_cost_rate(host, sparing.profile(twin, measure=False).macs)
    models = {"host ViT": host, "STViT": twin, f"ToMe r={rate}": sparing.twin(host, "tome", r=rate)}

    threads = torch.get_num_threads()
    say(f"{len(images)} test images of Fashion-MNIST; {threads} CPU thread(s), torch {torch.__version__}\n")
    small = sparing.compare(models, inputs=images[:64], repeats=repeats)
    accuracies = {name: accuracy_of(model, images, labels) for name, model in models.items()}
    say(_table(small, accuracies))
    whole = {name: sparing.model_card(name).measured[_MEASURED] for name in (HOST, TWIN)}
    say(
        f"On all 10,000 test images: host {whole[HOST]:.2f}%, STViT {whole[TWIN]:.2f}% "
        "(docs/results.md has all rows; toy scale, it says nothing about ImageNet).\n"
        "STViT was fine-tuned with labels, ToMe needs no training; its r is the one nearest to STViT in FLOPs.\n"
    )

    result: dict[str, Any] = {"images": len(images), "accuracy": accuracies, "small": small.to_dict()}
    if real_size:
        large = _deit_small(max(repeats // 5, 2))
        say(_table(large, {}))
        say("DeiT-S at its real size, 224 x 224, random weights: cost only.\n")
        result["deit_small"] = large.to_dict()

    picture = out / "semantic_tokens.png"
    draw_regions(twin, images, labels, picture, names=FASHION_CLASSES)
    say(f"picture: {picture} (which patches each of the nine semantic tokens gathers)\n")
    say(
        "Your own model and images. Training-free, now:\n"
        "  sparing classify IMAGES --model timm/deit_small_patch16_224.fb_in1k --twin tome:r=13\n"
        "Trained for more, from images without labels:\n"
        "  sparing distill timm/deit_small_patch16_224.fb_in1k IMAGES --out my-twin"
    )
    result["seconds"] = time.perf_counter() - started
    write_json(out / "demo.json", result)
    return result


def sample_images() -> tuple[Tensor, Tensor]:
    """The shipped test images, normalised (count, 1, 28, 28), and their labels (count,)."""
    data = TensorImages(
        read_idx(SAMPLES / "fashion-images-idx3-ubyte.gz")[:, None],
        read_idx(SAMPLES / "fashion-labels-idx1-ubyte.gz").long(),
    )
    return (data.images / 255.0 - FASHION_MEAN[0]) / FASHION_STD[0], data.labels


def equal_cost_rate(host: nn.Module, macs: float) -> int:
    """The ToMe rate r (tokens merged in each block) whose twin of ``host`` comes nearest to ``macs`` multiply-adds."""
    tokens = int(host.patch_embed.num_patches)  # type: ignore[union-attr, arg-type]
    best, smallest_gap = 0, float("inf")
    for rate in range(tokens // 2 + 1):
        gap = abs(sparing.profile(sparing.twin(host, "tome", r=rate), measure=False).macs - macs)
        if gap > smallest_gap:  # the cost falls with the rate
            break
        best, smallest_gap = rate, gap
    return best


@torch.inference_mode()
def accuracy_of(model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 100) -> float:
    """Share of ``images`` (count, channels, height, width) that ``model`` puts into their class."""
    batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    correct = [(model(part).argmax(-1) == truth).sum() for part, truth in batches]
    return float(torch.stack(correct).sum()) / len(images)


def _deit_small(repeats: int) -> Comparison:
    torch.manual_seed(0)
    host = sparing.create_model("timm/deit_small_patch16_224").eval()
    twin = sparing.twin(host, "stvit").eval()
    rate = equal_cost_rate(host, sparing.profile(twin, measure=False).macs)
    models = {"DeiT-S": host, "STViT": twin, f"ToMe r={rate}": sparing.twin(host, "tome", r=rate).eval()}
    return sparing.compare(models, inputs=torch.randn(4, 3, 224, 224), repeats=repeats, warmup=1)


def _table(comparison: Comparison, accuracies: dict[str, float]) -> str:
    batch = comparison.rows[0].profile.batch_size
    stated_heads = ["accuracy"] if accuracies else []
    rows = [["model", "status", *stated_heads, "MMACs/image", "of host", f"ms/{batch} images", "images/s", "speed"]]
    for row in comparison.rows:
        cost = row.profile
        stated = [f"{accuracies[row.name]:.1%}"] if accuracies else []
        rows.append(
            [
                row.name,
                row.status,
                *stated,
                f"{cost.macs / cost.batch_size / 1e6:,.1f}",
                f"{row.flops_ratio:.2f}",
                f"{1e3 * (cost.latency_s or 0):.1f} ± {1e3 * (cost.latency_spread_s or 0) / 2:.1f}",
                f"{cost.throughput or 0:,.0f}",
                f"{row.speedup or 0:.2f}x",
            ]
        )
    return "\n".join(_aligned(rows))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see ``--help``."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="sparing-demo", help="folder for the picture and the numbers")
    parser.add_argument("--repeats", type=int, default=20, help="interleaved timing rounds")
    wanted = parser.parse_args(arguments)
    run_demo(wanted.out, repeats=wanted.repeats)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
