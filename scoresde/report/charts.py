"""Charts as inline SVG: matplotlib draws the charts, and the page's style sheet sets colours and font.

A chart is 360 units wide, the width of a phone, or half as wide; wider pages put more of them side by side. Text stays
text, and each colour becomes a CSS custom property, so that a chart follows the light or dark mode of the page.
"""

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from scoresde.plots import BAND, COLOURS, MARKERS, draw_histogram, set_ticks

WIDTH, HEIGHT = 360.0, 236.0
UNITS_PER_INCH = 72.0
PANEL = 120.0  # width and height of one picture of the film
WIDE = 20.0  # ratio of the largest to the smallest value above which a logarithmic axis is clearer
MUTED, GRID, RULE, PAPER = "#000001", "#000002", "#000003", "white"  # placeholders for VARIABLES
VARIABLES = {
    **{colour.lower(): f"var(--c{i})" for i, colour in enumerate(COLOURS)},
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    RULE: "var(--rule)",
    BAND: "var(--band)",
    "#ffffff": "var(--paper)",
}
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 12,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 1.0,
    "xaxis.labellocation": "right",
    "xtick.color": MUTED,
    "xtick.labelcolor": "black",  # has no fill in the SVG, so that the style sheet sets the colour
    "ytick.major.size": 0,
}


@dataclass
class Chart:
    """A drawn chart.

    description: what the chart shows, with numbers, for screen readers. legend: {label: its mark, an SVG}.
    """

    title: str
    description: str
    svg: Markup
    legend: dict[str, Markup]


def new_axes(x: str = "", y: str = "", height: float = HEIGHT, width: float = WIDTH) -> Axes:
    """Return the axes of a new chart, with the label `x` at the lower right and `y` at the upper left corner."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((width / UNITS_PER_INCH, height / UNITS_PER_INCH), layout="constrained", frameon=False)
        axes = figure.add_subplot(facecolor="none", xlabel=x)
        if y:
            figure.suptitle(y, x=0, ha="left", color=MUTED, fontsize=12)
    return axes


def to_chart(axes: Axes, title: str, description: str) -> Chart:
    """Return the chart of drawn axes, with a legend if there are two labels or more."""
    figure = cast(Figure, axes.get_figure())
    set_ticks(axes, 6 if figure.get_figwidth() * UNITS_PER_INCH >= WIDTH else 3)
    svg, identifier = accessible_svg(axes, title, description)
    handles = {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    legend = {name: _glyph(handle, f"{identifier}{i}") for i, (name, handle) in enumerate(handles.items())}
    return Chart(title, description, svg, legend if len(legend) > 1 else {})


def accessible_svg(axes: Axes, title: str, description: str) -> tuple[Markup, str]:
    """Return the drawing of the axes as an SVG with title and description, and the SVG's identifier on the page."""
    figure = cast(Figure, axes.get_figure())
    for line in axes.lines:  # a line through a single point would be invisible
        if np.size(line.get_xdata()) == 1 and line.get_marker() == "None":
            line.set_marker("o")
    identifier = f"c{hashlib.blake2b(f'{title}{description}'.encode(), digest_size=6).hexdigest()}"
    width, height = (UNITS_PER_INCH * side for side in figure.get_size_inches())
    return Markup(
        '<svg class="chart" viewBox="0 0 {:g} {:g}" role="img" aria-labelledby="{id}t {id}d">'
        '<title id="{id}t">{}</title><desc id="{id}d">{}</desc>{}</svg>'
    ).format(width, height, title, description, _drawing(figure, identifier), id=identifier), identifier


def _glyph(handle: Any, identifier: str) -> Markup:
    """Return the mark that a legend shows for a matplotlib handle, as an SVG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((24 / UNITS_PER_INCH, 12 / UNITS_PER_INCH), frameon=False)
        figure.legend([handle], [""], loc="center", frameon=False, borderpad=0, handletextpad=0, handlelength=2)
    svg = Markup('<svg class="glyph" viewBox="0 0 24 12" aria-hidden="true">{}</svg>')
    return svg.format(_drawing(figure, identifier))


def _drawing(figure: Figure, identifier: str) -> Markup:
    """Return the elements of a figure's SVG; `identifier` makes the identifiers in it unique on the page."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": identifier}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index('<g id="figure_1">') : svg.rindex("</svg>")]  # without matplotlib's global style sheet
    return Markup(re.sub(r"\n *", "", re.sub(r"<[^>]+>", lambda tag: _shortened(tag[0]), svg)))


def _shortened(tag: str) -> str:
    """Return a tag of matplotlib's SVG with CSS custom properties as colours, two decimals, and no font of its own."""
    tag = re.sub(r'^<g id="[^"]*"', "<g", tag)
    tag = re.sub(r"\s*\n", "", re.sub(r"(\.\d\d)\d+", r"\1", tag))
    tag = re.sub(r"M (\S+ [^L]+)L \1(?=[M\"])", r"M\1h0", tag)  # dots
    tag = re.sub(r"font[a-z-]*: [^;\"]*; ?", "", tag)
    return re.sub("(?<=: )#[0-9a-f]{6}", lambda colour: VARIABLES.get(colour[0], colour[0]), tag)


# --- drawing


def dots(axes: Axes, points: Tensor, colour: int = 0, size: float = 2.4, label: str = "") -> None:
    """Draw points (N, 2) as one SVG path."""
    separated = np.repeat(points.double().cpu().numpy(), 3, axis=0)
    separated[2::3] = np.nan  # two equal ends and a gap: a line of length zero with round caps
    style: dict[str, Any] = {"color": COLOURS[colour], "alpha": 0.8}
    with matplotlib.rc_context({"path.simplify": False}):
        axes.plot(*separated.T, solid_capstyle="round", linewidth=size, **style)
    if label:
        axes.plot([], [], "o", markersize=5, markeredgewidth=0, label=label, **style)


def histogram(axes: Axes, values: Any, bins: int, label: str = "") -> None:
    """Draw a histogram of values with equal bins."""
    draw_histogram(axes, values, bins, color=COLOURS[0], edgecolor=PAPER, linewidth=1, alpha=0.82, label=label)


def scale_y(axes: Axes, values: np.ndarray) -> None:
    """Make the vertical axis logarithmic if all finite values are positive and far apart."""
    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() > 0 and finite.max() > WIDE * finite.min():
        axes.set_yscale("log", nonpositive="mask")


@dataclass
class Bar:
    """A named value with its standard error, and the text beside it."""

    name: str
    value: float
    error: float | None
    text: str
    colour: int


def bar_chart(title: str, bars: Sequence[Bar], x: str, lengths: bool) -> Chart:
    """Draw values with standard errors, one below the other: as bars from zero if `lengths`, otherwise as marks."""
    axes = new_axes(x, height=40 * len(bars) + 40)
    corner = axes.get_yaxis_transform()
    for i, bar in enumerate(bars):
        axes.text(0, i - 0.1, bar.name, transform=corner)
        axes.text(1, i - 0.1, bar.text, transform=corner, ha="right")
        if lengths:
            axes.barh(i + 0.15, bar.value, 0.22, color=COLOURS[bar.colour], alpha=0.82)
        marker: Any = {"marker": "" if lengths else MARKERS[bar.colour], "markersize": 6, "markeredgecolor": PAPER}
        colour = MUTED if lengths else COLOURS[bar.colour]
        axes.errorbar(bar.value, i + 0.15, xerr=bar.error, color=colour, elinewidth=1.4, **marker)
    axes.set(ylim=(len(bars) - 0.5, -0.5), yticks=[])
    if lengths:
        axes.set_xlim(min([0.0, *(bar.value - (bar.error or 0.0) for bar in bars)]))
    axes.grid(axis="x", color=GRID)
    axes.spines.bottom.set_visible(False)
    axes.tick_params("x", length=0)
    return to_chart(axes, title, f"{title}, in {x}: {', '.join(f'{bar.name} {bar.text}' for bar in bars)}.")
