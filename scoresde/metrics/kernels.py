r"""Unbiased kernel distances between samples (U-statistics): maximum mean discrepancy and energy distance.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)                                    (Gretton et al. 2012)

with independent states x, x' of one distribution and y, y' of the other, and k a mean of Gaussians. The energy distance
is the same expression with k = -|x - y| (1207.6076).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scoresde.metrics.samples import flatten, flatten_pair

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # bandwidths, in units of the median distance
MEDIAN_POINTS = 1000


class Discrepancy:
    """The unbiased estimate of E k(x, x') + E k(y, y') - 2 E k(x, y) from subsets of two samples.

    The letters are those of the module docstring.

    A call with n indices i of x and m indices j of y returns a scalar `()`, with sums over these samples only:

        sum_(a != b) k(x_a, x_b) / (n (n - 1)) + sum_(a != b) k(y_a, y_b) / (m (m - 1)) - 2 sum k(x_a, y_b) / (n m).

    The attribute `all` is the pair of the indices of every sample. The object stores the kernel of all pairs of
    samples: 8 (N^2 + N M + M^2) bytes.

    Args:
        x, y: samples (N, *) and (M, *).
        kernel: k as a function of the distance |x - y|; it is applied elementwise to a tensor of distances.

    Raises:
        ValueError: x and y have states of different shapes.
    """

    def __init__(self, x: Tensor, y: Tensor, kernel: Callable[[Tensor], Tensor]):
        x, y = flatten_pair(x, y)
        self._xx, self._xy, self._yy = (kernel(torch.cdist(a, b)) for a, b in ((x, x), (x, y), (y, y)))
        self.all = torch.arange(len(x), device=x.device), torch.arange(len(y), device=y.device)

    def __call__(self, i: Tensor, j: Tensor) -> Tensor:
        x, y = self._xx.new_zeros(len(self._xx)), self._yy.new_zeros(len(self._yy))
        x[i], y[j] = 1.0, 1.0
        cross = 2 * (x @ self._xy @ y) / (len(i) * len(j))
        return self._within(self._xx, x) + self._within(self._yy, y) - cross

    @staticmethod
    def _within(kernel: Tensor, weights: Tensor) -> Tensor:
        count = weights.sum()
        return (weights @ kernel @ weights - weights @ kernel.diagonal()) / (count * (count - 1))


def gaussian(bandwidths: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """Return the kernel exp(-|x - y|^2 / (2 h^2)), averaged over the bandwidths h, as a function of distances |x - y|.

    Raises:
        ValueError: there is no bandwidth, or a bandwidth is not positive.
    """
    if not len(bandwidths) or not all(h > 0 for h in bandwidths):
        raise ValueError(f"expected at least one bandwidth, all positive; got {list(bandwidths)}")

    def kernel(distances: Tensor) -> Tensor:
        squares = distances.square()
        total = torch.zeros_like(squares)
        for h in bandwidths:
            total += torch.exp(squares * (-0.5 / h**2))
        return total / len(bandwidths)

    return kernel


def median_bandwidths(y: Tensor) -> list[float]:
    """Return bandwidths by the median heuristic: the median distance times 1/4, 1/2, 1, 2 and 4.

    The median is over pairs of at most 1,000 samples, evenly spaced in y.

    Raises:
        ValueError: at least half of the distances are zero.
    """
    flat = flatten(y, "y")
    rows = torch.linspace(0, len(flat) - 1, min(len(flat), MEDIAN_POINTS)).round().long()
    median = float(torch.pdist(flat[rows.to(flat.device)]).median())
    if not median > 0:
        raise ValueError(
            "the median distance between samples of y is 0, as most of these samples are equal: pass bandwidths"
        )
    return [scale * median for scale in SCALES]


def mmd(x: Tensor, y: Tensor, bandwidths: Sequence[float] | None = None) -> Tensor:
    """Return the unbiased squared maximum mean discrepancy of Gaussian kernels (Gretton et al. 2012, eq. 3), unitless.

    Args:
        x, y: samples (N, *) and (M, *).
        bandwidths: standard deviations h of the Gaussians whose mean is the kernel; default `median_bandwidths(y)`, so
            that comparisons of several x with one y use the same kernel.

    Returns:
        (), float64; negative where x and y are closer than two samples of one distribution are on average.

    Raises:
        ValueError: x and y have states of different shapes, or a bandwidth is not positive.
    """
    statistic = Discrepancy(x, y, gaussian(bandwidths or median_bandwidths(y)))
    return statistic(*statistic.all)


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return an unbiased estimate of the energy distance, in the units of the state (Szekely and Rizzo 2013).

    The energy distance 2 E|x - y| - E|x - x'| - E|y - y'|, with letters as in the module docstring, is zero for equal
    distributions and positive otherwise; its square root is a metric.

    Returns:
        (), float64; the estimate may be negative, as for `mmd`.

    Raises:
        ValueError: x and y have states of different shapes.
    """
    statistic = Discrepancy(x, y, torch.neg)
    return statistic(*statistic.all)
