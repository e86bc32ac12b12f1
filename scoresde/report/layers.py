"""What is drawn in a chart: layers, each of which knows its extent and draws itself between two axes.

Colours are numbers, the classes c0 ... c6 of `templates/style.css`; each has a mark of its own shape, for colours alone
are not told apart by everybody.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from markupsafe import Markup

from scoresde.report.axes import Axis

COLOURS = 7


class Layer(Protocol):
    """Something in a chart: the values that the axes have to show, and its SVG between them."""

    name: str

    def extent(self) -> tuple[list[float], list[float]]: ...
    def draw(self, x: Axis, y: Axis) -> Markup: ...
    def glyph(self) -> Markup: ...


def _path(points: Iterable[tuple[float, float]]) -> str:
    """The `d` of a broken line; it is interrupted where a value is not finite."""
    parts, pen = [], "M"
    for px, py in points:
        if not (math.isfinite(px) and math.isfinite(py)):
            pen = "M"
            continue
        parts.append(f"{pen}{px:.1f} {py:.1f}")
        pen = "L"
    return "".join(parts)


def _shown(axis: Axis, value: float) -> bool:
    return math.isfinite(value) and (value > 0 or not axis.log)


@dataclass
class Line:
    """A curve through points, with intervals [low, high] if given.

    style: "line", "points", or "both"; weight: "faint", "normal" or "strong". colour: a number.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: int = 0
    style: str = "line"
    weight: str = "normal"

    def extent(self) -> tuple[list[float], list[float]]:
        return list(self.x), [*self.y, *(self.low or ()), *(self.high or ())]

    def draw(self, x: Axis, y: Axis) -> Markup:
        kept = [i for i in range(len(self.x)) if _shown(x, self.x[i]) and _shown(y, self.y[i])]
        places = [(x(self.x[i]), y(self.y[i])) for i in kept]
        found = Markup()
        if self.style != "points" and len(places) > 1:
            found += Markup('<path class="line {} c{}" d="{}"/>').format(self.weight, self.hue, _path(places))
        if self.low is not None and self.high is not None:
            bars = ((x(self.x[i]), y(self.low[i]), y(self.high[i])) for i in kept)
            d = "".join(f"M{px:.1f} {bottom:.1f}V{top:.1f}" for px, bottom, top in bars)
            found += Markup('<path class="bar c{}" d="{}"/>').format(self.hue, d)
        if self.style != "line" or len(places) == 1:
            found += Markup().join(mark(px, py, self.colour) for px, py in places)
        return found

    @property
    def hue(self) -> int:
        return self.colour % COLOURS

    def glyph(self) -> Markup:
        line = Markup('<path class="line {} c{}" d="M1 6H23"/>').format(self.weight, self.hue)
        here = mark(12.0, 6.0, self.colour)
        return {"line": line, "points": here}.get(self.style, line + here)


def mark(x: float, y: float, colour: int) -> Markup:
    """The mark of a colour at a place."""
    hue, shape = colour % COLOURS, colour % 6
    if shape == 0:
        return Markup('<circle class="mark c{}" cx="{:.1f}" cy="{:.1f}" r="3.2"/>').format(hue, x, y)
    corners: dict[int, list[tuple[float, float]]] = {
        1: [(-3, -3), (3, -3), (3, 3), (-3, 3)],
        2: [(0, -4), (3.7, 3), (-3.7, 3)],
        3: [(0, -4.2), (4.2, 0), (0, 4.2), (-4.2, 0)],
        4: [(0, 4), (3.7, -3), (-3.7, -3)],
        5: [(-4, -1.2), (0, -4), (4, -1.2), (2.5, 3.4), (-2.5, 3.4)],
    }
    points = _path((x + a, y + b) for a, b in corners[shape])
    return Markup('<path class="mark c{}" d="{}Z"/>').format(hue, points)


@dataclass
class Dots:
    """Many points, one faint dot each."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    size: float = 2.4

    def extent(self) -> tuple[list[float], list[float]]:
        return list(self.x), list(self.y)

    def draw(self, x: Axis, y: Axis) -> Markup:
        d = "".join(f"M{x(a):.1f} {y(b):.1f}h0" for a, b in zip(self.x, self.y, strict=True))
        return Markup('<path class="dots c{}" stroke-width="{:g}" d="{}"/>').format(self.colour % COLOURS, self.size, d)

    def glyph(self) -> Markup:
        return Markup('<path class="dots c{}" stroke-width="4" d="M6 8h0M12 4h0M18 7h0"/>').format(
            self.colour % COLOURS
        )


@dataclass
class Histogram:
    """Counts between edges, of which there is one more."""

    name: str
    edges: Sequence[float]
    counts: Sequence[float]
    colour: int = 0

    def extent(self) -> tuple[list[float], list[float]]:
        return list(self.edges), [0.0, *self.counts]

    def draw(self, x: Axis, y: Axis) -> Markup:
        boxes = Markup()
        for left, right, count in zip(self.edges[:-1], self.edges[1:], self.counts, strict=True):
            boxes += Markup('<rect class="box c{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                self.colour % COLOURS, x(left), y(count), max(x(right) - x(left) - 1, 0.5), y(0.0) - y(count)
            )
        return boxes

    def glyph(self) -> Markup:
        return Markup('<rect class="box c{}" x="5" y="2" width="14" height="8"/>').format(self.colour % COLOURS)


@dataclass
class Band:
    """All that lies between two values of y."""

    name: str
    low: float
    high: float

    def extent(self) -> tuple[list[float], list[float]]:
        return [], [self.low, self.high]

    def draw(self, x: Axis, y: Axis) -> Markup:
        if y.log and self.high <= 0:
            return Markup()
        top, bottom = y(self.high), y(self.low)
        left, width = min(x.start, x.stop), abs(x.stop - x.start)
        return Markup('<rect class="band" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
            left, top, width, max(bottom - top, 1.5)
        )

    def glyph(self) -> Markup:
        return Markup('<rect class="band" x="1" y="1" width="22" height="10"/>')


@dataclass
class Rule:
    """A vertical line at a value of x."""

    name: str
    at: float
    colour: int = 1

    def extent(self) -> tuple[list[float], list[float]]:
        return [self.at], []

    def draw(self, x: Axis, y: Axis) -> Markup:
        place = x(self.at)
        return Markup('<path class="rule c{}" d="M{:.1f} {:.1f}V{:.1f}"/>').format(
            self.colour % COLOURS, place, y.start, y.stop
        )

    def glyph(self) -> Markup:
        return Markup('<path class="rule c{}" d="M12 0V12"/>').format(self.colour % COLOURS)
