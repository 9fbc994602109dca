"""The step of a network as an exported program with flat state, for runtimes without Python.

Inputs ``(x, clock, *memories)``, outputs ``(y, valid, clock, *memories)``; the stream axis is dynamic. The manifest
says what each memory is called, its shape and what an empty one holds, so that a runtime can allocate, reset, gather
and save streams. Warm-up needs nothing special: ``valid`` is an output.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sparing.continual import state as states
from sparing.continual.module import Continual
from sparing.continual.state import StreamState


class FlatStep(nn.Module):
    """``step`` with its state as a flat list of tensors."""

    def __init__(self, network: Any, frame_shape: tuple[int, ...], *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.network = network
        self.like = network.init_state(1, frame_shape, dtype=dtype, device="meta" if _on_meta(network) else None)
        self.names = [name for name, _ in states.leaves(self.like.memory)]

    def forward(self, x: Tensor, clock: Tensor, *memories: Tensor) -> tuple[Tensor, ...]:
        """One frame: ``(y, valid, clock, *memories)``."""
        leaves = iter(memories)
        memory = states.map_memory(lambda _: next(leaves), self.like.memory)
        state = StreamState(clock, memory, x.new_empty((x.shape[0], 0, *x.shape[1:])))
        y, valid, new = self.network.step(x, state)
        return (y, valid, new.clock, *(tensor.contiguous() for _, tensor in states.leaves(new.memory)))

    def example(self, streams: int) -> tuple[Tensor, ...]:
        """Inputs of streams that have seen nothing."""
        many = states.gather(self.like, [0] * streams)
        x = self.like.frame.new_zeros((streams, *self.like.frame_shape))
        return (x, many.clock, *(tensor for _, tensor in states.leaves(many.memory)))


def _on_meta(network: nn.Module) -> bool:
    parameter = next(iter(network.parameters()), None)
    return parameter is not None and parameter.is_meta


def manifest(network: Continual, frame_shape: tuple[int, ...], *, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """JSON values: the plan, the frame, and every input and output by name, shape ('streams' first) and dtype."""
    flat = FlatStep(network, frame_shape, dtype=dtype)
    plan = network.plan()
    entries = [
        {
            "name": name,
            "shape": ["streams", *tensor.shape[1:]],
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "empty": str(states.EMPTY.get(name.rpartition(".")[2], 0.0)),
        }
        for name, tensor in states.leaves(flat.like.memory)
    ]
    return {
        "format": "sparing.continual.step/1",
        "frame": {"shape": ["streams", *frame_shape], "dtype": str(flat.like.frame.dtype).removeprefix("torch.")},
        "plan": {
            "receptive_field": plan.receptive_field,
            "delay": plan.delay,
            "period": plan.period,
            "first_output_step": plan.first_output_step,
        },
        "inputs": ["x", "clock", *flat.names],
        "outputs": ["y", "valid", "clock", *flat.names],
        "states": [{"name": "clock", "shape": ["streams"], "dtype": "int64", "empty": "0"}, *entries],
        "fingerprint": states.fingerprint(flat.like),
    }


def export_step(
    network: Any, frame_shape: tuple[int, ...], *, dtype: torch.dtype | None = None, dynamic: bool = True
) -> tuple[Any, dict[str, Any]]:
    """``torch.export`` of one step: ``(ExportedProgram, manifest)``.

    Args:
        frame_shape: (C, ...) of one frame.
        dynamic: any number of streams; otherwise 2.

    Raises:
        RuntimeError: in train mode.
    """
    if network.training:
        raise RuntimeError("export a network in eval mode: call eval() first")
    flat = FlatStep(network, frame_shape, dtype=dtype).eval()
    inputs = flat.example(2)
    shapes = None
    if dynamic:
        streams = torch.export.Dim("streams", min=1)
        shapes = ({0: streams}, {0: streams}, tuple({0: streams} for _ in flat.names))
    with torch.no_grad():
        program = torch.export.export(flat, inputs, dynamic_shapes=shapes)
    return program, manifest(network, frame_shape, dtype=dtype)


def export_onnx(
    network: Any, frame_shape: tuple[int, ...], path: str, *, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Write the step as an ONNX file (dynamo exporter) and return its manifest; inputs and outputs carry its names."""
    program, described = export_step(network, frame_shape, dtype=dtype)
    outputs = ["y", "valid", "clock_next", *(f"{name}_next" for name in described["inputs"][2:])]
    torch.onnx.export(
        program, (), path, input_names=described["inputs"], output_names=outputs, dynamo=True, verbose=False
    )
    return described | {"outputs": outputs}
