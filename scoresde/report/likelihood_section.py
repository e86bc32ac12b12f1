"""The section on the likelihood: the mean over a split, its errors, and the likelihood of each sample."""

import math
from typing import Any

import numpy as np
from torch import stack
from torch.utils.data import Dataset

from scoresde.data.summary import state_of
from scoresde.evaluation.likelihood_table import SUMMANDS
from scoresde.plots import COLOURS
from scoresde.report.charts import Bar, Chart, bar_chart, histogram, new_axes, to_chart
from scoresde.report.pictures import grid_uri
from scoresde.report.run_files import Line, RunFiles
from scoresde.report.wording import MINUS, UNITS, nouns, with_error

EXTREMES = 8  # images shown at either end
MOST_OTHERS = 12  # earlier measurements shown
LEAST_VALUES = 8  # for a histogram


def likelihood_section(files: RunFiles, data: Dataset | str) -> dict[str, Any] | None:
    """Return the variables for the section's template; None if no likelihood was measured.

    Args:
        files: the files of the run.
        data: the data whose likelihood is in the page's headline, or the reason why they are not available.
    """
    line = files.likelihood()
    if line is None:
        return None
    values = files.likelihood_per_sample(line)
    charts, unit = [], UNITS.get(line["unit"], "")
    if len(bars := estimates(line)) > 1:
        label = f"{unit}, mean ± standard error"
        charts.append(bar_chart("Estimates of the likelihood", bars, label, lengths=False))
    if len(bars := error_sources(line)) > 1:
        charts.append(bar_chart("Where the error comes from", bars, unit, lengths=True))
    if bars := bound_terms(line):
        charts.append(bar_chart("Terms of the bound", bars, f"{unit}, mean ± standard error", lengths=True))
    if values is not None and len(values) >= LEAST_VALUES:
        charts.append(values_chart(files, line, values))
    return {
        "line": line,
        "charts": charts,
        "others": [other for other in files.lines("likelihood")[::-1] if other != line][:MOST_OTHERS],
        "has_values": values is not None,
        "extremes": [] if values is None or isinstance(data, str) else extremes(files, line, values, data),
        "no_images": data if values is not None and files.kind == "images" and isinstance(data, str) else "",
    }


def estimates(line: Line) -> list[Bar]:
    """Return a bar for each measured estimate of the mean likelihood: ODE, ODE with smaller steps, evidence bound."""
    values = [("probability flow", line["mean"], line["stderr"], 0)]
    if (finer := line["discretisation"]) is not None:
        error = math.hypot(line["stderr"] or 0.0, finer.get("stderr") or 0.0)
        values.append(("with a finer solve", line["mean"] + finer["mean"], error, 2))
    if (bound := line["bound"]) is not None:
        values.append(("evidence bound (reverse SDE)", bound["mean"], bound.get("stderr"), 1))
    return [Bar(name, value, error, with_error(value, error), colour) for name, value, error, colour in values]


def bound_terms(line: Line) -> list[Bar]:
    """Return a bar for each term of the bound of an autoencoder; none for other transforms."""
    terms = (line.get("summands") or {}).items()
    bars = [(SUMMANDS.get(name, name), term["mean"], term["stderr"]) for name, term in terms]
    return [Bar(name, mean, error, with_error(mean, error), 3) for name, mean, error in bars]


def error_sources(line: Line) -> list[Bar]:
    """Return a bar for the size of each known source of error."""
    sources = (("population", "population", 0), ("probes and dequantisation", "monte_carlo", 5))
    known = [(name, line[key], colour) for name, key, colour in sources if line[key] is not None]
    bars = [Bar(name, value, None, f"± {value:.4f}", colour) for name, value, colour in known]
    if (finer := line["discretisation"]) is not None:
        text = with_error(finer["mean"], finer.get("stderr"), signed=True)
        bars.append(Bar("discretisation (a bias)", abs(finer["mean"]), finer.get("stderr"), text, 2))
    return bars


def values_chart(files: RunFiles, line: Line, values: np.ndarray) -> Chart:
    """Draw a histogram of the likelihood of each sample."""
    singular, plural = nouns(files)
    axes = new_axes(UNITS.get(line["unit"]) or line["unit"], f"number of {plural}")
    bins = min(40, max(8, round(math.sqrt(len(values)) * 1.5)))
    histogram(axes, values, bins, label=f"{line['split']} data")
    axes.axvline(line["mean"], color=COLOURS[1], linestyle="--", linewidth=1.6, label="mean")
    low, median, high = np.quantile(values, [0.05, 0.5, 0.95])
    description = (
        f"Histogram of the values of {len(values)} samples: from {values.min():.3f} to {values.max():.3f} "
        f"{line['unit']}, mean {values.mean():.3f}, median {median:.3f}; 90% lie between {low:.3f} and {high:.3f}."
    )
    return to_chart(axes, f"Likelihood of each {singular}", description)


def extremes(files: RunFiles, line: Line, values: np.ndarray, data: Dataset) -> list[dict[str, Any]]:
    """Return the most and the least likely images, with their values; none if states are not images."""
    order, count = np.argsort(values, kind="stable"), min(EXTREMES, len(values) // 2)
    if files.kind != "images" or not count:
        return []
    ends = []
    for title, indices in (("Most likely", order[:count]), ("Least likely", order[::-1][:count])):
        images = stack([state_of(data[int(i)]).double() for i in indices])
        texts = [f"{values[i]:.2f}".replace("-", MINUS) for i in indices]
        alt = f"{title}: {count} images of the {line['split']} data, in {line['unit']}: {', '.join(texts)}."
        ends.append({"title": title, "uri": grid_uri(images, files.bounds, count), "alt": alt, "texts": texts})
    return ends
