"""Charts of states that are not images: samples, frames of a film, and paths.

Points in the plane are dots. Series have a chart for each channel, with their quantiles and some of them as curves;
those of two channels are also paths in the plane. Tables have small charts of columns and pairs. States of more
dimensions are drawn by their first two principal components, and coordinate by coordinate.
"""

from collections.abc import Sequence

import numpy as np
import torch
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from scoresde.plots import COLOURS, curve
from scoresde.report.charts import (
    PANEL,
    RULE,
    UNITS_PER_INCH,
    Chart,
    accessible_svg,
    dots,
    histogram,
    new_axes,
    to_chart,
)
from scoresde.report.film import Film
from scoresde.report.run_files import RunFiles
from scoresde.report.table_charts import MOST_COLUMNS, table_charts
from scoresde.report.wording import number
from scoresde.state_plots import Group, RealData, column_names, draw_bands, draw_marginals, grouped

POINTS = 1500  # largest number of points in a chart
FEW = 200  # up to this number of points, they are drawn large
CURVES = 12  # largest number of series in a panel of the film
CHANNELS = 4  # largest number of channels of series; each has a chart
DIMENSIONS = 64  # largest number of coordinates in a chart
FLOW_PATHS, REVERSE_PATHS, OTHER_PATHS = 12, 3, 6  # numbers of paths: ODE and SDE in the plane; others
MOST_NOISE, LEAST_NOISE = -6.0, 12.0  # log-SNR at which paths in the plane begin, and at which other paths end
SQUARE = 340.0  # height of a chart of the plane


# --- samples


def sample_charts(files: RunFiles, samples: Tensor, real: RealData | None = None) -> list[Chart]:
    """Draw samples (N, *) over real data: all but tables of a few columns, which `small_charts` draws."""
    data = None if real is None else real.states
    if files.kind == "series":
        groups = grouped(samples, (), real)
        charts = [series_chart(groups, channel) for channel in range(min(samples.shape[1], CHANNELS))]
        return [*charts, planar_series(samples)] if samples.shape[1] == 2 and samples.shape[2] > 1 else charts
    if files.kind == "plane":
        names = column_names(real.columns if real else None, 2)
        return [cloud("Samples in the plane", samples, data, (names[0], names[1]))]
    samples, data = samples.double().flatten(1), None if data is None else data.double().flatten(1)
    if samples.shape[1] == 1:
        return [values_chart(grouped(samples, (), real))]
    if len(files.shape) == 1 and samples.shape[1] <= MOST_COLUMNS:
        return []
    reference = samples if data is None else data
    if len(reference) < 2:  # one point has no principal components
        return [coordinate_chart(samples, data)]
    basis = principal_directions(reference, 2)
    title, labels = "Samples in two dimensions", ("first principal component", "second principal component")
    projected = cloud(title, samples @ basis, None if data is None else data @ basis, labels)
    return [projected, coordinate_chart(samples, data)]


def small_charts(files: RunFiles, samples: Tensor, real: RealData | None = None) -> list[Chart]:
    """Draw the columns and the pairs of columns of a table of 3 to 12 columns, or of one whose columns have names."""
    is_named = real is not None and bool(real.columns)
    is_table = len(files.shape) == 1 and files.shape[0] > 1
    if not is_table or not (is_named or 2 < files.shape[0] <= MOST_COLUMNS):
        return []
    return table_charts(grouped(samples, (), real), column_names(real.columns if real else None, files.shape[0]))


def cloud(title: str, samples: Tensor, data: Tensor | None, labels: tuple[str, str]) -> Chart:
    """Draw samples (N, 2) as points in the plane, over points of the data (M, 2)."""
    axes = new_axes(*labels, height=SQUARE)
    if data is not None:
        dots(axes, data[:POINTS], colour=6, size=2.0, label="data")
    dots(axes, samples[:POINTS], size=2.4 if len(samples) > FEW else 4.5, label="samples")
    axes.set_aspect("equal", "datalim")
    deviation = samples.std(dim=0, correction=min(1, len(samples) - 1))
    mean, std = (", ".join(number(float(v), 3) for v in part) for part in (samples.mean(dim=0), deviation))
    shown = min(len(samples), POINTS)
    return to_chart(axes, title, f"{title}: {shown} samples as dots, mean ({mean}), standard deviations ({std}).")


def values_chart(groups: Sequence[Group]) -> Chart:
    """Draw a histogram of numbers (N, 1), one for each state."""
    axes, (values, name) = new_axes("value"), (groups[-1].states[:, 0], groups[-1].name or "samples")
    draw_marginals(axes, [group.of(slice(None), 0) for group in groups])
    description = f"Histogram of {len(values)} {name} from {values.min():.3g} to {values.max():.3g}."
    return to_chart(axes, "Samples", description)


def coordinate_chart(samples: Tensor, data: Tensor | None) -> Chart:
    """Draw the median and the 5% to 95% quantiles of each coordinate."""
    axes, shown = new_axes("coordinate", "median, 5% to 95%"), min(samples.shape[1], DIMENSIONS)
    levels, places = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64), np.arange(1, shown + 1)
    for name, x, colour, shift in (("data", data, 6, -0.12), ("samples", samples, 0, 0.12)):
        if x is not None:
            low, middle, high = torch.quantile(x[:, :shown].cpu(), levels, dim=0).numpy()
            curve(axes, places + shift, middle, (low, high), colour=colour, marker="o", linestyle="", label=name)
    axes.set_xticks([k for k in places if shown <= 12 or k % (shown // 8) == 0])
    description = f"The median of each of {shown} coordinates, with bars from the 5% to the 95% quantile."
    return to_chart(axes, "Coordinate by coordinate", description)


def series_chart(groups: Sequence[Group], channel: int) -> Chart:
    """Draw one channel of groups of series (N, C, L): quantiles at each position, and a few of the samples."""
    axes, x = new_axes("position", "value"), groups[-1].states[:, channel]
    draw_bands(axes, [group.of(slice(None), channel) for group in groups])
    texts = [
        f"of {len(group.states)} {group.name or 'samples'}, 90% lie on average between {low:.3g} and {high:.3g}"
        for group in groups
        for low, high in [np.quantile(group.states[:, channel], (0.05, 0.95), axis=0).mean(axis=1)]
    ]
    description = (
        f"Series of channel {channel}: {'; '.join(texts)}. The samples go from {x.min():.3g} to {x.max():.3g}."
    )
    return to_chart(axes, f"Channel {channel}", description)


def planar_series(samples: Tensor) -> Chart:
    """Draw the first series (2, L) as paths in the plane of their two channels."""
    axes, x = new_axes("channel 0", "channel 1", height=SQUARE), samples[:OTHER_PATHS].double().cpu()
    for i, path in enumerate(x.numpy()):
        axes.plot(*path, color=COLOURS[i % len(COLOURS)], linewidth=1.2)
    dots(axes, x[:, :, 0], colour=1, size=5.5, label="first position")
    dots(axes, x[:, :, -1], colour=2, size=5.5, label="last position")
    length = x.diff(dim=2).norm(dim=1).sum(dim=1).mean()
    description = f"{len(x)} series as paths in the plane of their two channels; their mean length is {length:.3g}."
    return to_chart(axes, "Both channels as paths", description)


def draw_lines(axes: Axes, x: Sequence[float] | np.ndarray, columns: Tensor) -> None:
    """Draw the columns of a matrix as lines, each in another colour."""
    for i, column in enumerate(columns.T.numpy()):
        axes.plot(x, column, color=COLOURS[i % len(COLOURS)], linewidth=1.5)


def principal_directions(x: Tensor, count: int) -> Tensor:
    """Return the first principal directions (D, count) of states (N, *); the largest entry of each is positive."""
    flat = x.double().flatten(1)
    directions = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False).Vh[:count].T
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return directions * largest.sign()


# --- the film


def film_panels(files: RunFiles, film: Film, labels: Sequence[str]) -> list[tuple[Markup, Markup]]:
    """Draw the states and the denoised views E[x_0 | x_t] at each time of the film, on equal axes without numbers."""
    parts = {"States": film.flow[film.frames], "Denoised views": film.denoised}
    if files.kind == "series":
        parts = {name: part[:, :CURVES, 0].double() for name, part in parts.items()}
    else:
        parts = {name: part.double().flatten(2) for name, part in parts.items()}
        if len(files.shape) > 1 or files.shape[0] > 2:
            basis = principal_directions(film.denoised[-1], 2)
            parts = {name: part @ basis for name, part in parts.items()}
    both = torch.cat(list(parts.values())).flatten(0, 1)
    columns = [
        [panel(files, x, f"{name} at log-SNR {label}", both) for x, label in zip(part, labels, strict=True)]
        for name, part in parts.items()
    ]
    return list(zip(*columns, strict=True))


def panel(files: RunFiles, x: Tensor, title: str, everything: Tensor) -> Markup:
    """Draw series (S, L) or points (S, 1 or 2) in a square; the axes fit `everything`, the data of all panels."""
    figure = Figure((PANEL / UNITS_PER_INCH, PANEL / UNITS_PER_INCH), frameon=False)
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98), xticks=[], yticks=[], facecolor="none")
    axes.spines[:].set_color(RULE)
    low, high = everything.numpy().min(axis=0), everything.numpy().max(axis=0)
    half, centre = 0.56 * (high - low).max() or 1.0, (low + high) / 2
    if files.kind == "series":
        draw_lines(axes, range(x.shape[1]), x.T)
        axes.set_ylim(*limits(everything))
    elif x.shape[1] == 1:
        histogram(axes, x[:, 0].numpy(), bins=20)
        axes.set_xlim(*limits(everything))
    else:
        dots(axes, x, size=2.0)
        axes.set(xlim=(centre[0] - half, centre[0] + half), ylim=(centre[1] - half, centre[1] + half))
    description = f"{len(x)} samples of mean {x.mean():.3g} and standard deviation {x.std():.3g}."
    return accessible_svg(axes, title, description)[0]


def limits(values: Tensor) -> tuple[float, float]:
    """Return the ends of an axis that shows all values, with a margin."""
    low, high = (float(end) for end in values.aminmax())
    margin = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return low - margin, high + margin


# --- the paths


def path_charts(files: RunFiles, film: Film, samples: Tensor | None) -> list[Chart]:
    """Draw the paths of the probability flow and of the reverse SDE from the same noise."""
    if files.kind == "plane":
        flow = plane_paths("Probability flow (ODE)", film.flow[:, :FLOW_PATHS], film.log_snr, [0], samples)
        return [flow, plane_paths("Reverse SDE", film.reverse[:, :REVERSE_PATHS], film.log_snr, [0, 3, 4], samples)]
    basis = principal_directions(film.flow[-1] if samples is None or len(samples) < 8 else samples, 1)
    shown = film.log_snr <= max(LEAST_NOISE, float(film.log_snr[1]))
    log_snr = film.log_snr[shown].numpy()
    paths = {"Probability flow (ODE)": film.flow, "Reverse SDE": film.reverse}
    projected = {name: (x[shown, :OTHER_PATHS].double().flatten(2) @ basis)[..., 0] for name, x in paths.items()}
    both = torch.cat(list(projected.values()))
    charts = []
    for name, y in projected.items():
        axes = new_axes("log-SNR (noise left, data right)", "value" if len(basis) == 1 else "first principal component")
        draw_lines(axes, log_snr, y)
        axes.set_ylim(*limits(both))
        description = (
            f"{y.shape[1]} paths from log-SNR {log_snr[0]:.3g} (noise) to {log_snr[-1]:.3g} (data), along the first "
            f"principal component of the samples; they end at {', '.join(f'{end:.3g}' for end in y[-1])}."
        )
        charts.append(to_chart(axes, name, description))
    return charts


def plane_paths(name: str, paths: Tensor, log_snr: Tensor, colours: list[int], samples: Tensor | None) -> Chart:
    """Draw S paths (K, S, 2) in the plane over the samples, without the first times, which are nearly pure noise."""
    cloud = paths[-1] if samples is None else samples[:POINTS]
    paths = paths[log_snr >= min(MOST_NOISE, float(log_snr[-2]))].double()
    axes, count = new_axes("x₁", "x₂", height=SQUARE), paths.shape[1]
    dots(axes, cloud, colour=6, size=2.0, label="samples")
    for i in range(count):
        axes.plot(*paths[:, i].T.numpy(), color=COLOURS[colours[i % len(colours)]], linewidth=1.5)
    dots(axes, paths[0], colour=1, size=5.5, label="start, in noise")
    dots(axes, paths[-1], colour=2, size=5.5, label="end, a sample")
    axes.set_aspect("equal", "datalim")
    length = paths.diff(dim=0).norm(dim=-1).sum(dim=0).mean()
    description = f"{count} paths in the plane over the samples, from noise to data; their mean length is {length:.3g}."
    return to_chart(axes, name, description)
