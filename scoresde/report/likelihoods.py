"""The section on the likelihood: the figure, the errors that it is made of, and the values of the samples."""

import math
from dataclasses import dataclass, field

import numpy as np
from torch import stack
from torch.utils.data import Dataset

from scoresde.data.summary import state_of
from scoresde.report.axes import MINUS
from scoresde.report.charts import Bar, Bars, Chart
from scoresde.report.facts import Facts, Line
from scoresde.report.layers import Histogram, Layer, Rule
from scoresde.report.pictures import data_uri, grid
from scoresde.report.tables import Table
from scoresde.report.words import DASH, UNITS, duration, many, number, one, pm

EXTREMES = 8  # images shown at either end
MOST_OTHERS = 12  # likelihoods beside the headline
LEAST = 8  # values of which a histogram is made


@dataclass
class Extreme:
    """Images at one end of the likelihood, and what is said about them."""

    title: str
    uri: str
    alt: str
    values: list[str]


@dataclass
class Likelihoods:
    """What the template shows."""

    line: Line
    rows: list[tuple[str, str, str]]
    others: Table | None
    charts: list[Chart | Bars] = field(default_factory=list)
    extremes: list[Extreme] = field(default_factory=list)
    no_values: bool = False
    no_images: str = ""


def likelihoods(facts: Facts, data: Dataset | str | None) -> Likelihoods | None:
    """The section, None where nothing was measured.

    Args:
        facts: of the run.
        data: the split of the headline, or why it is not to be had; None where states are no images.
    """
    line = facts.likelihood
    if line is None:
        return None
    found = Likelihoods(line, budget(line), others(facts, line))
    if (chart := estimates_chart(line)) is not None:
        found.charts.append(chart)
    if (bars := errors_chart(line)) is not None:
        found.charts.append(bars)
    values = facts.per_sample(line)
    found.no_values = values is None
    if values is not None and len(values) >= LEAST:
        found.charts.append(histogram(facts, line, values))
    if values is not None and facts.kind == "images":
        if isinstance(data, str):
            found.no_images = data
        elif data is not None:
            found.extremes = extremes(facts, line, values, data)
    return found


def budget(line: Line) -> list[tuple[str, str, str]]:
    """(what, figure, what it means) of a likelihood."""
    unit = line.get("unit", "")
    rows = [("mean", f"{pm(line['mean'], line.get('stderr'))} {unit}", f"standard error over {line['n']:,} samples")]
    if line.get("population") is not None:
        rows.append(("population", f"± {line['population']:.4f}", "other samples of the same number"))
    if line.get("monte_carlo") is not None:
        rows.append(("probes, dequantisation", f"± {line['monte_carlo']:.4f}", "other random numbers, same samples"))
    if (finer := line.get("discretisation")) is not None:
        rows.append(("finer solve", signed(finer), "what a finer solution of the ODE would change"))
    if (bound := line.get("bound")) is not None:
        figure = f"{pm(bound['mean'], bound.get('stderr'))} {unit}"
        rows.append(("evidence bound", figure, "upper bound for the reverse SDE, another model with the same network"))
    return rows


def others(facts: Facts, line: Line) -> Table | None:
    """What else was measured, the latest first; None if nothing was."""
    rows = [other for other in facts.of_kind("likelihood")[::-1] if other != line][:MOST_OTHERS]
    if not rows:
        return None
    titles = ["split", "figure", "samples", "weights", "NFE", "solver", "trace", "dequantisation"]
    conventions = [
        [str(row["conventions"].get(key, DASH)) for key in ("solver", "trace", "dequantization")] for row in rows
    ]
    figures = [
        [row["split"], f"{pm(row['mean'], row['stderr'])} {row['unit']}", number(row["n"]), str(row["weights"])]
        for row in rows
    ]
    costs = [[number(row["nfe"])] for row in rows]
    lines = [a + b + c for a, b, c in zip(figures, costs, conventions, strict=True)]
    return Table("Other likelihoods of this run, the latest first.", titles, lines)


def signed(estimate: Line) -> str:
    """A difference with its sign."""
    figure = pm(estimate["mean"], estimate.get("stderr"))
    return figure if estimate["mean"] < 0 else f"+{figure}"


def interval(value: float, error: float | None) -> tuple[float | None, float | None]:
    return (None, None) if error is None else (value - error, value + error)


def estimates_chart(line: Line) -> Bars | None:
    """The figure beside the bound, and beside what a finer solve would give."""
    mean, stderr = line["mean"], line.get("stderr")
    bars = [Bar("probability flow", mean, *interval(mean, stderr), words=pm(mean, stderr), colour=0)]
    if (finer := line.get("discretisation")) is not None:
        value, error = mean + finer["mean"], math.hypot(stderr or 0.0, finer.get("stderr") or 0.0)
        bars.append(Bar("with a finer solve", value, *interval(value, error), words=pm(value, error), colour=2))
    if (bound := line.get("bound")) is not None:
        value, error = bound["mean"], bound.get("stderr")
        bars.append(
            Bar("evidence bound (reverse SDE)", value, *interval(value, error), words=pm(value, error), colour=1)
        )
    if len(bars) < 2:
        return None
    unit = UNITS.get(line.get("unit", ""), "")
    seen = f"In {unit}, with standard errors: {', '.join(f'{bar.name} {bar.words}' for bar in bars)}."
    return Bars("Estimates of the likelihood", seen, bars, x=f"{unit}, mean ± standard error", lengths=False)


def errors_chart(line: Line) -> Bars | None:
    """How large each source of error is."""
    bars = []
    for name, key, colour in (("population", "population", 0), ("probes and dequantisation", "monte_carlo", 5)):
        if (value := line.get(key)) is not None:
            bars.append(Bar(name, value, words=f"± {value:.4f}", colour=colour))
    if (finer := line.get("discretisation")) is not None:
        ends = interval(abs(finer["mean"]), finer.get("stderr"))
        bars.append(Bar("discretisation (a bias)", abs(finer["mean"]), *ends, words=signed(finer), colour=2))
    if len(bars) < 2:
        return None
    seen = f"Sources of error: {', '.join(f'{bar.name} {bar.words}' for bar in bars)} {line.get('unit', '')}."
    return Bars("Where the error comes from", seen, bars, x=UNITS.get(line.get("unit", ""), ""))


def histogram(facts: Facts, line: Line, values: np.ndarray) -> Chart:
    """How the values of the samples are spread."""
    counts, edges = np.histogram(values, bins=min(40, max(8, round(math.sqrt(len(values)) * 1.5))))
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    unit, name = str(line["unit"]), one(facts)
    seen = (
        f"Histogram of the values of {len(values)} samples: from {values.min():.3f} to {values.max():.3f} {unit}, the "
        f"mean {values.mean():.3f}, the median {middle:.3f}; nine in ten lie between {low:.3f} and {high:.3f}."
    )
    bars = Histogram(f"{line['split']} data", edges.tolist(), counts.tolist(), 0)
    layers: list[Layer] = [bars, Rule("mean", line["mean"], 1)]
    return Chart(f"Each {name} by itself", seen, layers, x=UNITS.get(unit, unit), y=f"number of {many(facts)}")


def extremes(facts: Facts, line: Line, values: np.ndarray, data: Dataset) -> list[Extreme]:
    """The images that the model finds most and least likely."""
    order = np.argsort(values, kind="stable")
    count = min(EXTREMES, len(order) // 2)
    if not count:
        return []
    unit, (low, high) = line.get("unit", ""), facts.range
    found = []
    for title, indices in (("Most likely", order[:count]), ("Least likely", order[::-1][:count])):
        images = stack([state_of(data[int(i)]).double() for i in indices])
        array = grid(images, low, high - 1 if facts.levels else high, columns=count)
        told = [f"{values[i]:.2f}" for i in indices]
        alt = f"{title}: {count} images of the {line.get('split')} data, in {unit}: {', '.join(told)}."
        found.append(Extreme(title, data_uri(array), alt, [text.replace("-", MINUS) for text in told]))
    return found


def cost(line: Line) -> str:
    """What a likelihood took."""
    return f"{number(line.get('nfe'))} evaluations of the network each, {duration(line.get('seconds'))} in all"
