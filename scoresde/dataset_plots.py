"""Pictures of the samples of a dataset: images in a grid, other states by `state_plots`.

Images with labels are drawn in a row for each class, with its name beside it; a credit is drawn under the images.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from scoresde.atomic_files import replace_atomically
from scoresde.plots import PIXELS, are_images, image_grid
from scoresde.state_plots import save_states


def save_dataset(
    samples: Tensor,
    path: Path,
    limits: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    credit: str | None = None,
) -> Path:
    """Draw samples (N, *) in data units: images in a grid, other states by `state_plots.save_states`.

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
    low, high = limits or (float(samples.nan_to_num(0).min()), float(samples.nan_to_num(0).max()))
    high = high if high > low else low + 1
    if not are_images(samples) or not (rows or credit):
        return save_states(samples, path, low, high, credit=credit, columns=names)
    figure = labelled_grid((samples - low) / (high - low), rows, credit)
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
