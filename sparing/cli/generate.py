"""``sparing generate``: images of classes from a DiT or FlexDiT; images, video or sound of prompts."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sparing.cli.app import app
from sparing.cli.options import Device, JsonFile, check_json, parse_device, write_json


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="A name with weights, or a folder of a transformer or of a pipeline.")],
    out: Annotated[Path, typer.Option(help="Image file for the sheet; of prompts also .mp4, .gif, .wav.")],
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="A class index, or a name it knows; repeatable.")
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="A text, for a folder or hub id of a text pipeline; repeatable."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoiser steps.")] = 50,
    density: Annotated[
        str | None, typer.Option(help="Side, HxW, share or 'all' at every step; default: the model's schedule.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="1 = no guidance. Default: 4 for classes, the pipeline's own for prompts.")
    ] = None,
    twin: Annotated[
        str | None, typer.Option(help="Of prompts: a folder or name of a denoiser in place of the pipeline's own.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Of prompts: pixels; default: the pipeline's own.")] = None,
    width: Annotated[int | None, typer.Option(help="Of prompts: pixels; default: the pipeline's own.")] = None,
    frames: Annotated[int | None, typer.Option(help="Of a video; default: the pipeline's own number.")] = None,
    rate: Annotated[int, typer.Option(help="Frames per second of a video.")] = 8,
    per_class: Annotated[int, typer.Option(help="Images of each class.")] = 1,
    batch: Annotated[int | None, typer.Option(help="Samples a call. Default: 16 of classes, 1 of prompts.")] = None,
    seed: Annotated[int, typer.Option(help="Of the starting noise.")] = 0,
    vae: Annotated[Path | None, typer.Option(help="Of classes: folder of the decoder of a latent-space model.")] = None,
    enlarge: Annotated[int, typer.Option(help="Each pixel becomes this many.")] = 1,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Generate images of classes, or images, video or sound of prompts, and write them as one file."""
    if bool(classes) == bool(prompts):
        raise ValueError("give either --class or --prompt")
    check_json(json_file)
    where = str(parse_device(device)) if device else None
    common: dict[str, Any] = {
        "out": out,
        "steps": steps,
        "density": density,
        "seed": seed,
        "device": where,
        "enlarge": enlarge,
    }
    if prompts:
        from sparing.recipes.generate_prompted import generate_prompted

        if per_class != 1 or vae is not None:
            raise ValueError("--per-class and --vae go with --class")
        made = generate_prompted(
            model,
            prompts,
            twin=twin,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            frames=frames,
            rate=rate,
            batch_size=1 if batch is None else batch,
            **common,
        )
        result = {"out": str(out), "kind": made["kind"], "status": made["status"], "seeds": made["seeds"]}
        if not write_json(result, json_file):
            print(f"{made['kind']} of {len(prompts)} prompts in {out} (denoiser: {made['status']})")
        return
    from sparing.recipes.generate import generate as run
    from sparing.recipes.generate import parse_class

    if any(value is not None for value in (twin, height, width, frames)):
        raise ValueError("--twin, --height, --width and --frames go with --prompt")
    chosen: list[Any] = [parse_class(text) for text in classes or []]
    made = run(
        model,
        chosen,
        guidance_scale=4.0 if guidance_scale is None else guidance_scale,
        per_class=per_class,
        batch_size=16 if batch is None else batch,
        vae=vae,
        **common,
    )
    result = {"out": str(out), "images": len(made["images"]), "status": made["status"], "seeds": made["seeds"]}
    if not write_json(result, json_file):
        print(f"{len(made['images'])} images in {out} (model: {made['status']})")
