r"""Distances between a sample x (N, *) of a distribution P and a sample y (M, *) of Q, states flattened, in float64.

    sliced Wasserstein   SW_p = (mean over unit vectors u of W_p(u x, u y)^p)^(1/p)               (Rabin et al. 2011)
    maximum mean         MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y), k Gaussian                (Gretton et al. 2012)
    energy distance      2 E|x - y| - E|x - x'| - E|y - y'|: the same with k = -|x - y|           (1207.6076)
    mean, covariance     |m_x - m| / tr(C)^(1/2)  and  |C_x - C|_F / |C|_F
    Frechet distance     |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x^(1/2) C_y C_x^(1/2))^(1/2))        (1706.08500)

MMD^2 and the energy distance are U-statistics, without bias: where P = Q they are zero on average, and often negative.
The others are biased upwards by what samples of finite number vary: compare figures at equal N and M, beside the
figure that a sample of Q itself has. `bootstrap` gives the interval of any of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scoresde.tensors import float64

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # bandwidths, in units of the median distance
MEDIAN_POINTS = 1000
FEWEST = 4  # of a sample that is to be halved

Statistic = Callable[..., Tensor]


def flatten(x: Tensor, name: str = "x") -> Tensor:
    """A sample (N, *) as (N, D), float64.

    Raises:
        ValueError: no sample axis beside those of the state, or fewer than two samples.
    """
    if x.ndim < 2 or x.shape[0] < 2:
        raise ValueError(f"{name} as two samples or more, (N, *), expected; got shape {tuple(x.shape)}")
    return float64(x).flatten(1)


def _both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two samples of states of one shape, flattened."""
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"samples of states of one shape expected; got {tuple(x.shape)} and {tuple(y.shape)}")
    return flatten(x), flatten(y, "y")


def _everything(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)


# --- optimal transport


def wasserstein(x: Tensor, y: Tensor, order: float = 2) -> Tensor:
    r"""W_p of samples on the line, exact: (\int_0^1 |F_x^-1(q) - F_y^-1(q)|^p dq)^(1/p).

    Args:
        x, y: values (..., N) and (..., M), sorted or not.
        order: p >= 1.

    Returns:
        (...), float64.

    Raises:
        ValueError: an order below 1.
    """
    return _transport(float64(x).sort(dim=-1).values, float64(y).sort(dim=-1).values, order) ** (1 / order)


def _transport(x: Tensor, y: Tensor, order: float) -> Tensor:
    """W_p^p of sorted values: the quantile functions are steps, and their difference is one between all the ends."""
    if not order >= 1:
        raise ValueError(f"an order of 1 or more expected; got {order}")
    n, m = x.shape[-1], y.shape[-1]
    if n == m:
        return (x - y).abs().pow(order).mean(dim=-1)
    steps = [torch.arange(1, count + 1, device=x.device) * other for count, other in ((n, m), (m, n))]
    ends = torch.cat(steps).unique()  # in units of 1/(n m): whole numbers, so that no end is missed
    lengths = torch.diff(ends, prepend=ends.new_zeros(1))
    gaps = (x[..., (ends - 1) // m] - y[..., (ends - 1) // n]).abs().pow(order)
    return gaps @ lengths.double() / (n * m)


def directions(size: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Unit vectors (count, size), uniform on the sphere; of a line, the one that there is."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if count < 1:
        raise ValueError(f"one projection or more expected; got {count}")
    drawn = torch.randn(count, size, generator=generator, dtype=torch.float64)
    return drawn / drawn.norm(dim=1, keepdim=True)


class SlicedWasserstein:
    """SW_p of some of the samples: a statistic of index sets (i, j), each index at most once, `()`.

    Sorts once, for the order of some of the samples is that of all. On the CPU, wherever the samples are.

    Args:
        x, y: samples (N, *) and (M, *).
        projections: number of directions, or the directions themselves, (P, D).
        order: p.
        generator: of the directions.

    Raises:
        ValueError: samples or directions of shapes that do not fit, an order below 1.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        projections: int | Tensor = 128,
        order: float = 2,
        generator: torch.Generator | None = None,
    ):
        x, y = _both(x, y)
        given = isinstance(projections, Tensor)
        u = float64(projections) if given else directions(x.shape[1], int(projections), generator)
        if u.ndim != 2 or u.shape[1] != x.shape[1]:
            raise ValueError(f"directions (P, {x.shape[1]}) expected; got {tuple(u.shape)}")
        self.order = order
        self._x, self._y = ((u.to(part.device) @ part.mT).cpu().sort(dim=1) for part in (x, y))
        self.all = _everything(x).cpu(), _everything(y).cpu()

    def __call__(self, i: Tensor, j: Tensor) -> Tensor:
        x, y = (self._some(*pair) for pair in ((self._x, i), (self._y, j)))
        return _transport(x, y, self.order).mean() ** (1 / self.order)

    @staticmethod
    def _some(ranked: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        values, order = ranked
        kept = torch.zeros(values.shape[1], dtype=torch.bool)
        kept[rows] = True
        chosen = kept.index_select(0, order.flatten()).numpy()
        places = torch.from_numpy(np.flatnonzero(chosen))  # several times as fast as a boolean index
        return values.flatten()[places].reshape(len(values), -1)


def sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    projections: int | Tensor = 128,
    order: float = 2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(mean over directions u of W_p(u x, u y)^p)^(1/p), with W_p exact for any N and M; in the units of the state.

    For two Gaussians of covariance s^2 I whose means are |m| apart, SW_2 = |m| / D^(1/2).

    Args and errors: see `SlicedWasserstein`.

    Returns:
        (), float64.
    """
    statistic = SlicedWasserstein(x, y, projections, order, generator)
    return statistic(*statistic.all)


# --- kernels


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
        x, y = _both(x, y)
        self._xx, self._xy, self._yy = (kernel(torch.cdist(a, b)) for a, b in ((x, x), (x, y), (y, y)))
        self.all = _everything(x), _everything(y)

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


# --- moments


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D,) and the unbiased covariance (D, D) of a sample (N, *), float64."""
    flat = flatten(x)
    return flat.mean(dim=0), flat.mT.cov().reshape(flat.shape[1], flat.shape[1])


def mean_error(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """|m_x - m| / tr(C)^(1/2): the distance of the means in units of the root of the total variance.

    Args:
        x: a sample (N, *).
        mean, covariance: m (D,) or (*) and C (D, D), exact or those of another sample (`moments`).

    Returns:
        (), float64; (1/N)^(1/2) on average in squares where x has just these moments.

    Raises:
        ValueError: moments of another size.
    """
    mean, covariance = _of_size(flatten(x).shape[1], mean, covariance)
    return (flatten(x).mean(dim=0) - mean).norm() / covariance.trace().sqrt()


def covariance_error(x: Tensor, covariance: Tensor) -> Tensor:
    """|C_x - C|_F / |C|_F, with the unbiased covariance of the sample x (N, *) and C (D, D), exact or another's.

    Returns:
        (), float64.

    Raises:
        ValueError: a covariance of another size.
    """
    found = moments(x)[1]
    _, covariance = _of_size(len(found), None, covariance)
    return (found - covariance).norm() / covariance.norm()


def _of_size(size: int, mean: Tensor | None, covariance: Tensor) -> tuple[Tensor, Tensor]:
    if (mean is not None and mean.numel() != size) or covariance.shape != (size, size):
        raise ValueError(
            f"a mean of {size} numbers and a covariance ({size}, {size}) expected; got "
            f"{None if mean is None else tuple(mean.shape)} and {tuple(covariance.shape)}"
        )
    return float64(covariance[0] if mean is None else mean).flatten(), float64(covariance)


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> Tensor:
    """The squared Frechet (2-Wasserstein) distance of two Gaussians (Dowson and Landau 1982), in squared units.

        |m_1 - m_2|^2 + tr(C_1) + tr(C_2) - 2 tr((C_1^(1/2) C_2 C_1^(1/2))^(1/2))

    Of the moments of a network's features, this is what is called FID (1706.08500). The roots are those of symmetric
    matrices, by their eigenvalues, rounding below zero cut off: also right where a covariance is singular.

    Args:
        mean1, mean2: (D,).
        covariance1, covariance2: (D, D), symmetric and positive semi-definite.

    Returns:
        (), float64.

    Raises:
        ValueError: shapes that do not fit.
    """
    first = _of_size(mean1.numel(), mean1, covariance1)
    second = _of_size(mean1.numel(), mean2, covariance2)
    root = _root(first[1])
    overlap = torch.linalg.eigvalsh(root @ second[1] @ root).clamp(min=0).sqrt().sum()
    return (first[0] - second[0]).square().sum() + first[1].trace() + second[1].trace() - 2 * overlap


def _root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


@dataclass(frozen=True)
class PrincipalComponents:
    """Features of a state: its coordinates along the directions of largest variance of some data.

    centre: (D,), the data's mean. axes: (k, D), orthonormal, the largest variance first. str() names the features.
    """

    centre: Tensor
    axes: Tensor

    @classmethod
    def of(cls, data: Tensor, count: int = 32) -> "PrincipalComponents":
        """The first `count` components of a sample (N, *), by an eigendecomposition of its covariance.

        Raises:
            ValueError: a count outside of 1, ..., D.
        """
        mean, covariance = moments(data)
        if not 1 <= count <= len(mean):
            raise ValueError(f"1 to {len(mean)} principal components expected; got {count}")
        return cls(mean, torch.linalg.eigh(covariance).eigenvectors[:, -count:].flip(1).mT)

    def __call__(self, x: Tensor) -> Tensor:
        """Features (N, k) of states (N, *)."""
        return (flatten(x) - self.centre.to(x.device)) @ self.axes.to(x.device).mT

    def __str__(self) -> str:
        return f"pca-{len(self.axes)}"


# --- intervals


@dataclass(frozen=True)
class Interval:
    """A statistic and an interval for its expectation."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Statistic,
    x: Tensor,
    y: Tensor | None = None,
    resamples: int = 200,
    level: float = 0.95,
    generator: torch.Generator | None = None,
) -> Interval:
    """A statistic of samples, and an interval for its expectation at these numbers of samples, by half-samples.

    Resampling with replacement repeats points, which distances between samples take for structure: they come out too
    large, by about their own bias once more. Halves drawn without replacement repeat nothing. Of n samples, the
    statistics of halves vary around their mean as the statistic itself does around its expectation (the delete-d
    jackknife with d = n/2, whose factor (n - d)/d is 1: Shao and Wu 1989). Their mean has the bias of n/2 samples, and
    is not used: with v the value and e_q the quantiles of the halves less their mean, the interval is

        [v + e_((1 - level)/2),  v + e_(1 - (1 - level)/2)].

    It is for the expectation of the statistic at N and M samples, what repetitions of the experiment scatter around: of
    an unbiased statistic, the distance itself; of a biased one, the distance with its bias. Measured between Gaussians
    in space with 200 samples each, intervals of 95% cover that in 93 to nearly 100% of repetitions (sliced Wasserstein,
    energy and Frechet distance, error of the mean; 300 of them), and nearly always where P = Q, too wide there.

    Args:
        statistic: a function of (x, y), or of x alone, to `()`; with `SlicedWasserstein` and `Discrepancy`, of the
            index sets `.all`.
        x, y: samples (N, ...) and (M, ...), the sample axis first.
        resamples: halves drawn.
        level: of confidence.
        generator: of the halves.

    Raises:
        ValueError: fewer than four samples, fewer than two resamples, or a level outside of (0, 1).
    """
    samples = [x] if y is None else [x, y]
    if min(len(part) for part in samples) < FEWEST:
        raise ValueError(f"{FEWEST} samples or more expected; got {[len(part) for part in samples]}")
    if resamples < 2 or not 0 < level < 1:
        raise ValueError(f"two resamples or more, and a level in (0, 1), expected; got {resamples}, {level}")
    value = float(statistic(*samples))
    halves = torch.stack([statistic(*(_half(part, generator) for part in samples)) for _ in range(resamples)]).double()
    # Of R draws the k-th smallest is the quantile k/(R + 1), in expectation.
    tail = max((0.5 * (1 - level) * (resamples + 1) - 1) / (resamples - 1), 0.0)
    low, high = torch.quantile(halves - halves.mean(), halves.new_tensor([tail, 1 - tail])).tolist()
    return Interval(value, value + low, value + high)


def _half(samples: Tensor, generator: torch.Generator | None) -> Tensor:
    """Half of the samples, drawn without replacement."""
    order = torch.randperm(len(samples), generator=generator)
    return samples[order[: len(samples) // 2].to(samples.device)]
