"""Pictures of a search are written for images, video and audio, in SVG and PNG, and matplotlib is never imported."""

import math
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

from sparing.diffusion.search.charts import Axes, ticks
from sparing.diffusion.search.protocol import Gaussian, Renoise
from sparing.diffusion.search.report import plot, sheet, tree, waveform
from sparing.diffusion.search.result import Candidate, SearchResult

SAMPLES = {
    "image": lambda i: torch.full((3, 8, 8), i / 6),
    "video": lambda i: torch.stack([torch.full((3, 8, 8), frame / 5) for frame in range(5)]),
    "audio": lambda i: torch.sin(torch.linspace(0, 40, 400))[None] * (i + 1) / 6,
}


def make(scores, *, kind="image", recipes=None, parents=None, rounds=None, rank=None, kept=None):
    candidates = []
    for i, score in enumerate(scores):
        candidates.append(
            Candidate(
                id=i,
                prompt=0,
                stage="random",
                round=rounds[i] if rounds else 0,
                index=i,
                parent=parents[i] if parents else None,
                recipe=recipes[i] if recipes else Gaussian(i),
                start=0,
                stop=10,
                score=score,
                scores={"a": score},
                nfe=10,
                forwards=20,
                seconds=0.1,
                batch_size=4,
                kept=True,
                sample=SAMPLES[kind](i) if kept is None or i in kept else None,
            )
        )
    best = max((c for c in candidates if not math.isnan(c.score)), key=lambda c: c.score, default=candidates[0])
    return SearchResult(
        candidates=candidates,
        best=best,
        prompt="a <red> & blue cube",
        num_steps=10,
        nfe=10 * len(candidates),
        forwards=20 * len(candidates),
        seconds=1.0,
        seconds_by_part={},
        verifier="a",
        algorithm="random",
        kind=kind,
        rank=rank,
    )


def svg(path):
    root = ET.parse(path).getroot()
    return root, [element.tag.rpartition("}")[2] for element in root]


def test_the_plot_has_a_dot_a_candidate_and_a_line_that_never_falls(tmp_path):
    result = make([0.3, 0.9, 0.1, 1.5])
    root, tags = svg(result.plot(tmp_path / "deep" / "curve.svg"))
    assert tags.count("circle") == 4
    lines = [e for e in root if e.tag.endswith("polyline") and e.get("stroke") == "#1f6fb4"]
    heights = [float(point.split(",")[1]) for point in lines[0].get("points").split()]
    assert heights == sorted(heights, reverse=True)  # the page's y runs downward
    words = [e.text for e in root if e.tag.endswith("text")]
    assert "random: a <red> & blue cube" in words
    assert any("NFE" in word for word in words)


def test_independent_draws_get_the_expected_best_of_n_and_others_do_not(tmp_path):
    independent = plot(make([0.3, 0.9, 0.1]), tmp_path / "a.svg").read_text()
    assert "expected best of n" in independent
    assert 'stroke-dasharray="6 4"' in independent
    children = make(
        [0.3, 0.9, 0.1], recipes=[Gaussian(0), Renoise(0, 5, 3, 1), Renoise(0, 5, 3, 2)], parents=[None, 0, 0]
    )
    assert "expected best of n" not in plot(children, tmp_path / "b.svg").read_text()


def test_ranks_are_taken_over_all_finished_candidates(tmp_path):
    pools = []

    def rank(outcomes):
        pools.append(len(outcomes))
        return torch.arange(len(outcomes), dtype=torch.float64)

    plot(make([3.0, 2.0, 1.0], rank=rank), tmp_path / "a.svg")
    assert pools == [3]


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
def test_a_sheet_has_a_row_a_round_and_frames_the_winner(tmp_path, kind):
    one = Image.open(make([0.1, 0.2, 0.3, 0.4], kind=kind).sheet(tmp_path / "one.png"))
    result = make([0.1, 0.2, 0.3, 0.4], kind=kind, rounds=[0, 0, 1, 1])
    two = Image.open(result.sheet(tmp_path / "two.png"))
    assert two.height > 1.6 * one.height - 60
    assert two.width < one.width
    red = (np.asarray(two) == np.array([192, 57, 43])).all(axis=2)
    rows, columns = np.nonzero(red)
    assert rows.min() > two.height / 2 - 20  # the best is in the second row
    assert columns.min() > two.width / 2 - 60  # and the second column
    if kind == "video":
        assert two.width > 2 * 3 * 128  # three frames a candidate


def test_what_was_not_kept_is_grey_and_nan_is_written_as_such(tmp_path):
    result = make([0.1, math.nan, 0.3], kept={0})
    assert sheet(result, tmp_path / "s.jpg").stat().st_size > 0
    assert tree(result, tmp_path / "t.svg").exists()
    assert "nan" in (tmp_path / "t.svg").read_text()
    _, tags = svg(plot(result, tmp_path / "p.svg"))
    assert tags.count("circle") == 2


def test_long_rounds_are_wrapped(tmp_path):
    image = Image.open(sheet(make([float(i) for i in range(96)], kept=set()), tmp_path / "s.png"))
    assert image.width < 1400


def test_the_tree_draws_the_winners_line_bold(tmp_path):
    recipes = [Gaussian(0), Gaussian(1), Renoise(0, 5, 3, 1), Renoise(1, 5, 3, 2), Renoise(3, 5, 3, 2)]
    result = make([0.1, 0.2, 0.3, 0.4, 0.9], recipes=recipes, parents=[None, None, 0, 1, 3], rounds=[0, 0, 1, 1, 2])
    root, tags = svg(tree(result, tmp_path / "t.svg"))
    lines = [e for e in root if e.tag.endswith("polyline")]
    assert len(lines) == 3
    assert sum(e.get("stroke-width") == "2.5" for e in lines) == 2
    assert tags.count("circle") == 5


def test_one_candidate_equal_scores_and_colour_of_one_channel(tmp_path):
    for scores in ([0.5], [0.5, 0.5, 0.5], [0.0, 0.0], [-1e30, 1e30]):
        result = make(scores)
        for name, draw in (("p.svg", plot), ("p.png", plot), ("s.png", sheet), ("t.png", tree)):
            assert draw(result, tmp_path / name).stat().st_size > 100
    result.candidates[0].sample = torch.rand(1, 28, 28)
    sheet(result, tmp_path / "grey.png")


def test_bad_suffixes_and_empty_results_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no image format has the suffix .\.txt."):
        plot(make([1.0]), tmp_path / "p.txt")
    with pytest.raises(ValueError, match="no candidate was finished"):
        plot(make([math.nan]), tmp_path / "p.svg")
    assert list(tmp_path.iterdir()) == []


def test_a_waveform_shows_where_sound_is():
    wave = torch.zeros(1, 1000)
    wave[0, 500:] = torch.tensor([0.9, -0.9]).repeat(250)
    strip = np.asarray(waveform(wave, size=(100, 40)).convert("L"))
    blue = strip[5:35] < 200
    assert blue[:, 60:95].sum() > 10 * blue[:, 5:40].sum()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 17), (0.001, 0.0043), (0, 400), (1e6, 1.2e6)])
def test_ticks_are_round_numbers_inside_the_range(low, high):
    values = ticks(low, high)
    assert 2 <= len(values) <= 8
    assert all(low - 1e-9 <= value <= high * (1 + 1e-9) for value in values)
    axes = Axes((low, high), (0, 1), title="", x_label="", y_label="")
    assert axes.at(low, 0)[0] == axes.LEFT
    assert axes.at(high, 1) == (axes.right, axes.TOP)


SCRIPT = """
import sys, tempfile
sys.path.insert(0, {tests!r})
from test_search_report import make
result = make([0.1, 0.2])
folder = tempfile.mkdtemp()
result.plot(folder + "/p.svg"), result.plot(folder + "/p.png"), result.sheet(folder + "/s.png")
print([name for name in sys.modules if name.split(".")[0] in ("matplotlib", "scipy")])
"""


def test_no_picture_needs_matplotlib():
    code = SCRIPT.format(tests=__file__.rpartition("/")[0])
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() == "[]"


def test_a_score_of_nan_counts_as_the_worst_in_the_expected_best():
    result = make([0.5, math.nan, 0.3])
    assert result.best_of_n(3) == pytest.approx(0.5)
    assert result.best_of_n(2) == pytest.approx((2 * 0.5 + 0.3) / 3)
    assert result.best_of_n(1) == -math.inf
    many = make([math.nan] * 1000 + [1.0] * 1000, kept=set())
    assert many.best_of_n(1000) == -math.inf  # by a chance too small for a float
    assert many.best_of_n(1001) == pytest.approx(1.0)
