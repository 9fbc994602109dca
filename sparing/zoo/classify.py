"""Image files through a classifier: predictions, the files that could not be read, and agreement with the host."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from sparing.media.image import find_images, read_image
from sparing.zoo.compare import feature_cosine, pooled_features, status_of, top1_agreement
from sparing.zoo.hosts import as_dict, is_saved_name
from sparing.zoo.inputs import placement
from sparing.zoo.profile import evaluation
from sparing.zoo.registry import create_model


@dataclass(frozen=True, slots=True)
class Prediction:
    """The likeliest classes of one file, best first."""

    path: str
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Classification:
    """Predictions in the order of the files, and for each file that could not be read, why (``failures``: path,
    reason).

    ``status`` is the model's; ``top1_agreement`` and ``feature_cosine`` hold it against its host on these images,
    None where no host was given.
    """

    status: str
    predictions: tuple[Prediction, ...]
    failures: tuple[tuple[str, str], ...]
    top1_agreement: float | None = None
    feature_cosine: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return asdict(self)


def classify(
    model: nn.Module,
    paths: Sequence[str | Path],
    *,
    host: nn.Module | None = None,
    topk: int = 5,
    batch_size: int = 16,
    convert: bool = False,
) -> Classification:
    """Classifies image files with the preprocessing that the model's ``pretrained_cfg`` names.

    Args:
        model: a timm-style classifier or a twin of one.
        paths: files, and folders searched to any depth.
        host: hold the predictions against this model on the same images.
        topk: classes a prediction lists.
        batch_size: images at a time.
        convert: allow conversion of colour modes (:func:`sparing.media.image.read_image`).

    Raises:
        ValueError: a folder without images, a model without a classifier or without preprocessing, or a number below 1.
        FileNotFoundError: a path that is not there and looks like no image.
    """
    from timm.data import create_transform, resolve_data_config

    if topk < 1 or batch_size < 1:
        raise ValueError(f"topk and batch_size must be at least 1, got {topk} and {batch_size}")
    labels = label_names(model)
    cfg = _pretrained_cfg(model)
    settings = resolve_data_config(pretrained_cfg=cfg, model=model)
    transform = create_transform(**settings, is_training=False)
    device, dtype = placement(model)
    models = [model] if host is None else [model, host]
    predictions: list[Prediction] = []
    failures: list[tuple[str, str]] = []
    answers: list[list[tuple[Tensor, Tensor | None]]] = [[] for _ in models]
    images = _readable(find_images(paths), settings["input_size"][0], convert=convert, failures=failures)
    with evaluation(*models), torch.inference_mode():
        for names, batch in _batches(images, batch_size):
            pixels = torch.stack([cast(Tensor, transform(image)) for image in batch]).to(device=device, dtype=dtype)
            for record, member in zip(answers, models, strict=True):
                record.append((member(pixels), pooled_features(member, pixels) if host is not None else None))
            best = answers[0][-1][0].float().softmax(dim=1).topk(min(topk, len(labels)), dim=1)
            for name, chances, indices in zip(names, best.values.tolist(), best.indices.tolist(), strict=True):
                predictions.append(Prediction(str(name), tuple(labels[i] for i in indices), tuple(chances)))
    same, cosine = _agreement(answers) if host is not None and predictions else (None, None)
    return Classification(status_of(model), tuple(predictions), tuple(failures), same, cosine)


def label_names(model: nn.Module) -> list[str]:
    """Names of a classifier's classes: its ``pretrained_cfg``'s own, ImageNet's where the number of classes says so,
    else numbers.

    Raises:
        ValueError: the model has no classifier.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    classes = getattr(model, "num_classes", None)
    if not isinstance(classes, int) or classes < 2:
        raise ValueError(f"{type(model).__name__} has no classifier (num_classes {classes}): classify needs one")
    own = _pretrained_cfg(model).get("label_names")
    if own is not None and len(own) == classes:
        return list(own)
    subset = infer_imagenet_subset(model)
    if subset is None:
        return [f"class {index}" for index in range(classes)]
    info = ImageNetInfo(subset)
    return [info.index_to_description(index) for index in range(classes)]


def _pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if cfg is None:
        raise ValueError(f"{type(model).__name__} has no pretrained_cfg to say its image size and normalisation")
    return as_dict(cfg)


def _readable(
    paths: Sequence[Path], channels: int, *, convert: bool, failures: list[tuple[str, str]]
) -> Iterator[tuple[Path, Image.Image]]:
    """Images that can be read; the others go to ``failures`` and the rest goes on."""
    for path in paths:
        try:
            yield path, read_image(path, channels=channels, convert=convert)
        except (ValueError, OSError) as error:
            failures.append((str(path), str(error)))


def _batches(images: Iterator[tuple[Path, Image.Image]], size: int) -> Iterator[tuple[list[Path], list[Image.Image]]]:
    names: list[Path] = []
    batch: list[Image.Image] = []
    for name, image in images:
        names.append(name)
        batch.append(image)
        if len(batch) == size:
            yield names, batch
            names, batch = [], []
    if batch:
        yield names, batch


def _agreement(answers: list[list[tuple[Tensor, Tensor | None]]]) -> tuple[float | None, float | None]:
    (logits, features), (host_logits, host_features) = (
        (torch.cat([batch[0] for batch in record]), [batch[1] for batch in record if batch[1] is not None])
        for record in answers
    )
    both = bool(features) and bool(host_features)
    cosine = feature_cosine(torch.cat(features), torch.cat(host_features)) if both else None
    return top1_agreement(logits, host_logits), cosine


def load_classifier(
    name: str | None,
    weights: str | Path | None,
    *,
    device: "str | torch.device | None" = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A model that is never random: its published or shipped weights, or those given.

    Args:
        name: what ``create_model`` takes; None when ``weights`` is a folder that says what it holds.
        weights: a checkpoint file for the named model, or a folder written by ``save_pretrained``.
        device: where to; ``dtype`` likewise.

    Raises:
        ValueError: a checkpoint file without a name, or a name and a folder that is a whole model.
    """
    if weights is None:
        if name is None:
            raise ValueError("a model's name or a folder with its weights is needed")
        return create_model(name, pretrained=not is_saved_name(name), dtype=dtype).to(device=device).eval()
    if Path(weights).is_dir() and (Path(weights) / "config.json").is_file():
        if name is not None:
            raise ValueError(f"{str(weights)!r} is a whole saved model: give it alone, without the name {name!r}")
        return create_model(str(weights), dtype=dtype).to(device=device).eval()
    if not Path(weights).exists():
        raise FileNotFoundError(f"no such file or folder: {str(weights)!r}")
    if name is None:
        raise ValueError(f"{str(weights)!r} holds weights only: name the model they belong to")
    return create_model(name, checkpoint_path=weights, dtype=dtype).to(device=device).eval()
