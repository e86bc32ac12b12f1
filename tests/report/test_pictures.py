"""Images in a page: the pixels that were given, and nothing else."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from scoresde.report.pictures import data_uri, file_uri, fitting, grid


def test_a_grid_has_the_images_in_their_order_with_transparent_gaps():
    images = torch.arange(3.0)[:, None, None, None].expand(3, 1, 2, 2)
    found = grid(images, low=0.0, high=2.0, columns=2)
    assert found.shape == (98, 98, 4)  # each of 48 x 48
    assert np.unique(found[:48, :48].reshape(-1, 4), axis=0).tolist() == [[0, 0, 0, 255]]
    assert np.unique(found[:48, 50:].reshape(-1, 4), axis=0).tolist() == [[128, 128, 128, 255]]
    assert np.unique(found[50:, :48].reshape(-1, 4), axis=0).tolist() == [[255, 255, 255, 255]]
    assert (found[48:50, :, 3] == 0).all()
    assert (found[:, 48:50, 3] == 0).all()
    assert (found[50:, 50:, 3] == 0).all()


def test_values_outside_of_the_range_are_clipped():
    found = grid(torch.tensor([-5.0, 9.0, float("nan")]).reshape(1, 3, 1, 1), 0.0, 1.0)
    assert found[0, 0].tolist() == [0, 255, 0, 255]


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(ValueError, match=r"one or three channels expected; got \(1, 2, 4, 4\)"):
        grid(torch.zeros(1, 2, 4, 4), 0, 1)


def test_an_address_holds_the_picture():
    array = np.random.RandomState(0).randint(0, 256, (3, 4, 4)).astype(np.uint8)
    kind, data = data_uri(array).split(",")
    assert kind == "data:image/png;base64"
    assert np.array_equal(np.array(Image.open(io.BytesIO(base64.b64decode(data)))), array)


def test_a_file_that_is_no_picture_is_refused():
    with pytest.raises(ValueError, match="PNG"):
        file_uri(b"<svg onload=alert(1)>")


def test_large_images_are_few():
    assert fitting(64, 8, 8) == 64
    assert fitting(64, 256, 256) == 16
    assert fitting(64, 4096, 4096) == 1
