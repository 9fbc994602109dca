"""Follow several videos, cameras or recordings at once with one continual network: scores over time, frames per second.

    python -m sparing.recipes.stream a.mp4 b.mp4 --model co_x3d_micro
    python -m sparing.recipes.stream recording.wav --model co_spotter_micro --json said.json
    python -m sparing.recipes.stream 0 rtsp://camera/1 --model co_x3d_s --checkpoint x3d_s.pyth --every 6

Every source is a live stream with its own seat; a file that ends leaves, the others go on, and so they do when one
fails on the way or ends before the network could speak (one line on standard error, exit code 2). What was said is
written to ``--json`` and ``--plot`` at the end, after Ctrl-C too (exit code 130). Video frames are scaled,
cropped and normalised as the network was trained; audio comes in hops of samples. Scores come once a stream has given
as many frames as the network's delay. ``--model`` is a network of the zoo (with shipped weights, or with
``--checkpoint``) or a folder that the recipe train_clip wrote.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
    the network knows it, else its index; None where the scores are NaN (a broken frame is within sight). ``seconds``
    into the stream, where its rate is known."""

    stream: str
    frame: int
    top: list[tuple[int | str, float]] | None
    seconds: float | None = None


def prepare(frame: Tensor, config: dict[str, Any], size: int) -> Tensor:
    """uint8 (3, H, W) to float32 (3, size, size): shorter side to ``size``, centre crop, normalised as in training."""
    return normalise(square(frame, size), config)


def load_network(
    name: str, *, checkpoint: str | Path | None = None, random_weights: bool = False, **options: Any
) -> Any:
    """A continual network in eval mode: a folder, or a name of the zoo.

    Raises:
        ValueError: an unknown name; neither shipped weights, a checkpoint nor ``random_weights``; options that the
            network does not take (a folder takes none); or a network that does not run on streams.
    """
    import sparing
    from sparing.zoo.hosts import is_host_name
    from sparing.zoo.registry import tagged_names
    from sparing.zoo.table import MODELS, find_entry

    given = {"checkpoint": checkpoint is not None, "random_weights": random_weights} | dict.fromkeys(options, True)
    if Path(name).is_dir():
        if any(given.values()):
            ignored = ", ".join(_FLAGS.get(option, option) for option, is_given in given.items() if is_given)
            raise ValueError(f"{name} is a trained network with its weights and sizes: it takes no {ignored}")
        network: Any = sparing.load(name)
    else:
        if not is_host_name(name):
            find_entry(name)
        shipped = any(MODELS[tagged].source for tagged in tagged_names(name))
        if checkpoint is None and not random_weights and not shipped:
            raise ValueError(
                f"{name} has no weights of its own: give --checkpoint FILE, or --random-weights to try the pipe"
            )
        try:
            network = sparing.create_model(
                name,
                pretrained=shipped and checkpoint is None and not random_weights,
                checkpoint_path=None if checkpoint is None else str(checkpoint),
                **options,
            )
        except TypeError as error:
            if not options or "unexpected keyword" not in str(error):
                raise
            refused = ", ".join(_FLAGS.get(option, option) for option in options)
            raise ValueError(f"{name} takes no {refused}") from error
    if not hasattr(network, "step"):
        raise ValueError(f"{name} does not run on streams; see sparing models 'co_*'")
    return network.eval()


# How the command line calls what a network is built with.
_FLAGS = {"temporal_window_size": "--window", "checkpoint": "--checkpoint", "random_weights": "--random-weights"}


def _frames_of(network: Any, size: int | None) -> tuple[bool, tuple[int, ...]]:
    """Whether a network takes sound, and the shape of one frame. ValueError when it takes neither sound nor video."""
    config = getattr(network, "pretrained_cfg", None) or {}
    kind = config.get("kind")
    if kind == "audio":
        return True, (config["hop"],)
    if kind not in (None, "video"):
        raise ValueError(
            f"this network takes {kind}, not video or sound: its frames are to be made by your own program"
        )
    side: Any = size or config.get("image_size") or getattr(network, "image_size", 224)
    if kind is None:
        try:
            network.plan((3, side, side))
        except ValueError as error:
            raise ValueError(f"this network takes neither video nor sound: {error}") from error
    return False, (3, side, side)


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
    failed: Callable[[str, Exception], None] | None = None,
) -> Iterator[Spoken]:
    """Step all sources together until they end; yields what is said as it is said.

    Args:
        sources: files; for video also cameras (``0``) and addresses.
        network: takes frames (3, size, size) or, when its ``pretrained_cfg`` says that it takes audio, hops.
        size: height and width of frames; None: what the network was trained with.
        every: take each n-th frame of a video.
        failed: called with the name of a stream and the error when its source cannot be read further, or ends before
            the network could speak; the other streams go on. None: the error is raised, short sources say nothing.

    Raises:
        FileNotFoundError, ValueError: a source that cannot be opened, before anything is stepped; no source; a network
            that takes neither video nor sound; or ``every`` for sound.
    """
    from sparing.continual import StreamBatch

    config = getattr(network, "pretrained_cfg", None) or {}
    names, (audio, shape) = config.get("label_names") or (), _frames_of(network, size)
    if audio and every != 1:
        raise ValueError(f"every thins out the frames of a video; sound is taken whole, got every={every}")
    streams, rates = {}, {}
    for index, source in enumerate(sources):
        name = f"{index}: {Path(source).name}"
        streams[name], rates[name] = _audio(str(source), config) if audio else _video(str(source), every=every)
    if not streams:
        raise ValueError("give at least one video or audio file")
    batch = StreamBatch(network, seats=len(streams), frame_shape=shape, compile=compile)
    counts, needed = dict.fromkeys(streams, 0), batch.plan.first_output_step + 1
    for name in streams:
        batch.join(name)
    while streams:
        frames = {}
        for name in list(streams):
            frame = None
            try:
                if max_frames is None or counts[name] < max_frames:
                    frame = next(streams[name], None)
                if frame is None and failed is not None and counts[name] < needed:
                    unit = f"hops of {shape[0]} samples" if audio else "frames"
                    raise ValueError(f"ended after {counts[name]} {unit}; the network speaks from {needed} on")
            except (ValueError, OSError) as error:
                if failed is None:
                    raise
                failed(name, error)
            if frame is None:
                del streams[name]
                batch.leave(name)
            else:
                frames[name] = frame if audio else prepare(frame, config, shape[-1])
        for name, scores in batch.step(frames).items():
            rate = rates[name]
            seconds = None if rate is None else round((counts[name] + 1) / rate, 3)
            yield Spoken(name, counts[name], _best(scores.flatten(), topk, names), seconds)
        for name in frames:
            counts[name] += 1


def _best(scores: Tensor, count: int, names: Sequence[str]) -> list[tuple[int | str, float]] | None:
    """The best classes (by name where there is one) with their scores; None when the scores are NaN."""
    if bool(scores.isnan().any()):
        return None
    best = scores.topk(min(count, scores.numel()))
    classes = [names[i] if i < len(names) else i for i in best.indices.tolist()]
    return list(zip(classes, best.values.tolist()))


def plot(spoken: Sequence[Spoken], path: str | Path) -> None:
    """The best score of every stream over its frames; gaps are left where scores were NaN."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 3))
    for name in dict.fromkeys(row.stream for row in spoken):
        rows = [row for row in spoken if row.stream == name]
        best = [row.top[0][1] if row.top else math.nan for row in rows]
        axis.plot([row.frame for row in rows], best, label=name)
    axis.set_xlabel("frame")
    axis.set_ylabel("best score")
    if spoken:
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
    _check_outputs(options.json, options.plot)
    window = {} if options.window is None else {"temporal_window_size": options.window}
    network = load_network(
        options.model, checkpoint=options.checkpoint, random_weights=options.random_weights, **window
    )
    spoken: list[Spoken] = []
    bad: list[str] = []

    def failed(name: str, error: Exception) -> None:
        bad.append(name)
        print(f"error: {name}: {' '.join(str(error).split())}", file=sys.stderr)

    start, stopped = time.perf_counter(), False
    rows = watch(
        options.sources,
        network,
        every=options.every,
        topk=options.topk,
        max_frames=options.max_frames,
        compile=options.compile,
        failed=failed,
    )
    try:
        for row in rows:
            spoken.append(row)
            print(_line(row))
    except KeyboardInterrupt:
        stopped = True
        print("stopped", file=sys.stderr)
    except BaseException:
        if spoken:
            _write(spoken, options.json, options.plot)
        raise
    seconds, count = time.perf_counter() - start, sum(row.top is not None for row in spoken)
    _write(spoken, options.json, options.plot)
    print(f"{count} predictions in {seconds:.1f} s, {count / seconds:.1f} a second over all streams")
    return 130 if stopped else 2 if bad else 0


def _line(row: Spoken) -> str:
    when = f"frame {row.frame:6}" if row.seconds is None else f"{row.seconds:9.2f} s"
    said = "no prediction, the scores are NaN: a broken frame is within sight"
    if row.top is not None:
        said = "  ".join(f"{label}: {score:.3f}" for label, score in row.top)
    return f"{row.stream:32} {when}  {said}"


def _check_outputs(json_file: str | None, plot_file: str | None) -> None:
    """Raise FileNotFoundError or ValueError for results that could not be written in the end."""
    for flag, name in (("--json", json_file), ("--plot", plot_file)):
        if name is None:
            continue
        path = Path(name)
        if path.is_dir():
            raise ValueError(f"{flag} {name} is a folder: give the name of a file")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{flag} {name}: no folder {str(path.parent)!r}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"{flag} {name} cannot be written")
    if plot_file is not None:
        from matplotlib.backend_bases import FigureCanvasBase

        known = sorted(FigureCanvasBase.get_supported_filetypes())
        suffix = Path(plot_file).suffix[1:].lower()
        if suffix and suffix not in known:
            raise ValueError(f"--plot {plot_file}: pictures are {', '.join(known)}, not {suffix!r}")


def _write(spoken: Sequence[Spoken], json_file: str | None, plot_file: str | None) -> None:
    """The results as JSON, numbers that JSON does not know as null, and as a picture."""
    if json_file is not None:
        rows = [asdict(row) for row in spoken]
        for row in rows:
            row["top"] = row["top"] and [
                (label, score if math.isfinite(score) else None) for label, score in row["top"]
            ]
        Path(json_file).write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    if plot_file is not None:
        plot(spoken, plot_file)


if __name__ == "__main__":
    sys.exit(main())
