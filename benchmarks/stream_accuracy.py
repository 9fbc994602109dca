"""Accuracy over time of continual networks against their clip networks on the same recordings and videos.

    python benchmarks/stream_accuracy.py --kind digits --runs runs/digits_0 runs/digits_1 runs/digits_2 \
        --files DIGITS/manifest.csv
    python benchmarks/stream_accuracy.py --kind motions --runs ... --files MOTIONS/streams.csv

``--runs`` are folders of the recipe train_clip, a seed each; ``--files`` a manifest with spans, whose test files (all,
where it has no column ``split``) are played from beginning to end. The continual network steps once a frame. The clip
network recomputes its whole window at every frame, from the same frames. A prediction is right when its class is the
label of the frame ``lag_frames`` earlier; both are scored at the same frames. *Settled* are frames whose label has
held for as long as the continual network looks back: there no window straddles two labels. Multiply-adds
are counted where they run, by PyTorch's counter.
"""

import argparse
import csv
import json
import statistics
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sparing
from sparing.recipes.clip_data import ClipFormat
from sparing.recipes.train_clip import ClipSettings, clip_format, normalise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", required=True, help="names the report")
    parser.add_argument("--runs", nargs="+", type=Path, required=True)
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for run in arguments.runs:
        settings = json.loads((run / "metrics.json").read_text())
        rows.append({"seed": settings["fit"]["seed"], **measure(run, settings["clip"], arguments.files)})
        print({key: value for key, value in rows[-1].items() if not isinstance(value, list)}, flush=True)
    keys = [key for key, value in rows[0].items() if isinstance(value, float)]
    report = {
        "kind": arguments.kind,
        "seeds": rows,
        "mean": {key: statistics.mean(row[key] for row in rows) for key in keys},
        "spread": {key: statistics.stdev(row[key] for row in rows) for key in keys if len(rows) > 1},
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
    path = arguments.json or Path(__file__).parent / "results" / f"stream_accuracy_{arguments.kind}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for key in keys:
        print(f"{key}: {report['mean'][key]:.6g} ± {report['spread'].get(key, 0):.2g}")


@torch.inference_mode()
def measure(run: Path, clip: dict[str, Any], manifest: Path) -> dict[str, Any]:
    """Both networks over all files of one run's model."""
    twin: Any = sparing.load(run).eval()
    config, network = twin.pretrained_cfg, twin.network
    form = clip_format(twin, ClipSettings(**clip))
    options = {"se": "stream"} if clip["online"] else {}
    names, lag = list(config["label_names"]), int(config["lag_frames"])
    right, settled = {"stream": 0, "clip": 0}, {"stream": 0, "clip": 0}
    deciles = {"stream": [0] * 10, "clip": [0] * 10}
    total, totals, agreed, apart, held_total = 0, [0] * 10, 0, 0.0, 0
    field = network.plan().receptive_field
    for path, spans in _files(manifest).items():
        frames, labels = _played(form, path, spans, names, config)
        stepped, first = _step_through(network, frames)
        windows = frames.unfold(1, form.frames, 1)  # (C, windows, ..., frames), window t ends at frame t + frames - 1
        windows = windows.movedim(1, 0).movedim(-1, 2)
        exact = network.plan().equals_clip_of_last_frames
        clips = torch.cat([_clip(network, part, options) for part in windows.split(64)])
        begin = max(first, form.frames - 1)
        said = {"stream": stepped[begin - first :], "clip": clips[begin - form.frames + 1 :]}
        want = torch.tensor([labels[t - lag] if t >= lag else -1 for t in _range(begin, frames)])
        known = want >= 0
        held = torch.tensor(
            [len(set(labels[max(t - lag - field + 1, 0) : t - lag + 1])) == 1 for t in _range(begin, frames)]
        )
        held &= known
        held_total += int(held.sum())
        for name, scores in said.items():
            hits = (scores.argmax(1) == want) & known
            right[name] += int(hits.sum())
            settled[name] += int((hits & held).sum())
            for tenth, part in enumerate(hits.tensor_split(10)):
                deciles[name][tenth] += int(part.sum())
        totals = [a + int(part.sum()) for a, part in zip(totals, known.tensor_split(10))]
        total += int(known.sum())
        agreed += int(((said["stream"].argmax(1) == said["clip"].argmax(1)) & known).sum())
        if exact:
            apart = max(apart, _same_phase(network, frames, stepped, first))
    shape = tuple(frames.shape[:1] + frames.shape[2:])
    step_macs, clip_macs = _costs(network, shape, form, options)
    return {
        "stream_accuracy": 100 * right["stream"] / total,
        "clip_accuracy": 100 * right["clip"] / total,
        "settled_stream_accuracy": 100 * settled["stream"] / held_total,
        "settled_clip_accuracy": 100 * settled["clip"] / held_total,
        "same_class": 100 * agreed / total,
        "step_mmacs": step_macs / 1e6,
        "clip_mmacs": clip_macs / 1e6,
        "largest_difference_of_clip_form": apart if exact else None,
        "predictions": total,
        "settled": held_total,
        "delay_frames": network.plan().first_output_step - form.frames + 1,
        "stream_over_time": [100 * a / b for a, b in zip(deciles["stream"], totals)],
        "clip_over_time": [100 * a / b for a, b in zip(deciles["clip"], totals)],
    }


def _range(begin: int, frames: Tensor) -> range:
    return range(begin, frames.shape[1])


def _files(manifest: Path) -> dict[Path, list[tuple[str, float, float]]]:
    found: dict[Path, list[tuple[str, float, float]]] = defaultdict(list)
    with manifest.open(newline="") as file:
        for row in csv.DictReader(file):
            if row.get("split", "test") == "test":
                found[manifest.parent / row["path"]].append((row["label"], float(row["start_s"]), float(row["end_s"])))
    return found


def _played(
    form: ClipFormat, path: Path, spans: list, names: list[str], config: dict[str, Any]
) -> tuple[Tensor, list[int]]:
    """Frames as the network takes them, (C, T, ...), and the label of each (-1: none)."""
    frames, rate = form.read(path)
    labels = [-1] * len(frames)
    for label, start, end in spans:
        for t in range(round(start * rate), min(round(end * rate), len(frames))):
            labels[t] = names.index(label)
    if form.kind == "audio":
        return frames.movedim(0, 1), labels
    return normalise(frames.movedim(0, 1)[None], config)[0], labels


def _step_through(network: Any, frames: Tensor) -> tuple[Tensor, int]:
    """Scores (T - first, classes) of a live stream, and the frame of the first."""
    state = network.init_state(1, tuple(frames.shape[:1] + frames.shape[2:]), lockstep=True)
    said, first = [], network.plan().first_output_step
    for t in range(frames.shape[1]):
        y, _, state = network.step(frames[None, :, t], state)
        if t >= first:
            said.append(y.flatten())
    return torch.stack(said), first


def _clip(network: Any, windows: Tensor, options: dict[str, Any]) -> Tensor:
    return network(windows, **options).mean(-1)


def _same_phase(network: Any, frames: Tensor, stepped: Tensor, first: int) -> float:
    """Largest difference between the steps and the clip form over the whole file, positions in the same phase."""
    whole = network(frames[None], start=0)[0].T
    return float((whole - stepped[: len(whole)]).abs().max())


def _costs(network: Any, shape: tuple[int, ...], form: ClipFormat, options: dict[str, Any]) -> tuple[float, float]:
    state = network.init_state(1, shape, lockstep=True)
    frame = torch.randn(1, *shape)
    for _ in range(2 * network.plan().receptive_field):
        _, _, state = network.step(frame, state)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as step:  # fused attention is counted as nothing
        network.step(frame, state)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as clip:
        network(torch.randn(1, shape[0], form.frames, *shape[1:]), **options)
    return step.get_total_flops() / 2, clip.get_total_flops() / 2


if __name__ == "__main__":
    main()
