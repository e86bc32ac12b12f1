"""PNG files of results: classifications, samples against the scale of guidance, and the jobs of a sweep."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from scoresde.atomic_files import replace_atomically
from scoresde.evaluation.guidance_comparison import GuidanceRow
from scoresde.evaluation.run_table import SeedGroup, result_names
from scoresde.evaluation.sampler_comparison import ComparisonRow
from scoresde.metrics.classification import Calibration
from scoresde.plots import BAND, COLOURS, curve, draw_comparison, metric_name, set_ticks

MOST_PANELS = 3  # side by side
MOST_CLASSES = 40  # with a number in each cell and a name at each row of the confusion matrix


def save_confusion(counts: Tensor, classes: Sequence[str], path: Path) -> Path:
    """Save a picture of a confusion matrix; the darker a cell, the larger its share of the samples in its row.

    Args:
        counts: number of samples for each label (row) and decision (column), (K, K).
        classes: names of the K classes.
        path: PNG file to write.
    """
    shares = (counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    size = min(max(3.2, 0.42 * len(classes) + 1.6), 14.0)
    figure = Figure(figsize=(size, size), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= MOST_CLASSES:
        ticks = range(len(classes))
        axes.set_xticks(ticks, classes, rotation=90 if max(map(len, classes)) > 3 else 0)
        axes.set_yticks(ticks, classes)
        for (i, j), count in np.ndenumerate(counts.numpy()):
            if count:
                axes.text(
                    j, i, str(count), ha="center", va="center", fontsize=7, color="w" if shares[i, j] > 0.5 else "k"
                )
    axes.set(xlabel="decision", ylabel="label")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    replace_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path


def save_reliability(tables: Mapping[str, Calibration], path: Path) -> Path:
    """Save a reliability diagram: accuracy against confidence with error bars, above a histogram of the confidence.

    Args:
        tables: reliability tables by name, see `metrics.calibration`.
        path: PNG file to write.
    """
    figure = Figure(figsize=(4.6, 5.2), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color=BAND, linewidth=1.0, linestyle="--")
    for i, (name, table) in enumerate(tables.items()):
        confidence, value, low, high = np.array(
            [[b.confidence, b.accuracy.value, b.accuracy.low, b.accuracy.high] for b in table.bins]
        ).T
        curve(upper, confidence, value, (low, high), colour=i, label=f"{name}, ECE {table.ece:.3f}", linestyle="none")
        edges, counts = [b.low for b in table.bins], [b.count for b in table.bins]
        widths = [b.high - b.low for b in table.bins]
        lower.bar(edges, counts, widths, align="edge", alpha=0.5, color=COLOURS[i % len(COLOURS)])
    upper.set(ylabel="fraction of correct decisions", xlim=(-0.02, 1.02), ylim=(-0.03, 1.03))
    lower.set(xlabel="confidence, p of the decision", ylabel="samples")
    for axes in (upper, lower):
        axes.grid(linewidth=0.4, alpha=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    upper.legend(fontsize=8, frameon=False, loc="upper left")
    replace_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path


def save_guidance(rows: Sequence[GuidanceRow], path: Path) -> Path:
    """Save plots of metrics of samples against the guidance scale, side by side, with error bars.

    Precision, recall and class accuracy, which are fractions, share the first plot.

    Args:
        rows: the rows returned by `evaluation.guidance_comparison.compare_scales`.
        path: PNG file to write.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("the plot needs at least one row; got none")
    metrics = list(dict.fromkeys(row.metric for row in rows))
    fractions = [metric for metric in metrics if metric != "frechet_distance"]
    panels = [panel for panel in (fractions, [m for m in metrics if m not in fractions]) if panel]
    figure = Figure(figsize=(4.6 * len(panels), 3.8), dpi=200, layout="constrained")
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        for metric in panel:
            shown = sorted((row for row in rows if row.metric == metric), key=lambda row: row.scale)
            x, y, error = np.array([(row.scale, row.value, row.error or 0.0) for row in shown]).T
            high = np.minimum(y + error, 1.0) if panel == fractions else y + error
            interval = np.maximum(y - error, 0.0), high
            curve(axes, x, y, interval, metrics.index(metric), label=metric_name(metric, ""))
        axes.grid(linewidth=0.4, alpha=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(xlabel="guidance scale", ylabel="fraction" if panel == fractions else metric_name(panel[0], ""))
        if len(panel) > 1:
            axes.legend(fontsize=8, frameon=False)
    first = rows[0]
    made = f"{first.n} samples by {first.sampler}, {first.steps} steps"
    figure.suptitle(f"{made}, compared with {first.reference_n} of {first.reference}; {first.space}", fontsize=9)
    replace_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path


def save_groups(groups: Sequence[SeedGroup], path: Path) -> Path:
    """Draw each result of all groups, a panel for each result, with bars of one standard error; return the path."""
    names = result_names(groups)
    labels = [group.label() for group in groups]
    size = (3.2 * len(names) + 0.07 * max(map(len, labels)), 1.2 + 0.35 * len(groups))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        known = [(i, *group.values[name]) for i, group in enumerate(groups) if name in group.values]
        places, means = [i for i, _, _ in known], [mean for _, mean, _ in known]
        axes.errorbar(means, places, xerr=[error or 0.0 for _, _, error in known], fmt="o", capsize=3, color=COLOURS[0])
        axes.set(xlabel=name, ylim=(len(groups) - 0.5, -0.5))
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(groups)), labels)
    replace_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path


def save_compared_groups(groups: Sequence[SeedGroup], path: Path) -> Path:
    """Draw the first metric of samplers against their evaluations, a panel for each group of runs; return the path.

    Bars, and the band of the noise floor, show one standard error over the seeds.

    Args:
        groups: groups with the settings `sampler` and `nfe`, see `evaluation.run_table.compared_values`.
        path: PNG file to write.
    """
    metric, panels = result_names(groups)[0], dict[str, list[ComparisonRow]]()
    for group in groups:
        if metric in group.values:
            panels.setdefault(group.label("sampler", "nfe"), []).append(_comparison_row(group, metric))
    columns = min(len(panels), MOST_PANELS)
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.6 * columns + 1.8, 3.4 * lines), dpi=120, layout="constrained")
    drawn = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (label, rows) in zip(drawn, panels.items(), strict=False):
        draw_comparison(axes, rows)
        for row in rows:
            if row.is_floor and row.value > 0:  # a band without an error would be invisible
                axes.axhline(row.value, color=BAND, linewidth=1)
        axes.grid(linewidth=0.4, alpha=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(label if len(panels) > 1 else "", fontsize=9)
    limits = np.array([axes.get_ylim() for axes in drawn[: len(panels)]])
    for axes in drawn[: len(panels)]:
        axes.set_ylim(limits.min(), limits.max())
        set_ticks(axes)
    for axes in drawn[len(panels) :]:
        axes.set_axis_off()
    drawn[0].set(xlabel="network evaluations per sample (NFE)", ylabel=metric)
    figure.legend(*drawn[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    replace_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path


def _comparison_row(group: SeedGroup, metric: str) -> ComparisonRow:
    """Return a metric of a sampler, averaged over seeds, with the ends of one standard error."""
    (mean, error), nfe = group.values[metric], int(group.settings["nfe"] or 0)
    return ComparisonRow(
        sampler=group.settings["sampler"],
        budget=nfe or None,
        steps=None,
        nfe=nfe,
        seconds=None,
        batch=0,
        metric=metric,
        space="state",
        value=mean,
        low=mean - (error or 0.0),
        high=mean + (error or 0.0),
        n=0,
        reference="",
    )
