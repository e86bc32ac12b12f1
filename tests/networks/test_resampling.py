"""Resampling against its definition, axis by axis in NumPy, and on a widely padded signal."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from scoresde.networks.resampling import Resample, ResampledConvolution
from tests.conftest import normal
from tests.networks.test_layers import DIMS, randomised

TAPS = pytest.mark.parametrize("taps", [None, (1, 1), (1, 3, 3, 1), (1, 2, 3, 3, 2, 1)], ids=str)
SIDES = {1: (6,), 2: (6, 4), 3: (6, 4, 8)}


def filtered(line, taps, start):
    """A line, zero beyond its ends, filtered with normalised taps; the result from the entry `start` on."""
    return np.convolve(line, np.asarray(taps) / sum(taps))[start : start + len(line)]


def smooth(line, taps):
    """On the way down: the value at i is the mean around i + 1/2."""
    return filtered(line, taps, len(taps) // 2)


def spread(line, taps):
    """On the way up: zeros between the values, filtered with twice the taps."""
    wide = np.zeros(2 * len(line))
    wide[::2] = line
    return 2 * filtered(wide, taps, len(taps) // 2 - 1)


def halve(line, taps):
    return smooth(line, taps)[::2]


def along_axes(function, x, taps):
    """Apply a function of a line along every spatial axis of (B, C, *space)."""
    x = x.numpy()
    for axis in range(2, x.ndim):
        x = np.apply_along_axis(function, axis, x, taps or (1, 1))
    return torch.from_numpy(x)


@DIMS
@TAPS
def test_halves_and_doubles_as_defined(dims, taps):
    x = normal(2, 3, *SIDES[dims])
    for direction, function in (("down", halve), ("up", spread)):
        resample = Resample(dims, direction, taps).double()
        torch.testing.assert_close(resample(x), along_axes(function, x, taps), rtol=1e-6, atol=1e-6)
        assert not resample.state_dict()


@pytest.mark.parametrize("taps", [None, (1, 1), [1, 1], (2.0, 2.0)], ids=str)
def test_two_taps_are_the_mean_of_pairs_and_repetition(taps):
    x = normal(2, 3, 6)
    torch.testing.assert_close(Resample(1, "down", taps).double()(x), (x[..., ::2] + x[..., 1::2]) / 2)
    torch.testing.assert_close(Resample(1, "up", taps).double()(x), x.repeat_interleave(2, dim=2))


def convolved(x, weight, bias):
    """The sum over input channels of correlations with weights (out, in, *kernel), zero beyond the border, and bias."""
    channels = [
        sum(ndimage.correlate(x[c], weight[o, c], mode="constant") for c in range(len(x))) + bias[o]
        for o in range(len(weight))
    ]
    return np.stack(channels)


@DIMS
@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 2, 3, 3, 2, 1)], ids=str)
@pytest.mark.parametrize("direction", ["down", "up"])
def test_filter_and_convolution_without_a_border_between(dims, taps, direction):
    """Compared with the centre of the result on a signal padded so widely that neither reaches its border."""
    x, margin = normal(2, *SIDES[dims]), 8
    layer = randomised(ResampledConvolution(dims, 2, 3, direction, taps))
    assert layer(x[None]).shape == (1, 3, *(side // 2 if direction == "down" else 2 * side for side in SIDES[dims]))
    wide = np.pad(x.numpy(), [(0, 0), *[(margin, margin)] * dims])
    for axis in range(1, dims + 1):
        wide = np.apply_along_axis(smooth if direction == "down" else spread, axis, wide, taps)
    wide = convolved(wide, layer.conv.weight.detach().numpy(), layer.conv.bias.detach().numpy())
    if direction == "down":
        centre = [slice(margin, margin + side, 2) for side in SIDES[dims]]
    else:
        centre = [slice(2 * margin, 2 * margin + 2 * side) for side in SIDES[dims]]
    expected = torch.from_numpy(wide[(slice(None), *centre)])
    torch.testing.assert_close(layer(x[None])[0], expected, rtol=1e-6, atol=1e-6)


@DIMS
def test_convolution_that_resamples_without_taps(dims):
    x = normal(2, *SIDES[dims])
    down, up = (randomised(ResampledConvolution(dims, 2, 3, direction)) for direction in ("down", "up"))
    weight, bias = (p.detach().numpy() for p in (down.conv.weight, down.conv.bias))
    odd = (slice(None), *[slice(1, None, 2)] * dims)
    torch.testing.assert_close(down(x[None])[0], torch.from_numpy(convolved(x.numpy(), weight, bias)[odd]))
    repeated, weight, bias = x.numpy(), up.conv.weight.detach().numpy(), up.conv.bias.detach().numpy()
    for axis in range(1, dims + 1):
        repeated = repeated.repeat(2, axis)
    torch.testing.assert_close(up(x[None])[0], torch.from_numpy(convolved(repeated, weight, bias)))


@DIMS
def test_centred_convolution_keeps_the_even_positions(dims):
    x, down = normal(2, *SIDES[dims]), randomised(ResampledConvolution(dims, 2, 3, "down", centred=True))
    weight, bias = (p.detach().numpy() for p in (down.conv.weight, down.conv.bias))
    even = (slice(None), *[slice(0, None, 2)] * dims)
    torch.testing.assert_close(down(x[None])[0], torch.from_numpy(convolved(x.numpy(), weight, bias)[even]))


@pytest.mark.parametrize("taps", [None, (1, 3, 3, 1)], ids=str)
@pytest.mark.parametrize("direction", ["down", "up"])
def test_convolution_starts_with_the_variance_of_the_fan_average(direction, taps):
    torch.manual_seed(0)
    layer = ResampledConvolution(2, 30, 60, direction, taps)
    assert float(layer.conv.weight.detach().square().mean()) == pytest.approx(1 / (9 * 45), rel=0.05)
    assert list(layer.state_dict()) == ["conv.weight", "conv.bias"]


@pytest.mark.parametrize("taps", [(1, 2, 1), (1, 2), (1, 3, 2, 1), (), (1, -1, -1, 1)], ids=str)
@pytest.mark.parametrize("direction", ["down", "up"])
def test_refuses_taps_that_shift_the_image(taps, direction):
    for make in (lambda: Resample(2, direction, taps), lambda: ResampledConvolution(2, 1, 1, direction, taps)):
        with pytest.raises(ValueError, match="an even number of symmetric taps such as"):
            make()


def test_refuses_another_direction():
    for make in (lambda: Resample(2, "left"), lambda: ResampledConvolution(2, 1, 1, "left", (1, 3, 3, 1))):
        with pytest.raises(ValueError, match="direction must be 'down' or 'up'; got 'left'"):
            make()
