"""What a continual network is made of, as a table of its layers with time."""

from sparing.continual.module import Continual
from sparing.continual.state import state_bytes


def explain(network: Continual, frame_shape: tuple[int, ...] | None = None) -> str:
    """A table of every layer with time: receptive field, delay, stride, padding, bytes of memory per stream; then the
    whole.

    Args:
        frame_shape: (C, ...) of one frame; without it the bytes are left out.

    Raises:
        ValueError: frames that a layer cannot step on, with its path.
        TypeError: a network that does not run on streams.
    """
    if not isinstance(network, Continual):
        raise TypeError(f"{type(network).__name__} does not run on streams: convert it first")
    state = None if frame_shape is None else network.init_state(1, frame_shape)
    rows: list[tuple[str, ...]] = [("layer", "kind", "R", "delay", "stride", "padding", "bytes/stream")]
    for name, module in network.named_modules(remove_duplicate=False):  # type: ignore[attr-defined]
        if (
            not isinstance(module, Continual)
            or module is network
            or (module.span().receptive_field == 1 == module.span().stride)
        ):
            continue
        span, size = module.span(), ""
        if state is not None:
            size = str(_bytes_under(state.memory, name.split(".")))
        numbers = (span.receptive_field, span.delay, span.stride, span.padding)
        rows.append((name, type(module).__name__, *(str(n) for n in numbers), size))
    plan = network.plan()
    whole = (plan.receptive_field, plan.delay, plan.period, plan.padding)
    total = "" if state is None else str(state_bytes(state))
    rows.append(("whole", type(network).__name__, *(str(n) for n in whole), total))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.append(f"first output at step {plan.first_output_step}, then every {plan.period}")
    if plan.equals_clip_of_last_frames:
        lines.append(f"a step equals the clip network on the last {plan.receptive_field} frames (no temporal padding)")
    else:
        lines.append(
            f"a step equals the network over the whole stream, not the clip network on the last {plan.receptive_field} "
            "frames: temporal padding shows the clip zeros where the stream has frames"
        )
    return "\n".join(lines)


def _bytes_under(memory: dict, path: list[str]) -> int:
    for key in path:
        if not isinstance(memory, dict) or key not in memory:
            return 0
        memory = memory[key]
    pending, total = [memory], 0
    while pending:
        for value in pending.pop().values():
            if isinstance(value, dict):
                pending.append(value)
            else:
                total += value.numel() * value.element_size()
    return total
