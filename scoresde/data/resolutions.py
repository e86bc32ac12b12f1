r"""Two resolutions of an image: the mean over blocks of pixels, and the fine part that the mean leaves open.

x (B, C, *space) is split into its mean m over blocks of f pixels along every axis, and a fine part:

| class            | fine part of x                                 | dimensions of (m, fine part)                    |
| ---------------- | ---------------------------------------------- | ----------------------------------------------- |
| `AveragePooling` | x itself                                       | more than x: m is a function of the fine part   |
| `Haar`           | the coefficients of x in the orthonormal Haar  | those of x: the map is linear and invertible    |
|                  | basis of each block that are orthogonal to m   |                                                 |

In the Haar basis of a block of 2^n pixels, the first coefficient is 2^(n/2) times the mean. The basis is orthonormal,
so the map from x to (m, fine part) has the log-determinant -(n/2) log 2 for each of the dimensions of m.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from scoresde.arguments import Few, checked
from scoresde.configured import Configured

INTERPOLATION = ("linear", "bilinear", "trilinear")


class Resolutions(Configured, ABC):
    """A split of images into their mean over blocks and a fine part.

    Attributes:
        factor: side of a block in pixels.
        is_exact: whether the split is a change of variables, so that p(x) = p(mean) p(fine part | mean) up to
            `log_det`. If False, (mean, fine part) has more dimensions than x, and that product is a density of both.
    """

    factor: int
    is_exact: bool

    @abstractmethod
    def fine(self, x: Tensor) -> Tensor:
        """Return the fine part of images (B, C, *space)."""

    @abstractmethod
    def join(self, mean: Tensor, fine: Tensor) -> Tensor:
        """Return the images (B, C, *space) with this mean and this fine part."""

    @abstractmethod
    def fine_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the fine part of an image of a shape (C, *space)."""

    @abstractmethod
    def log_det(self, shape: Sequence[int]) -> float:
        """Return log|det d(mean, fine part)/dx| in nats for an image of a shape (C, *space); 0 if not `is_exact`."""

    @abstractmethod
    def upsampled(self, mean: Tensor) -> Tensor:
        """Return the mean on the grid of the fine part, (B, C, *space of the fine part)."""

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over blocks of images (B, C, *space)."""
        axes = range(3, 2 * x.ndim - 1, 2)
        return self._blocks(x).mean(dim=tuple(axes))

    def mean_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the mean of an image of a shape (C, *space).

        Raises:
            ValueError: the image has no spatial dimension or more than three, or a side is not a multiple of `factor`.
        """
        channels, *space = tuple(shape) or (0,)
        if not 1 <= len(space) <= 3 or any(side % self.factor for side in space):
            raise ValueError(
                f"images must have the shape (C, *space) with one to three sides that are multiples of {self.factor}; "
                f"got {tuple(shape)}: crop or pad them, or choose another factor"
            )
        return (channels, *(side // self.factor for side in space))

    def _blocks(self, x: Tensor) -> Tensor:
        """Reshape (B, C, f h, f w, ...) to (B, C, h, f, w, f, ...)."""
        _, *sides = self.mean_shape(x.shape[1:])
        return x.reshape(*x.shape[:2], *(n for side in sides for n in (side, self.factor)))


@checked
class AveragePooling(Resolutions):
    """The mean over blocks of `factor` pixels along every axis, and the image itself, as in SR3 (2104.07636).

    Args:
        factor: side of a block in pixels.
    """

    is_exact = False

    def __init__(self, factor: Few = 2):
        self.factor = factor

    def fine(self, x: Tensor) -> Tensor:
        self.mean_shape(x.shape[1:])
        return x

    def join(self, mean: Tensor, fine: Tensor) -> Tensor:
        return fine

    def fine_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        self.mean_shape(shape)
        return tuple(shape)

    def log_det(self, shape: Sequence[int]) -> float:
        return 0.0

    def upsampled(self, mean: Tensor) -> Tensor:
        """Return the mean, interpolated linearly along every axis."""
        return F.interpolate(mean, scale_factor=self.factor, mode=INTERPOLATION[mean.ndim - 3])

    def __repr__(self) -> str:
        return f"AveragePooling(factor={self.factor})"


class Haar(Resolutions):
    """The mean over blocks of two pixels along every axis, and the other coefficients of the orthonormal Haar basis.

    The fine part of (B, C, *space) has (2^n - 1) C channels at half the sides, with n spatial dimensions. Wavelet Flow
    (2010.13821) and wavelet score-based models (2208.05003) generate images from these coefficients.
    """

    factor, is_exact = 2, True

    def fine(self, x: Tensor) -> Tensor:
        n = x.ndim - 2
        blocks = self._blocks(x).permute(0, 1, *range(2, 2 * n + 2, 2), *range(3, 2 * n + 2, 2)).flatten(n + 2)
        details = blocks @ _basis(n, x)[1:].T  # (B, C, *half, 2^n - 1)
        return details.movedim(-1, 1).flatten(1, 2)

    def join(self, mean: Tensor, fine: Tensor) -> Tensor:
        n, channels = mean.ndim - 2, mean.shape[1]
        details = fine.reshape(len(fine), 2**n - 1, channels, *mean.shape[2:]).movedim(1, -1)
        blocks = torch.cat([2 ** (n / 2) * mean[..., None], details], dim=-1) @ _basis(n, fine)
        blocks = blocks.reshape(*mean.shape, *[2] * n)
        order = [axis for i in range(2, n + 2) for axis in (i, i + n)]
        return blocks.permute(0, 1, *order).reshape(*mean.shape[:2], *(2 * side for side in mean.shape[2:]))

    def fine_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        channels, *half = self.mean_shape(shape)
        return ((2 ** len(half) - 1) * channels, *half)

    def log_det(self, shape: Sequence[int]) -> float:
        half = self.mean_shape(shape)
        return -0.5 * (len(half) - 1) * math.log(2) * math.prod(half)

    def upsampled(self, mean: Tensor) -> Tensor:
        """Return the mean, which has the grid of the fine part."""
        return mean

    def __repr__(self) -> str:
        return "Haar()"


def _basis(n: int, like: Tensor) -> Tensor:
    """Return the orthonormal Haar basis of a block of two pixels along n axes, (2^n, 2^n), the constant first."""
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    basis = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(n):
        basis = torch.kron(basis, pair)
    return basis.to(like)
