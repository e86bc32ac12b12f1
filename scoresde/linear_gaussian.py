r"""Gaussians under a linear measurement y = A x + noise: the posterior of x, and the evidence of y, both in float64.

For x ~ N(m, L L^T) and noise with standard deviations n, whitened by z = L^-1 (x - m) and B = diag(1/n) A L = U S W^T,

    p(x | y)  =  N(m + L W S/(1 + S^2) U^T diag(1/n) (y - A m),   G G^T),      G = L W (1 + S^2)^(-1/2),
    p(y)      =  N(y; A m, M M^T),                                             M = [A L, diag(n)],

by singular value decompositions of B, G and M. No covariance is formed, so that small noise loses no digits.
"""

import math

import torch
from torch import Tensor


def condition(means: Tensor, factors: Tensor, matrix: Tensor, std: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the posterior means (K, D), standard deviations (K, D) and their axes, orthogonal (K, D, D).

    Args:
        means: m, (K, D).
        factors: L, (K, D, D).
        matrix: A, (m, D).
        std: standard deviations n of the noise, positive, (m,).
        y: the measurement, (m,).
    """
    whitened = matrix @ factors / std[:, None]
    u, s, wt = torch.linalg.svd(whitened, full_matrices=matrix.shape[0] < matrix.shape[1])
    residual = (y - means @ matrix.mT) / std
    along = torch.einsum("kmr,km->kr", u[:, :, : s.shape[1]], residual) * s / (1 + s.square())
    shift = torch.einsum("kij,krj,kr->ki", factors, wt[:, : s.shape[1]], along)
    shrink = torch.ones_like(means)
    shrink[:, : s.shape[1]] = (1 + s.square()).rsqrt()
    axes, stds, _ = torch.linalg.svd(factors @ (wt.mT * shrink[:, None, :]))
    return means + shift, stds, axes


def log_evidence(means: Tensor, factors: Tensor, matrix: Tensor, std: Tensor, y: Tensor) -> Tensor:
    """Return log p(y) of each Gaussian in nats, (B, K), for measurements y (B, m); see `condition`.

    std may be 0 where the rows of A are linearly independent.

    Raises:
        ValueError: M does not have full rank, so that y has no density.
    """
    count = len(means)
    joint = torch.cat((matrix @ factors, std.diag().expand(count, -1, -1)), dim=2)
    u, s, _ = torch.linalg.svd(joint, full_matrices=False)
    if bool((s[:, -1] <= s[:, 0] * max(joint.shape[1:]) * torch.finfo(s.dtype).eps).any()):
        raise ValueError(
            "noise_std must be positive where measurements are redundant, or y has no density; got "
            f"{float(std.min()):g}: give the operator a larger noise_std"
        )
    scaled = torch.einsum("kmr,bkm->bkr", u, y[:, None] - means @ matrix.mT) / s
    return -0.5 * scaled.square().sum(dim=2) - s.log().sum(dim=1) - 0.5 * len(matrix) * math.log(2 * math.pi)
