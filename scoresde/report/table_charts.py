"""Small charts of tables: the distribution of each column, and pairs of columns, samples beside real data."""

from collections.abc import Sequence

import numpy as np
import torch

from scoresde.report.charts import Chart, dots, new_axes, to_chart
from scoresde.report.wording import number
from scoresde.state_plots import Group, draw_marginals

MOST_COLUMNS = 12  # largest number of columns that are drawn
MOST_PAIRS = 6  # largest number of pairs of columns
MOST_POINTS = 500  # of a group in the chart of a pair
WIDTH, HEIGHT = 172.0, 160.0  # two charts side by side fit on a phone


def table_charts(groups: Sequence[Group], names: Sequence[str]) -> list[Chart]:
    """Draw the first 12 columns of groups of vectors (N, D), and the pairs with the largest correlations in the first.

    Args:
        groups: real data if there are any, then samples.
        names: names of the D columns.
    """
    columns = [marginal(groups, names, i) for i in range(min(len(names), MOST_COLUMNS))]
    return columns + [pair(groups, names, i, j) for i, j in correlated_pairs(groups[0].states[:, :MOST_COLUMNS])]


def marginal(groups: Sequence[Group], names: Sequence[str], column: int) -> Chart:
    """Draw the histogram of one column of each group."""
    axes = new_axes(names[column], height=HEIGHT, width=WIDTH)
    shown = [group.of(slice(None), column) for group in groups]
    draw_marginals(axes, shown)
    moments = [
        f"{len(group.states)} {group.name or 'samples'} of mean {number(group.states.mean(), 3)}, "
        f"standard deviation {number(group.states.std(), 3)}"
        for group in shown
    ]
    return to_chart(axes, f"Histogram of {names[column]}", f"Histogram of {names[column]}: {'; '.join(moments)}.")


def pair(groups: Sequence[Group], names: Sequence[str], i: int, j: int) -> Chart:
    """Draw column j against column i of each group as points."""
    axes, texts = new_axes(names[i], names[j], height=HEIGHT, width=WIDTH), []
    for group in groups:
        points = group.states[:, [i, j]]
        dots(axes, torch.from_numpy(points[:MOST_POINTS]), 6 if group.colour is None else 0, 2.0, group.name)
        texts.append(f"{number(correlations(points)[0, 1], 2)} in {group.name or 'samples'}")
    title = f"{names[j]} against {names[i]}"
    return to_chart(axes, title, f"{title}, as points; the correlation is {', '.join(texts)}.")


def correlated_pairs(x: np.ndarray) -> list[tuple[int, int]]:
    """Return at most 6 pairs i < j of columns of x (N, D), those with the largest absolute correlations, in order."""
    size = np.abs(correlations(x))
    pairs = [(i, j) for j in range(x.shape[1]) for i in range(j)]
    return sorted(sorted(pairs, key=lambda pair: -size[pair])[:MOST_PAIRS], key=lambda pair: (pair[1], pair[0]))


def correlations(x: np.ndarray) -> np.ndarray:
    """Return the correlations (D, D) of the columns of x (N, D); 0 for a constant column."""
    centred = x - x.mean(axis=0)
    spread = centred.std(axis=0)
    scaled = np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0)
    return scaled.T @ scaled / len(x)
