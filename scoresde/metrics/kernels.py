r"""Kernel distances between samples, U-statistics without bias: the maximum mean discrepancy and the energy distance.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)                                    (Gretton et al. 2012)

with k a mean of Gaussians; the energy distance is the same with k = -|x - y| (1207.6076).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scoresde.metrics.samples import both, everything, flatten

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # bandwidths, in units of the median distance
MEDIAN_POINTS = 1000


class Discrepancy:
    """E k(x, x') + E k(y, y') - 2 E k(x, y) of some of the samples, unbiased: a statistic of index sets (i, j), `()`.

        sum_(a != b) k(x_a, x_b) / (N (N - 1)) + sum_(a != b) k(y_a, y_b) / (M (M - 1)) - 2 sum k(x_a, y_b) / (N M)

    Holds the kernel of all pairs: 8 (N^2 + N M + M^2) bytes.

    Args:
        x, y: samples (N, *) and (M, *).
        kernel: a function of distances, of any shape.

    Raises:
        ValueError: samples of shapes that do not fit.
    """

    def __init__(self, x: Tensor, y: Tensor, kernel: Callable[[Tensor], Tensor]):
        x, y = both(x, y)
        self._xx, self._xy, self._yy = (kernel(torch.cdist(a, b)) for a, b in ((x, x), (x, y), (y, y)))
        self.all = everything(x), everything(y)

    def __call__(self, i: Tensor, j: Tensor) -> Tensor:
        x, y = self._xx.new_zeros(len(self._xx)), self._yy.new_zeros(len(self._yy))
        x[i], y[j] = 1.0, 1.0
        within = [self._within(kernel, w) for kernel, w in ((self._xx, x), (self._yy, y))]
        return within[0] + within[1] - 2 * (x @ self._xy @ y) / (len(i) * len(j))

    @staticmethod
    def _within(kernel: Tensor, weights: Tensor) -> Tensor:
        count = weights.sum()
        return (weights @ kernel @ weights - weights @ kernel.diagonal()) / (count * (count - 1))


def median_distance(y: Tensor) -> float:
    """The median distance between two of the samples, of at most 1,000 of them that are evenly spaced in y.

    Raises:
        ValueError: samples that are all the same.
    """
    flat = flatten(y, "y")
    some = torch.linspace(0, len(flat) - 1, min(len(flat), MEDIAN_POINTS)).round().long()
    median = float(torch.pdist(flat[some.to(flat.device)]).median())
    if not median > 0:
        raise ValueError("samples that differ expected; the median distance between those of y is 0")
    return median


def gaussian(bandwidths: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """The kernel mean_h exp(-|x - y|^2 / (2 h^2)), of distances.

    Raises:
        ValueError: no bandwidth, or one that is not positive.
    """
    if not len(bandwidths) or not all(h > 0 for h in bandwidths):
        raise ValueError(f"one positive bandwidth or more expected; got {list(bandwidths)}")

    def kernel(distances: Tensor) -> Tensor:
        squares = distances.square()
        total = torch.zeros_like(squares)
        for h in bandwidths:
            total += torch.exp(squares * (-0.5 / h**2))
        return total / len(bandwidths)

    return kernel


def mmd(x: Tensor, y: Tensor, bandwidths: Sequence[float] | None = None) -> Tensor:
    """The squared maximum mean discrepancy of Gaussian kernels, unbiased (Gretton et al. 2012, eq. 3), without units.

    Args:
        x, y: samples (N, *) and (M, *).
        bandwidths: of the Gaussians whose mean is the kernel; the median distance between samples of y times 1/4, 1/2,
            1, 2 and 4 unless given. Comparisons of several x with one y then have one kernel.

    Returns:
        (), float64; below 0 where the samples are nearer than two of one distribution are on average.

    Raises:
        ValueError: samples of shapes that do not fit, a bandwidth that is not positive.
    """
    statistic = Discrepancy(x, y, gaussian(bandwidths or median_bandwidths(y)))
    return statistic(*statistic.all)


def median_bandwidths(y: Tensor) -> list[float]:
    """The median heuristic: the median distance between samples of y, times 1/4, 1/2, 1, 2 and 4."""
    median = median_distance(y)
    return [scale * median for scale in SCALES]


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """2 E|x - y| - E|x - x'| - E|y - y'|, unbiased, in the units of the state (Szekely and Rizzo 2013).

    Zero where the distributions are one, positive elsewhere; its root is a metric.

    Returns:
        (), float64; may be negative as `mmd` may.

    Raises:
        ValueError: samples of shapes that do not fit.
    """
    statistic = Discrepancy(x, y, torch.neg)
    return statistic(*statistic.all)
