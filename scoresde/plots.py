"""Pictures: of samples, chosen by the shape of a state; of samplers side by side."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.image
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

from scoresde.evaluation.sampler_comparison import ComparisonRow
from scoresde.training.checkpoint import replace_atomically

PIXELS = 64  # height of a small image in a grid
# Okabe and Ito's colours, which the colour-blind tell apart, without the yellow that is lost on white; with black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
SHORTEST, TALLEST = 0.3, 2e3  # where the axis of figures ends, in units of the lowest one
DASHES = ("-", "--", ":", "-.")
TITLES = {
    "sliced_wasserstein": "sliced Wasserstein distance",
    "mmd": "squared MMD",
    "energy_distance": "energy distance",
    "mean_error": "error of the mean / total standard deviation",
    "covariance_error": "relative error of the covariance",
    "frechet_distance": "squared Fréchet distance",
}


def image_grid(images: Tensor, columns: int | None = None, gap: int = 1) -> np.ndarray:
    """Images (N, C, H, W), C 1 or 3, in [0, 1], as one array (rows H, columns W[, 3]) with white gaps."""
    array = images.detach().cpu().clamp(0, 1).permute(0, 2, 3, 1).double().numpy()
    count, height, width, channels = array.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    grid = np.ones((rows * (height + gap) + gap, columns * (width + gap) + gap, channels))
    for i, image in enumerate(array):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid.squeeze(-1) if channels == 1 else grid


def save_samples(samples: Tensor, path: Path, low: float = 0.0, high: float = 1.0) -> Path:
    """A picture of samples (N, *): images in a grid, points of a plane as a scatter, sequences as lines.

    Args:
        samples: (N, C, H, W) with C 1 or 3, (N, 2), or anything else as lines over the flattened state.
        path: of the PNG to write.
        low, high: values shown black and white.
    """
    if samples.ndim == 4 and samples.shape[1] in (1, 3):
        grid = image_grid((samples - low) / (high - low))
        scale = max(1, PIXELS // samples.shape[2])
        grid = grid.repeat(scale, axis=0).repeat(scale, axis=1)
        write = lambda file: matplotlib.image.imsave(file, grid, cmap="gray", vmin=0, vmax=1, format="png")  # noqa: E731
        replace_atomically(path, write)
        return path
    figure = Figure(figsize=(5, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    flat = samples.detach().cpu().flatten(1).numpy()
    if flat.shape[1] == 2:
        axes.scatter(flat[:, 0], flat[:, 1], s=4, alpha=0.5, linewidths=0)
        axes.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal", title=f"{len(flat)} samples")
    else:
        axes.plot(flat[:64].T, linewidth=0.8, alpha=0.6)
        axes.set(xlabel="dimension", ylabel="value", title=f"{min(len(flat), 64)} samples")
    replace_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path


def save_comparison(rows: Sequence[ComparisonRow], path: Path, metric: str | None = None) -> Path:
    """One figure of samplers against the evaluations and against the seconds that it took, on logarithmic axes.

    Bars are the intervals of the rows. The band is the noise floor, the interval of draws from the truth: a sampler in
    it cannot be told from those. What lies at zero or below is left out. The picture goes from 0.3 to 2,000
    times the lowest figure at most: the curve of what diverged leaves it upwards.

    Args:
        rows: of `evaluation.compare`.
        path: of the PNG to write.
        metric: the one drawn; that of the first row unless given.

    Raises:
        ValueError: no row of a sampler has that metric.
    """
    metric = metric or (rows[0].metric if rows else None)
    shown = [row for row in rows if row.metric == metric]
    names = list(dict.fromkeys(row.sampler for row in shown if not row.is_floor))
    if not names:
        raise ValueError(f"rows of samplers with the metric {metric!r} expected; got {len(rows)} rows, none such")
    figure = Figure(figsize=(9.2, 4.0), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, quantity in ((left, "nfe"), (right, "seconds")):
        for i, name in enumerate(names):
            _curve(axes, [row for row in shown if row.sampler == name], quantity, i)
        for row in (row for row in shown if row.is_floor):
            label = f"noise floor ({row.sampler})"
            axes.axhspan(max(row.low, 0.0), max(row.high, 0.0), color="0.5", alpha=0.25, linewidth=0, label=label)
        axes.set(xscale="log", yscale="log")
        axes.grid(which="major", linewidth=0.4, alpha=0.6)
        axes.grid(which="minor", linewidth=0.2, alpha=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    first = next(row for row in shown if not row.is_floor)
    space = "" if first.space == "state" else f", {first.space} features"
    left.set(xlabel="network evaluations per sample (NFE)", ylabel=f"{TITLES.get(first.metric, first.metric)}{space}")
    right.set_xlabel(f"seconds for {first.batch} samples")
    budgets = sorted({row.budget for row in shown if row.budget is not None})
    left.set_xticks(budgets, [str(budget) for budget in budgets])
    left.xaxis.set_minor_formatter(NullFormatter())
    lowest = min((row.value for row in shown if row.value > 0), default=1.0)
    bottom, top = left.get_ylim()
    left.set_ylim(max(bottom, SHORTEST * lowest), min(top, TALLEST * lowest))
    for axis in (right.xaxis, left.yaxis):
        _plain(axis)
    figure.suptitle(f"{first.n} samples, compared with {first.reference}", fontsize=9)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    replace_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path


def _curve(axes: Axes, rows: Sequence[ComparisonRow], quantity: str, index: int) -> None:
    """A sampler's figures with their intervals, joined from its smallest budget to its largest."""
    kept = sorted((row for row in rows if row.value > 0), key=lambda row: row.nfe)
    # The lower end of a bar stays above zero, where a logarithmic axis ends.
    below = [row.value - max(row.low, 1e-3 * row.value) for row in kept]
    axes.errorbar(
        [getattr(row, quantity) for row in kept],
        [row.value for row in kept],
        [below, [row.high - row.value for row in kept]],
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle=DASHES[index // len(COLOURS) % len(DASHES)],
        label=rows[0].sampler,
        markersize=5,
        linewidth=1.3,
        elinewidth=0.9,
        capsize=2,
    )


def _plain(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 of each decade, of many decades at 1 alone, as plain numbers."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1e3 * low else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
