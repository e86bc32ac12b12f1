"""Pictures of samples, chosen by the shape of a state."""

from pathlib import Path

import matplotlib.image
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from scoresde.training.checkpoint import replace_atomically

PIXELS = 64  # height of a small image in a grid


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
