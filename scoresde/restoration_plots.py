"""PNG files of restorations: the truth, the measurement, the posterior mean and standard deviation, and samples."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from scoresde.atomic_files import replace_atomically
from scoresde.plots import BAND, COLOURS

SHOWN = 64  # largest number of samples in a picture
LEAST, MOST = 4, 8  # number of columns


def save_restoration(
    samples: Tensor,
    parts: Mapping[str, Tensor],
    std: Tensor,
    path: Path,
    low: float = 0.0,
    high: float = 1.0,
    credit: str | None = None,
) -> Path:
    """Save a picture of a restoration.

    Images are drawn in a grid: `parts` and the standard deviation in the first row, the samples below. Points in the
    plane are a scatter plot, and other states are lines over their entries.

    Args:
        samples: (n, *) in data units.
        parts: states (*) in data units by their names: "mean", and perhaps "truth" and "measurement".
        std: the standard deviation in each entry (*).
        path: PNG file to write.
        low, high: the value drawn in black and the value drawn in white, for images.
        credit: the makers of the data and their licence, stored in the file as the metadata "Copyright".
    """
    if samples.ndim == 4 and samples.shape[1] in (1, 3):
        scaled = {name: (part - low) / (high - low) for name, part in parts.items()}
        figure = _images((samples[:SHOWN] - low) / (high - low), scaled, std)
    else:
        figure = Figure(figsize=(5, 5), dpi=120, layout="constrained")
        flat = {name: part.flatten().numpy() for name, part in parts.items() if name != "measurement"}
        draw = _points if samples[0].numel() == 2 else _lines
        draw(figure.add_subplot(), samples.flatten(1).numpy(), flat)
        figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    metadata = {"Copyright": credit} if credit else {}
    replace_atomically(path, lambda file: figure.savefig(file, format="png", metadata=metadata))
    return path


def _images(samples: Tensor, parts: Mapping[str, Tensor], std: Tensor) -> Figure:
    """Return the grid of images in [0, 1]; the standard deviation is the root mean square over the channels."""
    columns = min(MOST, max(LEAST, len(samples)))
    rows = 1 + -(-len(samples) // columns)
    figure = Figure(figsize=(1.2 * columns, 1.3 * rows), dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (name, part) in zip(grid[0], parts.items(), strict=False):
        _show(axes, part, name)
    deviation = std.square().mean(dim=0).sqrt().numpy()
    spread = grid[0, len(parts)]
    spread.imshow(deviation, cmap="magma", vmin=0, interpolation="nearest")
    spread.set_title(f"std, up to {deviation.max():.2g}", fontsize=7)
    for i, (axes, sample) in enumerate(zip(grid[1:].flat, samples, strict=False)):
        _show(axes, sample, f"sample {i}")
    return figure


def _show(axes: Axes, image: Tensor, title: str) -> None:
    """Draw an image (C, H, W) in [0, 1] with a title."""
    axes.imshow(image.clamp(0, 1).movedim(0, -1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=7)


def _points(axes: Axes, samples: np.ndarray, parts: Mapping[str, np.ndarray]) -> None:
    """Draw points in the plane."""
    axes.scatter(
        samples[:, 0], samples[:, 1], s=6, alpha=0.5, linewidths=0, color=COLOURS[0], label=f"{len(samples)} samples"
    )
    for marker, colour, (name, point) in zip("*X", (COLOURS[1], COLOURS[-1]), parts.items(), strict=False):
        axes.scatter(point[0], point[1], s=80, marker=marker, color=colour, label=name)
    axes.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")


def _lines(axes: Axes, samples: np.ndarray, parts: Mapping[str, np.ndarray]) -> None:
    """Draw states as lines over their flattened entries."""
    axes.plot(samples[:SHOWN].T, linewidth=0.6, alpha=0.6, color=BAND)
    axes.plot([], [], color=BAND, label=f"{min(len(samples), SHOWN)} samples")
    for colour, (name, line) in zip((COLOURS[1], COLOURS[-1]), parts.items(), strict=False):
        axes.plot(line, linewidth=1.2, color=colour, label=name)
    axes.set(xlabel="dimension", ylabel="value")
