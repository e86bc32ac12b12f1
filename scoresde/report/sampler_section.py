"""The section that compares samplers: a chart for each metric, and all numbers in a table."""

from collections.abc import Sequence
from typing import Any

from scoresde.evaluation.sampler_comparison import ComparisonRow
from scoresde.plots import draw_comparison, metric_name
from scoresde.report.charts import Chart, new_axes, to_chart
from scoresde.report.run_files import RunFiles
from scoresde.report.wording import number

MOST_CHARTS = 3  # metrics drawn


def sampler_section(files: RunFiles) -> dict[str, Any] | None:
    """Return the variables for the section's template, from the last comparison; None if there was none."""
    rows = files.comparison
    first = next((row for row in rows if not row.is_floor), None)
    if first is None:
        return None
    level = next((line["level"] for line in reversed(files.lines("comparison")) if line.get("level")), 0.95)
    metrics = list(dict.fromkeys((row.metric, row.space) for row in rows))
    by_metric = [[row for row in rows if (row.metric, row.space) == metric] for metric in metrics[:MOST_CHARTS]]
    charts = [
        comparison_chart(of_metric, level)
        for of_metric in by_metric
        if any(row.value > 0 and not row.is_floor for row in of_metric)
    ]
    cells: dict[tuple[str, int | None], dict[tuple[str, str], ComparisonRow]] = {}
    for row in rows:
        cells.setdefault((row.sampler, row.budget), {})[row.metric, row.space] = row
    return {
        "charts": charts,
        "legend": {name: glyph for chart in charts for name, glyph in chart.legend.items()},
        "first": first,
        "level": level,
        "metrics": metrics,
        "cells": cells,
    }


def comparison_chart(rows: Sequence[ComparisonRow], level: float) -> Chart:
    """Draw a metric against the number of network evaluations."""
    axes = new_axes("network evaluations (NFE)", "lower is better")
    draw_comparison(axes, rows)
    title = metric_name(rows[0].metric, rows[0].space)
    last = {row.sampler: row for row in sorted(rows, key=lambda row: row.nfe)}
    ends = ", ".join(f"{name} {number(row.value, 3)} at {row.nfe}" for name, row in last.items() if not row.is_floor)
    floors = "".join(f" The noise floor is {number(row.value, 3)}." for row in rows if row.is_floor)
    description = (
        f"{title} against network evaluations per sample, both axes logarithmic, with {100 * level:g}% intervals. At "
        f"the largest number of evaluations: {ends}.{floors}"
    )
    return to_chart(axes, title, description)
