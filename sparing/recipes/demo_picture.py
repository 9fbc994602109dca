"""The demo's picture: what each semantic token gathers from an image."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparing.vision.stvit import SemanticTokenViT

__all__ = ["draw_regions", "pick_examples"]

# nine hues that stay apart for the usual colour blindnesses as far as nine can (after Okabe and Ito, and Tol)
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#882255", "#999933")


def pick_examples(probabilities: Tensor, labels: Tensor, classes: Sequence[int]) -> list[int]:
    """For each class the place of the image that is recognised with the median confidence among the recognised ones.

    Args:
        probabilities: (count, classes).
        labels: (count,).
        classes: labels to show.
    """
    places = []
    for label in classes:
        found = ((labels == label) & (probabilities.argmax(-1) == label)).nonzero().flatten()
        found = found if len(found) else (labels == label).nonzero().flatten()
        order = probabilities[found, label].argsort()
        places.append(int(found[order[len(order) // 2]]))
    return places


def draw_regions(
    twin: SemanticTokenViT,
    images: Tensor,
    labels: Tensor,
    path: Path,
    *,
    names: Sequence[str],
    classes: Sequence[int] = (0, 1, 5, 7, 8, 9),
) -> None:
    """Draw one row an image: the image, its patches by the token that gathers most of them, and each token's attention.

    Args:
        twin: an STViT twin.
        images: (count, 1, height, width), normalised.
        labels: (count,).
        path: PNG to write.
        names: of the classes.
        classes: those to show, one image each.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    with torch.inference_mode():
        probabilities = twin(images).softmax(-1)
        places = pick_examples(probabilities, labels, classes)
        maps = twin.gathered_regions(images[places])
    height, width = images.shape[-2:]
    rows, tokens = len(places), maps.shape[1]
    smooth = torch.nn.functional.interpolate(maps, (8 * height, 8 * width), mode="bicubic").clamp_min(0)
    # share of a patch's attention that each token has, against its mean over patches: who reads more here than
    # elsewhere
    winner = (maps / maps.amax((-2, -1), keepdim=True)).argmax(1)
    palette = torch.tensor([to_rgb(_COLOURS[token % len(_COLOURS)]) for token in range(tokens)])

    wide, high = 1.06 * (tokens + 3) + 0.6, 1.03 * rows + 0.85  # inches
    figure = Figure(figsize=(wide, high), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        rows, tokens + 3, width_ratios=[1, 1, 0.12, *[1] * tokens], wspace=0.06, hspace=0.06,
        left=0.105, right=0.99, top=1 - 0.75 / high, bottom=0.1 / high,
    )  # fmt: skip
    for row, place in enumerate(places):
        grey = images[place, 0] - images[place, 0].min()
        grey = grey / grey.max().clamp_min(1e-6)
        fine = torch.nn.functional.interpolate(grey[None, None], scale_factor=8, mode="bilinear")[0, 0].clamp(0, 1)
        panel = figure.add_subplot(grid[row, 0])
        panel.imshow(1 - grey, cmap="gray", vmin=0, vmax=1)
        confidence, said = probabilities[place].max(-1)
        panel.set_ylabel(
            f"{names[int(labels[place])]}\n→ {names[int(said)]} {float(confidence):.0%}",
            rotation=0, ha="right", va="center", fontsize=8, labelpad=6,
        )  # fmt: skip
        panels = [panel, figure.add_subplot(grid[row, 1])]
        patches = palette[winner[row]].repeat_interleave(height // maps.shape[-2], 0)
        patches = patches.repeat_interleave(width // maps.shape[-1], 1)
        ink = grey[..., None]
        panels[1].imshow((patches * (0.30 + 0.70 * ink) + (1 - (0.30 + 0.70 * ink))).clamp(0, 1))
        for token in range(tokens):
            panel = figure.add_subplot(grid[row, 3 + token])
            heat = (smooth[row, token] / smooth[row, token].max())[..., None]
            base = (1 - 0.55 * fine)[..., None].expand(-1, -1, 3)
            panel.imshow((base * (1 - 0.85 * heat) + 0.85 * heat * palette[token]).clamp(0, 1))
            panels.append(panel)
        for panel in panels:
            panel.set_xticks([])
            panel.set_yticks([])
            for spine in panel.spines.values():
                spine.set_visible(False)
        if row == 0:
            for panel, title in zip(panels, ["image", "who reads\nmost here", *map(str, range(1, tokens + 1))]):
                panel.set_title(title, fontsize=8, pad=3)
            for token, panel in enumerate(panels[2:]):
                panel.set_title(f"token {token + 1}", fontsize=8, pad=3, color=palette[token].mul(0.8).tolist())
    grid_size = f"{maps.shape[-2]} x {maps.shape[-1]}"
    figure.suptitle(
        f"{tokens} semantic tokens instead of {grid_size} patches: what each one reads from the image",
        fontsize=11, y=1 - 0.12 / high, va="top",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
