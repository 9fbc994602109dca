"""Follow several videos, cameras or recordings at once with one continual network: scores over time, frames per second.

    python -m sparing.recipes.stream a.mp4 b.mp4 --model co_x3d_micro
    python -m sparing.recipes.stream recording.wav --model co_spotter_micro --json said.json
    python -m sparing.recipes.stream 0 rtsp://camera/1 --model co_x3d_s --checkpoint x3d_s.pyth --every 6

Every source is a live stream with its own seat; a file that ends leaves, the others go on. Video frames are scaled,
cropped and normalised as the network was trained; audio comes in hops of samples. Scores come once a stream has given
as many frames as the network's delay. ``--model`` is a network of the zoo (with shipped weights, or with
``--checkpoint``) or a folder that the recipe train_clip wrote.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparing.recipes.clip_data import square
from sparing.recipes.train_clip import normalise

__all__ = ["Spoken", "load_network", "plot", "prepare", "watch"]


@dataclass(frozen=True)
class Spoken:
    """What one stream said after one of its frames: ``top`` is (class, score), best first; a class is its name where
    the network knows it, else its index. ``seconds`` into the stream, where its rate is known."""

    stream: str
    frame: int
    top: list[tuple[int | str, float]]
    seconds: float | None = None


def prepare(frame: Tensor, config: dict[str, Any], size: int) -> Tensor:
    """uint8 (3, H, W) to float32 (3, size, size): shorter side to ``size``, centre crop, normalised as in training."""
    return normalise(square(frame, size), config)


def load_network(
    name: str, *, checkpoint: str | Path | None = None, random_weights: bool = False, **options: Any
) -> Any:
    """A continual network in eval mode: a folder, or a name of the zoo.

    Raises:
        ValueError: neither shipped weights, a checkpoint nor ``random_weights``; or a network that does not run on
            streams.
    """
    import sparing
    from sparing.zoo.registry import tagged_names
    from sparing.zoo.table import MODELS

    if Path(name).is_dir():
        network: Any = sparing.load(name)
    else:
        shipped = any(MODELS[tagged].source for tagged in tagged_names(name))
        if checkpoint is None and not random_weights and not shipped:
            raise ValueError(
                f"{name} has no weights of its own: give --checkpoint FILE, or --random-weights to try the pipe"
            )
        network = sparing.create_model(
            name,
            pretrained=shipped and checkpoint is None and not random_weights,
            checkpoint_path=None if checkpoint is None else str(checkpoint),
            **options,
        )
    if not hasattr(network, "step"):
        raise ValueError(f"{name} does not run on streams; see sparing models 'co_*'")
    return network.eval()


def _video(source: str, *, every: int) -> tuple[Iterator[Tensor], float | None]:
    """Frames of a file, a camera or an address, and its frames per second where a file states them."""
    from sparing.media.video import is_live, read_frames, read_live, video_rate

    if is_live(source):
        return read_live(source, every=every), None
    frames = read_frames(source, every=every)
    try:
        return frames, video_rate(source) / every
    except ValueError:  # it plays, but states no rate; what cannot be played is said by the first frame
        return frames, None


def _audio(source: str, config: dict[str, Any]) -> tuple[Iterator[Tensor], float | None]:
    """Hops of samples of a file, and hops per second."""
    from sparing.continual import hops_of
    from sparing.media.audio import read_audio

    samples, rate = read_audio(source, rate=config["sample_rate"])
    return iter(hops_of(samples, config["hop"]).T), rate / config["hop"]


def watch(
    sources: Sequence[str | Path],
    network: Any,
    *,
    size: int | None = None,
    every: int = 1,
    topk: int = 3,
    max_frames: int | None = None,
    compile: bool = False,
) -> Iterator[Spoken]:
    """Step all sources together until they end; yields what is said as it is said.

    Args:
        sources: files; for video also cameras (``0``) and addresses.
        network: takes frames (3, size, size) or, when its ``pretrained_cfg`` says that it takes audio, hops.
        size: height and width of frames; None: what the network was trained with.
        every: take each n-th frame of a video.

    Raises:
        FileNotFoundError, ValueError: a source that cannot be read, before anything is stepped; no source.
    """
    from sparing.continual import StreamBatch

    config = getattr(network, "pretrained_cfg", None) or {}
    names, audio = config.get("label_names") or (), config.get("kind") == "audio"
    side: Any = size or config.get("image_size") or getattr(network, "image_size", 224)
    streams, rates = {}, {}
    for index, source in enumerate(sources):
        name = f"{index}: {Path(source).name}"
        streams[name], rates[name] = _audio(str(source), config) if audio else _video(str(source), every=every)
    if not streams:
        raise ValueError("give at least one video or audio file")
    shape: tuple[int, ...] = (config["hop"],) if audio else (3, side, side)
    batch = StreamBatch(network, seats=len(streams), frame_shape=shape, compile=compile)
    counts = dict.fromkeys(streams, 0)
    for name in streams:
        batch.join(name)
    while streams:
        frames = {}
        for name in list(streams):
            frame = None if max_frames is not None and counts[name] >= max_frames else next(streams[name], None)
            if frame is None:
                del streams[name]
                batch.leave(name)
            else:
                frames[name] = frame if audio else prepare(frame, config, side)
        for name, scores in batch.step(frames).items():
            best = scores.flatten().topk(min(topk, scores.numel()))
            classes = [names[i] if i < len(names) else i for i in best.indices.tolist()]
            rate = rates[name]
            seconds = None if rate is None else round((counts[name] + 1) / rate, 3)
            yield Spoken(name, counts[name], list(zip(classes, best.values.tolist())), seconds)
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of this recipe."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    parser.add_argument("--model", default="co_x3d_micro")
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
        options.sources,
        network,
        every=options.every,
        topk=options.topk,
        max_frames=options.max_frames,
        compile=options.compile,
    )
    for row in rows:
        spoken.append(row)
        scores = "  ".join(f"{label}: {score:.3f}" for label, score in row.top)
        when = f"frame {row.frame:6}" if row.seconds is None else f"{row.seconds:9.2f} s"
        print(f"{row.stream:32} {when}  {scores}")
    seconds = time.perf_counter() - start
    print(f"{len(spoken)} predictions in {seconds:.1f} s, {len(spoken) / seconds:.1f} a second over all streams")
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in spoken], indent=1) + "\n")
    if options.plot:
        plot(spoken, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
