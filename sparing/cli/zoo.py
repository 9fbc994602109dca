"""``sparing models``, ``card``, ``methods``, ``compare``."""

from pathlib import Path
from typing import Annotated

import typer

import sparing
from sparing.cli.app import app
from sparing.cli.options import Device, Dtype, JsonFile, Twins, make_twins, parse_device, parse_dtype, write_json


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Shell-style pattern, or a word to find anywhere in a name.")] = "*",
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    method: Annotated[str | None, typer.Option(help="Only twins by this method.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Only models with weights of their own.")] = False,
    commercial: Annotated[
        bool, typer.Option("--commercial", help="Only where no licence is known to forbid it.")
    ] = False,
    demo: Annotated[bool, typer.Option("--demo", help="Also the small models that come with sparing.")] = False,
    json_file: JsonFile = None,
) -> None:
    """List the models of the zoo."""
    names = sparing.list_models(
        pattern, task=task, method=method, pretrained=pretrained, commercial=commercial or None, demo=demo
    )
    cards = [sparing.model_card(name) for name in names]
    if write_json([card.to_dict() for card in cards], json_file):
        return
    if not cards:
        print(f"no model matches {pattern!r}")
        return
    width = max(len(name) for name in names)
    for card in cards:
        size = f"{card.params / 1e6:.1f} M" if card.params else "-"
        weights = "no weights of its own" if card.source is None else f"weights: {card.source.partition(':')[0]}"
        print(f"{card.name:<{width}}  {card.task:<24}  {size:>9}  {weights}")
    print(f"{len(cards)} models; more: sparing card NAME; hosts are named timm/NAME, torchvision/NAME, open_clip/NAME")


@app.command()
def card(
    name: Annotated[str, typer.Argument(help="A name of the zoo, timm/NAME and the like, or a saved folder.")],
    json_file: JsonFile = None,
) -> None:
    """Show what is known of a model: paper, licences, weights, measurements."""
    found = sparing.model_card(name)
    if not write_json(found.to_dict(), json_file):
        print(found)


@app.command()
def methods(
    name: Annotated[
        str, typer.Argument(help="A host: timm/NAME, torchvision/NAME, open_clip/NAME, a folder, a hub id.")
    ],
    json_file: JsonFile = None,
) -> None:
    """Say which methods make a twin of a model, and why the others do not."""
    answers = sparing.methods(sparing.create_model(name, device="meta"))
    rows = [
        {"method": a.method, "training": a.training, "applies": a.applies, "reasons": list(a.reasons)} for a in answers
    ]
    if not write_json(rows, json_file):
        for answer in answers:
            print(answer)


@app.command()
def compare(
    names: Annotated[
        list[str], typer.Argument(metavar="A [B ...]", help="The first is what the others are held against.")
    ],
    twin: Twins = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Published weights of every model.")] = False,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images or latents; default: the first's.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a forward.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 10,
    count_only: Annotated[bool, typer.Option("--count-only", help="Parameters and FLOPs, no times.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    json_file: JsonFile = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw FLOPs and time as shares of the first.")
    ] = None,
) -> None:
    """Measure models and twins interleaved in one run, on random images or latents."""
    from sparing.zoo.compare import create_all

    members, random = create_all(names, pretrained=pretrained, device=parse_device(device), dtype=parse_dtype(dtype))
    lacks_weights = bool(random)
    first_name, first = next(iter(members.items()))
    twins = make_twins(first, twin)
    if twins:
        random.discard(first_name)  # its twins have its weights, whatever these are
    result = sparing.compare(
        members | twins,
        batch=batch,
        image_size=image_size,
        repeats=repeats,
        measure=not count_only,
        cost_only=random,
    )
    if plot is not None:
        result.plot(plot)
    if not write_json(result.to_dict(), json_file):
        print(result)
        if lacks_weights:
            print(
                "random weights: costs are real, agreement says nothing (--pretrained, tags and folders bring weights)"
            )
