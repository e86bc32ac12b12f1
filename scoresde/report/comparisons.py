"""The sections on samplers side by side, and on the quality of samples."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from scoresde.evaluation.sampler_comparison import ComparisonRow
from scoresde.report.charts import Chart
from scoresde.report.facts import Facts
from scoresde.report.facts import Line as MetricLine
from scoresde.report.layers import Band, Layer, Line
from scoresde.report.tables import Table
from scoresde.report.words import DASH, METRICS, many, number, pm

SHORTEST, TALLEST = 0.5, 1e3  # where the axis of figures ends, in units of the lowest one
MOST_CHARTS = 3  # metrics drawn


@dataclass
class Comparisons:
    """What the template shows of samplers side by side."""

    charts: list[Chart]
    table: Table
    against: str
    samples: int
    level: float
    legend: list[tuple[Markup, str]] = field(default_factory=list)


def comparisons(facts: Facts) -> Comparisons | None:
    """The last comparison, None if there was none."""
    rows = facts.comparison
    if not any(not row.is_floor for row in rows):
        return None
    level = next((line["level"] for line in reversed(facts.of_kind("comparison")) if line.get("level")), 0.95)
    metrics = list(dict.fromkeys((row.metric, row.space) for row in rows))
    charts: list[Chart] = []
    legend: dict[str, Markup] = {}
    for metric, space in metrics[:MOST_CHARTS]:
        here = [row for row in rows if (row.metric, row.space) == (metric, space)]
        chart = comparison_chart(here, level)
        if chart is not None:
            charts.append(chart)
            legend |= {name: glyph for glyph, name in chart.legend}
    first = next(row for row in rows if not row.is_floor)
    shared = [(glyph, name) for name, glyph in legend.items()]
    return Comparisons(charts, comparison_table(rows, level), first.reference, first.n, level, shared)


def title_of(metric: str, space: str) -> str:
    name = METRICS.get(metric, (metric.replace("_", " "), ""))[0]
    return name if space in ("state", "", "model space") else f"{name} ({space})"


def comparison_chart(rows: Sequence[ComparisonRow], level: float) -> Chart | None:
    """A metric against the number of evaluations, a curve for each sampler; None if nothing is above zero."""
    positive = [row.value for row in rows if row.value > 0 and not row.is_floor]
    if not positive:
        return None
    lowest = min(positive)
    floors = [row for row in rows if row.is_floor]
    layers: list[Layer] = [
        Band(f"noise floor ({row.sampler})", max(row.low, SHORTEST * lowest), row.high)
        for row in floors
        if row.high > 0
    ]
    told = []
    for i, name in enumerate(dict.fromkeys(row.sampler for row in rows if not row.is_floor)):
        mine = sorted((row for row in rows if row.sampler == name and row.value > 0), key=lambda row: row.nfe)
        if not mine:
            continue
        y, low, high = ([getattr(row, key) for row in mine] for key in ("value", "low", "high"))
        low = [max(value, 1e-3 * middle) for value, middle in zip(low, y, strict=True)]
        layers.append(Line(name, [row.nfe for row in mine], y, low, high, colour=i, style="both"))
        told.append(f"{name} {number(y[-1], 3)} at {mine[-1].nfe}")
    tallest = max(value for layer in layers for value in layer.extent()[1])
    ends = (SHORTEST * lowest, min(1.15 * tallest, TALLEST * lowest))
    budgets = sorted({row.budget for row in rows if row.budget is not None})
    title = title_of(rows[0].metric, rows[0].space)
    floor = f" The noise floor is {number(floors[0].value, 3)}." if floors else ""
    seen = (
        f"{title} against network evaluations for each sample, both axes logarithmic, bars of {100 * level:g}% "
        f"intervals. At the largest number of evaluations: {', '.join(told)}.{floor}"
    )
    wide = [row.nfe for row in rows if row.nfe > 0]
    return Chart(
        title,
        seen,
        layers,
        x="network evaluations (NFE)",
        y="lower is better",
        x_log=len(set(wide)) > 1,
        y_log=True,
        x_ticks=spread_out(budgets),
        y_span=ends,
    )


def spread_out(ticks: Sequence[int]) -> list[int]:
    """Those of the ticks of a logarithmic axis whose labels do not touch each other."""
    kept: list[int] = []
    for tick in ticks:
        if not kept or tick >= 1.35 * kept[-1]:
            kept.append(tick)
    return kept


def comparison_table(rows: Sequence[ComparisonRow], level: float) -> Table:
    """A line for each sampler and budget."""
    metrics = list(dict.fromkeys((row.metric, row.space) for row in rows))
    titles = ["sampler", "NFE", "seconds", *(title_of(*metric) for metric in metrics)]
    lines = []
    for name, budget in dict.fromkeys((row.sampler, row.budget) for row in rows):
        mine = {(row.metric, row.space): row for row in rows if (row.sampler, row.budget) == (name, budget)}
        first = next(iter(mine.values()))
        cells = [pm(row.value, 0.5 * (row.high - row.low)) if (row := mine.get(key)) else DASH for key in metrics]
        lines.append([name, number(first.nfe) if not first.is_floor else DASH, number(first.seconds, 3), *cells])
    caption = (
        f"Figure ± half the width of its {100 * level:g}% interval; seconds are those of a batch of {rows[0].batch:,}. "
        "The first line is the noise floor: the figures that real data has in place of samples."
    )
    return Table(caption, titles, lines)


def quality_tables(facts: Facts) -> list[Table]:
    """A table for each feature space that `evaluate` measured in."""
    spaces: dict[str, dict[tuple[str, str], MetricLine]] = {}
    for line in facts.of_kind("quality"):  # a later one takes the place of an earlier one
        spaces.setdefault(str(line.get("features")), {})[column_of(line), str(line.get("metric"))] = line
    return [quality_table(facts, space, lines) for space, lines in spaces.items()]


def column_of(line: MetricLine) -> str:
    """What was measured."""
    if line.get("of") != "samples":
        return str(line.get("of"))
    return f"samples by {line['sampler']}" if line.get("sampler") else f"samples of {line.get('samples', 'a file')}"


def quality_table(facts: Facts, space: str, lines: dict[tuple[str, str], MetricLine]) -> Table:
    """The figures in one feature space: metrics below each other, what was measured side by side."""
    columns, metrics = (list(dict.fromkeys(key[i] for key in lines)) for i in (0, 1))
    found = []
    for metric in metrics:
        cells = []
        for column in columns:
            line = lines.get((column, metric))
            cells.append(DASH if line is None else pm(line["value"], line.get("error")))
        found.append([METRICS.get(metric, (metric.replace("_", " "), ""))[0], *cells])
    counts = []
    for column in columns:
        line = next(line for (name, _), line in lines.items() if name == column)
        counts.append(f"{number(line.get('n'))} : {number(line.get('reference_n'))}")
    first = next(line for line in lines.values())
    measured_in = "the states themselves" if space == "model space" else f"the features “{space}”"
    caption = (
        f"Measured in {measured_in}, against "
        f"{first.get('reference')}. Columns other than the samples' are what real data has in their place."
    )
    compared = f"{many(facts)} : reference"
    return Table(caption, ["", *columns], [[compared, *counts], *found], measured_in)


def error_kinds(facts: Facts) -> list[tuple[str, str, str]]:
    """(metric, what it is, what its ± is) of all metrics of `evaluate`."""
    kinds = {str(line.get("metric")): str(line.get("error_kind") or DASH) for line in facts.of_kind("quality")}
    return [(*METRICS.get(metric, (metric.replace("_", " "), "")), kind) for metric, kind in kinds.items()]
