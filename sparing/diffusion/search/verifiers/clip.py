"""CLIP as a verifier, through open_clip: how well an image fits its prompt, or a class.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021; the score and its scale
after Hessel et al., "CLIPScore", 2021.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparing.diffusion.search.verifiers.base import Verifier
from sparing.diffusion.search.verifiers.images import Preprocessing, as_images
from sparing.zoo.inputs import placement
from sparing.zoo.profile import evaluation
from sparing.zoo.registry import create_model

__all__ = ["CLIPClassLogit", "CLIPEncoder", "CLIPScore"]

DEFAULT_MODEL, DEFAULT_WEIGHTS = "ViT-L-14-quickgelu", "openai"


class CLIPEncoder:
    """Image and text features of an open_clip model, L2-normalised, float32; texts are encoded once.

    Args:
        model: open_clip's name for it, or a live model.
        pretrained: open_clip's tag of published weights; ignored for a live model.
        tokenizer: ``list[str] -> (B, tokens)``; open_clip's for the name, or CLIP's own for a live model.
        device: where to put it; a live model stays where it is when None.

    Raises:
        ValueError: an unknown model or tag, or weights that were trained with the other GELU.
        ConnectionError: the weights are not here and cannot be downloaded.
    """

    def __init__(
        self,
        model: str | nn.Module = DEFAULT_MODEL,
        *,
        pretrained: str | None = DEFAULT_WEIGHTS,
        tokenizer: Any = None,
        device: str | torch.device | None = None,
    ) -> None:
        import open_clip

        if isinstance(model, str):
            if pretrained is None:
                raise ValueError(f"a CLIP that scores needs weights: name the tag of {model!r}, or pass a live model")
            _check_activation(model, pretrained)
            name = model
            model = create_model(f"open_clip/{name}:{pretrained}", pretrained=True)
            tokenizer = tokenizer or open_clip.get_tokenizer(name)
        for needed in ("encode_image", "encode_text", "visual"):
            if not hasattr(model, needed):
                raise TypeError(f"{type(model).__name__} is no open_clip model: it has no {needed}")
        self.model = model if device is None else model.to(device)
        self.tokenizer = tokenizer or open_clip.SimpleTokenizer()
        self.context_length = int(getattr(model, "context_length", 77) or 77)
        self.preprocess = Preprocessing.of_clip(model)
        self._texts: dict[str, Tensor] = {}

    @property
    def logit_scale(self) -> float:
        """exp of the trained temperature, about 100 for OpenAI's weights."""
        return float(torch.as_tensor(self.model.logit_scale).exp())

    def images(self, images: Tensor) -> Tensor:
        """Features ``(B, D)`` of images ``(B, 3, H, W)`` in [0, 1]."""
        model: Any = self.model
        device, dtype = placement(self.model)
        with evaluation(self.model):
            features = model.encode_image(self.preprocess(images.to(device).float()).to(dtype))
        return nn.functional.normalize(features.float(), dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features ``(B, D)`` of texts; longer ones than the context are cut, with a warning."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            self._texts.update(zip(new, self._encoded(new), strict=True))
        return torch.stack([self._texts[text] for text in texts])

    def classes(self, names: Sequence[str]) -> Tensor:
        """Zero-shot heads ``(B, D)``: the normalised mean over OpenAI's 80 templates of normalised text features."""
        import open_clip

        wanted = list(dict.fromkeys(names))
        templates = [[template(name) for template in open_clip.OPENAI_IMAGENET_TEMPLATES] for name in wanted]
        heads = {
            name: nn.functional.normalize(self._encoded(texts).mean(dim=0), dim=0)
            for name, texts in zip(wanted, templates, strict=True)
        }
        return torch.stack([heads[name] for name in names])

    def _encoded(self, texts: Sequence[str]) -> Tensor:
        model: Any = self.model
        device, _ = placement(self.model)
        tokens = self.tokenizer(list(texts), context_length=self.context_length).to(device)
        if hasattr(self.tokenizer, "encode"):
            long = [text for text in texts if len(self.tokenizer.encode(text)) + 2 > self.context_length]
            if long:
                warnings.warn(
                    f"CLIP reads the first {self.context_length} tokens of a prompt; cut: {long[0][:60]!r}...",
                    stacklevel=2,
                )
        with evaluation(self.model), torch.no_grad():
            features = model.encode_text(tokens)
        return nn.functional.normalize(features.float(), dim=-1)


def _check_activation(name: str, tag: str) -> None:
    """OpenAI's weights need QuickGELU; open_clip only warns when the named architecture has the other one."""
    import open_clip

    config = open_clip.get_model_config(name)
    found = open_clip.get_pretrained_cfg(name, tag)
    if not config or not found:
        return  # an unknown name or tag is refused where the model is made, with the closest ones
    trained, built = (bool(source.get("quick_gelu", False)) for source in (found, config))
    if trained != built:
        right = f"{name}-quickgelu" if trained else name.removesuffix("-quickgelu")
        raise ValueError(
            f"weights {tag!r} of {name!r} were trained with {'QuickGELU' if trained else 'GELU'}, which {name!r} does "
            f"not have: name {right!r}"
        )


class CLIPScore(Verifier):
    """``scale * max(cos(image, prompt), 0)``.

    Args:
        model: see :class:`CLIPEncoder`; an encoder may be shared between verifiers.
        scale: 2.5 is CLIPScore's.
        encoder: as of :class:`CLIPEncoder`, with the other keywords.
    """

    name, needs_text, differentiable = "clip", True, True

    def __init__(
        self, model: "str | nn.Module | CLIPEncoder" = DEFAULT_MODEL, *, scale: float = 2.5, **encoder: Any
    ) -> None:
        self.encoder = model if isinstance(model, CLIPEncoder) else CLIPEncoder(model, **encoder)
        self.scale = scale

    def measure(self, samples: Any, prompts: Sequence[Any]) -> Tensor:
        images = self.encoder.images(as_images(samples, name=self.name))
        cosine = (images * self.encoder.texts(prompts)).sum(dim=-1)
        return self.scale * cosine.clamp(min=0)


class CLIPClassLogit(Verifier):
    """Zero-shot logit of a class: ``exp(logit_scale) * cos(image, class)``.

    Args:
        model: see :class:`CLIPEncoder`.
        classes: names; None: ImageNet's 1000, as open_clip words them.
        target: index or name of the class; None: the prompt of each sample, an index or a name.
        encoder: as of :class:`CLIPEncoder`, with the other keywords.
    """

    name, differentiable = "clip_class", True

    def __init__(
        self,
        model: "str | nn.Module | CLIPEncoder" = DEFAULT_MODEL,
        *,
        classes: Sequence[str] | None = None,
        target: int | str | None = None,
        **encoder: Any,
    ) -> None:
        import open_clip

        self.classes = list(open_clip.IMAGENET_CLASSNAMES if classes is None else classes)
        if not self.classes:
            raise ValueError("classes is empty; give at least one name")
        self.target = None if target is None else self._class_name(target)
        self.encoder = model if isinstance(model, CLIPEncoder) else CLIPEncoder(model, **encoder)
        self._heads: dict[str, Tensor] = {}

    def measure(self, samples: Any, prompts: Sequence[Any]) -> Tensor:
        names = [self.target or self._class_name(prompt) for prompt in prompts]
        new = [name for name in dict.fromkeys(names) if name not in self._heads]
        if new:
            self._heads.update(zip(new, self.encoder.classes(new), strict=True))
        images = self.encoder.images(as_images(samples, name=self.name))
        return self.encoder.logit_scale * (images * torch.stack([self._heads[name] for name in names])).sum(dim=-1)

    def _class_name(self, given: Any) -> str:
        """A name of the list by its index; a text is taken as a class of its own."""
        if isinstance(given, str) and given.strip():
            return given
        if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(self.classes):
            return self.classes[given]
        raise ValueError(
            f"verifier {self.name!r} needs a class name or an index below {len(self.classes)} for every sample, "
            f"got {given!r}"
        )
