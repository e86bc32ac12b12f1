"""Pictures of datasets: pairs, histograms, lines."""

import numpy as np
import pytest
import torch

from scoresde.dataset_plots import labelled_grid, series, vectors


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


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_of_images_have_their_names_and_a_credit(channels):
    images = torch.linspace(0, 1, 6)[:, None, None, None].expand(6, channels, 4, 5).clone()
    images[5] = float("nan")
    figure = labelled_grid(images, ["cat", "dog"], "by its maker")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]
    assert figure.get_supxlabel() == "by its maker"
    grid = axes.images[0].get_array().reshape(11, 19, -1)
    assert grid.shape[2] == channels
    for tick, (row, column) in zip(axes.get_yticks(), ((0, 1), (1, 0)), strict=True):
        inside = grid[int(tick), 1 + 6 * column + 2]
        assert np.allclose(inside, float(images[3 * row + column, 0, 0, 0]))
    assert (grid[6:10, 13:18] == 1).all()  # there are fewer dogs
