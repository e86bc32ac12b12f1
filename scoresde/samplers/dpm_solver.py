r"""DPM-Solver and DPM-Solver++: the multistep form (`DPMSolverPP`) and the single-step form (`DPMSolver`).

The multistep methods interpolate the last values of the denoiser (`samplers.exponential`). The published third-order
formula of DPM-Solver++ (also in its authors' code, diffusers and k-diffusion) takes half of the polynomial's second
derivative: measured, it converges at order two (tests/samplers/test_orders.py). form="exact" has the exact weights and
converges at order three; form="published" reproduces the published formula.

The single-step methods are exponential Runge-Kutta methods in lambda = log(alpha/sigma). They integrate E[x_0 | x] (++)
or E[eps | x]; with h = lambda_s - lambda_t,

    x_s = sigma_s/sigma_t x_t + alpha_s \int e^(lambda - lambda_s) E[x_0 | x] dlambda
        = alpha_s/alpha_t x_t - sigma_s \int e^(lambda_s - lambda) E[eps | x] dlambda.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from scoresde.samplers.exponential import check_order, limited, transport, weights
from scoresde.samplers.linear import Linear, Row, Stage, check_signal
from scoresde.samplers.predictors import check_level
from scoresde.sdes import SDE
from scoresde.sdes.points import Point, points


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


class DPMSolver(Linear):
    """DPM-Solver (2206.00927, algorithms 1, 2) and DPM-Solver++ (2211.01095, algorithm 1), single-step.

    The last stage of order 2 takes the view at the middle for the whole step, that of order 3 the line through the
    first and the last view.

    Args:
        order: 1 (DDIM), 2 or 3: as many evaluations a step.
        view: "denoised" is DPM-Solver++, "noise" DPM-Solver.

    Raises:
        ValueError: another order or view; in a run, alpha = 0 where it starts or sigma = 0 where it ends.
    """

    def __init__(self, order: int = 2, view: str = "denoised"):
        if view not in ("denoised", "noise"):
            raise ValueError(f"view 'denoised' or 'noise' expected; got {view!r}")
        self.order, self.view = check_order(order, 3), view

    def row(self, sde: SDE, nodes: Sequence[Point], target: Point, left: int) -> Row:
        here = nodes[0]
        check_signal(sde, here, self)
        h = target.lam - here.lam
        if math.isinf(h):
            raise ValueError(
                f"sigma > 0 where it ends expected by DPMSolver; got 0 at t={float(target.t):g}: raise t_min"
            )
        parts = {1: (1.0,), 2: (0.5, 1.0), 3: (1 / 3, 2 / 3, 1.0)}[self.order]
        ends = [target if part == 1 else self._between(sde, here, part * h) for part in parts]
        starts = [here, *ends[:-1]]
        stages = []
        for k, (part, start, end) in enumerate(zip(parts, starts, ends, strict=True)):
            a, scale, constant, slope = self._integrals(here, end, part * h)
            if self.order == 2 and k == 1:
                slope = 0.5 * constant  # the weight of the first view vanishes
            # The slope is that between the first view and the newest, (k / order) h apart.
            tilt = slope * part * self.order / k if k else 0.0
            between = (0.0,) * (k - 1)
            b = (scale * tilt, *between, scale * (constant - tilt)) if k else (scale * constant,)
            stages.append(Stage(start.t, a, b))
        return Row(tuple(stages))

    def _integrals(self, here: Point, end: Point, h: float) -> tuple[float, float, float, float]:
        """(a, scale, integral of the constant 1, integral of (lambda - lambda_t)/h) over a step h to `end`."""
        data = self.view == "denoised"
        rate = 1 if data else -1
        constant = -math.expm1(-rate * h)
        a = end.sigma / here.sigma if data else end.alpha / here.alpha
        return a, end.alpha if data else end.sigma, constant, 1 - constant / (rate * h)

    @staticmethod
    def _between(sde: SDE, here: Point, h: float) -> Point:
        """The point at lambda_t + h."""
        return points(sde, [sde.time(torch.tensor(2 * (here.lam + h), dtype=torch.float64))])[0]
