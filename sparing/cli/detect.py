"""``sparing detect``: boxes and masks drawn on pictures."""

from pathlib import Path
from typing import Annotated

import typer

from sparing.cli.app import app
from sparing.cli.options import Device, parse_device


@app.command()
def detect(
    paths: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files and folders.")],
    weights: Annotated[Path, typer.Option(help="A detector: the folder that the recipe finetune_detection wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for the drawn pictures.")] = Path("detected"),
    threshold: Annotated[float, typer.Option(help="Least score in [0, 1] that is shown.")] = 0.5,
    device: Device = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the numbers.")] = None,
) -> None:
    """Detect objects in images and draw them; files that cannot be read are listed, and the exit code is 2."""
    from sparing.recipes.detect import detect as detect_files
    from sparing.recipes.detect import report
    from sparing.vision.detection import load_detector

    place = parse_device(device)
    detector = load_detector(weights, device=place)
    found, failures = detect_files(detector, paths, out=out, threshold=threshold)
    if code := report(found, failures, json_file=json_file, detector=detector):
        raise typer.Exit(code)
