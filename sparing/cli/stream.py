"""``sparing stream``: several videos, cameras or recordings through one continual network."""

from pathlib import Path
from typing import Annotated

import typer

from sparing.cli.app import app


@app.command()
def stream(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Video files, cameras (0, /dev/video0) and addresses (rtsp://...); or sound files. Followed together.",
        ),
    ],
    model: Annotated[
        str, typer.Option(help="A continual network of the zoo, or a folder of the recipe train_clip.")
    ] = "co_x3d_micro",
    checkpoint: Annotated[Path | None, typer.Option(help="Its weights, under published or our keys.")] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Run without weights.")] = False,
    window: Annotated[int | None, typer.Option(min=1, help="Frames that the head pools.")] = None,
    every: Annotated[int, typer.Option(min=1, help="Take each n-th frame.")] = 1,
    topk: Annotated[int, typer.Option(min=1, help="Classes a prediction lists.")] = 3,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Frames of each video at most.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all predictions as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the best scores over time.")] = None,
) -> None:
    """Follow videos or recordings as live streams; prints scores as they come, and predictions per second."""
    from sparing.recipes.stream import main

    arguments = [*sources, "--model", model, "--every", str(every), "--topk", str(topk)]
    optional = {
        "--checkpoint": checkpoint,
        "--window": window,
        "--max-frames": max_frames,
        "--json": json_file,
        "--plot": plot,
    }
    for name, value in optional.items():
        arguments += [] if value is None else [name, str(value)]
    code = main([*arguments, *(["--random-weights"] if random_weights else [])])
    if code:
        raise typer.Exit(code)
