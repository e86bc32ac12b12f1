"""Charts as inline SVG: they take their colours from the page's style sheet, and their text is text.

A chart is 360 units wide, the width of a phone, so that its text is as large there as on paper; wider pages put several
side by side. What is drawn is a list of layers (`report.layers`). All text is escaped.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from scoresde.report.axes import Axis, span, text
from scoresde.report.layers import COLOURS, Histogram, Layer, mark

WIDTH, HEIGHT = 360.0, 236.0
CHARACTER = 6.9  # width of a digit at the size of the ticks' labels


@dataclass
class Chart:
    """Layers between two axes.

    Args:
        title: what is drawn; description: what is seen, with numbers, for who cannot see it.
        layers: the first is drawn first.
        x, y: labels with their units.
        x_log, y_log: logarithmic axes.
        x_ticks: of the horizontal axis, instead of round numbers.
        square: one unit is as long on either axis.
        height: of the chart.
        x_span, y_span: ends of the axes, instead of those of the layers.
    """

    title: str
    description: str
    layers: Sequence[Layer]
    x: str = ""
    y: str = ""
    x_log: bool = False
    y_log: bool = False
    x_ticks: Sequence[float] | None = None
    square: bool = False
    height: float = HEIGHT
    x_span: tuple[float, float] | None = None
    y_span: tuple[float, float] | None = None

    @property
    def legend(self) -> list[tuple[Markup, str]]:
        """(glyph, name) of each layer that has a name, if there is more than one."""
        named = {layer.name: layer.glyph() for layer in self.layers if layer.name}
        if len(named) < 2:
            return []
        box = Markup('<svg class="glyph" viewBox="0 0 24 12" aria-hidden="true">{}</svg>')
        return [(box.format(glyph), name) for name, glyph in named.items()]

    def _axes(self) -> tuple[Axis, Axis]:
        horizontal, vertical = (
            [v for layer in self.layers for v in layer.extent()[i] if math.isfinite(v)] for i in (0, 1)
        )
        x_low, x_high = self.x_span or span(horizontal, self.x_log, 0.03)
        floor = any(isinstance(layer, Histogram) for layer in self.layers)
        y_low, y_high = self.y_span or span(vertical, self.y_log)
        if floor:
            y_low = 0.0
        top, bottom = (22.0 if self.y else 8.0), self.height - (34.0 if self.x else 20.0)
        y = Axis(y_low, y_high, bottom, top, self.y_log)
        left = 10.0 + CHARACTER * max(len(text(tick)) for tick in y.ticks())
        x = Axis(x_low, x_high, left, WIDTH - 10.0, self.x_log)
        if self.square:
            x, y = _equal(x, y)
        return x, y

    def svg(self) -> Markup:
        """The chart."""
        x, y = self._axes()
        ticks = list(self.x_ticks) if self.x_ticks is not None else x.ticks()
        grid = "".join(f"M{x.start:.1f} {y(v):.1f}H{x.stop:.1f}" for v in y.ticks())
        marks = "".join(f"M{x(v):.1f} {y.start:.1f}v4" for v in ticks)
        frame = Markup('<path class="grid" d="{}"/>').format(grid)
        frame += Markup('<path class="axis" d="M{:.1f} {:.1f}H{:.1f}{}"/>').format(x.start, y.start, x.stop, marks)
        words = Markup()
        for value in y.ticks():
            words += _text(x.start - 6, y(value) + 3.8, text(value), "end")
        for value in ticks:
            words += _text(x(value), y.start + 16, text(value), "middle")
        if self.x:
            words += _text(x.stop, self.height - 4, self.x, "end", "label")
        if self.y:
            words += _text(0.0, 11.0, self.y, "start", "label")
        inside = Markup().join(layer.draw(x, y) for layer in self.layers)
        return picture(self.title, self.description, WIDTH, self.height, frame + inside + words)


def _equal(x: Axis, y: Axis) -> tuple[Axis, Axis]:
    """Axes of the same number of units for a length: the shorter range is made longer."""
    per_x, per_y = (x.high - x.low) / abs(x.stop - x.start), (y.high - y.low) / abs(y.stop - y.start)
    unit = max(per_x, per_y)

    def wider(axis: Axis) -> Axis:
        middle, half = 0.5 * (axis.low + axis.high), 0.5 * unit * abs(axis.stop - axis.start)
        return Axis(middle - half, middle + half, axis.start, axis.stop, axis.log, axis.count)

    return wider(x), wider(y)


@dataclass
class Bar:
    """A line of a chart of bars: a length from 0, or a mark with its interval; and what is written beside it."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    words: str = ""
    colour: int = 0


@dataclass
class Bars:
    """Named values one below the other: lengths from 0, or marks with their intervals."""

    title: str
    description: str
    bars: Sequence[Bar]
    x: str
    lengths: bool = True
    legend: Sequence[tuple[Markup, str]] = ()

    def svg(self) -> Markup:
        """The chart."""
        pitch, top = 40.0, 4.0
        bottom = top + pitch * len(self.bars)
        ends = [v for bar in self.bars for v in (bar.value, bar.low, bar.high) if v is not None]
        low, high = span([0.0, *ends] if self.lengths else ends, margin=0.08)
        if self.lengths:
            low = min(0.0, *(v for v in ends if v < 0), 0.0)
        axis = Axis(low, high, 8.0, WIDTH - 16.0)
        grid = "".join(f"M{axis(v):.1f} {top:.1f}V{bottom:.1f}" for v in axis.ticks())
        found = Markup('<path class="grid" d="{}"/>').format(grid)
        for i, bar in enumerate(self.bars):
            found += self._bar(bar, axis, top + pitch * i)
        for value in axis.ticks():
            found += _text(axis(value), bottom + 13, text(value), "middle")
        found += _text(WIDTH - 10, bottom + 31, self.x, "end", "label")
        return picture(self.title, self.description, WIDTH, bottom + 36, found)

    def _bar(self, bar: Bar, axis: Axis, top: float) -> Markup:
        hue, middle = bar.colour % COLOURS, top + 28
        found = _text(8.0, top + 15, bar.name, "start", "label halo")
        found += _text(WIDTH - 10, top + 15, bar.words, "end", "halo")
        if self.lengths:
            left, right = sorted((axis(0.0), axis(bar.value)))
            found += Markup('<rect class="box c{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="9"/>').format(
                hue, left, middle - 5, max(right - left, 1.0)
            )
        if bar.low is not None and bar.high is not None:
            found += Markup('<path class="{}" d="M{:.1f} {:.1f}H{:.1f}"/>').format(
                "whisker" if self.lengths else f"bar c{hue}", axis(bar.low), middle, axis(bar.high)
            )
        return found if self.lengths else found + mark(axis(bar.value), middle, bar.colour)


def panel(
    title: str, description: str, layers: Sequence[Layer], x_span: tuple[float, float], y_span: tuple[float, float]
) -> Markup:
    """A small square chart without numbers: a frame of a film."""
    size, edge = 120.0, 3.0
    x, y = Axis(*x_span, edge, size - edge), Axis(*y_span, size - edge, edge)
    frame = Markup('<rect class="frame" x="0.5" y="0.5" width="{0:g}" height="{0:g}"/>').format(size - 1)
    return picture(title, description, size, size, frame + Markup().join(layer.draw(x, y) for layer in layers))


def _text(x: float, y: float, words: str, anchor: str, kind: str = "tick") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, words)


def picture(title: str, description: str, width: float, height: float, inside: Markup) -> Markup:
    """An SVG with its title and description, by which it is read out."""
    content = f"{title}{description}{inside}".encode()
    name = f"c{hashlib.blake2b(content, digest_size=6).hexdigest()}"
    return Markup(
        '<svg class="chart" viewBox="0 0 {:g} {:g}" role="img" aria-labelledby="{id}t {id}d">'
        '<title id="{id}t">{}</title><desc id="{id}d">{}</desc>{}</svg>'
    ).format(width, height, title, description, inside, id=name)
