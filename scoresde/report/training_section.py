"""The section on training: charts of the log."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from scoresde.plots import COLOURS, curve
from scoresde.report.charts import Chart, new_axes, scale_y, to_chart
from scoresde.report.run_files import Line, RunFiles
from scoresde.report.wording import number, with_error
from scoresde.training.log import LEVELS

MOST_POINTS = 400  # points of a curve; longer curves are drawn by the means of neighbouring points
HELD_OUT = {
    "validation_loss": ("Loss on held-out data", "loss"),
    "validation_bits_per_dim_bound": ("Evidence bound on held-out data", "bits/dim"),
    "validation_nats_per_dim_bound": ("Evidence bound on held-out data", "nats/dim"),
}


def training_section(files: RunFiles) -> dict[str, Any]:
    """Return the variables for the section's template, from the training log."""
    lines = files.training
    charts: list[Chart] = []
    if len(lines) > 1:
        charts.append(smoothed_chart(lines, "loss", "Training loss", "loss"))
        charts.append(smoothed_chart(lines, "gradient_norm", "Norm of the gradient", "norm, before clipping"))
    for name, labels in HELD_OUT.items():
        if measured := finite(files.held_out, name):
            charts.append(held_out_chart(measured, name, *labels))
    levels = levels_chart(lines)
    return {
        "charts": charts if levels is None else [*charts, levels],
        "has_levels": levels is not None,
        "has_held_out": any(line.get("validation_loss") is not None for line in files.held_out),
        "is_short": len(lines) == 1,
        "speed": np.median(rates) if (rates := values(lines, "images_per_second")) and charts else None,
        "memory": max(memory) if (memory := values(lines, "memory_gb")) and charts else None,
        "skipped": files.skipped,
    }


def finite(lines: Sequence[Line], name: str) -> list[Line]:
    """Return the lines of the log with a finite number as entry `name`."""
    return [line for line in lines if line.get(name) is not None and math.isfinite(line[name])]


def values(lines: Sequence[Line], name: str) -> list[float]:
    """Return the finite numbers that the lines of the log have as entry `name`."""
    return [float(line[name]) for line in finite(lines, name)]


def thinned(y: np.ndarray) -> np.ndarray:
    """Return at most `MOST_POINTS` means, each of equally many neighbouring values."""
    size = max(1, math.ceil(len(y) / MOST_POINTS))
    return np.array([y[i : i + size].mean() for i in range(0, len(y), size)])


def moving_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Return at each index the mean of the `window` values that end there; fewer values at the beginning."""
    return np.array([y[max(0, i + 1 - window) : i + 1].mean() for i in range(len(y))])


def smoothed_chart(lines: Sequence[Line], name: str, title: str, y_label: str) -> Chart:
    """Draw a thin curve of values, and a thick curve of their moving mean."""
    axes = new_axes("step", y_label)
    x, y = np.array(values(finite(lines, name), "step")), np.array(values(lines, name))
    if not len(y):
        return to_chart(axes, f"{title} (never finite)", f"{title}: never finite.")
    window = max(3, round(len(y) / 12))
    mean = moving_mean(y, window)
    axes.plot(thinned(x), thinned(y), color=COLOURS[0], linewidth=0.8, alpha=0.8, label="each line of the log")
    axes.plot(thinned(x), thinned(mean), color=COLOURS[0], linewidth=2.2, label=f"mean of {window} lines")
    scale_y(axes, mean)
    description = (
        f"{title} against training steps. Its mean over {window} lines of the log goes from {number(mean[0])} at step "
        f"{number(x[0])} to {number(mean[-1])} at step {number(x[-1])}; the lowest is {number(mean.min())}."
    )
    return to_chart(axes, title, description)


def held_out_chart(lines: Sequence[Line], name: str, title: str, y_label: str) -> Chart:
    """Draw a metric of held-out data with its standard errors, from lines of the log in which the metric is finite."""
    axes = new_axes("step", y_label)
    x, y = np.array(values(lines, "step")), np.array(values(lines, name))
    errors = np.array([float(line.get(f"{name}_stderr") or 0.0) for line in lines])
    curve(axes, x, y, (y - errors, y + errors), colour=2)
    scale_y(axes, y)
    first, last = (f"{with_error(y[i], errors[i])} at step {number(x[i])}" for i in (0, -1))
    return to_chart(axes, title, f"{title} at {len(x)} steps, with standard errors: {first}, {last}.")


def losses_by_level(lines: Sequence[Line]) -> dict[str, np.ndarray]:
    """Return the mean loss at each noise level in the first, middle and last tenth of the log; NaN if unknown."""
    rows = [line["loss_by_log_snr"] for line in lines if line.get("loss_by_log_snr")]
    if len(rows) < 3:
        return {}
    share = max(1, len(rows) // 10)
    middle = (len(rows) - share) // 2
    parts = {"first": rows[:share], "middle": rows[middle : middle + share], "last": rows[-share:]}
    means = {}
    for name, part in parts.items():
        losses = np.array([[row[k] if k < len(row) else None for k in range(len(LEVELS) + 1)] for row in part], float)
        known = np.isfinite(losses)
        count = known.sum(axis=0)
        means[name] = np.where(known, losses, 0.0).sum(axis=0) / np.where(count > 0, count, np.nan)
    return {name: mean for name, mean in means.items() if np.isfinite(mean).any()}


def levels_chart(lines: Sequence[Line]) -> Chart | None:
    """Draw the loss at each noise level early, midway and late in training; return None if it was not logged."""
    means, step = losses_by_level(lines), float(LEVELS[1] - LEVELS[0])
    if not means:
        return None
    centres = np.append(LEVELS.numpy(), float(LEVELS[-1]) + step) - step / 2
    axes, texts = new_axes("log-SNR (noise left, data right)", "loss, unweighted"), []
    for name, mean in means.items():
        colour, width = {"first": (6, 1.5), "middle": (4, 1.5), "last": (0, 2.2)}[name]
        known = np.isfinite(mean)
        x, y = centres[known], mean[known]
        curve(axes, x, y, colour=colour, linewidth=width, label=f"{name} tenth of the training")
        ends = [f"{number(y[i], 3)} at log-SNR {number(x[i])}" for i in (0, -1)]
        texts.append(f"in the {name} tenth, from {ends[0]} to {ends[1]}")
    scale_y(axes, np.concatenate(list(means.values())))
    return to_chart(axes, "Loss by noise level", f"The unweighted loss by noise level: {'; '.join(texts)}.")
