"""The sections on samples: what was drawn, how it came out of noise, and the paths it took; for states of any shape.

Images are shown as they are; points of the plane as dots; series as curves, a chart for each channel; other vectors by
their first two principal components, and coordinate by coordinate.
"""

from dataclasses import dataclass, field

import torch
from markupsafe import Markup
from torch import Tensor

from scoresde.report.axes import MINUS, span
from scoresde.report.charts import Chart, panel
from scoresde.report.facts import Facts
from scoresde.report.film import Film, Paths
from scoresde.report.layers import Dots, Histogram, Layer, Line
from scoresde.report.pictures import data_uri, fitting, grid
from scoresde.report.words import number, state

SHOWN = 64  # images
POINTS = 1500  # of a cloud
FEW = 200  # up to which its points are large
CURVES = 12  # series in a chart
CHANNELS = 4  # of series, a chart each
DIMENSIONS = 64  # of vectors, coordinate by coordinate
FLOW_PATHS, REVERSE_PATHS, OTHER_PATHS = 12, 3, 6  # in the plane, and else
MOST_NOISE, LEAST_NOISE = -6.0, 12.0  # log-SNR between which paths are drawn in the plane; up to which they move
FILMED = 4  # images in a frame


@dataclass
class Picture:
    """An image in the page."""

    uri: str
    alt: str
    caption: str = ""


@dataclass
class Gallery:
    """Pictures of states, or charts of them."""

    pictures: list[Picture] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)


@dataclass
class Frame:
    """A time of a film: its log-SNR, and the state and its denoised view as pictures or panels."""

    label: str
    state: Picture | Markup
    denoised: Picture | Markup


def bounds(facts: Facts) -> tuple[float, float]:
    """Values drawn black and white: of k grey levels [low, high), the first and the last of them."""
    low, high = facts.range
    return low, high - 1 if facts.levels else high


# --- samples


def gallery(facts: Facts, samples: Tensor, what: str, beside: Tensor | None = None) -> Gallery:
    """Samples, beside data if given.

    Args:
        facts: of the run.
        samples: (N, *) in data units.
        what: they are, for who cannot see them.
        beside: data (M, *), (M of any number).
    """
    if facts.kind == "images":
        both = [(samples, f"Samples {what}")]
        both += [(beside, "Real data beside them")] if beside is not None else []
        return Gallery(pictures=[images(facts, *one_of) for one_of in both])
    return Gallery(charts=charts_of(facts, samples, beside))


def images(facts: Facts, x: Tensor, caption: str) -> Picture:
    """Images in a square grid."""
    count = fitting(min(len(x), SHOWN), *x.shape[2:])
    low, high = bounds(facts)
    values = f"values from {number(float(x[:count].min()), 3)} to {number(float(x[:count].max()), 3)}"
    alt = f"{caption}: {count} {state(facts)} in a grid, {values}."
    shown = x[:count].floor() if facts.levels else x[:count]
    return Picture(data_uri(grid(shown, low, high)), alt, caption)


def charts_of(facts: Facts, samples: Tensor, beside: Tensor | None) -> list[Chart]:
    """States that are no images, over the data."""
    if facts.kind == "series":
        return series_charts(samples)
    if facts.kind == "plane":
        return [cloud("Samples in the plane", samples, beside, ("x₁", "x₂"))]
    flat = samples.flatten(1)
    if flat.shape[1] == 1:
        return [histogram(flat[:, 0])]
    real = None if beside is None else beside.double().flatten(1)
    spread = flat if real is None else real
    if len(spread) < 2:  # which has no principal components
        return [coordinates(flat, real)]
    basis = principal(spread, 2)
    labels = ("first principal component", "second principal component")
    return [
        cloud("Samples in two dimensions", flat @ basis, None if real is None else real @ basis, labels),
        coordinates(flat, real),
    ]


def cloud(title: str, samples: Tensor, beside: Tensor | None, labels: tuple[str, str]) -> Chart:
    """Points of a plane, over those of the data."""
    layers: list[Layer] = []
    if beside is not None:
        layers.append(Dots("data", *columns(beside[:POINTS]), colour=6, size=2.0))
    layers.append(Dots("samples", *columns(samples[:POINTS]), size=2.4 if len(samples) > FEW else 4.5))
    deviation = samples.std(dim=0, correction=min(1, len(samples) - 1))
    mean, std = (", ".join(number(float(v), 3) for v in part) for part in (samples.mean(dim=0), deviation))
    seen = f"{title}: {min(len(samples), POINTS)} samples as dots, of mean ({mean}) and standard deviations ({std})."
    return Chart(title, seen, layers, x=labels[0], y=labels[1], square=True, height=340.0)


def columns(points: Tensor) -> tuple[list[float], list[float]]:
    first, second = points.double().cpu().unbind(dim=1)
    return first.tolist(), second.tolist()


def histogram(values: Tensor) -> Chart:
    """Numbers, one for each sample."""
    counts, edges = torch.histogram(values.double().cpu(), bins=40)
    seen = f"Histogram of {len(values)} samples from {float(values.min()):.3g} to {float(values.max()):.3g}."
    layer = Histogram("samples", edges.tolist(), counts.tolist())
    return Chart("Samples", seen, [layer], x="value", y="number of samples")


def coordinates(samples: Tensor, beside: Tensor | None) -> Chart:
    """The middle and nine tenths of the samples in each coordinate."""
    layers: list[Layer] = []
    for i, (name, x) in enumerate((("data", beside), ("samples", samples))):
        if x is None:
            continue
        levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
        low, middle, high = (row.tolist() for row in torch.quantile(x[:, :DIMENSIONS].double().cpu(), levels, dim=0))
        places = [k + 1 + (0.12 if i else -0.12) for k in range(len(middle))]
        layers.append(Line(name, places, middle, low, high, colour=0 if i else 6, style="points"))
    shown = min(samples.shape[1], DIMENSIONS)
    seen = f"The median of each of {shown} coordinates, with bars from the 5% to the 95% quantile."
    ticks = [k for k in range(1, shown + 1) if shown <= 12 or k % (shown // 8) == 0]
    return Chart("Coordinate by coordinate", seen, layers, x="coordinate", y="median, 5% to 95%", x_ticks=ticks)


def series_charts(samples: Tensor) -> list[Chart]:
    """Some series, a chart for each channel."""
    found = []
    for channel in range(min(samples.shape[1], CHANNELS)):
        x = samples[:CURVES, channel].double().cpu()
        layers: list[Layer] = [Line("", list(range(len(y))), y.tolist(), colour=i) for i, y in enumerate(x)]
        seen = f"{len(x)} series of channel {channel}, from {float(x.min()):.3g} to {float(x.max()):.3g}."
        found.append(Chart(f"Channel {channel}", seen, layers, x="position", y="value"))
    return found


def principal(x: Tensor, count: int) -> Tensor:
    """The first principal directions (D, count) of states (N, *); each with its largest entry positive."""
    flat = x.double().flatten(1)
    directions = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False).Vh[:count].T
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return directions * largest.sign()


# --- the film


def frames(facts: Facts, film: Film) -> list[Frame]:
    """The frames of a film."""
    if facts.kind == "images":
        return [_image_frame(facts, film, i) for i in range(len(film.log_snr))]
    everything = torch.cat([film.states.flatten(0, 1), film.denoised.flatten(0, 1)])
    basis = None
    if facts.kind == "vectors" and everything[0].numel() > 1:
        basis = principal(film.denoised[-1], 2)
    ends = _ends(facts, everything, basis)
    return [
        Frame(
            label(film.log_snr[i]),
            *(
                panel(
                    f"{name} at log-SNR {label(film.log_snr[i])}", _seen(part[i]), _drawn(facts, part[i], basis), *ends
                )
                for name, part in (("States", film.states), ("Denoised views", film.denoised))
            ),
        )
        for i in range(len(film.log_snr))
    ]


def label(log_snr: Tensor) -> str:
    return f"{float(log_snr):+.1f}".replace("-", MINUS).replace("+0.0", "0.0")


def _image_frame(facts: Facts, film: Film, i: int) -> Frame:
    when, low_high = label(film.log_snr[i]), bounds(facts)

    def picture(x: Tensor, name: str) -> Picture:
        x = x[:FILMED]
        alt = f"{len(x)} {name} at log-SNR {when}; standard deviation of the values {float(x.double().std()):.3g}."
        return Picture(data_uri(grid(x, *low_high, columns=1)), alt)

    return Frame(when, picture(film.states[i], "states"), picture(film.denoised[i], "denoised views"))


def _seen(x: Tensor) -> str:
    values = x.double()
    return f"{len(x)} samples of mean {float(values.mean()):.3g} and standard deviation {float(values.std()):.3g}."


def _flat(x: Tensor, basis: Tensor | None) -> Tensor:
    flat = x.double().flatten(1)
    return flat if basis is None else flat @ basis


def _ends(facts: Facts, x: Tensor, basis: Tensor | None) -> tuple[tuple[float, float], tuple[float, float]]:
    """The ends of the axes of all panels."""
    if facts.kind == "series":
        return (0.0, float(max(x.shape[-1] - 1, 1))), span(x[:, 0].flatten().tolist())
    flat = _flat(x, basis)
    if flat.shape[1] == 1:
        return span(flat[:, 0].tolist()), (0.0, 1.0)
    (x_low, x_high), (y_low, y_high) = (span(column.tolist()) for column in flat.T)
    half = max(x_high - x_low, y_high - y_low) / 2
    x_middle, y_middle = (x_low + x_high) / 2, (y_low + y_high) / 2
    return (x_middle - half, x_middle + half), (y_middle - half, y_middle + half)


def _drawn(facts: Facts, x: Tensor, basis: Tensor | None) -> list[Layer]:
    """The layers of a panel."""
    if facts.kind == "series":
        curves = x[:CURVES, 0].double()
        return [Line("", list(range(len(y))), y.tolist(), colour=i) for i, y in enumerate(curves)]
    flat = _flat(x, basis)
    if flat.shape[1] == 1:
        counts, edges = torch.histogram(flat[:, 0], bins=20)
        return [Histogram("", edges.tolist(), (counts / counts.max()).tolist())]
    return [Dots("", *columns(flat), size=2.0)]


# --- the paths


def path_charts(facts: Facts, paths: Paths, samples: Tensor | None) -> list[Chart]:
    """The paths of the probability flow and of the reverse SDE, from the same noise."""
    kinds = (("Probability flow (ODE)", paths.flow), ("Reverse SDE", paths.reverse))
    if facts.kind == "plane":
        return [_plane_paths(*kind, paths.log_snr, samples) for kind in kinds]
    reference = paths.flow[-1] if samples is None or len(samples) < 8 else samples
    basis = principal(reference, 1)
    log_snr = paths.log_snr[paths.log_snr <= max(LEAST_NOISE, float(paths.log_snr[1]))].tolist()
    moving = [path[: len(log_snr), :OTHER_PATHS] for _, path in kinds]
    drawn = [_flat(path.flatten(0, 1), basis).reshape(len(log_snr), -1) for path in moving]
    ends = span(torch.cat(drawn).flatten().tolist())
    found = []
    for (name, _), y in zip(kinds, drawn, strict=True):
        layers: list[Layer] = [Line("", log_snr, column.tolist(), colour=i) for i, column in enumerate(y.T)]
        last = ", ".join(f"{float(value):.3g}" for value in y[-1])
        seen = (
            f"{y.shape[1]} paths from log-SNR {log_snr[0]:.3g} (noise) to {log_snr[-1]:.3g} (data), along the first "
            f"principal component of the samples; they end at {last}."
        )
        y_label = "value" if basis.shape[0] == 1 else "first principal component"
        found.append(Chart(name, seen, layers, x="log-SNR (noise left, data right)", y=y_label, y_span=ends))
    return found


def _plane_paths(name: str, path: Tensor, log_snr: Tensor, samples: Tensor | None) -> Chart:
    """Paths in the plane, over the samples: from where they are noise in all but a trace."""
    cloud = path[-1] if samples is None else samples[:POINTS]
    path = path[log_snr >= min(MOST_NOISE, float(log_snr[-2]))]
    is_flow = name.startswith("Probability")
    count = min(FLOW_PATHS if is_flow else REVERSE_PATHS, path.shape[1])
    layers: list[Layer] = [Dots("samples", *columns(cloud), colour=6, size=2.0)]
    layers += [Line("", *columns(path[:, i]), colour=0 if is_flow else (0, 3, 4)[i % 3]) for i in range(count)]
    layers.append(Dots("start, in noise", *columns(path[0, :count]), colour=1, size=5.5))
    layers.append(Dots("end, a sample", *columns(path[-1, :count]), colour=2, size=5.5))
    length = float(path[:, :count].double().diff(dim=0).norm(dim=-1).sum(dim=0).mean())
    seen = f"{count} paths in the plane over the samples, from noise to data; their mean length is {length:.3g}."
    return Chart(name, seen, layers, x="x₁", y="x₂", square=True, height=340.0)


def film_steps(facts: Facts) -> int:
    """Of how many steps a path is unless it is said: of cheap networks so many that it looks as rough as it is."""
    return 120 if facts.kind in ("plane", "vectors") else 40


def film_samples(facts: Facts) -> int:
    """How many samples are followed unless it is said."""
    return {"images": 6, "series": 6}.get(facts.kind, 300)
