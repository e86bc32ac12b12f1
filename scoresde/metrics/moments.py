r"""Distances between the moments of samples, and features that keep the largest of them.

mean, covariance     |m_x - m| / tr(C)^(1/2)  and  |C_x - C|_F / |C|_F
Frechet distance     |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x^(1/2) C_y C_x^(1/2))^(1/2))        (1706.08500)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.metrics.samples import both, flatten
from scoresde.tensors import float64


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
    matrices, by their eigenvalues, rounding below zero cut off: also right where a covariance is singular. A distance
    of no more than its own rounding error, of either sign, is exactly 0.

    An eigenvalue under the outer root is off by e = D eps lambda_max at most, and its root by min(e^(1/2), e /
    lambda^(1/2)): half of the digits are lost in directions without variance. The traces are off by D eps.

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
    values = torch.linalg.eigvalsh(root @ second[1] @ root).clamp(min=0)
    total = (first[0] - second[0]).square().sum() + first[1].trace() + second[1].trace()
    distance = total - 2 * values.sqrt().sum()
    relative = len(values) * torch.finfo(values.dtype).eps
    off = relative * values[-1]
    rounding = relative * total + 2 * (off / values.clamp(min=off).sqrt()).sum()  # nan where all are 0: none is lost
    return torch.where(distance.abs() <= rounding, torch.zeros_like(distance), distance)


def frechet_influence(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """By how much each sample of x moves its Frechet distance from a Gaussian, times N, to first order; see the module.

    Args:
        x: a sample (N, *).
        mean, covariance: of the Gaussian, (D,) and (D, D).

    Returns:
        (N,), float64, of mean 0 up to a factor (N - 1)/N of the covariance.

    Raises:
        ValueError: moments of another size.
    """
    mean, covariance = _of_size(flatten(x).shape[1], mean, covariance)
    own, spread = moments(x)
    away = flatten(x) - own
    change = torch.eye(len(own), dtype=own.dtype, device=own.device) - _transport_map(spread, covariance)
    linear, square = 2 * away @ (own - mean), ((away @ change) * away).sum(dim=1)
    return linear + square - (change * spread).sum()


def frechet_stderr(x: Tensor, y: Tensor) -> Tensor:
    """The standard error of the Frechet distance between the moments of samples (N, *) and (M, *), `()`.

    Raises:
        ValueError: samples of shapes that do not fit.
    """
    x, y = both(x, y)
    parts = [frechet_influence(a, *moments(b)).var() / len(a) for a, b in ((x, y), (y, x))]
    return (parts[0] + parts[1]).sqrt()


def _transport_map(first: Tensor, second: Tensor) -> Tensor:
    """The symmetric T with T first T = second, on the range of the first covariance; zero on what is beside it."""
    values, vectors = torch.linalg.eigh(first)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    values, vectors = values[kept], vectors[:, kept]
    root = vectors * values.sqrt()
    inverse = vectors * values.rsqrt()
    return inverse @ _root(root.mT @ second @ root) @ inverse.mT


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
