"""``sparing classify``, ``distill``, ``demo``: what takes or shows images."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sparing.cli.app import app
from sparing.cli.options import Device, Dtype, JsonFile, make_twins, parse_device, parse_dtype, parse_twin, write_json

DEFAULT_MODEL = "stvit_vit_micro_patch4_28.demo_fashion"


@app.command()
def classify(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Image files and folders.")],
    model: Annotated[
        str | None, typer.Option(help=f"A name with weights, timm/NAME, a folder or hub id; default: {DEFAULT_MODEL}.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="A checkpoint file for --model, or a folder written by save_pretrained.")
    ] = None,
    twin: Annotated[
        str | None, typer.Option(metavar="METHOD[:KNOB=VALUE,...]", help="Use a twin of the model, e.g. tome:r=8.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Also say how far the predictions agree with this model's.")] = None,
    topk: Annotated[int, typer.Option(min=1, help="Classes a prediction lists.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Images a forward.")] = 16,
    convert: Annotated[
        bool, typer.Option("--convert", help="Convert grey, coloured or transparent images to what the model takes.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    json_file: JsonFile = None,
) -> None:
    """Classify images; files that cannot be read are listed, the rest goes on, and the exit code is 2."""
    from sparing.zoo.classify import classify as classify_files
    from sparing.zoo.classify import load_classifier

    place: dict[str, Any] = {"device": parse_device(device), "dtype": parse_dtype(dtype)}
    network = load_classifier(model or (None if weights else DEFAULT_MODEL), weights, **place)
    reference = load_classifier(host, None, **place) if host else None
    if twin is not None:
        reference = reference or network
        network = next(iter(make_twins(network, [twin]).values()))
    result = classify_files(network, paths, host=reference, topk=topk, batch_size=batch, convert=convert)
    if not write_json({"model": model, "twin": twin, **result.to_dict()}, json_file):
        for prediction in result.predictions:
            chances = zip(prediction.labels, prediction.probabilities, strict=True)
            print(f"{prediction.path}: " + ", ".join(f"{label} {chance:.1%}" for label, chance in chances))
        line = f"status: {result.status}"
        if result.top1_agreement is not None:
            line += f"; same top class as the host on {result.top1_agreement:.1%}"
        if result.feature_cosine is not None:
            line += f"; feature cosine to the host {result.feature_cosine:.4f}"
        print(line)
    for _, reason in result.failures:
        typer.echo(f"error: {reason}", err=True)
    if result.failures:
        raise typer.Exit(2)


@app.command()
def distill(
    host: Annotated[str, typer.Argument(help="timm/NAME (published weights), a name of the zoo, a folder.")],
    images: Annotated[str, typer.Argument(help="Images without labels: a folder, idx files, WebDataset tars.")],
    out: Annotated[Path, typer.Option(help="Folder of the twin; the same folder resumes a run that was stopped.")],
    twin: Annotated[
        str, typer.Option(metavar="METHOD[:KNOB=VALUE,...]", help="The twin, e.g. stvit:num_tokens=16.")
    ] = "stvit",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the images.")] = 30,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate; ten times that for parameters the host lacks.")] = 1e-4,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 on CUDA.")] = "fp32",
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Train a twin to say what its host says, from images without labels.

    More settings, several GPUs: accelerate launch -m sparing.recipes.distil_vision --help
    """
    from sparing.recipes.distil_vision import distill as distil_host
    from sparing.training import FitSettings

    method, knobs = parse_twin(twin)
    settings = FitSettings(epochs=epochs, batch_size=batch, lr=lr, precision=precision, seed=seed)
    metrics = distil_host(host, images, out=out, method=method, knobs=knobs, fit_settings=settings)
    if not write_json(metrics, json_file):
        held_out, after = metrics["held_out"], metrics["after"]
        for name, before in metrics["before"].items():
            print(f"{name} on {held_out} held-out images: {before:.4f} before, {after[name]:.4f} after")
        print(f"twin in {out}; use it: sparing classify IMAGE --weights {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the numbers.")] = Path("sparing-demo"),
    json_file: JsonFile = None,
) -> None:
    """Show host, STViT and ToMe side by side on real images that come with sparing; needs no network."""
    from sparing.recipes.demo import run_demo

    only_json = str(json_file) == "-"
    write_json(run_demo(out, say=lambda text: typer.echo(text, err=only_json)), json_file)
