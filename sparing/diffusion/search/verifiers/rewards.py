"""Learned preferences: the aesthetic head on CLIP, and adapters for reward models and graders that others bring.

The aesthetic predictor is a stack of linear layers without activations on the normalised image feature of CLIP ViT-L/14
(Schuhmann, "LAION-Aesthetics", 2022). ImageReward (Xu et al. 2023) and language-model graders are not rebuilt here:
:class:`PromptReward` and :class:`VLMGrader` say what is asked of them.
"""

import itertools
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparing.diffusion.search.verifiers.base import Verifier
from sparing.diffusion.search.verifiers.clip import CLIPEncoder
from sparing.diffusion.search.verifiers.images import as_images, to_pil
from sparing.zoo.weights import download, fill, read_state

__all__ = ["Aesthetic", "AestheticHead", "PromptReward", "VLMGrader"]

_HEAD = ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
_DROPOUT_AFTER = {0: 0.2, 2: 0.2, 4: 0.1}  # layers 1, 3 and 5 of the published stack


class AestheticHead(nn.Module):
    """Linear layers under the published names ``layers.{0,2,4,6,7}``, dropout between the first four.

    Args:
        widths: of the feature and of every layer.
    """

    def __init__(self, widths: Sequence[int] = (768, 1024, 128, 64, 16, 1)) -> None:
        super().__init__()
        if len(widths) != 6 or widths[-1] != 1:
            raise ValueError(f"an aesthetic head has 5 layers that end in 1 number, got widths {tuple(widths)}")
        linear = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        drop = [nn.Dropout(share) for share in _DROPOUT_AFTER.values()]
        self.layers = nn.Sequential(linear[0], drop[0], linear[1], drop[1], linear[2], drop[2], linear[3], linear[4])

    def forward(self, features: Tensor) -> Tensor:
        """``(B, D)`` -> ``(B,)``."""
        return self.layers(features)[..., 0]

    @classmethod
    def from_file(cls, path: str | Path) -> "AestheticHead":
        """Reads safetensors or a ``.pth`` of tensors; widths are those of the file.

        Raises:
            ValueError: the file holds something else.
        """
        state = {name.removeprefix("module."): tensor for name, tensor in read_state(path).items()}
        weights = [state.get(f"layers.{i}.weight") for i in (0, 2, 4, 6, 7)]
        shapes = [tuple(weight.shape) for weight in weights if weight is not None and weight.ndim == 2]
        if len(shapes) != 5:
            raise ValueError(
                f"{str(path)!r} holds no aesthetic head: layers.0, 2, 4, 6, 7 are wanted, it has "
                f"{', '.join(list(state)[:6])}"
            )
        head = cls([shapes[0][1], *(rows for rows, _ in shapes)])
        fill(head, state, origin=repr(str(path)))
        return head.eval()


class Aesthetic(Verifier):
    """LAION's aesthetic score, roughly 1 to 10. Ignores the prompt.

    Args:
        head: a head, its file, or None: the published one from the hub (``trl-lib/ddpo-aesthetic-predictor``).
        encoder: a :class:`CLIPEncoder`, or an open_clip name or model; the published head is for ViT-L/14 of OpenAI.
    """

    name, differentiable = "aesthetic", True

    def __init__(
        self,
        head: AestheticHead | str | Path | None = None,
        *,
        encoder: CLIPEncoder | str | nn.Module | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if not isinstance(head, nn.Module):
            head = AestheticHead.from_file(download(*_HEAD) if head is None else head)
        if not isinstance(encoder, CLIPEncoder):
            encoder = CLIPEncoder(device=device) if encoder is None else CLIPEncoder(encoder, device=device)
        self.encoder, self.head = encoder, head.eval() if device is None else head.eval().to(device)

    def measure(self, samples: Any, prompts: Sequence[Any]) -> Tensor:
        features = self.encoder.images(as_images(samples, name=self.name))
        first: Tensor = next(self.head.parameters())
        if features.shape[1] != first.shape[1]:
            raise ValueError(
                f"the aesthetic head takes features of {first.shape[1]} numbers, this CLIP gives {features.shape[1]}"
            )
        return self.head.float()(features.to(first.device))


class PromptReward(Verifier):
    """A reward model that somebody else runs, e.g. ImageReward.

    Args:
        reward: ``f(images, prompts) -> B numbers``; images are B PIL images, or the tensor with ``as_pil=False``.
        mean, std: of its raw values; ImageReward's own are 0.16717362830052426 and 1.0333394966054072 (its ``score``
            subtracts them already).

    Example::

        import ImageReward
        model = ImageReward.load("ImageReward-v1.0")
        verifier = PromptReward(lambda images, prompts: [model.score(p, i) for i, p in zip(images, prompts)],
                                name="image_reward")
    """

    needs_text = True

    def __init__(
        self,
        reward: Callable[[Any, Sequence[str]], Any],
        *,
        name: str = "reward",
        mean: float = 0.0,
        std: float = 1.0,
        as_pil: bool = True,
        batch_size: int | None = None,
    ) -> None:
        if not callable(reward):
            raise TypeError(f"a reward is a callable f(images, prompts), got {type(reward).__name__}")
        if not std > 0:
            raise ValueError(f"std must be above 0, got {std}")
        self.reward, self.name, self.mean, self.std = reward, name, mean, std
        self.as_pil, self.batch_size = as_pil, batch_size

    def measure(self, samples: Any, prompts: Sequence[Any]) -> Tensor:
        images = to_pil(samples, name=self.name) if self.as_pil else as_images(samples, name=self.name)
        values = self.reward(images, list(prompts))
        return (torch.as_tensor(values, dtype=torch.float32) - self.mean) / self.std


ASPECTS = ("accuracy", "creativity", "visual quality", "consistency", "resonance")

QUESTION = (
    "Grade this image for the prompt {prompt!r}. Answer with JSON only: numbers from 0 to 10 for the keys {keys} and "
    "'overall'."
)


class VLMGrader(Verifier):
    """A language model that sees, as a grader.

    The adapter's contract: ``ask(image, question) -> text``, one PIL image and one question in, the answer out. The
    answer holds one JSON object, alone or in other words, with a number from 0 to 10 under ``key`` (and under the
    aspects, which ``last`` keeps for the caller). An answer that cannot be read, or an exception while asking, is asked
    for once more; after that the sample's score is NaN with a warning. The search goes on.

    Args:
        ask: see above; network, keys and models are the caller's.
        key: what counts as the score.
        aspects: further keys that are asked for.
        question: with ``{prompt!r}`` and ``{keys}``.
        top: highest grade.
    """

    name, needs_text = "grader", True

    def __init__(
        self,
        ask: Callable[[Any, str], str],
        *,
        key: str = "overall",
        aspects: Sequence[str] = ASPECTS,
        question: str = QUESTION,
        top: float = 10.0,
        name: str | None = None,
    ) -> None:
        if not callable(ask):
            raise TypeError(f"a grader is a callable ask(image, question), got {type(ask).__name__}")
        self.ask, self.key, self.aspects, self.question, self.top = ask, key, tuple(aspects), question, top
        self.name = name or self.name
        self.last: list[Mapping[str, Any] | None] = []

    def measure(self, samples: Any, prompts: Sequence[Any]) -> list[float]:
        images = to_pil(samples, name=self.name)
        self.last = [self._graded(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return [math.nan if answer is None else float(answer[self.key]) for answer in self.last]

    def _graded(self, image: Any, prompt: str) -> Mapping[str, Any] | None:
        question = self.question.format(prompt=prompt, keys=", ".join(map(repr, self.aspects)))
        reason = ""
        for _ in range(2):
            try:
                return self._read(self.ask(image, question))
            except Exception as error:  # whatever a caller's network raises
                reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"verifier {self.name!r} got no grade in two tries ({reason[:200]}): NaN", stacklevel=2)
        return None

    def _read(self, answer: str) -> Mapping[str, Any]:
        """The first JSON object of an answer that has the key.

        Raises:
            ValueError: there is none, or its grade is no number from 0 to top.
        """
        decoder, start = json.JSONDecoder(), answer.find("{")
        while start >= 0:
            try:
                found, _ = decoder.raw_decode(answer, start)
            except ValueError:
                found = None
            if isinstance(found, dict) and self.key in found:
                grade = found[self.key]
                if isinstance(grade, bool) or not isinstance(grade, int | float) or not 0 <= grade <= self.top:
                    raise ValueError(f"grade {self.key!r} is {grade!r}, a number from 0 to {self.top:g} is needed")
                return found
            start = answer.find("{", start + 1)
        raise ValueError(f"no JSON object with {self.key!r} in the answer")
