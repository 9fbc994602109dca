"""Detection on a Swin host and on its STViT-R twin, trained the same way from the same start: AP, FLOPs, seconds.

    python -m sparing.recipes.emoji_scenes --emoji google.tar --out DATA/scenes --train 400 --test 100 --size 128
    python benchmarks/detection_table.py --scenes DATA/scenes --data DATA/PennFudanPed.zip --out runs/detection

Nothing is downloaded: the start of both is one Swin, trained as the backbone of a Mask R-CNN on the synthetic scenes
(seed 0). Host and twin are made from its weights and fine-tuned on ``--data`` with every seed, by the same settings.
Each run leaves a folder and resumes; the script can be stopped and given again. Prints the table and writes JSON under
benchmarks/results/. The comparison is the result, not the absolute AP.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from sparing.recipes.detection_data import open_detection
from sparing.recipes.finetune_detection import finetune_detection
from sparing.training import FitSettings, write_json
from sparing.vision.detection import DetectorConfig, load_detector, timm_fpn
from sparing.vision.stvit_r import STViTR
from sparing.zoo.compare import compare

RESULTS = Path(__file__).parent / "results"
HOST = "timm/swin_tiny_patch4_window7_224"


def settings_of(options: argparse.Namespace, epochs: int, seed: int) -> FitSettings:
    return FitSettings(epochs=epochs, batch_size=options.batch, lr=options.lr, seed=seed, checkpoint_every=50)


def config_of(options: argparse.Namespace, classes: list[str], *, twin: bool) -> DetectorConfig:
    arguments = {"embed_dim": options.embed_dim, "num_heads": [2, 4, 8, 16], "drop_path_rate": 0.0, "num_classes": 0}
    return DetectorConfig(
        classes=classes,
        backbone=HOST,
        backbone_arguments=arguments,
        twin="stvit_r" if twin else None,
        knobs={"dense": True} if twin else {},
        out_channels=64,
        min_size=options.pixels,
        max_size=2 * options.pixels,
    )


def run(config: DetectorConfig, data: str, out: Path, settings: FitSettings, backbone: nn.Module) -> dict[str, Any]:
    """The metrics of a run, from its folder when it is complete."""
    done = out / "metrics.json"
    if done.is_file():
        return json.loads(done.read_text())  # type: ignore[no-any-return]
    return finetune_detection(config, data, out=out, fit_settings=settings, backbone=backbone)


def start(options: argparse.Namespace) -> nn.Module:
    """The Swin that both begin with: trained on the synthetic scenes."""
    torch.manual_seed(0)
    config = config_of(options, open_detection(options.scenes, split="train").classes, twin=False)
    host = timm.create_model(HOST.removeprefix("timm/"), **config.backbone_arguments)
    run(config, options.scenes, options.out / "start", settings_of(options, options.start_epochs, 0), host)
    trained: nn.Module = load_detector(options.out / "start").backbone.body.model
    host.load_state_dict({k: v for k, v in trained.state_dict().items() if not k.startswith("head.")}, strict=False)
    return host


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", required=True, help="folder of sparing.recipes.emoji_scenes")
    parser.add_argument("--data", required=True, help="what to fine-tune on, e.g. the Penn-Fudan zip")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--start-epochs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--embed-dim", type=int, default=32, help="width of the Swin; heads are 2, 4, 8, 16")
    parser.add_argument("--pixels", type=int, default=192, help="shorter side of an image")
    options = parser.parse_args()

    host = start(options)
    classes = open_detection(options.data, split="train").classes
    rows: dict[str, list[dict[str, Any]]] = {"host": [], "stvit_r": []}
    for seed in range(options.seeds):
        for name, found in rows.items():
            torch.manual_seed(seed)
            backbone = STViTR.from_host(host, dense=True) if name == "stvit_r" else host
            config = config_of(options, classes, twin=name == "stvit_r")
            folder = options.out / f"{name}_seed{seed}"
            found.append(run(config, options.data, folder, settings_of(options, options.epochs, seed), backbone))
    scores = ("box_ap", "box_ap50", "mask_ap", "mask_ap50")
    table = {
        name: {
            score: {
                "mean": statistics.mean(m[score] for m in found),
                "sd": statistics.stdev(m[score] for m in found) if len(found) > 1 else 0.0,
            }
            for score in scores
        }
        for name, found in rows.items()
    }

    class Coarsest(nn.Module):
        """The whole pyramid is computed, its coarsest map handed on."""

        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.pyramid = timm_fpn(backbone, out_channels=64)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            coarsest: torch.Tensor = self.pyramid(images)["3"]
            return coarsest

    bodies = {"host": Coarsest(host).eval(), "stvit_r": Coarsest(STViTR.from_host(host, dense=True)).eval()}
    images = torch.rand(1, 3, 640, 640)
    cost = compare(bodies, inputs=images, repeats=10, warmup=2, cost_only=list(bodies))
    print(cost)
    for name, values in table.items():
        print(f"{name:8s} " + "  ".join(f"{s} {v['mean']:.3f} ± {v['sd']:.3f}" for s, v in values.items()))
    RESULTS.mkdir(exist_ok=True)
    cost.to_json(RESULTS / "detection_cost.json")
    write_json(RESULTS / "detection_table.json", {"scores": table, "seeds": options.seeds, "runs": rows})


if __name__ == "__main__":
    main()
