"""PNG files of samples, sampler comparisons and classifications; drawing functions that `scoresde.report` uses too."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from scoresde.atomic_files import replace_atomically
from scoresde.evaluation.sampler_comparison import ComparisonRow

Interval = tuple[np.ndarray, np.ndarray]  # low and high
PIXELS = 64  # height of a small image in a grid
LONGEST = 32  # characters of the name of a row
# Okabe and Ito's colours for colour-blind readers; near-black replaces their yellow, which is invisible on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#111111")
BAND = "#808080"  # colour of a noise floor
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES = ("-", "--", ":", "-.")
SHORTEST, TALLEST = 0.3, 2e3  # ends of the axis of a metric, in units of its lowest value
METRIC_NAMES = {
    "sliced_wasserstein": "sliced Wasserstein distance",
    "mmd": "squared MMD",
    "energy_distance": "energy distance",
    "mean_error": "error of the mean / total standard deviation",
    "covariance_error": "relative error of the covariance",
    "frechet_distance": "squared Fréchet distance",
    "kid": "KID",
    "inception_score": "Inception score",
}


def metric_name(metric: str, space: str) -> str:
    """Return the text that names a metric in figures, with the feature space if it is computed on features."""
    name = METRIC_NAMES.get(metric, metric.replace("_", " "))
    return name if space in ("state", "model space", "") else f"{name} ({space})"


# --- samples


def draw_histogram(axes: Axes, values: Any, bins: int, **style: Any) -> None:
    """Draw a histogram of the finite values, with bins of equal width.

    The bins are computed from the differences to the least value, so that values far from zero keep their digits.
    """
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    least = values.min() if len(values) else 0.0
    counts, edges = np.histogram(values - least, bins)
    axes.bar(least + edges[:-1], counts, np.diff(edges), align="edge", **style)


def are_images(states: Tensor) -> bool:
    """Return whether states are grey or colour images, (N, 1, H, W) or (N, 3, H, W)."""
    return states.ndim == 4 and states.shape[1] in (1, 3)


def save_samples(
    samples: Tensor,
    path: Path,
    low: float = 0.0,
    high: float = 1.0,
    names: Sequence[str] = (),
    credit: str | None = None,
) -> Path:
    """Save a grid of images, magnified by a whole number. `state_plots.save_picture` draws states of any shape.

    Args:
        samples: images (N, C, H, W) with C 1 or 3.
        path: PNG file to write.
        low, high: the value drawn in black and the value drawn in white.
        names: names of K groups of N / K consecutive images, such as classes: each is a row with its name at the side.
            Empty for images of one kind.
        credit: the makers of the data and their licence, stored in the file as the metadata "Copyright".

    Raises:
        ValueError: the number of samples is not a multiple of the number of names.
    """
    if names and len(samples) % len(names):
        raise ValueError(
            f"the number of samples must be a multiple of {len(names)}, the number of names; got {len(samples)}"
        )
    metadata = {"Copyright": credit} if credit else {}
    grid = image_grid((samples - low) / (high - low), len(samples) // len(names) if names else None)
    scale = max(1, PIXELS // samples.shape[2])
    grid = grid.repeat(scale, axis=0).repeat(scale, axis=1)
    if names:
        grid = np.concatenate([_row_names(names, grid.shape[0], grid.ndim), grid], axis=1)
    settings: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1, "format": "png", "metadata": metadata}
    replace_atomically(path, lambda file: matplotlib.image.imsave(file, grid, **settings))
    return path


def _row_names(names: Sequence[str], height: int, dimensions: int) -> np.ndarray:
    """Return an image of the names, one above the other, black on white: an array (height, width[, 3]) in [0, 1]."""
    texts = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}" for name in names]
    size = min(14.0, 0.6 * height / len(names))  # in pixels
    width = int(0.72 * size * max(map(len, texts)) + size)
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    for i, text in enumerate(texts):
        x, y = 1 - 0.4 * size / width, 1 - (i + 0.5) / len(names)
        figure.text(x, y, text, ha="right", va="center", fontsize=0.72 * size)  # in points of 100/72 pixels
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[:height, :, :3] / 255
    padded = np.ones((height, pixels.shape[1], 3))
    padded[: len(pixels)] = pixels
    return padded if dimensions == 3 else padded.mean(axis=2)


def image_grid(images: Tensor, columns: int | None = None, gap: int = 1) -> np.ndarray:
    """Arrange images (N, C, H, W), C 1 or 3, in [0, 1], as one array (rows H, columns W[, 3]) with white gaps."""
    array = images.detach().cpu().clamp(0, 1).permute(0, 2, 3, 1).double().numpy()
    count, height, width, channels = array.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    grid = np.ones((rows * (height + gap) + gap, columns * (width + gap) + gap, channels))
    for i, image in enumerate(array):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid.squeeze(-1) if channels == 1 else grid


# --- samplers compared


def save_comparison(rows: Sequence[ComparisonRow], path: Path, metric: str | None = None) -> Path:
    """Save plots of a metric against the network evaluations and against the seconds of each sampler.

    Args:
        rows: the rows returned by `evaluation.compare`.
        path: PNG file to write.
        metric: name of the metric to draw; that of the first row by default.

    Raises:
        ValueError: no sampler has a row of that metric.
    """
    metric = metric or (rows[0].metric if rows else None)
    shown = [row for row in rows if row.metric == metric]
    first = next((row for row in shown if not row.is_floor), None)
    if first is None:
        raise ValueError(
            f"metric must be one that was measured on a sampler; got {metric!r}, and none of the {len(rows)} rows has "
            "a sampler's value of it: choose another metric"
        )
    figure = Figure(figsize=(9.2, 4.0), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, quantity in ((left, "nfe"), (right, "seconds")):
        draw_comparison(axes, shown, quantity)
        axes.grid(linewidth=0.4, alpha=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    left.set(xlabel="network evaluations per sample (NFE)", ylabel=metric_name(first.metric, first.space))
    right.set_xlabel(f"seconds for {first.batch} samples")
    figure.suptitle(f"{first.n} samples, compared with {first.reference}", fontsize=9)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    replace_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path


def draw_comparison(axes: Axes, rows: Sequence[ComparisonRow], quantity: str = "nfe") -> None:
    """Draw one metric of samplers against "nfe" or "seconds", on logarithmic axes.

    Error bars run from `low` to `high` of each row. The band is the noise floor, the interval of the metric for exact
    samples: a sampler inside it cannot be distinguished from exact sampling. Values <= 0 are left out. The vertical
    axis runs from 0.3 to 2,000 times the lowest value, so that a sampler that diverged does not flatten the others.
    """
    for i, name in enumerate(dict.fromkeys(row.sampler for row in rows if not row.is_floor)):
        of_sampler = sorted((row for row in rows if row.sampler == name and row.value > 0), key=lambda row: row.nfe)
        x, y, low, high = (
            np.array([getattr(row, key) for row in of_sampler]) for key in (quantity, "value", "low", "high")
        )
        curve(axes, x, y, (np.maximum(low, 1e-3 * y), high), colour=i, label=name)
    for row in rows:
        if row.is_floor and row.high > 0:
            ends = max(row.low, 0.0), row.high
            axes.axhspan(*ends, color=BAND, alpha=0.25, linewidth=0, label=f"noise floor ({row.sampler})")
    axes.set(xscale="log", yscale="log")
    lowest = min((row.value for row in rows if row.value > 0), default=1.0)
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, SHORTEST * lowest), min(top, TALLEST * lowest))
    if quantity == "nfe":
        axes.set_xticks(distinct_ticks(sorted({row.budget for row in rows if row.budget is not None})))
    set_ticks(axes)


def curve(
    axes: Axes, x: np.ndarray, y: np.ndarray, interval: Interval | None = None, colour: int = 0, **style: Any
) -> None:
    """Draw a line through points with error bars; the index `colour` selects its colour, marker and dashes."""
    bars = None if interval is None else np.maximum([y - interval[0], interval[1] - y], 0)
    defaults: dict[str, Any] = {
        "color": COLOURS[colour % len(COLOURS)],
        "marker": MARKERS[colour % len(MARKERS)],
        "linestyle": DASHES[colour // len(COLOURS) % len(DASHES)],
        "markersize": 6,
        "markeredgecolor": "white",
        "markeredgewidth": 0.8,
        "linewidth": 1.5,
        "elinewidth": 1.3,
    }
    axes.errorbar(x, y, bars, **defaults | style)


def distinct_ticks(ticks: Sequence[int]) -> list[int]:
    """Return the ticks of a logarithmic axis without those whose labels would touch the previous label."""
    distinct: list[int] = []
    for tick in ticks:
        if not distinct or tick >= 1.35 * distinct[-1]:
            distinct.append(tick)
    return distinct


def set_ticks(axes: Axes, most: int = 6) -> None:
    """Set plain numbers as ticks: at most `most` + 1 on a linear axis, 1, 2 and 5 of each decade on a logarithmic one.

    A logarithmic axis of more than three decades has ticks at powers of ten alone.
    """
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        decades = LogLocator(subs=(1.0, 2.0, 5.0) if high < 1e3 * low else (1.0,))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda value, _: tick_label(value))
        if not isinstance(axis.get_major_locator(), FixedLocator):
            is_log = axis.get_scale() == "log"
            axis.set_major_locator(decades if is_log else MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]))


def tick_label(value: float) -> str:
    """Return a number with thousands separators, as a power of ten if it is far from 1."""
    if value and not 1e-4 <= abs(value) < 1e6:
        factor, _, power = f"{value:.2e}".partition("e")
        exponent = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        label = f"10{exponent}" if factor == "1.00" else f"{float(factor):g}·10{exponent}"
    else:
        label = f"{value:,.6g}"
    return label.replace("-", "\N{MINUS SIGN}")
