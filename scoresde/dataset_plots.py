"""Pictures of the samples of a dataset: images in a grid, vectors as scatter plots or histograms, series as lines.

Images with labels are drawn in a row for each class, with its name beside it; a credit is drawn under the images.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from scoresde.atomic_files import replace_atomically
from scoresde.plots import COLOURS, PIXELS, draw_histogram, image_grid, save_samples

MAX_PAIRED = 6  # dimensions up to which vectors are drawn in pairs
PANELS = 16  # largest number of histograms or channels in a picture
LINES = 12  # largest number of series in a panel


def save_dataset(
    samples: Tensor,
    path: Path,
    limits: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    credit: str | None = None,
) -> Path:
    """Draw samples (N, *) in data units: images in a grid, vectors (N, D) by `vectors`, series (N, C, L) as lines.

    Args:
        samples: samples (N, *) in data units.
        path: PNG file to write.
        limits: the value drawn in black and the value drawn in white; default: the range of the samples.
        names: names of the dimensions of a vector.
        rows: names of the rows of a grid of images. All rows hold the same number of images; to fill a row, add
            images of NaN, which are drawn white.
        credit: the makers of the data and their licence, stored in the file as the metadata "Copyright"; also drawn
            under a grid of images.
    """
    if samples.ndim not in (2, 3):
        low, high = limits or (float(samples.nan_to_num(0).min()), float(samples.nan_to_num(0).max()))
        high = high if high > low else low + 1
        if not (rows or credit):
            return save_samples(samples, path, low, high)
    array = samples.numpy()
    if samples.ndim == 4:
        figure = labelled_grid((samples - low) / (high - low), rows, credit)
    elif samples.ndim == 3:
        figure = series(array)
    else:
        figure = vectors(array, names or [f"$x_{{{i + 1}}}$" for i in range(array.shape[1])])
    metadata = {"Copyright": credit} if credit else {}
    replace_atomically(path, lambda file: figure.savefig(file, format="png", metadata=metadata))
    return path


def labelled_grid(images: Tensor, rows: Sequence[str] | None, credit: str | None) -> Figure:
    """Draw images (N, C, H, W), C 1 or 3, in [0, 1], with the names of the rows at the left and a credit underneath."""
    columns = len(images) // len(rows) if rows else int(np.ceil(np.sqrt(len(images))))
    grid = image_grid(images.nan_to_num(1.0), columns)
    height, width = grid.shape[0], grid.shape[1]
    scale = max(1, PIXELS // images.shape[2]) / 100  # inches of a pixel
    margin = 0.4 + 0.09 * max(map(len, rows or [""]))  # inches of the names
    figure = Figure(figsize=(width * scale + margin, height * scale + 0.5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(grid, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    step = images.shape[2] + 1
    axes.set_xticks([])
    axes.set_yticks([i * step + step / 2 for i in range(len(rows or ()))], rows or ())
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    if credit:
        figure.supxlabel(credit, fontsize=7)
    return figure


def vectors(points: np.ndarray, names: Sequence[str]) -> Figure:
    """Draw vectors (N, D): scatter plots of all pairs of dimensions if D <= 6, otherwise `histograms`."""
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
