"""Pictures of datasets: rows of images with names and a credit."""

import numpy as np
import pytest
import torch

from scoresde.dataset_plots import labelled_grid


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
