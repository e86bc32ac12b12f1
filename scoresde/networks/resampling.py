"""Halving and doubling the resolution, in plain PyTorch.

A filter with L taps, normalised, is applied along every axis; (1, 3, 3, 1) is the anti-aliasing filter of NCSN++
(1904.11486; 2011.13456, appendix H), (1, 1) the mean of pairs on the way down and repetition on the way up.
Downsampling filters and keeps every second value; upsampling puts zeros between the values and filters with 2^dims
times the taps. Beyond the border the signal is zero.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.networks.layers import CONVOLUTIONS, initialise

CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
POOLS: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class Filter(nn.Module):
    """A separable filter on each channel alone: on the way down with a stride, on the way up on values between zeros.

    Args:
        dims: spatial dimensions.
        direction: "down" or "up".
        taps: an even number, symmetric; normalised to sum to 1, to 2 on the way up.

    Raises:
        ValueError: taps of odd number, or not symmetric.
    """

    def __init__(self, dims: int, direction: str, taps: Sequence[float]):
        super().__init__()
        taps = [float(tap) for tap in taps]
        if not taps or len(taps) % 2 or taps != taps[::-1] or not sum(taps) > 0:
            raise ValueError(f"an even number of symmetric taps such as (1, 3, 3, 1) expected; got {taps}")
        self.dims, self.direction, self.taps = dims, direction, len(taps)
        axis, kernel = torch.tensor(taps) * ((2 if direction == "up" else 1) / sum(taps)), torch.ones(())
        for _ in range(dims):
            kernel = kernel[..., None] * axis
        self.kernel = nn.Buffer(kernel, persistent=False)

    def forward(self, x: Tensor, padding: int, stride: int = 2) -> Tensor:
        kernel = self.kernel.expand(x.shape[1], 1, *self.kernel.shape)
        convolve = (TRANSPOSED if self.direction == "up" else CONVOLVE)[self.dims]
        return convolve(x, kernel, stride=stride, padding=padding, groups=x.shape[1])


class Resample(nn.Module):
    """Half or twice the resolution, (B, C, *space).

    Args:
        dims: spatial dimensions.
        direction: "down" or "up".
        taps: of the filter, an even number, symmetric; None for (1, 1).

    Raises:
        ValueError: another direction, or taps of odd number, or not symmetric.
    """

    def __init__(self, dims: int, direction: str, taps: Sequence[float] | None = None):
        super().__init__()
        self.dims, self.direction = dims, _checked(direction)
        self.filter = None if taps is None or list(taps) == [1, 1] else Filter(dims, direction, taps)

    def forward(self, x: Tensor) -> Tensor:
        if self.filter is not None:
            return self.filter(x, padding=self.filter.taps // 2 - 1)
        return POOLS[self.dims](x, 2) if self.direction == "down" else F.interpolate(x, scale_factor=2)


class ResampledConvolution(nn.Module):
    """A convolution of width 3 that halves or doubles the resolution.

    Without taps, as in DDPM: every second position of a convolution, or a convolution of the values repeated. With
    taps, as in NCSN++: filter and convolution together, with zeros beyond the border of the input alone.

    Args:
        dims: spatial dimensions.
        in_channels, out_channels: of input and output.
        direction: "down" or "up".
        taps: of the filter, see `Resample`.

    Raises:
        ValueError: as `Resample`.
    """

    def __init__(
        self, dims: int, in_channels: int, out_channels: int, direction: str, taps: Sequence[float] | None = None
    ):
        super().__init__()
        self.dims, self.direction = dims, _checked(direction)
        self.filter = None if taps is None else Filter(dims, direction, taps)
        # Of the margin that a filter leaves on the way up, the convolution uses one position; (1, 1) leaves none.
        padding = int(direction == "up" and (self.filter is None or self.filter.taps == 2))
        stride = 2 if direction == "down" else 1
        self.conv = initialise(CONVOLUTIONS[dims](in_channels, out_channels, 3, stride=stride, padding=padding), 1.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.filter is None:
            return self.conv(
                F.pad(x, (0, 1) * self.dims) if self.direction == "down" else F.interpolate(x, scale_factor=2)
            )
        if self.direction == "down":
            return self.conv(self.filter(x, padding=self.filter.taps // 2, stride=1))
        return self.conv(self.filter(x, padding=max(self.filter.taps // 2 - 2, 0)))


def _checked(direction: str) -> str:
    if direction not in ("down", "up"):
        raise ValueError(f"direction 'down' or 'up' expected; got {direction!r}")
    return direction
