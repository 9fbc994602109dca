"""Detection on a Swin host and on its STViT-R twin, trained the same way from the same start: AP, FLOPs, seconds.

    python -m sparing.recipes.emoji_scenes --emoji google.tar --out DATA/scenes --train 600 --test 100 --size 192
    python benchmarks/detection_table.py --scenes DATA/scenes --data DATA/PennFudanPed.zip --out runs/detection

Nothing is downloaded: the start of both is one Mask R-CNN on a Swin backbone, trained on the synthetic scenes (seed
0). The twin's backbone is made from the host's trained weights; pyramid and heads begin from the start for both, the
class predictors afresh. Both are fine-tuned on ``--data`` with every seed by the same settings. The host is the dense
form with ordinary Swin blocks everywhere (``sample_window_size='all'``), so that both have a norm a level. Each run
leaves a folder and resumes; the script can be stopped and given again. ``--cost`` measures FLOPs and seconds (on a
quiet machine) instead, ``--picture`` draws held-out scenes beside their true masks (docs/detected_scenes.png; the
photographs are nobody's to publish). Writes JSON under benchmarks/results/. The comparison is the result, not the
absolute AP.
"""

import argparse
import datetime
import json
import statistics
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

import sparing
from sparing.media.image import write_image
from sparing.recipes.detect import draw
from sparing.recipes.detection_data import DetectionBatches, open_detection
from sparing.recipes.finetune_detection import finetune_detection
from sparing.training import FitSettings, write_json
from sparing.vision.detection import DetectorConfig, load_detector
from sparing.vision.stvit_r import STViTR
from sparing.zoo.compare import compare

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
PAGE, PICTURE = DOCS / "results.md", DOCS / "detected_scenes.png"
HOST = "timm/swin_small_patch4_window7_224"
KNOBS: dict[str, dict[str, Any]] = {"host": {"dense": True, "sample_window_size": "all"}, "stvit_r": {"dense": True}}
LABELS = {"host": "Swin (host)", "stvit_r": "STViT-R twin"}
SCORES = {"box_ap": "box AP", "box_ap50": "box AP50", "mask_ap": "mask AP", "mask_ap50": "mask AP50"}


def config_of(options: argparse.Namespace, classes: list[str], name: str) -> DetectorConfig:
    arguments = {
        "embed_dim": options.embed_dim, "depths": options.depths, "num_heads": [2, 4, 8, 16], "drop_path_rate": 0.0,
        "num_classes": 0,
    }  # fmt: skip
    return DetectorConfig(
        classes=classes,
        backbone=HOST,
        backbone_arguments=arguments,
        twin="stvit_r",
        knobs=KNOBS[name],
        out_channels=64,
        min_size=options.pixels,
        max_size=2 * options.pixels,
        mask_channels=64,
        detector_arguments={
            "box_batch_size_per_image": 64, "rpn_pre_nms_top_n_train": 500, "rpn_post_nms_top_n_train": 250,
            "rpn_pre_nms_top_n_test": 250, "rpn_post_nms_top_n_test": 100, "box_detections_per_img": 50,
        },
    )  # fmt: skip


def run(config: DetectorConfig, data: str, out: Path, settings: FitSettings, **begin: Any) -> dict[str, Any]:
    """The metrics of a run, from its folder when it is complete."""
    done = out / "metrics.json"
    if done.is_file():
        return json.loads(done.read_text())  # type: ignore[no-any-return]
    return finetune_detection(config, data, out=out, fit_settings=settings, **begin)


def backbones(options: argparse.Namespace) -> dict[str, nn.Module]:
    """Host and twin with the weights of the start, which is trained first unless its folder is complete."""
    config = config_of(options, open_detection(options.scenes, split="train").classes, "host")
    torch.manual_seed(0)
    host = timm.create_model(HOST.removeprefix("timm/"), **config.backbone_arguments)
    made: dict[str, nn.Module] = {name: STViTR.from_host(host, **knobs) for name, knobs in KNOBS.items()}
    settings = FitSettings(
        epochs=options.start_epochs, batch_size=options.batch, lr=options.start_lr, checkpoint_every=50
    )
    run(config, options.scenes, options.out / "start", settings, backbone=made["host"])
    trained = load_detector(options.out / "start").backbone.body.state_dict()
    for body in made.values():
        body.load_host_weights(trained)
    return made


def train(options: argparse.Namespace) -> None:
    made = backbones(options)
    classes = open_detection(options.data, split="train").classes
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in made}
    for seed in range(options.seeds):
        for name, body in made.items():
            settings = FitSettings(
                epochs=options.epochs, batch_size=options.batch, lr=options.lr, seed=seed, checkpoint_every=50
            )
            folder, config = options.out / f"{name}_seed{seed}", config_of(options, classes, name)
            begin = {"backbone": body, "start": options.out / "start"}
            runs[name].append(run(config, options.data, folder, settings, **begin))
    write_json(RESULTS / "detection_table.json", {"runs": runs, "date": str(datetime.date.today())})
    report(options, runs)


def report(options: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> None:
    """The table, printed and put into docs/results.md between its markers; GMACs are counted, not measured."""
    lines = [
        "| backbone | GMACs, 192 x 288 | GMACs, 640 x 640 | detector parameters | "
        + " | ".join(f"{name}: mean ± sd (each seed)" for name in SCORES.values())
        + " |",
        "| --- | ---: | ---: | ---: | " + " | ".join("---" for _ in SCORES) + " |",
    ]
    for name, found in runs.items():
        detector = load_detector(options.out / f"{name}_seed0")
        sizes = ((192, 288), (640, 640))
        costs = [sparing.profile(Backbone(detector), torch.rand(1, 3, *s), measure=False).macs for s in sizes]
        cells = [f"{cost / 1e9:.3f}" for cost in costs] + [f"{sum(p.numel() for p in detector.parameters()):,}"]
        for score in SCORES:
            values = [metrics[score] for metrics in found]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread} ({', '.join(f'{v:.3f}' for v in values)})")
        lines.append(f"| {LABELS[name]} | {' | '.join(cells)} |")
    gaps = {score: [twin[score] - host[score] for host, twin in zip(runs["host"], runs["stvit_r"])] for score in SCORES}
    said = "; ".join(
        f"{SCORES[score]} {statistics.mean(values):+.3f} ({', '.join(f'{v:+.3f}' for v in values)})"
        for score, values in gaps.items()
    )
    table = "\n".join([*lines, "", f"Twin minus host, mean (each seed): {said}."])
    fill("detection", table)


def fill(marker: str, table: str) -> None:
    """Print a table and put it into docs/results.md between its markers."""
    print(table)
    before, begin, rest = PAGE.read_text().partition(f"<!-- {marker}: begin -->\n")
    _, end, after = rest.partition(f"<!-- {marker}: end -->")
    PAGE.write_text(f"{before}{begin}{table}\n{end}{after}")


class Backbone(nn.Module):
    """The whole pyramid is computed, its coarsest map handed on."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.pyramid = detector.backbone

    def forward(self, images: Tensor) -> Tensor:
        coarsest: Tensor = self.pyramid(images)["pool"]
        return coarsest


class Detector(nn.Module):
    """A detector that takes one batch of images of one size and gives the mean score, for the timing."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([found["scores"].sum() for found in self.detector(list(images))])


def cost(options: argparse.Namespace) -> None:
    """FLOPs and seconds of the trained detectors (seed 0), host and twin in one run: the backbone with its pyramid,
    and the whole detector on the first held-out picture; the backbone at 640 x 640 too."""
    detectors = {name: load_detector(options.out / f"{name}_seed0") for name in KNOBS}
    picture, _ = DetectionBatches(open_detection(options.data, split="test")).load(0, None)
    resized = next(iter(detectors.values())).transform([picture])[0].tensors
    pyramids = {name: Backbone(detector) for name, detector in detectors.items()}
    parts = {
        "backbone": (pyramids, resized),
        "backbone_640": (pyramids, torch.rand(1, 3, 640, 640)),
        "detector": ({name: Detector(detector) for name, detector in detectors.items()}, picture[None]),
    }
    lines = [
        "| part, image | model | GMACs | of host | ms an image (interquartile range) | of the host's time |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for part, (models, images) in parts.items():
        cost_of = compare(models, inputs=images, repeats=options.repeats, warmup=2, cost_only=list(models))
        cost_of.to_json(RESULTS / f"detection_cost_{part}.json")
        for row in cost_of.rows:
            found = row.profile
            latency, spread = (1e3 * (value or 0.0) for value in (found.latency_s, found.latency_spread_s))
            lines.append(
                f"| {part.replace('_640', '')}, {images.shape[-2]} x {images.shape[-1]} | {LABELS[row.name]} "
                f"| {found.macs / 1e9:.3f} | {row.flops_ratio:.3f} | {latency:.0f} "
                f"({spread:.0f}) | {1 / (row.speedup or 1.0):.2f} |"
            )
    date, threads = datetime.date.today(), torch.get_num_threads()
    note = f"Float32, eager, batch 1, {options.repeats} interleaved rounds, {threads} thread(s), {date}."
    fill("detection_cost", "\n".join([*lines, "", note]))


@torch.inference_mode()
def picture(options: argparse.Namespace) -> None:
    """Held-out scenes: true boxes and masks above, what the start's detector finds with a score of 0.3 below."""
    detector = load_detector(options.out / "start")
    scenes = DetectionBatches(open_detection(options.scenes, split="test"))
    names = ["", *(name.split()[0] for name in scenes.data.classes)]
    rows: list[list[Tensor]] = [[], []]
    for index in range(5):
        image, target = scenes.load(index, None)
        pixels = (image * 255).round().to(torch.uint8)
        found = detector([image])[0]
        found = {name: value[found["scores"] >= 0.3] for name, value in found.items()}
        true = {**target, "masks": target["masks"][:, None].float(), "scores": torch.ones(len(target["labels"]))}
        for row, result in zip(rows, (true, found)):
            row.append(draw(pixels, result, [names[label] for label in result["labels"]]))
    grid = make_grid(torch.stack([*rows[0], *rows[1]]), nrow=5, padding=4, pad_value=255)
    write_image(to_pil_image(grid), PICTURE)
    print(PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", required=True, help="folder of sparing.recipes.emoji_scenes")
    parser.add_argument("--data", required=True, help="what to fine-tune on, e.g. the Penn-Fudan zip")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--start-epochs", type=int, default=10)
    parser.add_argument("--start-lr", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--embed-dim", type=int, default=32, help="width of the Swin; heads are 2, 4, 8, 16")
    parser.add_argument("--depths", type=int, nargs=4, default=[2, 2, 12, 2], help="layers a stage of the Swin")
    parser.add_argument("--pixels", type=int, default=192, help="shorter side of an image")
    parser.add_argument("--cost", action="store_true", help="measure FLOPs and seconds of what was trained")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--picture", action="store_true", help="draw scenes and what the start's detector finds")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    (picture if options.picture else cost if options.cost else train)(options)


if __name__ == "__main__":
    main()
