r"""The Frechet distance between two samples, and its standard error; between Inception features it is the FID.

|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x^(1/2) C_y C_x^(1/2))^(1/2))        (1706.08500)

with m_x, C_x and m_y, C_y the means and covariances of the two samples.
"""

import torch
from torch import Tensor

from scoresde.metrics.moments import check_moments, moments
from scoresde.metrics.samples import flatten, flatten_pair


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> Tensor:
    """Return the squared Frechet (2-Wasserstein) distance of two Gaussians (Dowson and Landau 1982), in squared units.

        |m_1 - m_2|^2 + tr(C_1) + tr(C_2) - 2 tr((C_1^(1/2) C_2 C_1^(1/2))^(1/2))

    Between moments of a network's features it is called FID (1706.08500). Both roots are those of symmetric matrices,
    computed from eigenvalues with negative rounding errors set to zero, so singular covariances are allowed. A distance
    whose magnitude does not exceed its rounding error is returned as exactly 0.

    An eigenvalue lambda under the outer root has an error of at most e = D eps lambda_max (eps the machine epsilon),
    and its root an error of at most min(e^(1/2), e / lambda^(1/2)): half of the digits are lost in directions without
    variance. The relative error of the traces is D eps.

    Args:
        mean1, mean2: (D,).
        covariance1, covariance2: (D, D), symmetric and positive semi-definite.

    Returns:
        (), float64.

    Raises:
        ValueError: the shapes do not match, or a moment is not finite.
    """
    mean1, covariance1 = check_moments(mean1.numel(), mean1, covariance1)
    mean2, covariance2 = check_moments(mean1.numel(), mean2, covariance2)
    root = _root(covariance1)
    values = torch.linalg.eigvalsh(root @ covariance2 @ root).clamp(min=0)
    total = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace()
    distance = total - 2 * values.sqrt().sum()
    relative = len(values) * torch.finfo(values.dtype).eps
    error = relative * values[-1]
    rounding = relative * total + 2 * (error / values.clamp(min=error).sqrt()).sum()  # NaN if all are 0
    return torch.where(distance.abs() <= rounding, torch.zeros_like(distance), distance)


def frechet_influence(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Return the influence function, at each sample of x, of the Frechet distance between x and a Gaussian.

    It is N times the first-order effect of the sample on the distance. With m and C the mean and covariance of the
    Gaussian, m_x and C_x those of x, and T the symmetric matrix with T C_x T = C, its value at a sample m_x + d is

        2 d (m_x - m) + d (I - T) d - tr((I - T) C_x).

    Args:
        x: a sample (N, *).
        mean, covariance: m (D,) and C (D, D) of the Gaussian.

    Returns:
        (N,), float64; the mean over x is 0, except for a term of order 1/N.

    Raises:
        ValueError: the moments do not have the size of the states.
    """
    mean, covariance = check_moments(flatten(x).shape[1], mean, covariance)
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
    """Return the symmetric T with T A T = B on the range of A, and T = 0 on its null space; A = first, B = second."""
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
