"""Images in the page: the given pixels, and nothing else."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from scoresde.report.pictures import grid_uri, png_uri


def pixels(*arguments, **settings):
    """The pixels (height, width, 4) of a grid."""
    kind, data = grid_uri(*arguments, **settings).split(",")
    assert kind == "data:image/png;base64"
    return np.array(Image.open(io.BytesIO(base64.b64decode(data))))


def test_a_grid_has_the_images_in_order_with_transparent_gaps():
    grid = pixels(torch.arange(3.0)[:, None, None, None].expand(3, 1, 2, 2), (0.0, 2.0), columns=2)
    assert grid.shape == (98, 98, 4)  # each of 48 x 48
    for image, grey in ((grid[:48, :48], 0), (grid[:48, 50:], 128), (grid[50:, :48], 255)):
        assert np.unique(image.reshape(-1, 4), axis=0).tolist() == [[grey, grey, grey, 255]]
    for gap in (grid[48:50], grid[:, 48:50], grid[50:, 50:]):
        assert (gap[..., 3] == 0).all()


def test_values_outside_of_the_range_are_clipped():
    grid = pixels(torch.tensor([-5.0, 9.0, float("nan")]).reshape(1, 3, 1, 1), (0.0, 1.0))
    assert grid[0, 0].tolist() == [0, 255, 0, 255]


def test_bytes_that_are_not_a_png_file_are_refused():
    with pytest.raises(ValueError, match="PNG"):
        png_uri(b"<svg onload=alert(1)>")
