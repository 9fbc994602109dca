"""Small drawings as SVG text or as PNG through PIL: the same lines, dots, boxes and words in either."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from PIL import Image, ImageColor, ImageDraw, ImageFont

from sparing.media.image import write_image

__all__ = ["Axes", "Drawing", "font", "ticks"]

INK, FAINT, BLUE, ORANGE, RED = "#222222", "#d0d0d0", "#1f6fb4", "#e08214", "#c0392b"


@dataclass(frozen=True)
class _Line:
    points: tuple[tuple[float, float], ...]
    colour: str
    width: float
    dashed: bool


@dataclass(frozen=True)
class _Dot:
    x: float
    y: float
    radius: float
    colour: str


@dataclass(frozen=True)
class _Word:
    x: float
    y: float
    text: str
    size: float
    anchor: str
    colour: str


def font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """PIL's own font; nothing is looked for on the machine."""
    return ImageFont.load_default(size)


@dataclass
class Drawing:
    """Things to draw, in pixels from the top left corner, in the order they were added."""

    width: int
    height: int
    items: list[_Line | _Dot | _Word] = field(default_factory=list)

    def line(
        self, points: Sequence[tuple[float, float]], *, colour: str = INK, width: float = 1, dashed: bool = False
    ) -> None:
        self.items.append(_Line(tuple(points), colour, width, dashed))

    def dot(self, x: float, y: float, *, radius: float = 3, colour: str = BLUE) -> None:
        self.items.append(_Dot(x, y, radius, colour))

    def word(
        self, x: float, y: float, text: str, *, size: float = 12, anchor: str = "middle", colour: str = INK
    ) -> None:
        """``anchor``: start, middle or end of the text is at x; y is its vertical middle."""
        self.items.append(_Word(x, y, text, size, anchor, colour))

    def write(self, path: str | Path) -> Path:
        """Writes .svg as text, any other suffix as a picture, whole or not at all.

        Raises:
            ValueError: PIL knows no format of that suffix.
        """
        path = Path(path)
        if path.suffix.lower() != ".svg":
            return write_image(self.picture(), path)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.draft")
        try:
            draft.write_text(self.svg(), encoding="utf-8")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        return path

    def svg(self) -> str:
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
        back = f'<rect width="{self.width}" height="{self.height}" fill="white"/>'
        return "\n".join([head, back, *map(_svg, self.items), "</svg>", ""])

    def picture(self, *, scale: int = 2) -> Image.Image:
        """RGB, ``scale`` pixels for each of the drawing's."""
        image = Image.new("RGB", (self.width * scale, self.height * scale), "white")
        pen = ImageDraw.Draw(image)
        for item in self.items:
            _draw(pen, item, scale)
        return image


def _svg(item: _Line | _Dot | _Word) -> str:
    if isinstance(item, _Line):
        points = " ".join(f"{x:.2f},{y:.2f}" for x, y in item.points)
        dash = ' stroke-dasharray="6 4"' if item.dashed else ""
        return f'<polyline points="{points}" fill="none" stroke="{item.colour}" stroke-width="{item.width:g}"{dash}/>'
    if isinstance(item, _Dot):
        return f'<circle cx="{item.x:.2f}" cy="{item.y:.2f}" r="{item.radius:g}" fill="{item.colour}"/>'
    return (
        f'<text x="{item.x:.2f}" y="{item.y:.2f}" font-size="{item.size:g}" text-anchor="{item.anchor}" '
        f'dominant-baseline="central" fill="{item.colour}">{escape(item.text)}</text>'
    )


def _draw(pen: ImageDraw.ImageDraw, item: _Line | _Dot | _Word, scale: int) -> None:
    if isinstance(item, _Line):
        points = [(x * scale, y * scale) for x, y in item.points]
        for a, b in itertools.pairwise(points):
            for start, stop in _dashes(a, b, 6 * scale, 4 * scale) if item.dashed else [(a, b)]:
                pen.line([start, stop], fill=item.colour, width=max(1, round(item.width * scale)))
    elif isinstance(item, _Dot):
        x, y, r = item.x * scale, item.y * scale, item.radius * scale
        pen.ellipse([x - r, y - r, x + r, y + r], fill=item.colour)
    else:
        anchor = {"start": "lm", "middle": "mm", "end": "rm"}[item.anchor]
        pen.text(
            (item.x * scale, item.y * scale), item.text, fill=item.colour, font=font(item.size * scale), anchor=anchor
        )


Point = tuple[float, float]


def _dashes(a: Point, b: Point, on: float, off: float) -> list[tuple[Point, Point]]:
    length = math.dist(a, b)
    if length == 0:
        return []
    starts = [i * (on + off) / length for i in range(int(length / (on + off)) + 1)]

    def at(share: float) -> Point:
        share = min(share, 1.0)
        return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share

    return [(at(share), at(share + on / length)) for share in starts]


def ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """Round numbers from ``low`` to ``high``: steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


class Axes:
    """A frame with numbers along two sides, on a drawing of its own.

    Args:
        x, y: ranges ``(low, high)``; an empty one is widened.
        title, x_label, y_label: words.
    """

    LEFT, RIGHT, TOP, BOTTOM = 74, 20, 44, 52

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        title: str,
        x_label: str,
        y_label: str,
        size: tuple[int, int] = (720, 440),
    ) -> None:
        self.drawing = Drawing(*size)
        self.x_range, self.y_range = _widened(*x), _widened(*y)
        self.right, self.bottom = size[0] - self.RIGHT, size[1] - self.BOTTOM
        self.drawing.word(size[0] / 2, 18, title, size=15)
        self.drawing.word((self.LEFT + self.right) / 2, size[1] - 14, x_label)
        self.drawing.word(8, 36, y_label, anchor="start")
        for value in ticks(*self.x_range):
            left = self.at(value, self.y_range[0])[0]
            self.drawing.line([(left, self.bottom), (left, self.bottom + 5)])
            self.drawing.word(left, self.bottom + 16, f"{value:g}")
        for value in ticks(*self.y_range):
            top = self.at(self.x_range[0], value)[1]
            self.drawing.line([(self.LEFT, top), (self.right, top)], colour=FAINT)
            self.drawing.word(self.LEFT - 8, top, f"{value:g}", anchor="end")
        corners = [(self.LEFT, self.TOP), (self.LEFT, self.bottom), (self.right, self.bottom)]
        self.drawing.line([(float(a), float(b)) for a, b in corners])

    def at(self, x: float, y: float) -> Point:
        """Where on the drawing a value is."""
        (left, right), (low, high) = self.x_range, self.y_range
        return (
            self.LEFT + (x - left) / (right - left) * (self.right - self.LEFT),
            self.bottom - (y - low) / (high - low) * (self.bottom - self.TOP),
        )


def _widened(low: float, high: float) -> tuple[float, float]:
    if high > low:
        return low, high
    margin = abs(low) * 0.05 or 0.5
    return low - margin, high + margin


def shade(share: float) -> str:
    """A colour from grey (0) to blue (1)."""
    share = min(max(share, 0.0), 1.0)
    grey, blue = ImageColor.getrgb("#c8c8c8"), ImageColor.getrgb(BLUE)
    mixed = [round(a + (b - a) * share) for a, b in zip(grey, blue, strict=True)]
    return "#" + "".join(f"{value:02x}" for value in mixed)
