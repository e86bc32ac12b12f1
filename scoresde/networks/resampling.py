"""Modules that halve ("down") or double ("up") the resolution of (B, C, *space).

A filter with L taps, normalised, is applied along every axis; (1, 3, 3, 1) is the anti-aliasing filter of NCSN++
(1904.11486; 2011.13456, appendix H), (1, 1) averages pairs on the way down and repeats values on the way up.
Downsampling filters and keeps every second value; upsampling inserts zeros between the values and filters with 2^dims
times the taps. The signal is zero beyond the border.

`forward` ignores further arguments, so that a U-Net can call these modules in the same way as its blocks.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.networks.layers import CONVOLUTIONS, initialise
from scoresde.tensors import FullPrecision

CONVOLVE: dict[str, Sequence[Callable[..., Tensor]]] = {
    "down": (F.conv1d, F.conv2d, F.conv3d),
    "up": (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}


def _avg_pool3d(x: Tensor, size: int) -> Tensor:
    """Return F.avg_pool3d(x, size), also in half precision on a CPU, where PyTorch lacks that function."""
    return F.interpolate(x, scale_factor=1 / size, mode="area")


POOL: Sequence[Callable[..., Tensor]] = (F.avg_pool1d, F.avg_pool2d, _avg_pool3d)


class Filter(FullPrecision):
    """A separable filter on each channel; "down" keeps every second value, "up" inserts zeros between the values first.

    Args:
        dims: number of spatial dimensions.
        direction: "down" or "up".
        taps: an even number of symmetric values, which are normalised to sum to 1 ("down") or to 2 ("up").

    Raises:
        ValueError: the number of taps is odd, they are not symmetric, or their sum is not positive.
    """

    def __init__(self, dims: int, direction: str, taps: Sequence[float]):
        super().__init__()
        taps = [float(tap) for tap in taps]
        if not taps or len(taps) % 2 or taps != taps[::-1] or not sum(taps) > 0:
            raise ValueError(
                f"taps must be an even number of symmetric taps such as (1, 3, 3, 1), with a positive sum; got {taps}"
            )
        self.convolve, self.taps = CONVOLVE[direction][dims - 1], len(taps)
        axis, kernel = torch.tensor(taps) * ((2 if direction == "up" else 1) / sum(taps)), torch.ones(())
        for _ in range(dims):
            kernel = kernel[..., None] * axis
        self.kernel = nn.Buffer(kernel, persistent=False)

    def forward(self, x: Tensor, padding: int, stride: int = 2) -> Tensor:
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, *self.kernel.shape)
        return self.convolve(x, kernel, stride=stride, padding=padding, groups=x.shape[1])


class Resample(nn.Module):
    """Halve or double the resolution by a filter.

    Args:
        dims: number of spatial dimensions.
        direction: "down" or "up".
        taps: taps of the filter, an even number of symmetric values; None for (1, 1).

    Raises:
        ValueError: `direction` is neither "down" nor "up", or `Filter` rejects the taps.
    """

    def __init__(self, dims: int, direction: str, taps: Sequence[float] | None = None):
        super().__init__()
        self.dims, self.is_up = dims, _is_up(direction)
        self.filter = None if taps is None or list(taps) == [1, 1] else Filter(dims, direction, taps)

    def forward(self, x: Tensor, *unused: Tensor | None) -> Tensor:
        if self.filter is not None:
            return self.filter(x, padding=self.filter.taps // 2 - 1)
        return F.interpolate(x, scale_factor=2) if self.is_up else POOL[self.dims - 1](x, 2)


class ResampledConvolution(nn.Module):
    """A convolution of width 3 that halves or doubles the resolution.

    Without taps (DDPM), "down" keeps every second position of a convolution, and "up" convolves the repeated values.
    Position i of the output of "down" reads the positions 2i .. 2i + 2 of the input (DDPM), or, if `centred`,
    2i - 1 .. 2i + 1 (improved DDPM, 2102.09672, and ADM, 2105.05233).
    With taps (NCSN++), the filter precedes the convolution, and both act on the input extended by zeros.

    Args:
        dims: number of spatial dimensions.
        in_channels, out_channels: channels of the input and of the output.
        direction: "down" or "up".
        taps: taps of the filter, see `Resample`; None for no filter.
        centred: whether "down" without taps reads as many positions to the left as to the right.

    Raises:
        ValueError: see `Resample`.
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        direction: str,
        taps: Sequence[float] | None = None,
        centred: bool = False,
    ):
        super().__init__()
        self.margins = ((1, 0) if centred else (0, 1)) * dims  # the sides are even
        self.dims, self.is_up = dims, _is_up(direction)
        self.filter = None if taps is None else Filter(dims, direction, taps)
        # On the way up, the output of a filter with more than two taps has the margin that the convolution reads.
        padding = int(self.is_up and (self.filter is None or self.filter.taps == 2))
        stride = 1 if self.is_up else 2
        self.conv = initialise(CONVOLUTIONS[dims](in_channels, out_channels, 3, stride=stride, padding=padding), 1.0)

    def forward(self, x: Tensor, *unused: Tensor | None) -> Tensor:
        if self.filter is None:
            return self.conv(F.interpolate(x, scale_factor=2) if self.is_up else F.pad(x, self.margins))
        if self.is_up:
            return self.conv(self.filter(x, padding=max(self.filter.taps // 2 - 2, 0)))
        return self.conv(self.filter(x, padding=self.filter.taps // 2, stride=1))


def _is_up(direction: str) -> bool:
    if direction not in ("down", "up"):
        raise ValueError(f"direction must be 'down' or 'up'; got {direction!r}")
    return direction == "up"
