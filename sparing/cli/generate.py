"""``sparing generate``: images of classes from a DiT or FlexDiT."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sparing.cli.app import app
from sparing.cli.options import Device, JsonFile, parse_device, write_json


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="A name with weights, or a folder of a transformer or of a pipeline.")],
    classes: Annotated[list[str], typer.Option("--class", help="A class index, or a name it knows; repeatable.")],
    out: Annotated[Path, typer.Option(help="Image file for the sheet.")],
    steps: Annotated[int, typer.Option(help="Denoiser steps.")] = 50,
    density: Annotated[
        str | None, typer.Option(help="Side, HxW, share or 'all' at every step; default: the model's schedule.")
    ] = None,
    guidance_scale: Annotated[float, typer.Option(help="1 = no guidance.")] = 4.0,
    per_class: Annotated[int, typer.Option(help="Images of each class.")] = 1,
    batch: Annotated[int, typer.Option(help="Images a forward.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the starting noise.")] = 0,
    vae: Annotated[Path | None, typer.Option(help="Folder of the decoder of a latent-space model.")] = None,
    enlarge: Annotated[int, typer.Option(help="Each pixel becomes this many.")] = 1,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Generate images of classes and write them as one sheet."""
    from sparing.recipes.generate import generate as run

    chosen: list[Any] = [int(text) if text.lstrip("-").isdigit() else text for text in classes]
    made = run(
        model,
        chosen,
        out=out,
        steps=steps,
        density=density,
        guidance_scale=guidance_scale,
        per_class=per_class,
        batch_size=batch,
        seed=seed,
        vae=vae,
        device=str(parse_device(device)) if device else None,
        enlarge=enlarge,
    )
    result = {"out": str(out), "images": len(made["images"]), "status": made["status"], "seeds": made["seeds"]}
    if not write_json(result, json_file):
        print(f"{len(made['images'])} images in {out} (model: {made['status']})")
