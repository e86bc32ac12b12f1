"""Input and output pyramids of the U-Net against their formulas."""

import pytest
import torch
from torch.nn.functional import silu

from scoresde.networks import pyramids
from scoresde.networks.blocks import NetworkStyle
from scoresde.networks.resampling import Resample
from tests.conftest import normal
from tests.networks.test_blocks import BOOLEANS, FIR, convolve, joined, norm
from tests.networks.test_layers import DIMS, difference, randomised


@DIMS
@pytest.mark.parametrize("fir", [None, FIR], ids=str)
@pytest.mark.parametrize("concatenate", BOOLEANS)
def test_input_skip_projects_the_downsampled_image(dims, fir, concatenate):
    skip = randomised(pyramids.InputSkip(NetworkStyle(dims=dims, fir=fir), 2, 4, concatenate))
    hidden, pyramid = normal(3, 4, *[4] * dims), normal(3, 2, *[8] * dims, seed=1)
    smaller = Resample(dims, "down", fir).double()(pyramid)
    image = convolve(skip.project, smaller)
    output, carried = skip(hidden, pyramid)
    torch.testing.assert_close(output, torch.cat([image, hidden], dim=1) if concatenate else image + hidden)
    torch.testing.assert_close(carried, smaller)
    assert (skip.channels, skip.image_channels) == (output.shape[1], 2)


@DIMS
@pytest.mark.parametrize("skip_rescale", BOOLEANS)
def test_residual_pyramids_join_the_features(dims, skip_rescale):
    style, hidden = NetworkStyle(dims=dims, fir=FIR, skip_rescale=skip_rescale), normal(3, 4, *[4] * dims)
    for pyramid, image in (
        (randomised(pyramids.InputResidual(style, 2, 4)), normal(3, 2, *[8] * dims, seed=1)),
        (randomised(pyramids.OutputResidual(style, 6, 4, 2)), normal(3, 6, *[2] * dims, seed=1)),
    ):
        expected = joined(style, pyramid.resample(image), hidden)
        for actual in pyramid(hidden, image):
            torch.testing.assert_close(actual, expected)
        assert difference(expected, joined(style, hidden, 0)) > 1e-3


@DIMS
def test_output_residual_begins_with_a_head(dims):
    pyramid = randomised(pyramids.OutputResidual(NetworkStyle(dims=dims), None, 8, 2))
    hidden = normal(3, 8, *[4] * dims)
    output, image = pyramid(hidden, hidden)
    assert torch.equal(output, hidden)
    torch.testing.assert_close(image, convolve(pyramid.head.conv, silu(norm(pyramid.head.norm, hidden, 2))))


def test_output_residual_does_not_begin_at_zero():
    torch.manual_seed(0)
    head = pyramids.OutputResidual(NetworkStyle(), None, 64, 3).head
    assert float(head.conv.weight.detach().var()) == pytest.approx(1 / (9 * 64), rel=0.05)


@DIMS
@pytest.mark.parametrize("fir", [None, FIR], ids=str)
def test_output_skip_adds_an_image_to_the_upsampled_one(dims, fir):
    style, hidden, image = (
        NetworkStyle(dims=dims, fir=fir),
        normal(3, 8, *[4] * dims),
        normal(3, 2, *[2] * dims, seed=1),
    )
    for coarser, upsampled in ((None, 0), (16, Resample(dims, "up", fir).double()(image))):
        skip = randomised(pyramids.OutputSkip(style, coarser, 8, 2))
        output, after = skip(hidden, image)
        assert torch.equal(output, hidden)
        torch.testing.assert_close(after, convolve(skip.head.conv, silu(norm(skip.head.norm, hidden, 2))) + upsampled)
