"""Search for the noise of a diffusion pipeline whose sample a verifier scores highest.

    python -m sparing.recipes.search --model flexdit_dit_micro_patch4_28 --labels 3 5 --steps 20 \
        --verifiers classifier:model=vit_micro_patch4_28.demo_fashion --algorithm random:n=16 --out runs/search

``--model`` is a class-conditional transformer (a name of the zoo with weights, or a folder), ``--pipeline`` a folder or
hub id of any diffusers pipeline that loops over a scheduler, with ``--prompts``, ``--labels`` or neither, as it takes
them. A killed search goes on from ``--out``. The same function is ``sparing search``.
"""

import inspect
import json
import math
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparing.diffusion.pipelines import FlexDiTPipeline
from sparing.diffusion.search import Budget, Draft, NoiseSearch, SearchResult
from sparing.diffusion.search.algorithms import ALGORITHMS, PRESETS
from sparing.diffusion.search.drafts import cached_draft, draft_agreement, fewer_steps, twin_draft
from sparing.diffusion.search.settings import check_whole
from sparing.diffusion.search.verifiers.names import VERIFIERS, key_values, make_verifier, make_verifiers
from sparing.recipes.generate import open_pipeline, open_stored, open_transformer
from sparing.training.checkpoint import atomic_file
from sparing.zoo.table import closest

__all__ = ["condition_of", "make_algorithm", "make_draft", "open_any", "search", "settings_of", "summary"]


def open_any(model: str | Path | None, pipeline: str | Path | None, *, vae: str | Path | None = None) -> Any:
    """The pipeline of ``model`` (as ``recipes.generate.open_pipeline``), or any diffusers pipeline by folder or hub id.

    Raises:
        ValueError: neither or both are given.
        OSError: the pipeline is neither a folder nor on the hub.
    """
    if (model is None) == (pipeline is None):
        raise ValueError("give either model (a class-conditional transformer) or pipeline (any diffusers pipeline)")
    if model is not None:
        return open_pipeline(model, vae=vae)
    assert pipeline is not None
    return open_stored(pipeline)


def condition_of(pipe: Any) -> str | None:
    """What a pipeline is asked for: "prompt", "class_labels", or None where it makes samples of one kind only."""
    parameters = inspect.signature(pipe.__call__).parameters
    if "prompt" in parameters:
        return "prompt"
    if "class_labels" not in parameters:
        return None
    # consistency models take labels by name, whether their network has classes or not
    needed = parameters["class_labels"].default is inspect.Parameter.empty
    return "class_labels" if needed or _num_classes(pipe) else None


def _num_classes(pipe: Any) -> int | None:
    for part in ("transformer", "unet"):
        config = getattr(getattr(pipe, part, None), "config", None)
        for name in ("num_embeds_ada_norm", "num_class_embeds"):
            if getattr(config, name, None):
                return int(getattr(config, name))
    return None


def settings_of(text: str) -> tuple[str, dict[str, Any]]:
    """``NAME[:KEY=VALUE,...]`` with JSON values: ``halving:n=16,stops=[8,14,20],keeps=[8,4,1]``.

    Raises:
        ValueError: a part is no KEY=VALUE.
    """
    name, _, rest = text.partition(":")
    return name.strip(), key_values(rest, of=repr(text))


def make_algorithm(text: str) -> Any:
    """An algorithm from ``NAME[:KEY=VALUE,...]``.

    Raises:
        ValueError: an unknown name (the closest are named), or settings that it does not take.
    """
    name, settings = settings_of(text)
    name = name.lower().replace("-", "_")
    if name not in ALGORITHMS:
        raise ValueError(f"no algorithm {name!r}; {closest(name, ALGORITHMS) or 'there are ' + ', '.join(ALGORITHMS)}")
    try:
        return ALGORITHMS[name](**settings)
    except TypeError as error:
        known = inspect.signature(ALGORITHMS[name]).parameters
        raise ValueError(f"algorithm {text!r}: {error}; it takes {', '.join(known)}") from error


def make_draft(text: str, pipe: Any) -> Draft:
    """``model=NAME_OR_FOLDER`` (a twin), ``cache=THRESHOLD`` (FirstBlockCache), with ``steps=N``, ``density=N`` and
    other arguments of the pipeline beside them or alone.

    Raises:
        ValueError: both a twin and a cache, nothing cheaper, or a twin that is no denoiser.
    """
    _, settings = settings_of(f":{text}")
    if "steps" in settings:
        check_whole(steps=settings["steps"])
        settings["num_inference_steps"] = settings.pop("steps")
    model, cache = settings.pop("model", None), settings.pop("cache", None)
    if model is not None and cache is not None:
        raise ValueError(f"draft {text!r}: take a twin (model=) or a cache (cache=), not both")
    if model is not None:
        return twin_draft(pipe, open_transformer(model), **settings)
    if cache is not None:
        from diffusers import FirstBlockCacheConfig

        if isinstance(cache, bool) or not isinstance(cache, int | float) or cache < 0:
            raise ValueError(f"draft {text!r}: cache is a threshold, 0 or more, got {cache!r}")
        return cached_draft(pipe, FirstBlockCacheConfig(threshold=float(cache)), **settings)
    if "num_inference_steps" in settings:
        return fewer_steps(**settings)
    if not settings:
        raise ValueError("an empty draft: give steps=N, model=NAME, cache=THRESHOLD or arguments of the pipeline")
    return Draft(kwargs=settings)


def search(
    pipe: Any,
    wanted: Sequence[Any],
    verifier: Any,
    algorithm: Any,
    *,
    out: str | Path,
    call: Mapping[str, Any] | None = None,
    budget: Budget | str | None = None,
    seed: int = 0,
    batch_size: Any = "auto",
    report: Sequence[Any] = (),
    draft: Draft | None = None,
    keep: Any = "best",
    force: bool = False,
) -> list[SearchResult]:
    """Runs or goes on with a search, and writes its log, winners, contact sheets and curves into ``out``.

    Args:
        pipe: see :class:`sparing.diffusion.search.NoiseSearch`, as are the arguments not named here.
        wanted: prompts or class labels, each an independent search; empty for a pipeline that takes neither.
        call: further arguments of the pipeline.
        out: folder; ``candidates.jsonl``, ``results.json``, and for each prompt ``best_N.png`` or (video, audio)
            ``best_N.safetensors``, ``sheet_N.png``, and ``curve_N.svg`` where a finished candidate has a finite score.

    Raises:
        ValueError: nothing is wanted, or what :class:`NoiseSearch` refuses.
    """
    if Path(out).is_file():
        raise ValueError(f"out: {str(out)!r} is a file, and a search writes a folder")
    condition, call = condition_of(pipe), dict(call or {})
    if not wanted and condition is not None:
        raise ValueError("nothing to search for: give at least one prompt or class")
    if condition in call:
        raise ValueError(f"{condition} is given twice")
    engine = NoiseSearch(
        pipe,
        verifier,
        algorithm,
        seed=seed,
        batch_size=batch_size,
        out_dir=out,
        budget=budget,
        report=list(report),
        draft=draft,
        keep=keep,
        force=force,
    )
    if condition == "class_labels":
        found = engine(**call, class_labels=list(wanted))
    else:
        found = engine(list(wanted) or None, **call)
    results: list[SearchResult] = found if isinstance(found, list) else [found]
    folder = Path(out)
    for number, result in enumerate(results):
        _write_best(result, folder, number)
    text = json.dumps([summary(result) for result in results], indent=2, default=str, allow_nan=False)
    with atomic_file(folder / "results.json") as file:
        file.write(text.encode())
    for number, result in enumerate(results):
        result.sheet(folder / f"sheet_{number}.png")
        if result.finished:
            _plot(result, folder / f"curve_{number}.svg")
    return results


def _plot(result: SearchResult, path: Path) -> None:
    try:
        result.plot(path)
    except ValueError as error:  # the search is done and its results are written
        warnings.warn(f"{path.name} is left out: {error}", stacklevel=3)


def summary(result: SearchResult) -> dict[str, Any]:
    """A result as JSON: the winner, its score against the first candidate's, and what was spent.

    Numbers that are not finite are None.
    """
    first = result.finished[0].score if result.finished else None
    numbers = {
        "prompt": result.prompt,
        "best": result.best.id,
        "score": result.best.score,
        "scores": result.best.scores,
        "first_score": first,
        "candidates": len(result.candidates),
        "nfe": result.nfe,
        "forwards": result.forwards,
        "seconds": round(result.seconds, 3),
        "report": result.report,
    }
    if any(candidate.via == "draft" for candidate in result.candidates):
        numbers["draft"] = dict(draft_agreement(result))
    return {name: _finite(value) for name, value in numbers.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_best(result: SearchResult, folder: Path, number: int) -> None:
    sample = result.best.sample
    if sample is None:
        return
    if result.kind == "image":
        from torchvision.transforms.functional import to_pil_image

        from sparing.media.image import write_image

        write_image(to_pil_image(sample.nan_to_num(0).clamp(0, 1)), folder / f"best_{number}.png")
        return
    from safetensors.torch import save

    with atomic_file(folder / f"best_{number}.safetensors") as file:
        file.write(save({"sample": sample.contiguous()}))


@dataclass(frozen=True)
class Arguments:
    """What to search for, and how."""

    out: str = field(metadata={"help": "folder of the log and the results; an interrupted search goes on from it"})
    verifiers: list[str] = field(
        metadata={"help": f"NAME[:KEY=VALUE,...] or FILE.py:FUNCTION; names: {', '.join(VERIFIERS)}"}
    )
    model: str = field(default="", metadata={"help": "name in the zoo or folder of a class-conditional transformer"})
    pipeline: str = field(default="", metadata={"help": "folder or hub id of a diffusers pipeline"})
    prompts: list[str] = field(default_factory=list, metadata={"help": "text prompts"})
    labels: list[str] = field(default_factory=list, metadata={"help": "class indices or names"})
    algorithm: str = field(
        default="", metadata={"help": f"NAME[:KEY=VALUE,...], random if empty; names: {', '.join(ALGORITHMS)}"}
    )
    preset: str = field(default="", metadata={"help": f"published settings instead: {', '.join(PRESETS)}"})
    budget: str = field(default="", metadata={"help": "400nfe, 90s, 5min or 12candidates, of each prompt"})
    steps: int = field(default=0, metadata={"help": "denoiser steps; the pipeline's own number if 0"})
    guidance_scale: float = field(default=-1.0, metadata={"help": "the pipeline's own if negative"})
    call: str = field(default="", metadata={"help": "further arguments of the pipeline, KEY=VALUE,..."})
    draft: str = field(default="", metadata={"help": "steps=N, model=NAME, cache=THRESHOLD, density=N,..."})
    report: list[str] = field(default_factory=list, metadata={"help": "verifiers that take no part in the search"})
    seed: int = field(default=0, metadata={"help": "decides every noise"})
    batch_size: int = field(default=0, metadata={"help": "rows a batch; 0 = as memory allows"})
    vae: str = field(default="", metadata={"help": "folder of the decoder of a latent-space model"})
    device: str = field(default="", metadata={"help": "cpu, cuda, ..."})
    force: bool = field(default=False, metadata={"help": "go on with a log although the search was changed"})


def run(wanted: Arguments) -> list[SearchResult]:
    """Opens what the arguments name and searches.

    Raises:
        ValueError: arguments that do not go together, or name what there is not.
    """
    if wanted.prompts and wanted.labels:
        raise ValueError("give either prompts or classes")
    if not math.isfinite(wanted.guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, got {wanted.guidance_scale}")
    call: dict[str, Any] = settings_of(f":{wanted.call}")[1]
    if wanted.preset:
        if wanted.preset not in PRESETS:
            near = closest(wanted.preset, PRESETS) or "there are " + ", ".join(PRESETS)
            raise ValueError(f"no preset {wanted.preset!r}; {near}")
        if wanted.algorithm:
            raise ValueError(
                f"a preset names its algorithm: give either preset {wanted.preset!r} or algorithm {wanted.algorithm!r}"
            )
        preset: Mapping[str, Any] = PRESETS[wanted.preset]
        call = {**preset["call"], **call}
        chosen: Any = ALGORITHMS[preset["algorithm"]](**preset["kwargs"])
    else:
        chosen = make_algorithm(wanted.algorithm or "random")
    if wanted.draft and chosen.config().get("keep") is None:
        raise ValueError(
            f"draft {wanted.draft!r}: {chosen.name} runs no drafts here; algorithm random:n=N,keep=K uses it"
        )
    if wanted.steps:
        call["num_inference_steps"] = wanted.steps
    if wanted.guidance_scale >= 0:
        call["guidance_scale"] = wanted.guidance_scale
    verifier, report = make_verifiers(wanted.verifiers), [make_verifier(text) for text in wanted.report]
    pipe = open_any(wanted.model or None, wanted.pipeline or None, vae=wanted.vae or None)
    if wanted.device:
        pipe.to(wanted.device)
    return search(
        pipe,
        _wanted(pipe, wanted.prompts, wanted.labels),
        verifier,
        chosen,
        out=wanted.out,
        call=call,
        budget=wanted.budget or None,
        seed=wanted.seed,
        batch_size=wanted.batch_size or "auto",
        report=report,
        draft=make_draft(wanted.draft, pipe) if wanted.draft else None,
        force=wanted.force,
    )


def _wanted(pipe: Any, prompts: Sequence[str], labels: Sequence[str]) -> Sequence[Any]:
    """Prompts or labels as the pipeline takes them; what it does not take is told before anything is run."""
    kind, condition = type(pipe).__name__, condition_of(pipe)
    takes = {"prompt": "text prompts", "class_labels": "classes", None: "neither prompts nor classes"}[condition]
    given = "prompts" if prompts else "classes" if labels else "none"
    if {"prompt": bool(prompts), "class_labels": bool(labels), None: not (prompts or labels)}[condition]:
        return prompts or _class_labels(pipe, labels)
    raise ValueError(f"{kind} takes {takes}, and {given} were given")


def _class_labels(pipe: Any, texts: Sequence[str]) -> list[int | str]:
    labels = [int(text) if re.fullmatch(r"-?\d+", text) else text for text in texts]
    if isinstance(pipe, FlexDiTPipeline):
        pipe.label_indices(labels)
        return labels
    names, count, found = getattr(pipe, "labels", None) or {}, _num_classes(pipe), list[int | str]()
    for label in labels:
        if isinstance(label, str) and label not in names:
            raise ValueError(f"no class {label!r}; {closest(label, names) or 'give an index'}")
        index = names[label] if isinstance(label, str) else label
        if count is not None and not 0 <= index < count:
            raise ValueError(f"class {label} is out of range: the model has classes 0..{count - 1}")
        found.append(index)
    return found


def lines_of(results: Sequence[SearchResult]) -> list[str]:
    """One line a prompt."""
    found = []
    for result in results:
        first = result.finished[0].score if result.finished else float("nan")
        name = "no prompt" if result.prompt is None else repr(result.prompt)
        found.append(
            f"{name}: score {result.best.score:.5g} (candidate {result.best.id} of "
            f"{len(result.candidates)}; the first had {first:.5g}), {result.nfe} NFE, {result.seconds:.1f} s"
        )
        found += [
            f"  {name}, which took no part: {scores['first']:.4g} -> {scores['best']:.4g}"
            for name, scores in result.report.items()
        ]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Command line; see ``--help``."""
    from transformers import HfArgumentParser

    (wanted,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(arguments)
    try:
        results = run(Arguments(**asdict(wanted)))
    except (ValueError, TypeError, OSError, NotImplementedError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines_of(results)))
    print(f"log, winners, sheets and curves in {wanted.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
