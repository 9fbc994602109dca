"""Watch several videos at once with one continual network: scores over time and frames per second.

    python -m sparing.recipes.stream a.mp4 b.mp4 --model co_x3d_s --checkpoint x3d_s.pyth --every 6

Every file is a live stream with its own seat; a file that ends leaves, the others go on. Frames are scaled and
cropped as the network was trained; scores come once a stream has given as many frames as the network's delay.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What the published X3D, Slow and I3D were trained with.
MEAN, STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)


@dataclass(frozen=True)
class Spoken:
    """What one stream said after one of its frames: ``top`` is (class index, score), best first."""

    stream: str
    frame: int
    top: list[tuple[int, float]]


def prepare(frame: Tensor, size: int, *, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """uint8 (3, H, W) to float32 (3, size, size): shorter side to ``size``, centre crop, normalised."""
    from torchvision.transforms.v2 import functional as transforms

    frame = transforms.resize(frame, [size], antialias=True)
    frame = transforms.center_crop(frame, [size, size])
    return transforms.normalize(transforms.to_dtype(frame, torch.float32, scale=True), list(mean), list(std))


def load_network(
    name: str, *, checkpoint: str | Path | None = None, random_weights: bool = False, **options: Any
) -> Any:
    """A continual network of the zoo in eval mode.

    Raises:
        ValueError: neither a checkpoint nor ``random_weights``, or a network that does not take video frames.
    """
    import sparing

    if checkpoint is None and not random_weights:
        raise ValueError(
            f"{name} has no weights of its own: give --checkpoint FILE, or --random-weights to try the pipe"
        )
    network: Any = sparing.create_model(
        name, checkpoint_path=None if checkpoint is None else str(checkpoint), **options
    )
    if not hasattr(network, "step"):
        raise ValueError(f"{name} does not run on streams; see sparing models 'co_*'")
    return network.eval()


def watch(
    videos: Sequence[str | Path],
    network: Any,
    *,
    size: int,
    every: int = 1,
    topk: int = 3,
    max_frames: int | None = None,
    compile: bool = False,
) -> Iterator[Spoken]:
    """Step all videos together until they end; yields what is said as it is said.

    Raises:
        FileNotFoundError, ValueError: a file that cannot be read, before anything is stepped.
    """
    from sparing.continual import StreamBatch
    from sparing.media.video import read_frames

    sources = {f"{index}: {Path(path).name}": read_frames(path, every=every) for index, path in enumerate(videos)}
    if not sources:
        raise ValueError("give at least one video file")
    batch = StreamBatch(network, seats=len(sources), frame_shape=(3, size, size), compile=compile)
    counts = dict.fromkeys(sources, 0)
    for name in sources:
        batch.join(name)
    while sources:
        frames = {}
        for name in list(sources):
            frame = None if max_frames is not None and counts[name] >= max_frames else next(sources[name], None)
            if frame is None:
                del sources[name]
                batch.leave(name)
            else:
                frames[name] = prepare(frame, size)
        for name, scores in batch.step(frames).items():
            best = scores.flatten().topk(min(topk, scores.numel()))
            yield Spoken(name, counts[name], list(zip(best.indices.tolist(), best.values.tolist())))
        for name in frames:
            counts[name] += 1


def plot(spoken: Sequence[Spoken], path: str | Path) -> None:
    """The best score of every stream over its frames."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 3))
    for name in dict.fromkeys(row.stream for row in spoken):
        rows = [row for row in spoken if row.stream == name]
        axis.plot([row.frame for row in rows], [row.top[0][1] for row in rows], label=name)
    axis.set_xlabel("frame")
    axis.set_ylabel("best score")
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this recipe."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("videos", nargs="+")
    parser.add_argument("--model", default="co_x3d_s")
    parser.add_argument("--checkpoint")
    parser.add_argument("--random-weights", action="store_true", help="run without a checkpoint; scores mean nothing")
    parser.add_argument("--window", type=int, help="frames that the head pools; default: the clip network's")
    parser.add_argument("--every", type=int, default=1, help="take each n-th frame")
    parser.add_argument("--topk", type=int, default=3)
    parser.add_argument("--max-frames", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--plot")
    options = parser.parse_args(arguments)
    window = {} if options.window is None else {"temporal_window_size": options.window}
    network = load_network(
        options.model, checkpoint=options.checkpoint, random_weights=options.random_weights, **window
    )
    spoken, start = [], time.perf_counter()
    rows = watch(
        options.videos,
        network,
        size=getattr(network, "image_size", 224),
        every=options.every,
        topk=options.topk,
        max_frames=options.max_frames,
        compile=options.compile,
    )
    for row in rows:
        spoken.append(row)
        scores = "  ".join(f"{label}: {score:.3f}" for label, score in row.top)
        print(f"{row.stream:32} frame {row.frame:6}  {scores}")
    seconds = time.perf_counter() - start
    print(f"{len(spoken)} predictions in {seconds:.1f} s, {len(spoken) / seconds:.1f} a second over all streams")
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in spoken], indent=1) + "\n")
    if options.plot:
        plot(spoken, options.plot)


if __name__ == "__main__":
    main()
