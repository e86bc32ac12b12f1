"""Masks that are made for the shape of the states: boxes and files."""

import numpy as np
import pytest
import torch
from PIL import Image

from scoresde.inverse import GaussianBlur, SizedInpainting
from tests.conftest import close, normal

CENTRE = torch.ones(8, 6, dtype=torch.bool)
CENTRE[2:6, 1:3] = False


def test_a_box_hides_its_pixels_in_every_channel():
    operator = SizedInpainting((0.25, 0.75, 0.2, 0.55), noise_std=0.1)((3, 8, 6))
    assert torch.equal(operator.mask, CENTRE)
    assert operator.noise_std == 0.1
    assert operator(normal(2, 3, 8, 6)).shape == (2, 3, 40)


@pytest.mark.parametrize(("name", "shape"), [("mask.npy", (1, 8, 6)), ("mask.png", (3, 8, 6)), ("mask.bmp", (1, 8, 6))])
def test_the_mask_of_a_file_is_measured_where_it_is_white(name, shape, tmp_path):
    path = tmp_path / name
    if path.suffix == ".npy":
        np.save(path, CENTRE.numpy().astype(np.uint8))
    else:
        Image.fromarray(CENTRE.numpy().astype(np.uint8) * 200).save(path)
    assert torch.equal(SizedInpainting(mask=str(path))(shape).mask, CENTRE)


def test_a_mask_of_states_of_any_shape(tmp_path):
    np.save(tmp_path / "a.npy", np.array([True, False, True]))
    operator = SizedInpainting(mask=str(tmp_path / "a.npy"))((3,))
    close(operator(torch.tensor([[1.0, 2.0, 3.0]])), torch.tensor([[1.0, 3.0]]))
    with pytest.raises(ValueError, match=r"must have the shape \(4,\); got \(3,\)"):
        SizedInpainting(mask=str(tmp_path / "a.npy"))((4,))
    with pytest.raises(ValueError, match=r"a mask for states \(3,\) must be a .npy file; got .*a.png"):
        SizedInpainting(mask=str(tmp_path / "a.png"))((3,))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.full((2, 2), 0.5), "mask must have the entries 0 and 1"),
        (np.zeros((2, 2)), "mask must be true somewhere"),
        (np.array([["a", "b"], ["c", "d"]]), "mask must be a tensor of bools"),
    ],
)
def test_the_file_of_a_wrong_mask_is_named(mask, message, tmp_path):
    np.save(tmp_path / "a.npy", mask)
    with pytest.raises(ValueError, match=rf"a\.npy is not a mask: {message}"):
        SizedInpainting(mask=str(tmp_path / "a.npy"))((1, 2, 2))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0.5, 0.5, 0, 1), "with top < bottom"),
        ((0, 1, 0, 1), "hides all"),
        ((0, 0.01, 0, 1), "hides none"),
        ((0, 2, 0, 1), r"box\[1\] must be a finite number >= 0 and <= 1; got 2"),
    ],
)
def test_boxes_that_hide_nothing_or_everything_are_refused(box, message):
    with pytest.raises(ValueError, match=message):
        SizedInpainting(box)((1, 8, 8))


def test_a_gaussian_blur_keeps_the_mean_and_has_the_variance_of_its_kernel():
    """The variance of a kernel of standard deviation 2, in pixels, up to the tail that is cut off."""
    image = torch.zeros(1, 33, 33, dtype=torch.float64)
    image[0, 16, 16] = 1
    blurred = GaussianBlur(2.0)(image)[0]
    close(blurred.sum(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-12)
    distance = (torch.arange(33, dtype=torch.float64) - 16).square()
    assert float((blurred.sum(dim=1) * distance).sum()) == pytest.approx(4, rel=5e-3)
    close(blurred, blurred.mT, rtol=1e-10, atol=1e-14)
