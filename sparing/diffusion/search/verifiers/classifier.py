"""Verifiers that read a classifier or an encoder: class logits and probabilities, and distance to known features."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparing.diffusion.search.verifiers.base import Verifier
from sparing.diffusion.search.verifiers.images import Preprocessing, as_images
from sparing.zoo.classify import label_names, load_classifier
from sparing.zoo.compare import main_tensor, pooled_features
from sparing.zoo.hosts import is_saved_name
from sparing.zoo.inputs import placement
from sparing.zoo.profile import evaluation
from sparing.zoo.table import closest

__all__ = ["ClassifierLogit", "Encoder", "FeatureKNN", "InceptionClassProb"]

OUTPUTS = ("logit", "log_prob", "prob")


def _opened(model: str | Path | nn.Module, weights: str | Path | None) -> nn.Module:
    """A live model as it is; a name never random."""
    if isinstance(model, nn.Module):
        return model
    name = str(model)
    if weights is None and is_saved_name(name) and Path(name).is_dir():
        return load_classifier(None, name)
    return load_classifier(name, weights)


class ClassifierLogit(Verifier):
    """Output of a classifier for the wanted class.

    Args:
        model: a timm, torch or ``sparing`` classifier ``(B, C, H, W) -> (B, classes)``, or a name or folder that
            ``sparing.create_model`` knows, opened with its weights.
        target: index of the class, or its name; None: the prompt of each sample (the label of a class-conditional
            pipeline).
        output: 'log_prob' (log-softmax, default), 'logit' (raw) or 'prob'.
        weights: a checkpoint for a named model.
        preprocess: sizes and normalisation; None: as the model's ``pretrained_cfg`` says, and without one images in
            [0, 1] as they are.
        device: where to put the model; None: where it is.
    """

    name, differentiable = "classifier", True

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        target: int | str | None = None,
        output: str = "log_prob",
        weights: str | Path | None = None,
        preprocess: Preprocessing | Callable[[Tensor], Tensor] | None = None,
        device: str | torch.device | None = None,
        name: str | None = None,
    ) -> None:
        if output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
        opened = _opened(model, weights)
        self.model = opened if device is None else opened.to(device)
        self.output, self.target = output, target
        self.preprocess = preprocess or Preprocessing.of(opened)
        self.name = name or self.name
        self._labels: list[str] | None = None
        if isinstance(target, str):
            self.target = self._index(target, None)

    def measure(self, samples: Any, prompts: Sequence[Any]) -> Tensor:
        images = as_images(samples, name=self.name)
        device, dtype = placement(self.model)
        with evaluation(self.model):
            logits = main_tensor(self.model(self.preprocess(images.to(device).float()).to(dtype)))
        if logits is None or logits.ndim != 2:
            shape = None if logits is None else tuple(logits.shape)
            raise ValueError(f"verifier {self.name!r} needs a classifier (B, classes); the model returned {shape}")
        wanted = [self._index(prompt if self.target is None else self.target, logits.shape[1]) for prompt in prompts]
        logits = logits.float()
        if self.output != "logit":
            logits = logits.log_softmax(dim=1)
        picked = logits[torch.arange(len(wanted)), torch.tensor(wanted)]
        return picked.exp() if self.output == "prob" else picked

    def _index(self, label: Any, classes: int | None) -> int:
        """A class index from an index or a name; ``classes`` of the output, when known."""
        if isinstance(label, str):
            if self._labels is None:
                self._labels = label_names(self.model)
            if label in self._labels:
                return self._labels.index(label)
            near = closest(label, self._labels) or f"it has {len(self._labels)}, {self._labels[0]!r} the first"
            raise ValueError(f"verifier {self.name!r} knows no class {label!r}; {near}")
        if isinstance(label, bool) or not isinstance(label, int):
            raise ValueError(
                f"verifier {self.name!r} needs a class for every sample, got {label!r}: give target=, or labels as "
                "prompts"
            )
        if label < 0 or (classes is not None and label >= classes):
            raise ValueError(f"verifier {self.name!r} has classes 0 to {(classes or 1) - 1}, got {label}")
        return label


class InceptionClassProb(ClassifierLogit):
    """Softmax probability of the condition's class: the paper's oracle for the Inception Score, with any classifier.

    Args:
        model: the paper's is Inception v3, e.g. ``'timm/inception_v3.tv_in1k'``.
        target, kwargs: as of :class:`ClassifierLogit`.
    """

    name = "class_prob"

    def __init__(self, model: str | Path | nn.Module, *, target: int | str | None = None, **kwargs: Any) -> None:
        super().__init__(model, target=target, output="prob", **kwargs)


class Encoder:
    """Images ``(B, 3, H, W)`` in [0, 1] to features ``(B, D)`` float32, of anything that has features.

    Args:
        model: a timm-style model (features before its head), an open_clip model or :class:`CLIPEncoder`, any module or
            callable ``(B, 3, H, W) -> (B, D)``, or a name that ``sparing.create_model`` opens.
        preprocess: None: as the model says.
    """

    def __init__(self, model: Any, *, preprocess: Callable[[Tensor], Tensor] | None = None) -> None:
        if isinstance(model, str | Path):
            model = _opened(model, None)
        if isinstance(model, nn.Module) and hasattr(model, "encode_image"):
            from sparing.diffusion.search.verifiers.clip import CLIPEncoder

            model = CLIPEncoder(model)
        if not isinstance(model, nn.Module) and not hasattr(model, "images") and not callable(model):
            raise TypeError(f"features come from a model or a callable, got {type(model).__name__}")
        self.model = model
        self.preprocess = preprocess or (Preprocessing.of(model) if isinstance(model, nn.Module) else lambda x: x)

    def __call__(self, images: Tensor) -> Tensor:
        if hasattr(self.model, "images"):
            return self.model.images(images)
        if not isinstance(self.model, nn.Module):
            return torch.as_tensor(self.model(self.preprocess(images))).flatten(1).float()
        device, dtype = placement(self.model)
        with evaluation(self.model):
            pixels = self.preprocess(images.to(device).float()).to(dtype)
            features = pooled_features(self.model, pixels)
            if features is None:
                features = main_tensor(self.model(pixels))
        if features is None:
            raise ValueError(f"{type(self.model).__name__} returned no features")
        return features.flatten(1).float()


class FeatureKNN(Verifier):
    """Minus the mean Euclidean distance to the ``k`` nearest features of a reference set.

    Args:
        encoder: see :class:`Encoder`.
        reference: images ``(N, 3, H, W)`` in [0, 1], or features ``(N, D)``.
        k: neighbours.
    """

    name, differentiable = "feature_knn", True

    def __init__(self, encoder: Any, reference: Tensor, *, k: int = 1, batch_size: int = 64) -> None:
        self.encoder = encoder if isinstance(encoder, Encoder) else Encoder(encoder)
        if reference.ndim == 4:
            images = as_images(reference, name=self.name)
            with torch.no_grad():
                reference = torch.cat([self.encoder(part) for part in images.split(batch_size)])
        if reference.ndim != 2 or not 1 <= k <= len(reference):
            raise ValueError(
                f"the reference is images (N, 3, H, W) or features (N, D) with k <= N, got {tuple(reference.shape)} "
                f"and k={k}"
            )
        self.reference, self.k = reference.float(), k

    def measure(self, samples: Any, prompts: Sequence[Any]) -> Tensor:
        features = self.encoder(as_images(samples, name=self.name))
        if features.shape[1] != self.reference.shape[1]:
            raise ValueError(
                f"verifier {self.name!r}: features have {features.shape[1]} entries, the reference "
                f"{self.reference.shape[1]}"
            )
        distances = torch.cdist(features, self.reference.to(features), compute_mode="donot_use_mm_for_euclid_dist")
        return -distances.topk(self.k, dim=1, largest=False).values.mean(dim=1)
