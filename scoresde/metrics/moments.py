r"""Distances between the moments of samples, their standard error, and principal components as features.

mean, covariance     |m_x - m| / tr(C)^(1/2)  and  |C_x - C|_F / |C|_F
Frechet distance     |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x^(1/2) C_y C_x^(1/2))^(1/2))        (1706.08500)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.metrics.samples import flatten, flatten_pair
from scoresde.tensors import float64


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and the unbiased covariance (D, D) of a sample (N, *), float64."""
    flat = flatten(x)
    return flat.mean(dim=0), flat.mT.cov().reshape(flat.shape[1], flat.shape[1])


def mean_error(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Return |m_x - m| / tr(C)^(1/2): the distance of the means in units of the root of the total variance.

    Args:
        x: a sample (N, *).
        mean, covariance: m (D,) or (*) and C (D, D), exact or of another sample (`moments`).

    Returns:
        (), float64. Its root mean square is (1/N)^(1/2) where x has these moments.

    Raises:
        ValueError: moments of another size than the states.
    """
    mean, covariance = _check_moments(flatten(x).shape[1], mean, covariance)
    return (flatten(x).mean(dim=0) - mean).norm() / covariance.trace().sqrt()


def covariance_error(x: Tensor, covariance: Tensor) -> Tensor:
    """Return |C_x - C|_F / |C|_F, with the unbiased covariance C_x of the sample x (N, *) and C (D, D).

    Returns:
        (), float64.

    Raises:
        ValueError: a covariance of another size than the states.
    """
    mean, own = moments(x)
    _, covariance = _check_moments(len(mean), mean, covariance)
    return (own - covariance).norm() / covariance.norm()


def _check_moments(size: int, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return (mean (D,), covariance (D, D)) in float64."""
    if mean.numel() != size or covariance.shape != (size, size):
        shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
        raise ValueError(f"expected a mean ({size},) and a covariance ({size}, {size}); got {shapes}")
    return float64(mean).flatten(), float64(covariance)


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> Tensor:
    """Return the squared Frechet (2-Wasserstein) distance of two Gaussians (Dowson and Landau 1982), in squared units.

        |m_1 - m_2|^2 + tr(C_1) + tr(C_2) - 2 tr((C_1^(1/2) C_2 C_1^(1/2))^(1/2))

    Between moments of a network's features it is called FID (1706.08500). Both roots are those of symmetric matrices,
    computed from eigenvalues with negative rounding errors set to zero: this also holds for singular covariances. A
    distance that does not exceed its own rounding error, of either sign, is returned as exactly 0.

    An eigenvalue lambda under the outer root has an error of at most e = D eps lambda_max, and its root one of
    min(e^(1/2), e / lambda^(1/2)): half of the digits are lost in directions without variance. The error of the traces
    is D eps, relative.

    Args:
        mean1, mean2: (D,).
        covariance1, covariance2: (D, D), symmetric and positive semi-definite.

    Returns:
        (), float64.

    Raises:
        ValueError: the shapes do not match.
    """
    mean1, covariance1 = _check_moments(mean1.numel(), mean1, covariance1)
    mean2, covariance2 = _check_moments(mean1.numel(), mean2, covariance2)
    root = _root(covariance1)
    values = torch.linalg.eigvalsh(root @ covariance2 @ root).clamp(min=0)
    total = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace()
    distance = total - 2 * values.sqrt().sum()
    relative = len(values) * torch.finfo(values.dtype).eps
    error = relative * values[-1]
    rounding = relative * total + 2 * (error / values.clamp(min=error).sqrt()).sum()  # nan if all are 0: no rounding
    return torch.where(distance.abs() <= rounding, torch.zeros_like(distance), distance)


def frechet_influence(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Return N times the first-order effect of each sample of x on the Frechet distance from a Gaussian.

    With T the symmetric matrix that transports the covariance C_x to C (T C_x T = C), the influence of a sample that
    lies d away from the mean m_x is 2 d (m_x - m) + d (I - T) d - tr((I - T) C_x).

    Args:
        x: a sample (N, *).
        mean, covariance: m (D,) and C (D, D), of the Gaussian.

    Returns:
        (N,), float64; its mean is 0 up to a factor (N - 1)/N of the covariance.

    Raises:
        ValueError: moments of another size than the states.
    """
    mean, covariance = _check_moments(flatten(x).shape[1], mean, covariance)
    own_mean, own_covariance = moments(x)
    deviation = flatten(x) - own_mean
    identity = torch.eye(len(own_mean), dtype=own_mean.dtype, device=own_mean.device)
    change = identity - _transport_matrix(own_covariance, covariance)
    linear, square = 2 * deviation @ (own_mean - mean), ((deviation @ change) * deviation).sum(dim=1)
    return linear + square - (change * own_covariance).sum()


def frechet_stderr(x: Tensor, y: Tensor) -> Tensor:
    """Return the standard error `()` of the Frechet distance between the moments of samples (N, *) and (M, *).

    Raises:
        ValueError: x and y have states of different shapes.
    """
    x, y = flatten_pair(x, y)
    variances = [frechet_influence(a, *moments(b)).var() / len(a) for a, b in ((x, y), (y, x))]
    return (variances[0] + variances[1]).sqrt()


def _transport_matrix(first: Tensor, second: Tensor) -> Tensor:
    """Return the symmetric T with T first T = second on the range of `first`, and zero on its null space."""
    values, vectors = torch.linalg.eigh(first)
    is_positive = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    values, vectors = values[is_positive], vectors[:, is_positive]
    root = vectors * values.sqrt()
    inverse = vectors * values.rsqrt()
    return inverse @ _root(root.mT @ second @ root) @ inverse.mT


def _root(matrix: Tensor) -> Tensor:
    """Return the square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


@dataclass(frozen=True)
class PrincipalComponents:
    """The coordinates of states along the directions of largest variance of some data.

    centre: the mean of the data, (D,). axes: (k, D), orthonormal, largest variance first. `str` names the features.
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
