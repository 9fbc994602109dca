"""``sparing search``: compute spent on choosing the noise of a diffusion pipeline."""

from pathlib import Path
from typing import Annotated

import typer

from sparing.cli.app import app
from sparing.cli.options import Device, JsonFile, parse_device, write_json

_ALGORITHMS = "random, halving, zero_order, paths, smc, evolutionary"
_VERIFIERS = (
    "classifier, class_prob, clip, clip_class, aesthetic, brightness, colorfulness, compressibility, contrast, "
    "entropy, sharpness, self_consistency, denoising_error, temporal_smoothness, clip_ratio, loudness, "
    "spectral_flatness"
)


@app.command()
def search(
    out: Annotated[Path, typer.Option(help="Folder of log and results; an interrupted search goes on from it.")],
    verifiers: Annotated[
        list[str],
        typer.Option(
            "--verifier",
            help=f"NAME[:KEY=VALUE,...] or FILE.py:FUNCTION; several make an ensemble of ranks. Names: {_VERIFIERS}.",
        ),
    ],
    model: Annotated[str, typer.Option(help="A class-conditional transformer: a name with weights, or a folder.")] = "",
    pipeline: Annotated[str, typer.Option(help="Any diffusers pipeline: a folder or a hub id.")] = "",
    prompts: Annotated[list[str] | None, typer.Option("--prompt", help="A text prompt; repeatable.")] = None,
    classes: Annotated[list[str] | None, typer.Option("--class", help="A class index or name; repeatable.")] = None,
    algorithm: Annotated[
        str,
        typer.Option(
            help=f"NAME[:KEY=VALUE,...], e.g. halving:n=16,stops=[8,14,20],keeps=[8,4,1]: {_ALGORITHMS}; else random."
        ),
    ] = "",
    preset: Annotated[str, typer.Option(help="Published settings by name, instead of an algorithm.")] = "",
    budget: Annotated[str, typer.Option(help="400nfe, 90s, 5min or 12candidates, of each prompt.")] = "",
    steps: Annotated[int, typer.Option(help="Denoiser steps; 0: the pipeline's own number.")] = 0,
    guidance_scale: Annotated[float, typer.Option(help="Negative: the pipeline's own.")] = -1.0,
    call: Annotated[str, typer.Option(help="Further arguments of the pipeline: KEY=VALUE,...")] = "",
    draft: Annotated[
        str,
        typer.Option(help="Rank drafts first (random:n=8,keep=1): steps=N, model=TWIN, cache=THRESHOLD, density=N."),
    ] = "",
    report: Annotated[
        list[str] | None, typer.Option("--report", help="A verifier that takes no part, asked about the winner.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides every noise.")] = 0,
    batch: Annotated[int, typer.Option(help="Rows a batch; 0: as memory allows.")] = 0,
    vae: Annotated[str, typer.Option(help="Folder of the decoder of a latent-space model.")] = "",
    force: Annotated[bool, typer.Option(help="Go on with a log although the search was changed.")] = False,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Search for the noise whose sample scores best, within a budget; resumable."""
    from sparing.recipes import search as recipe

    results = recipe.run(
        recipe.Arguments(
            out=str(out),
            verifiers=verifiers,
            model=model,
            pipeline=pipeline,
            prompts=prompts or [],
            labels=classes or [],
            algorithm=algorithm,
            preset=preset,
            budget=budget,
            steps=steps,
            guidance_scale=guidance_scale,
            call=call,
            draft=draft,
            report=report or [],
            seed=seed,
            batch_size=batch,
            vae=vae,
            device=str(parse_device(device)) if device else "",
            force=force,
        )
    )
    if not write_json([recipe.summary(result) for result in results], json_file):
        print("\n".join(recipe.lines_of(results)))
        print(f"log, winners, sheets and curves in {out}")
