"""Pictures of datasets: pairs, histograms, lines."""

import numpy as np
import pytest

from scoresde.dataset_plots import series, vectors


def panels(figure):
    """The panels of a figure that show something."""
    return [axes for axes in figure.axes if axes.axison]


@pytest.mark.parametrize(("dimensions", "count"), [(1, 1), (2, 3), (4, 10), (6, 21), (7, 7), (30, 16)])
def test_vectors_are_drawn_in_pairs_or_as_histograms(dimensions, count):
    points = np.random.RandomState(0).normal(size=(50, dimensions))
    figure = vectors(points, [f"x{i}" for i in range(dimensions)])
    assert len(panels(figure)) == count
    assert sum(patch.get_height() for patch in panels(figure)[0].patches) == 50
    if 1 < dimensions <= 6:
        pair = next(axes for axes in panels(figure) if axes.collections)
        assert np.array_equal(pair.collections[0].get_offsets(), points[:, :2])
        assert pair.get_ylabel() == "x1"
    labels = [axes.get_xlabel() for axes in panels(figure) if axes.get_xlabel()]
    assert labels == [f"x{i}" for i in range(min(dimensions, 16))]


def test_series_are_drawn_as_lines_of_each_channel():
    lines = np.random.RandomState(0).normal(size=(64, 3, 20))
    figure = series(lines)
    assert len(figure.axes) == 3
    assert np.array_equal(figure.axes[2].lines[1].get_ydata(), lines[6, 2])
