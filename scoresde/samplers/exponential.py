r"""Exact weights of exponential integrators in lambda = log(alpha/sigma): DPM-Solver++, UniPC, SA-Solver, DEIS.

The reverse family of noise level l has the exact solution (2211.01095, eq. 8; 2309.05019, eq. 10)

    x_s = sigma_s/sigma_t e^(-l^2 h) x_t + alpha_s \int k e^(-k (lambda_s - lambda)) E[x_0 | x_lambda] dlambda
          + sigma_s (1 - e^(-2 l^2 h))^(1/2) z,                 k = 1 + l^2,    h = lambda_s - lambda_t.

Only the denoiser is approximated, by a polynomial in lambda through its last values. The part linear in x is exact at
any step size, and so is Gaussian noise without data. l = 0 is the probability flow, l = 1 the reverse SDE.
"""

import math
from collections.abc import Sequence

import numpy as np

from scoresde.sdes.points import Point

NODES, QUADRATURE = np.polynomial.legendre.leggauss(32)


def check_order(order: int, highest: int) -> int:
    """The order; a ValueError outside of 1, ..., highest."""
    if order not in range(1, highest + 1):
        raise ValueError(f"an order from 1 to {highest} expected; got {order!r}")
    return order


def lagrange(nodes: Sequence[float], at: np.ndarray) -> np.ndarray:
    """The Lagrange polynomials of the nodes, (p, n) at n points."""
    rows = []
    for j, node in enumerate(nodes):
        others = [other for k, other in enumerate(nodes) if k != j]
        rows.append(np.prod([(at - other) / (node - other) for other in others], axis=0) * np.ones_like(at))
    return np.stack(rows)


def weights(nodes: Sequence[float], start: float, end: float, rate: float) -> list[float]:
    r"""w_j = \int_start^end rate e^(-rate (end - lambda)) L_j(lambda) dlambda, L_j the Lagrange polynomials."""
    if len(nodes) == 1:
        return [-math.expm1(-rate * (end - start))]
    at = 0.5 * (end + start) + 0.5 * (end - start) * NODES
    density = 0.5 * (end - start) * QUADRATURE * rate * np.exp(-rate * (end - at))
    return (lagrange(nodes, at) @ density).tolist()


def limited(nodes: Sequence[Point], target: Point, left: int, final: int) -> Sequence[Point]:
    """The nodes that the order at the end of a run allows; one, where no noise is left and lambda is infinite."""
    if math.isinf(target.lam):
        return nodes[:1]
    return nodes[: left - 1 + final] if final else nodes


def transport(here: Point, target: Point, l: float) -> tuple[float, float]:  # noqa: E741 - the letter of the formula
    """(a, c) of the exact solution: the coefficients of x and z."""
    h, square = target.lam - here.lam, l * l
    if not square:
        return target.sigma / here.sigma, 0.0
    return target.sigma / here.sigma * math.exp(-square * h), target.sigma * math.sqrt(-math.expm1(-2 * square * h))
