"""Options that several commands share, and what their texts mean."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Also write the result as JSON ('-': only that, on standard output)."),
]
Twins = Annotated[
    list[str] | None,
    typer.Option(
        "--twin",
        metavar="METHOD[:KNOB=VALUE,...]",
        help="Make a twin of the first model, e.g. tome:r=8 or stvit:num_tokens=16; repeatable.",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]


def check_json(file: Path | None) -> None:
    """Raises, before the work, what :func:`write_json` would raise after it."""
    if file is not None and str(file) != "-":
        from sparing.media.outputs import check_output

        check_output(file, make_folder=False)


def write_json(content: Any, file: Path | None) -> bool:
    """Writes a result as JSON; returns whether it went to standard output, so that a table must not."""
    if file is None:
        return False
    text = json.dumps(content, indent=2) + "\n"
    if str(file) == "-":
        print(text, end="")
        return True
    file.write_text(text, encoding="utf-8")
    return False


def parse_twin(text: str) -> tuple[str, dict[str, Any]]:
    """``'stvit:num_tokens=4x4,base_depth=4'`` to the method and its knobs.

    Values are JSON (``16``, ``0.5``, ``true``, ``null``), a pair such as ``4x6``, or else plain text.

    Raises:
        ValueError: a knob without a value.
    """
    method, _, rest = text.partition(":")
    knobs = {}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        if not equals or not name:
            raise ValueError(f"--twin {text!r}: {part!r} is no KNOB=VALUE")
        knobs[name.strip().replace("-", "_")] = _value(value.strip())
    return method, knobs


def _value(text: str) -> Any:
    pair = text.split("x")
    if len(pair) == 2 and all(part.isdigit() for part in pair):
        return tuple(map(int, pair))
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_dtype(text: str | None) -> Any:
    """A torch dtype by name.

    Raises:
        ValueError: it is none of the three that models run in.
    """
    if text is None:
        return None
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if text not in known:
        raise ValueError(f"--dtype {text!r}: one of {', '.join(known)} is needed")
    return known[text]


def parse_device(text: str | None) -> Any:
    """A torch device that this machine has.

    Raises:
        ValueError: no such kind of device, or not on this machine.
    """
    import torch

    try:
        device = torch.device(text or "cpu")
    except RuntimeError as error:
        raise ValueError(f"--device {text!r}: cpu, cuda, cuda:N or mps is needed") from error
    if (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    ):
        raise ValueError(f"--device {text!r}: this machine has no such device")
    return device


def make_twins(model: "nn.Module", texts: list[str] | None) -> "dict[str, nn.Module]":
    """A twin of ``model`` for every ``--twin``, under the text that asked for it."""
    import torch

    import sparing

    twins = {}
    for text in texts or []:
        method, knobs = parse_twin(text)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # new parameters of a twin are the same ones in every run
            twins[text] = sparing.twin(model, method, **knobs)
    return twins
