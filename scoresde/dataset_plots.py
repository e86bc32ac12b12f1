"""Pictures of the samples of a dataset: images in a grid, vectors in pairs or as histograms, series as lines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from scoresde.atomic_files import replace_atomically
from scoresde.plots import COLOURS, draw_histogram, save_samples

MAX_PAIRED = 6  # dimensions up to which vectors are drawn in pairs
PANELS = 16  # largest number of histograms or channels in a picture
LINES = 12  # largest number of series in a panel


def save_dataset(
    samples: Tensor, path: Path, limits: Sequence[float] | None = None, names: Sequence[str] | None = None
) -> Path:
    """Draw samples (N, *) in data units: images in a grid, vectors (N, D) in pairs, series (N, C, L) as lines.

    Args:
        samples: samples (N, *) in data units.
        path: PNG file to write.
        limits: the values that are shown black and white; default: the range of the samples.
        names: names of the dimensions of a vector.
    """
    if samples.ndim not in (2, 3):
        low, high = limits or (float(samples.min()), float(samples.max()))
        return save_samples(samples, path, low, high if high > low else low + 1)
    array = samples.numpy()
    if samples.ndim == 3:
        figure = series(array)
    else:
        figure = vectors(array, names or [f"$x_{{{i + 1}}}$" for i in range(array.shape[1])])
    replace_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path


def vectors(points: np.ndarray, names: Sequence[str]) -> Figure:
    """Draw vectors (N, D): a scatter plot of each pair of up to 6 dimensions, else a histogram of each dimension."""
    dimensions = points.shape[1]
    if dimensions > MAX_PAIRED:
        return histograms(points, names)
    side = max(4, 2 * dimensions)
    figure = Figure(figsize=(side, side), dpi=120, layout="constrained")
    panels: Any = figure.subplots(dimensions, dimensions, squeeze=False)
    for (row, column), axes in np.ndenumerate(panels):
        if column > row:
            axes.set_axis_off()
        elif column == row:
            _histogram(axes, points[:, row])
        else:
            axes.scatter(points[:, column], points[:, row], s=3, alpha=0.4, linewidths=0, color=COLOURS[0])
    for i, name in enumerate(names):
        panels[-1, i].set_xlabel(name)
        if i > 0:
            panels[i, 0].set_ylabel(name)
    figure.suptitle(f"{len(points)} samples", fontsize=9)
    return figure


def histograms(points: np.ndarray, names: Sequence[str]) -> Figure:
    """Draw vectors (N, D): a histogram of each of the first 16 dimensions."""
    shown = min(PANELS, points.shape[1])
    columns = int(np.ceil(np.sqrt(shown)))
    rows = -(-shown // columns)
    figure = Figure(figsize=(2.2 * columns, 1.7 * rows), dpi=120, layout="constrained")
    panels: Any = figure.subplots(rows, columns, squeeze=False).flat
    for axes, values, name in zip(panels[:shown], points.T, names, strict=False):
        _histogram(axes, values)
        axes.set_xlabel(name, fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in panels[shown:]:
        axes.set_axis_off()
    figure.suptitle(f"{shown} of {points.shape[1]} dimensions, {len(points)} samples", fontsize=9)
    return figure


def _histogram(axes: Axes, values: np.ndarray) -> None:
    draw_histogram(axes, values, bins=40, color=COLOURS[0])
    axes.set_yticks([])


def series(lines: np.ndarray) -> Figure:
    """Draw series (N, C, L): a panel for each of the first 16 channels, with at most 12 of the samples as lines."""
    channels = min(PANELS, lines.shape[1])
    shown = lines[:: -(-len(lines) // LINES)]
    figure = Figure(figsize=(8, 0.6 + 1.5 * channels), dpi=120, layout="constrained")
    panels: Any = figure.subplots(channels, 1, squeeze=False, sharex=True)[:, 0]
    for channel, axes in enumerate(panels):
        axes.set_prop_cycle(color=COLOURS)
        axes.plot(shown[:, channel].T, linewidth=0.8, alpha=0.8)
        axes.set_ylabel(f"channel {channel}", fontsize=8)
    panels[-1].set_xlabel("position")
    figure.suptitle(f"{len(shown)} samples, {channels} of {lines.shape[1]} channels", fontsize=9)
    return figure
