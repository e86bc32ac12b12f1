"""Pictures of states that are not images: tables, points in the plane, series, and other arrays.

Vectors (N, D) are drawn by the histogram of each column and the points of each pair of columns. Series (N, C, L) are
drawn, for each channel, by the 5%, 50% and 95% quantiles at each position and by a few of the series; a few series of
two channels are also paths in the plane of the two, as in the report. Several groups of states, such as real data and
samples, share the same axes: real data are grey, every other group has its own colour.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import Dataset

from scoresde.atomic_files import replace_atomically
from scoresde.data.summary import state_of
from scoresde.plots import BAND, COLOURS, are_images, draw_histogram, save_samples, set_ticks

MAX_PAIRED = 6  # columns up to which vectors are drawn in pairs
PANELS = 16  # largest number of histograms or channels in a picture
MOST_POINTS = 2000  # of a group in a scatter plot, and of real data
ENOUGH = 200  # states of a split for a comparison with samples
BINS = 30  # of histograms that are compared
LINES, FEW_LINES = 4, 2  # series drawn as lines: of one group of samples, and of each of several
LONGEST = 24  # characters of the name of a column
LEVELS = (0.05, 0.5, 0.95)  # of the quantiles of series


@dataclass(frozen=True)
class Group:
    """States (N, *) that are drawn alike.

    name: for the legend; "" if it is the only group. colour: None for real data, which are grey.
    """

    name: str
    states: np.ndarray
    colour: Any = None

    def of(self, *index: Any) -> "Group":
        """Return the group of `states[index]`."""
        return Group(self.name, self.states[index], self.colour)


@dataclass(frozen=True)
class RealData:
    """States (M, *) of a dataset to compare samples with; their name in legends; names of the columns of a table."""

    states: Tensor
    name: str
    columns: Sequence[str] | None


def real_data(data: Callable[[str], Dataset | str], shape: Sequence[int], most: int = MOST_POINTS) -> RealData | None:
    """Return real data to compare samples with: the test split, or a larger split if it has fewer than 200 states.

    Args:
        data: returns the dataset of a split ("test", "validation", "train"), or the reason why there is none.
        shape: the shape of a sample.
        most: largest number of states; they are evenly spaced in the dataset.

    Returns:
        None if there are no data of this shape.
    """
    best: Any = ()
    split = ""
    for name in ("test", "train"):
        dataset: Any = data(name)
        if not isinstance(dataset, str) and len(dataset) > len(best):
            best, split = dataset, name
        if len(best) >= ENOUGH:
            break
    if not len(best) or tuple(state_of(best[0]).shape) != tuple(shape):
        return None
    return RealData(evenly_spaced(best, most), f"{split} data", getattr(best, "names", None))


def evenly_spaced(data: Any, count: int) -> Tensor:
    """Return at most `count` states (float64) of a dataset that is not empty, evenly spaced in it."""
    size = len(data)
    indices = [i * size // min(count, size) for i in range(min(count, size))]
    return torch.stack([state_of(data[i]).double() for i in indices])


def grouped(samples: Tensor, names: Sequence[str] = (), data: RealData | None = None) -> list[Group]:
    """Return the groups of a picture: real data if there are any, then the samples.

    Vectors (N, D) and series (N, C, L) keep their shape; others are flattened to series of one channel.

    Args:
        samples: (N, *).
        names: names of K groups of N / K consecutive samples; empty for samples of one kind.
        data: real data; None for none.

    Raises:
        ValueError: the number of samples is not a multiple of the number of names.
    """
    if names and len(samples) % len(names):
        raise ValueError(
            f"the number of samples must be a multiple of {len(names)}, the number of names; got {len(samples)}"
        )
    array, names = _array(samples), names or ["" if data is None else "samples"]
    each, few = len(array) // len(names), len(names) <= len(COLOURS)
    colours: Any = COLOURS if few else matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(names))).tolist()
    groups = [Group(name, array[i * each : (i + 1) * each], colours[i]) for i, name in enumerate(names)]
    return groups if data is None else [Group(data.name, _array(data.states)), *groups]


def _array(states: Tensor) -> np.ndarray:
    states = states if states.ndim in (2, 3) else states.flatten(1)[:, None]
    return states.detach().double().cpu().numpy()


def column_names(names: Sequence[str] | None, dimensions: int) -> list[str]:
    """Return the names of the columns, shortened to 24 characters; x₁, x₂, ... if there are none or not as many."""
    if names is None or len(names) != dimensions:
        digits = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
        return [f"x{str(i + 1).translate(digits)}" for i in range(dimensions)]
    return [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}" for name in names]


def save_states(
    samples: Tensor,
    path: Path,
    low: float = 0.0,
    high: float = 1.0,
    names: Sequence[str] = (),
    credit: str | None = None,
    columns: Sequence[str] | None = None,
    data: RealData | None = None,
) -> Path:
    """Save a picture of samples (N, *) of any shape: images by `save_samples`, other states beside real data.

    Args:
        samples: (N, C, H, W) with C 1 or 3, vectors (N, D), series (N, C, L), or any other shape, which is flattened.
        path: PNG file to write.
        low, high: the value drawn in black and the value drawn in white, for images.
        names: names of K groups of N / K consecutive samples; each is a row of images, or has a colour of its own.
        credit: the makers of the data and their licence, stored in the file as the metadata "Copyright".
        columns: names of the columns of a table; by default those of `data`.
        data: real data to compare with, for states that are not images.

    Raises:
        ValueError: the number of samples is not a multiple of the number of names.
    """
    if are_images(samples):
        return save_samples(samples, path, low, high, names, credit)
    columns = columns or (data.columns if data else None)
    groups = grouped(samples, names, data)
    if samples.ndim != 2:
        figure = series(groups)
    elif samples.shape[1] == 2 and not columns:
        figure = plane(groups)
    else:
        figure = vectors(groups, column_names(columns, samples.shape[1]))
    metadata = {"Copyright": credit} if credit else {}
    replace_atomically(path, lambda file: figure.savefig(file, format="png", metadata=metadata))
    return path


# --- tables


def vectors(groups: Sequence[Group], names: Sequence[str]) -> Figure:
    """Draw vectors (N, D): histograms and scatter plots of all pairs if 2 <= D <= 6, otherwise `marginals`."""
    dimensions = len(names)
    if dimensions > MAX_PAIRED or dimensions == 1:
        return marginals(groups, names)
    side = max(5, 2 * dimensions)
    figure = Figure(figsize=(side, side), dpi=120, layout="constrained")
    panels: Any = figure.subplots(dimensions, dimensions, squeeze=False)
    for (row, column), axes in np.ndenumerate(panels):
        if column > row:
            axes.set_axis_off()
            continue
        if column == row:
            draw_marginals(axes, [group.of(slice(None), row) for group in groups])
        else:
            scatter(axes, [group.of(slice(None), [column, row]) for group in groups])
        set_ticks(axes, 4)
    for i, name in enumerate(names):
        panels[-1, i].set_xlabel(name)
        if i > 0:
            panels[i, 0].set_ylabel(name)
    return titled(figure, groups, panels[0, 0])


def plane(groups: Sequence[Group]) -> Figure:
    """Draw points in the plane (N, 2), with one unit as long on either axis."""
    figure = Figure(figsize=(5, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="x₁", ylabel="x₂", aspect="equal")
    scatter(axes, groups)
    set_ticks(axes)
    return titled(figure, groups, axes)


def marginals(groups: Sequence[Group], names: Sequence[str]) -> Figure:
    """Draw vectors (N, D): a histogram of each of the first 16 columns."""
    shown = min(PANELS, len(names))
    columns = int(np.ceil(np.sqrt(shown)))
    rows = -(-shown // columns)
    figure = Figure(figsize=(max(5.0, 2.2 * columns), max(3.5, 1.7 * rows)), dpi=120, layout="constrained")
    panels: Any = figure.subplots(rows, columns, squeeze=False).flat
    for i, axes in enumerate(panels):
        if i >= shown:
            axes.set_axis_off()
            continue
        draw_marginals(axes, [group.of(slice(None), i) for group in groups])
        axes.set_xlabel(names[i], fontsize=8)
        axes.tick_params(labelsize=7)
        set_ticks(axes, 4)
    return titled(figure, groups, panels[0], f"{shown} of {len(names)} columns, " if shown < len(names) else "")


def draw_marginals(axes: Axes, groups: Sequence[Group]) -> None:
    """Draw a histogram of the finite values (N,) of a group; of several groups, their densities on the same bins."""
    axes.set_yticks([])
    if len(groups) == 1:
        draw_histogram(axes, groups[0].states, bins=40, color=groups[0].colour or BAND)
        return
    values = [group.states[np.isfinite(group.states)] for group in groups]
    least = min((float(x.min()) for x in values if len(x)), default=0.0)
    edges = np.histogram_bin_edges(np.concatenate(values) - least, BINS)
    for group, x in zip(groups, values, strict=True):
        heights = np.histogram(x - least, edges)[0] / (max(1, len(x)) * np.diff(edges))
        style: dict[str, Any] = {"color": BAND, "alpha": 0.35, "fill": True, "linewidth": 0}
        if group.colour is not None:
            style = {"color": group.colour, "linewidth": 1.4}
        axes.stairs(heights, least + edges, label=group.name, **style)
    axes.set_ylim(bottom=0)


def scatter(axes: Axes, groups: Sequence[Group]) -> None:
    """Draw points (N, 2)."""
    for group in groups:
        style: dict[str, Any] = {"s": 4, "alpha": 0.5, "linewidths": 0, "color": group.colour or BAND}
        axes.scatter(*group.states[:MOST_POINTS].T, label=group.name, **style)


# --- series


def series(groups: Sequence[Group]) -> Figure:
    """Draw series (N, C, L): a panel for each of the first 16 channels, see `draw_bands`; two also as `draw_paths`."""
    total = groups[0].states.shape[1]
    channels, is_planar = min(PANELS, total), total == 2
    figure = Figure(figsize=(8 + 4 * is_planar, 1.4 + 1.8 * channels), dpi=120, layout="constrained")
    grid = figure.add_gridspec(channels, 1 + is_planar, width_ratios=(2, 1)[: 1 + is_planar])
    panels = [figure.add_subplot(grid[0, 0])]
    panels += [figure.add_subplot(grid[i, 0], sharex=panels[0]) for i in range(1, channels)]
    if is_planar:
        draw_paths(figure.add_subplot(grid[:, 1], xlabel="channel 0", ylabel="channel 1"), groups)
    for channel, axes in enumerate(panels):
        draw_bands(axes, [group.of(slice(None), channel) for group in groups])
        axes.set_ylabel(f"channel {channel}", fontsize=8)
        axes.margins(x=0)
        axes.tick_params(labelbottom=channel == channels - 1)
        set_ticks(axes)
    panels[-1].set_xlabel("position")
    return titled(figure, groups, panels[0], f"{channels} of {total} channels, " if channels < total else "")


def draw_paths(axes: Axes, groups: Sequence[Group]) -> None:
    """Draw a few series (N, 2, L) of each group as paths in the plane of their channels, with a dot at the start."""
    samples = [group for group in groups if group.colour is not None]
    for group in groups:
        shown = group.states[: LINES if len(samples) == 1 else FEW_LINES]
        for i, (x, y) in enumerate(shown):
            colour = group.colour if len(samples) > 1 else COLOURS[1 + i % 4]
            axes.plot(x, y, color=BAND if group.colour is None else colour, linewidth=1.2)
        axes.scatter(shown[:, 0, 0], shown[:, 1, 0], s=16, color=COLOURS[6], zorder=3)
    set_ticks(axes)


def draw_bands(axes: Axes, groups: Sequence[Group]) -> None:
    """Draw groups of series (N, L) by their quantiles at each position, and some of the samples as thin lines.

    The band from the 5% to the 95% quantile of the first group is filled: real data, or samples alone. Of other groups,
    these quantiles are dashed lines. The median is a thick line.
    """
    samples = [group for group in groups if group.colour is not None]
    for group in groups:
        x = np.arange(group.states.shape[1])
        low, middle, high = np.quantile(group.states, LEVELS, axis=0)
        name, colour = group.name or "samples", group.colour if group.colour is not None else COLOURS[6]
        if group is groups[0]:
            axes.fill_between(x, low, high, color=BAND, alpha=0.3, linewidth=0, label=f"{name}, 5% to 95%")
        else:
            axes.plot(x, low, color=colour, linewidth=1.4, linestyle="--", label=f"{name}, 5% to 95%")
            axes.plot(x, high, color=colour, linewidth=1.4, linestyle="--")
        axes.plot(x, middle, color=colour, linewidth=2, label=f"{name}, median")
        if group.colour is not None:
            shown = group.states[: LINES if len(samples) == 1 else FEW_LINES]
            for i, line in enumerate(shown):
                own = COLOURS[1 + i % 4] if len(samples) == 1 else colour
                axes.plot(x, line, color=own, linewidth=0.9, label="" if i else f"{name}, {len(shown)} of them")


def titled(figure: Figure, groups: Sequence[Group], axes: Axes, prefix: str = "") -> Figure:
    """Set the title of a figure, the number of states, and its legend if `axes` has several labels."""
    counts = ", ".join(f"{len(group.states):,} {group.name or 'samples'}".strip() for group in groups[:4])
    figure.suptitle(f"{prefix}{counts}{', ...' if len(groups) > 4 else ''}", fontsize=9)
    handles, labels = axes.get_legend_handles_labels()
    if len(set(labels)) > 1:
        figure.legend(handles, labels, loc="outside lower center", fontsize=8, frameon=False, ncols=4)
    return figure
