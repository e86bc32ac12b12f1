"""Errors of the mean m_x and the covariance C_x of a sample x, and principal components as features.

mean        |m_x - m| / tr(C)^(1/2)
covariance  |C_x - C|_F / |C|_F

with m and C the expected mean and covariance.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.metrics.samples import flatten, refuse_nonfinite
from scoresde.tensors import float64


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and the unbiased covariance (D, D) of a sample (N, *), float64."""
    flat = flatten(x)
    return flat.mean(dim=0), flat.mT.cov().reshape(flat.shape[1], flat.shape[1])


def mean_error(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Return |m_x - m| / tr(C)^(1/2): the distance of the means in units of the root of the total variance.

    Args:
        x: a sample (N, *).
        mean, covariance: m (D,) or (*) and C (D, D), exact or from another sample (`moments`).

    Returns:
        (), float64. Its root mean square is (1/N)^(1/2) if the distribution of x has these moments.

    Raises:
        ValueError: the moments do not have the size of the states, samples or moments are not finite, or the covariance
            is zero.
    """
    mean, covariance = check_moments(flatten(x).shape[1], mean, covariance)
    return (flatten(x).mean(dim=0) - mean).norm() / _refuse_constant(covariance).trace().sqrt()


def covariance_error(x: Tensor, covariance: Tensor) -> Tensor:
    """Return |C_x - C|_F / |C|_F, with the unbiased covariance C_x of the sample x (N, *) and C (D, D).

    Returns:
        (), float64.

    Raises:
        ValueError: the covariance does not have the size of the states, samples or the covariance are not finite, or
            the covariance is zero.
    """
    mean, own = moments(x)
    _, covariance = check_moments(len(mean), mean, covariance)
    return (own - covariance).norm() / _refuse_constant(covariance).norm()


def check_moments(size: int, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return (mean (D,), covariance (D, D)) in float64; raise ValueError for another size, NaN or infinity."""
    if mean.numel() != size or covariance.shape != (size, size):
        shapes = f"shapes {tuple(mean.shape)} and {tuple(covariance.shape)}"
        raise ValueError(f"expected a mean ({size},) and a covariance ({size}, {size}); got {shapes}")
    refuse_nonfinite(mean.reshape(size, 1), "the mean", "numbers")
    refuse_nonfinite(covariance, "the covariance", "rows")
    return float64(mean).flatten(), float64(covariance)


def _refuse_constant(covariance: Tensor) -> Tensor:
    """Return the covariance, which is the unit of the errors; raise ValueError if it is zero."""
    if not bool(covariance.any()):
        raise ValueError("the covariance must not be zero, as it is the unit of the error: the data are constant")
    return covariance


@dataclass(frozen=True)
class PrincipalComponents:
    """A map from states to their coordinates along the directions of largest variance of a data set.

    centre: the mean of the data, (D,). axes: the directions (k, D), orthonormal, the one of largest variance first.
    `str` gives the name of the features.
    """

    centre: Tensor
    axes: Tensor

    @classmethod
    def of(cls, data: Tensor, count: int = 32) -> "PrincipalComponents":
        """Return the first `count` components of a sample (N, *), from an eigendecomposition of its covariance.

        Raises:
            ValueError: count is not in 1, ..., D.
        """
        mean, covariance = moments(data)
        if not 1 <= count <= len(mean):
            raise ValueError(f"expected 1 to {len(mean)} principal components; got {count}")
        return cls(mean, torch.linalg.eigh(covariance).eigenvectors[:, -count:].flip(1).mT)

    def __call__(self, x: Tensor) -> Tensor:
        """Return features (N, k) of states (N, *)."""
        return (flatten(x) - self.centre.to(x.device)) @ self.axes.to(x.device).mT

    def __str__(self) -> str:
        return f"pca-{len(self.axes)}"
