r"""Exponential integrators in lambda = log(alpha/sigma): DDIM, DPM-Solver++ and its stochastic forms, UniPC, SA-Solver.

The reverse family of noise level l has the exact solution (2211.01095, eq. 8; 2309.05019, eq. 10)

    x_s = sigma_s/sigma_t e^(-l^2 h) x_t + alpha_s \int k e^(-k (lambda_s - lambda)) E[x_0 | x_lambda] dlambda
          + sigma_s (1 - e^(-2 l^2 h))^(1/2) z,                 k = 1 + l^2,    h = lambda_s - lambda_t,

so that only the denoiser is approximated: by a polynomial in lambda through its last values. What is linear in x is
exact at any step, and so is Gaussian noise without data. l = 0 is the probability flow, l = 1 the reverse SDE.

The published third-order formula of DPM-Solver++ (as in its authors' code, diffusers and k-diffusion) takes half of the
polynomial's second derivative: measured, it converges at order two (tests/samplers/test_orders.py). form="exact" has
the exact weights, and their order; form="published" is for reproduction.
"""

import math
from collections.abc import Sequence

import numpy as np

from scoresde.samplers.linear import Linear, Row, Stage
from scoresde.samplers.predictors import check_level
from scoresde.sdes import SDE
from scoresde.sdes.points import Point, posterior

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


class DDIM(Linear):
    """DDIM (2010.02502, eq. 12): x_s = alpha_s E[x_0 | x] + (sigma_s^2 - c^2)^(1/2) E[eps | x] + c z.

    Args:
        eta: c in units of the posterior's standard deviation: 0 is deterministic (order 1), 1 an ancestral step.

    Raises:
        ValueError: an eta outside of [0, 1].
    """

    view = "denoised"

    def __init__(self, eta: float = 0.0):
        if not 0 <= eta <= 1:
            raise ValueError(f"an eta in [0, 1] expected; got {eta}")
        self.eta, self.stochastic = eta, eta > 0

    def row(self, sde: SDE, nodes: Sequence[Point], target: Point, left: int) -> Row:
        here = nodes[0]
        c = self.eta * math.sqrt(posterior(target, here)[2]) if self.eta else 0.0
        a = math.sqrt(target.sigma**2 - c * c) / here.sigma
        return Row((Stage(here.t, a, (target.alpha - a * here.alpha,), c),))


class DPMSolverPP(Linear):
    """DPM-Solver++, multistep (2211.01095), one evaluation a step; of the first order it is DDIM.

    Args:
        order: 1, 2 or 3; the weak order with noise is 2 at most.
        l: noise level; 1 is SDE-DPM-Solver++ (eq. 19 there; 3M: k-diffusion), whose first order is the exponential
            Euler scheme (SEEDS-1, 2305.14267).
        form: "exact" weights of the polynomial, or those "published", see the module.
        final: order of the last transition at most, one more for each before it; 0 for no such limit. With few steps 1
            is steadier; 2 is what others have whose last step is to sigma = 0 (`denoise_final`).

    Raises:
        ValueError: another order or form, a negative noise level.
    """

    view = "denoised"

    def __init__(self, order: int = 2, l: float = 0.0, form: str = "exact", final: int = 0):  # noqa: E741
        if form not in ("exact", "published") or final < 0:
            raise ValueError(f"form 'exact' or 'published' and final >= 0 expected; got {form!r}, {final}")
        self.past = self.order = check_order(order, 3)
        self.l, self.form, self.final = check_level(l), form, final
        self.stochastic = self.l > 0

    def row(self, sde: SDE, nodes: Sequence[Point], target: Point, left: int) -> Row:
        here, rate = nodes[0], 1 + self.l**2
        nodes = limited(nodes, target, left, self.final)
        a, c = transport(here, target, self.l)
        lams = [node.lam for node in nodes]
        if self.form == "exact" or len(nodes) == 1:
            b = weights(lams, here.lam, target.lam, rate)
        else:
            b = _published(lams, target.lam - here.lam, rate)
        return Row((Stage(here.t, a, tuple(target.alpha * w for w in b), c),))


def _published(lams: Sequence[float], h: float, rate: float) -> list[float]:
    """Weights of "2M" (2211.01095, algorithm 2) and "3M", in the step h and the steps before."""
    phi1 = -math.expm1(-rate * h)
    if len(lams) == 2:
        half = 0.5 * phi1 * h / (lams[0] - lams[1])
        return [phi1 + half, -half]
    phi2 = 1 - phi1 / (rate * h)
    phi3 = phi2 / (rate * h) - 0.5
    r0, r1 = (lams[0] - lams[1]) / h, (lams[1] - lams[2]) / h
    first, second = np.array([1, -1, 0]) / r0, np.array([0, 1, -1]) / r1
    slope = first + (first - second) * r0 / (r0 + r1)
    curve = (first - second) / (r0 + r1)
    return (np.array([phi1, 0, 0]) + phi2 * slope - phi3 * curve).tolist()


class UniPC(Linear):
    """UniPC (2302.04867, algorithms 5 to 8): a multistep predictor and a corrector without evaluations of its own.

    With data prediction, hh = -h, and B(h) = hh ("bh1") or e^hh - 1 ("bh2").

    Args:
        order: p = 1, 2 or 3 of the predictor; the corrected method has order p + 1, and 2 with `final` = 1.
        form: "bh1" or "bh2".
        final: order of the last transition at most, one more for each before it; 0 for no such limit. Its authors have
            1, counting a last step to sigma = 0: 2 where that is `denoise_final`.

    Raises:
        ValueError: another order or form.
    """

    view = "denoised"

    def __init__(self, order: int = 2, form: str = "bh2", final: int = 1):
        if form not in ("bh1", "bh2") or final < 0:
            raise ValueError(f"form 'bh1' or 'bh2' and final >= 0 expected; got {form!r}, {final}")
        self.past = self.order = check_order(order, 3)
        self.form, self.final = form, final

    def row(self, sde: SDE, nodes: Sequence[Point], target: Point, left: int) -> Row:
        nodes = limited(nodes, target, left, self.final)
        a, _ = transport(nodes[0], target, 0.0)
        return Row((Stage(nodes[0].t, a, tuple(self._weights(nodes, target, ahead=False))),))

    def correction(self, nodes: Sequence[Point], target: Point, left: int) -> tuple[float, ...]:
        nodes = limited(nodes, target, left, self.final)
        return tuple(self._weights(nodes, target, ahead=True)) if math.isfinite(nodes[0].lam) else ()

    def _weights(self, nodes: Sequence[Point], target: Point, ahead: bool) -> list[float]:
        """Weights of the views at `nodes`, with that at `target` before them if it is known already."""
        h, first = target.lam - nodes[0].lam, int(ahead)
        phi1 = math.expm1(-h)
        ratios = [(node.lam - nodes[0].lam) / h for node in nodes[1:]] + [1.0] * first
        found = np.zeros(len(nodes) + first)
        found[first] = -phi1
        if ratios:
            base = -h if self.form == "bh1" else phi1
            shares = base * self._shares(ratios, h, base) / ratios
            found[first] += shares.sum()
            found[1 + first :] -= shares[: len(nodes) - 1]
            if ahead:
                found[0] = -shares[-1]
        return (target.alpha * found).tolist()

    @staticmethod
    def _shares(ratios: Sequence[float], h: float, base: float) -> np.ndarray:
        """The coefficients that satisfy the order conditions (eq. 9 there); of a single difference, 1/2."""
        count = len(ratios)
        if count == 1:
            return np.array([0.5])
        conditions, phi = [], math.expm1(-h) / -h - 1
        for i in range(1, count + 1):
            conditions.append(phi * math.factorial(i) / base)
            phi = phi / -h - 1 / math.factorial(i + 1)
        matrix = np.array([[r ** (i - 1) for r in ratios] for i in range(1, count + 1)])
        return np.linalg.solve(matrix, conditions)


class SASolver(Linear):
    """SA-Solver (2309.05019, algorithm 1): stochastic Adams predictor and corrector, one evaluation a step.

    Of order min(order, corrector) + 1 without noise (`order` without a corrector), of weak order 2 at most with it.

    Args:
        order: values that the predictor interpolates, 1 to 4.
        corrector: values that the corrector interpolates beside the one ahead, 0 (none) to 4.
        l: noise level, tau there; 0 is deterministic.
        low, high: sigma/alpha between which there is noise; l is 0 elsewhere.
        final: order of the last transition at most, one more for each before it; 0 for no such limit.

    Raises:
        ValueError: an order, noise level or range that makes no sense.
    """

    view = "denoised"

    def __init__(
        self,
        order: int = 3,
        corrector: int = 3,
        l: float = 1.0,  # noqa: E741
        low: float = 0.0,
        high: float = math.inf,
        final: int = 0,
    ):
        self.order, self.l = check_order(order, 4), check_level(l)
        if corrector not in range(5) or not 0 <= low < high or final < 0:
            raise ValueError(
                f"a corrector from 0 to 4, 0 <= low < high and final >= 0 expected; got {corrector}, {low}, {high}, "
                f"{final}"
            )
        self.corrector, self.low, self.high, self.final = corrector, low, high, final
        self.past, self.stochastic = max(order, corrector), self.l > 0

    def row(self, sde: SDE, nodes: Sequence[Point], target: Point, left: int) -> Row:
        a, c = transport(nodes[0], target, self._level(nodes[0]))
        known = limited(nodes[: self.order], target, left, self.final)
        return Row((Stage(nodes[0].t, a, self._weights(known, nodes[0], target), c),))

    def correction(self, nodes: Sequence[Point], target: Point, left: int) -> tuple[float, ...]:
        if not self.corrector or not math.isfinite(nodes[0].lam):
            return ()
        known = limited(nodes[: self.corrector], target, left, self.final)
        return self._weights([target, *known], nodes[0], target)

    def _weights(self, nodes: Sequence[Point], here: Point, target: Point) -> tuple[float, ...]:
        rate = 1 + self._level(here) ** 2
        return tuple(target.alpha * w for w in weights([node.lam for node in nodes], here.lam, target.lam, rate))

    def _level(self, here: Point) -> float:
        return self.l if self.low <= here.ratio <= self.high else 0.0
