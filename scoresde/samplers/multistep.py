r"""The base of multistep methods, and the exact weights of exponential integrators in lambda = log(alpha/sigma).

A multistep method puts a polynomial through the last values of a view (E[x_0 | x], E[eps | x] or E[v | x]) and
integrates it over the step. A corrector repeats this with the value at the end of the step as a further point
(`samplers.linear`).

DPM-Solver++, UniPC and SA-Solver approximate the denoiser by a polynomial in lambda. The family of reverse
SDEs (`ReverseSDE`) has, at noise level l, the exact solution (2211.01095, eq. 8; 2309.05019, eq. 10)

    x_s = sigma_s/sigma_t e^(-l^2 h) x_t + alpha_s \int k e^(-k (lambda_s - lambda)) E[x_0 | x_lambda] dlambda
          + sigma_s (1 - e^(-2 l^2 h))^(1/2) z,                 k = 1 + l^2,    h = lambda_s - lambda_t.

The terms in x_t and z are exact at any step size. l = 0 is the probability flow, l = 1 the reverse SDE. `AngularAdams`
has a polynomial in another variable, the angle.
"""

import math
from collections.abc import Sequence

import numpy as np

from scoresde.samplers.grids import CLEAN, Grid, bounded_log_snr
from scoresde.samplers.linear import Linear, Row, Stage
from scoresde.sdes import SDE
from scoresde.sdes.sde import check_level
from scoresde.sdes.transitions import Point

NODES, QUADRATURE = np.polynomial.legendre.leggauss(32)


def check_order(order: int, highest: int) -> int:
    """Return the order; raise ValueError unless it is an integer from 1 to `highest`."""
    if order not in range(1, highest + 1):
        raise ValueError(f"order must be an integer from 1 to {highest}; got {order!r}")
    return order


def lagrange(nodes: Sequence[float], at: np.ndarray) -> np.ndarray:
    """Return the values of the Lagrange polynomials of p nodes at n points, (p, n)."""
    rows = []
    for j, node in enumerate(nodes):
        others = [other for k, other in enumerate(nodes) if k != j]
        rows.append(np.prod([(at - other) / (node - other) for other in others], axis=0) * np.ones_like(at))
    return np.stack(rows)


def exponential_weights(nodes: Sequence[float], start: float, end: float, rate: float) -> list[float]:
    r"""Return w_j = \int_start^end rate e^(-rate (end - lambda)) L_j(lambda) dlambda, L_j the Lagrange polynomials."""
    if len(nodes) == 1:
        return [-math.expm1(-rate * (end - start))]
    at = 0.5 * (end + start) + 0.5 * (end - start) * NODES
    density = 0.5 * (end - start) * QUADRATURE * rate * np.exp(-rate * (end - at))
    return (lagrange(nodes, at) @ density).tolist()


class Multistep(Linear):
    """A multistep method, by default an exponential integrator in lambda; with or without a corrector.

    A subclass may override `transport` and `weights`, and `coordinate` and `grid` if its polynomial is in another
    variable.

    Args:
        order: number of values that the predictor interpolates, 1 to `highest`.
        corrector: number of values that the corrector interpolates besides the value at the end of the step, 0 (no
            corrector) to `highest`.
        final: number of values that the last transition interpolates at most; the transition before it interpolates at
            most `final` + 1, and so on; 0 for no limit.
        highest: the largest order of the method.
        l: noise level.
    """

    grid: Grid = bounded_log_snr

    def __init__(self, order: int, corrector: int, final: int, highest: int, l: float = 0.0):  # noqa: E741
        self.order, self.l = check_order(order, highest), check_level(l)
        if corrector not in range(highest + 1) or final < 0:
            raise ValueError(
                f"corrector must be from 0 to {highest} and final >= 0; got corrector={corrector}, final={final}"
            )
        self.corrector, self.final = corrector, final
        self.past, self.stochastic = max(order, corrector), self.l > 0

    def level(self, here: Point) -> float:
        """Return the noise level l of a step from `here`."""
        return self.l

    def coordinate(self, point: Point) -> float:
        """Return the value of the polynomial's variable, by default lambda, at a `Point`."""
        return point.lam

    def transport(self, here: Point, target: Point) -> tuple[float, float]:
        """Return (a, c), the coefficients of x_t and z in the exact solution; see the module docstring."""
        h, square = target.lam - here.lam, self.level(here) ** 2
        if not square:
            return target.sigma / here.sigma, 0.0
        return target.sigma / here.sigma * math.exp(-square * h), target.sigma * math.sqrt(-math.expm1(-2 * square * h))

    def weights(self, nodes: Sequence[Point], here: Point, target: Point) -> tuple[float, ...]:
        """Return the coefficients of the views at `nodes`, for the step from `here` to `target`."""
        rate = 1 + self.level(here) ** 2
        lams = [node.lam for node in nodes]
        return tuple(target.alpha * w for w in exponential_weights(lams, here.lam, target.lam, rate))

    def row(self, sde: SDE, nodes: Sequence[Point], target: Point, left: int) -> Row:
        a, c = self.transport(nodes[0], target)
        known = self._limited(nodes[: self.order], target, left)
        return Row((Stage(nodes[0].t, a, self.weights(known, nodes[0], target), c),))

    def correction(self, nodes: Sequence[Point], target: Point, left: int) -> tuple[float, ...]:
        if not self.corrector or not math.isfinite(self.coordinate(nodes[0])):
            return ()
        known = self._limited(nodes[: self.corrector], target, left)
        return self.weights([target, *known], nodes[0], target)

    def _limited(self, nodes: Sequence[Point], target: Point, left: int) -> Sequence[Point]:
        """Return the newest of the nodes, as many as `final` allows.

        Only one is returned for a step that ends at sigma/alpha < 0.0002 (almost no noise) and makes sigma/alpha more
        than four times smaller.
        """
        if target.ratio < min(CLEAN, nodes[0].ratio / 4):
            return nodes[:1]
        return nodes[: left - 1 + self.final] if self.final else nodes
