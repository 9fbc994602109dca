"""Pictures of a search: score against NFE, a contact sheet, the tree of what descended from what. No matplotlib.

``result.plot(path)`` and ``result.sheet(path)`` call these.
"""

import math
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from sparing.diffusion.search.charts import BLUE, FAINT, INK, ORANGE, RED, Axes, Drawing, font, shade
from sparing.media.image import write_image

if TYPE_CHECKING:
    from sparing.diffusion.search.result import Candidate, SearchResult

__all__ = ["plot", "sheet", "tree"]

_TILE = 128  # pixels of the longer side of a sheet's pictures
_CAPTION = 16
_GAP = 6
_MOST_COLUMNS = 12


# -- score against NFE


def plot(result: "SearchResult", path: str | Path) -> Path:
    """Score against NFE: every finished candidate a dot, the best so far a line.

    When all candidates are independent draws, the expected best of n (over all subsets, not only the prefix that was
    drawn) is a dashed line.

    Args:
        path: .svg, or .png and other formats of PIL.

    Raises:
        ValueError: no candidate was finished, or no format of that suffix.
    """
    finished = _finished_scores(result)
    spent, points = 0, []
    for candidate in result.candidates:
        spent += candidate.nfe
        if candidate.id in finished and math.isfinite(finished[candidate.id]):
            points.append((spent, finished[candidate.id], candidate.id))
    if not points:
        raise ValueError("nothing to plot: no candidate was finished with a finite score")
    low, high = min(score for _, score, _ in points), max(score for _, score, _ in points)
    margin = 0.06 * (high - low)
    axes = Axes(
        (0, spent),
        (low - margin, high + margin),
        title=f"{result.algorithm}: {_shortened(result.prompt, 60)}",
        x_label="NFE (evaluations of the denoiser)",
        y_label=f"score ({_shortened(result.verifier, 60)})",
    )
    best, stairs = -math.inf, list[tuple[float, float]]()
    for x, score, _ in points:
        if score > best:
            if stairs:
                stairs.append(axes.at(x, best))
            stairs.append(axes.at(x, score))
            best = score
    stairs.append(axes.at(spent, best))
    _expected_best(axes, result, [score for _, score, _ in points])
    axes.drawing.line(stairs, colour=BLUE, width=2)
    for x, score, id in points:
        won = id == result.best.id
        axes.drawing.dot(*axes.at(x, score), radius=5 if won else 3, colour=RED if won else BLUE)
    return axes.drawing.write(path)


def _finished_scores(result: "SearchResult") -> dict[int, float]:
    """Scores of the finished candidates by id; of an ensemble of ranks, over all of them as one pool."""
    finished = result.finished
    if result.rank is None or not finished:
        return {candidate.id: candidate.score for candidate in finished}
    scores = result.rank([candidate.outcome for candidate in finished])
    return {candidate.id: score for candidate, score in zip(finished, scores.tolist(), strict=True)}


def _expected_best(axes: Axes, result: "SearchResult", scores: Sequence[float]) -> None:
    from sparing.diffusion.search.protocol import Gaussian

    everything = result.candidates
    independent = all(isinstance(candidate.recipe, Gaussian) and candidate.parent is None for candidate in everything)
    if not independent or len(scores) != len(everything) or len(scores) < 2:
        return
    ordered, total, cost = sorted(scores), len(scores), sum(candidate.nfe for candidate in everything) / len(scores)
    curve = []
    for n in range(1, total + 1):
        ways = math.comb(total, n)
        expected = sum(score * (math.comb(k, n - 1) / ways) for k, score in enumerate(ordered) if k >= n - 1)
        curve.append(axes.at(n * cost, expected))
    axes.drawing.line(curve, colour=ORANGE, width=1.5, dashed=True)
    axes.drawing.word(axes.right - 4, axes.bottom - 10, "dashed: expected best of n draws", anchor="end", colour=ORANGE)


def _shortened(text: object, most: int) -> str:
    line = "no prompt" if text is None else " ".join(str(text).split())
    return line if len(line) <= most else line[: most - 3] + "..."


# -- contact sheet


def sheet(result: "SearchResult", path: str | Path) -> Path:
    """A contact sheet: a row a round, id and score below each picture, the winner framed.

    Videos show their first, middle and last frame, audio its waveform. Candidates whose sample was not kept are grey.

    Args:
        path: .png, .jpg, ...

    Raises:
        ValueError: there is no candidate, or no image format of that suffix.
    """
    if not result.candidates:
        raise ValueError("nothing to show: the search has no candidates")
    rows = [(label, row) for label, group in _rounds(result) for row in _wrapped(group)]
    tiles = {candidate.id: _tile(candidate, result) for candidate in result.candidates}
    width = max(tile.width for tile in tiles.values())
    height = max(tile.height for tile in tiles.values())
    columns = max(len(row) for _, row in rows)
    cell = (max(width, 72) + _GAP, height + _CAPTION + _GAP)
    margin, head = 92, 26
    image = Image.new("RGB", (margin + columns * cell[0] + _GAP, head + len(rows) * cell[1] + _GAP), "white")
    pen = ImageDraw.Draw(image)
    title = f"{_shortened(result.prompt, 80)}   best #{result.best.id}: {result.best.score:.5g}, {result.nfe} NFE"
    pen.text((_GAP, head / 2), title, fill=INK, font=font(13), anchor="lm")
    for i, (label, row) in enumerate(rows):
        top = head + i * cell[1]
        pen.text((_GAP, top + height / 2), label, fill=INK, font=font(11), anchor="lm")
        for j, candidate in enumerate(row):
            left = margin + j * cell[0]
            tile = tiles[candidate.id]
            image.paste(tile, (left, top))
            if candidate.id == result.best.id:
                for ring in range(1, 4):
                    pen.rectangle(
                        [left - ring, top - ring, left + tile.width - 1 + ring, top + tile.height - 1 + ring],
                        outline=RED,
                    )
            caption = f"#{candidate.id}: " + (f"{candidate.score:.5g}" if candidate.error is None else "failed")
            pen.text((left + tile.width / 2, top + height + 9), caption, fill=INK, font=font(11), anchor="mm")
    return write_image(image, path)


def _rounds(result: "SearchResult") -> list[tuple[str, list["Candidate"]]]:
    """Candidates of each round in order, under the words beside the row."""
    groups = groupby(result.candidates, key=lambda candidate: (candidate.stage, candidate.round))
    return [(f"{_shortened(stage, 12)} {number}".strip(), list(group)) for (stage, number), group in groups]


def _wrapped(row: list["Candidate"]) -> list[list["Candidate"]]:
    return [row[i : i + _MOST_COLUMNS] for i in range(0, len(row), _MOST_COLUMNS)]


def _tile(candidate: "Candidate", result: "SearchResult") -> Image.Image:
    """A small picture of a candidate; a grey square where nothing was kept."""
    tensor = candidate.preview if candidate.preview is not None else candidate.sample
    if tensor is not None:
        return _picture(tensor, result.kind)
    blank = Image.new("RGB", (_TILE // 2, _TILE // 2), FAINT)
    ImageDraw.Draw(blank).text((_TILE / 4, _TILE / 4), "not kept", fill=INK, font=font(10), anchor="mm")
    return blank


def _picture(tensor: Tensor, kind: str) -> Image.Image:
    """One sample without batch axis as a picture whose longer side is about ``_TILE``."""
    tensor = tensor.detach().cpu()
    if kind == "audio" or tensor.ndim == 2:
        return waveform(tensor, size=(2 * _TILE, _TILE // 2))
    pixels = tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()
    if pixels.ndim == 4:  # video
        from sparing.diffusion.search.verifiers.video import chosen_frames

        pixels = rearrange(pixels[chosen_frames(len(pixels), 3)], "f c h w -> c h (f w)")
        longest = pixels.shape[1]
    else:
        longest = max(pixels.shape[1:])
    pixels = pixels.nan_to_num(0).clamp(0, 1)
    pixels = pixels.expand(3, -1, -1) if pixels.shape[0] == 1 else pixels[:3]
    array = (rearrange(pixels, "c h w -> h w c") * 255).round().byte().numpy()
    image = Image.fromarray(array)
    scale = _TILE / longest
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # small pictures are enlarged by whole pixels as they are, so that nothing is invented
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def waveform(audio: Tensor, *, size: tuple[int, int] = (256, 64)) -> Image.Image:
    """Strip of the extremes of ``(channels, samples)`` over time, channels averaged; full height is amplitude 1."""
    image = Image.new("RGB", size, "white")
    mono = audio.float().mean(dim=0) if audio.ndim == 2 else audio.float()
    mono = (mono / 127.0 if audio.dtype == torch.int8 else mono).nan_to_num(0).clamp(-1, 1)
    pen, (width, height) = ImageDraw.Draw(image), size
    pen.line([(0, height / 2), (width, height / 2)], fill=FAINT)
    edges = torch.linspace(0, len(mono), width + 1).long().tolist()
    for x, (start, stop) in enumerate(pairwise(edges)):
        part = mono[start : max(stop, start + 1)]
        if len(part):
            low, high = part.min().item(), part.max().item()
            pen.line([(x, (1 - high) * (height - 1) / 2), (x, (1 - low) * (height - 1) / 2)], fill=BLUE)
    pen.rectangle([0, 0, width - 1, height - 1], outline=FAINT)
    return image


# -- tree


def tree(result: "SearchResult", path: str | Path) -> Path:
    """What descended from what: a column a round, a line from parent to child, the winner's ancestors drawn bold.

    Args:
        path: .svg, or .png and other formats of PIL.

    Raises:
        ValueError: there is no candidate, or no format of that suffix.
    """
    columns = _rounds(result)
    if not columns:
        raise ValueError("nothing to draw: the search has no candidates")
    deepest = max(len(group) for _, group in columns)
    step, row = 110, 26
    drawing = Drawing(80 + step * len(columns), 70 + row * deepest)
    drawing.word(drawing.width / 2, 16, f"{result.algorithm}: {_shortened(result.prompt, 50)}", size=14)
    scores = [candidate.score for candidate in result.candidates if math.isfinite(candidate.score)]
    low, high = (min(scores), max(scores)) if scores else (0.0, 1.0)
    places: dict[int, tuple[float, float]] = {}
    for i, (label, group) in enumerate(columns):
        drawing.word(50 + i * step, 40, label, size=11)
        offset = (deepest - len(group)) * row / 2
        for j, candidate in enumerate(group):
            places[candidate.id] = (50.0 + i * step, 60 + offset + j * row)
    line_of_best = _ancestors(result)
    for candidate in sorted(result.candidates, key=lambda c: c.id in line_of_best):  # bold lines on top
        if candidate.parent in places:
            bold = candidate.id in line_of_best
            ends = [places[candidate.parent], places[candidate.id]]
            drawing.line(ends, colour=RED if bold else FAINT, width=2.5 if bold else 1)
    for candidate in result.candidates:
        x, y = places[candidate.id]
        share = (candidate.score - low) / (high - low) if high > low and math.isfinite(candidate.score) else 0.0
        drawing.dot(x, y, radius=6, colour=RED if candidate.id == result.best.id else shade(share))
        drawing.word(x + 9, y, f"{candidate.score:.3g}", size=9, anchor="start")
    return drawing.write(path)


def _ancestors(result: "SearchResult") -> set[int]:
    """Ids of the winner and of everything it descends from."""
    parents = {candidate.id: candidate.parent for candidate in result.candidates}
    found: set[int] = set()
    current: int | None = result.best.id
    while current is not None and current not in found:
        found.add(current)
        current = parents.get(current)
    return found
