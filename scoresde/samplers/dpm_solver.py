r"""DPM-Solver and DPM-Solver++: the multistep form (`DPMSolverPP`) and the single-step form (`DPMSolver`).

The multistep methods interpolate the last values of the denoiser (`samplers.multistep`). The published third-order
formula of DPM-Solver++ (also in its authors' code, diffusers and k-diffusion) contains only half of the polynomial's
second derivative: its measured order of convergence is two (tests/samplers/test_orders.py). form="exact" has the exact
weights and converges at order three; form="published" reproduces the published formula.

The single-step methods are exponential Runge-Kutta methods in lambda = log(alpha/sigma). They integrate E[x_0 | x]
(DPM-Solver++) or E[eps | x] (DPM-Solver); with h = lambda_s - lambda_t,

    x_s = sigma_s/sigma_t x_t + alpha_s \int e^(lambda - lambda_s) E[x_0 | x] dlambda
        = alpha_s/alpha_t x_t - sigma_s \int e^(lambda_s - lambda) E[eps | x] dlambda.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from scoresde.arguments import checked
from scoresde.samplers.grids import bounded_karras
from scoresde.samplers.linear import Linear, Row, Stage, check_signal
from scoresde.samplers.multistep import Multistep, check_order
from scoresde.sdes import SDE
from scoresde.sdes.transitions import Point, points


@checked
class DPMSolverPP(Multistep):
    """DPM-Solver++, multistep (2211.01095), one evaluation a step; order 1 is DDIM.

        x_s = sigma_s/sigma_t x + sigma_s int e^lambda D(lambda) dlambda,        lambda = log(alpha/sigma),

    from lambda_t to lambda_s, with D the polynomial through the last `order` values of E[x_0 | x] (at l = 0).

    Args:
        order: 1, 2 or 3; with noise (l > 0) the weak order of convergence is at most 2.
        l: noise level; 0 is deterministic, 1 is SDE-DPM-Solver++ (2211.01095, eq. 19; at order 3 from k-diffusion; at
            order 1 the exponential Euler scheme SEEDS-1, 2305.14267).
        form: "exact" weights; or "published", the formula of the paper, whose order is two for order=3.
        final: the highest order allowed in the last transition; the transition before it may have order `final` + 1,
            and so on; 0 for no limit. With few steps, 1 is more stable than 0. Other codes often end with a step of
            order 1 to sigma = 0. If `denoise_final` makes that step, use 2 for the same orders.

    Raises:
        ValueError: order or form is none of these, or l or final is negative.
    """

    def __init__(self, order: int = 2, l: float = 0.0, form: str = "exact", final: int = 0):  # noqa: E741
        super().__init__(order, 0, final, highest=3, l=l)
        if form not in ("exact", "published"):
            raise ValueError(f"form must be 'exact' or 'published'; got {form!r}")
        self.form = form

    def weights(self, nodes: Sequence[Point], here: Point, target: Point) -> tuple[float, ...]:
        if self.form == "exact" or len(nodes) == 1:
            return super().weights(nodes, here, target)
        lams = [node.lam for node in nodes]
        return tuple(target.alpha * w for w in _published(lams, target.lam - here.lam, 1 + self.l**2))


def _published(lams: Sequence[float], h: float, rate: float) -> list[float]:
    """Return the published weights of the denoiser's values at `lams`, values of lambda = log(alpha/sigma).

    Two values give "2M" (2211.01095, algorithm 2), three give "3M" (k-diffusion). h is the step in lambda. `rate` is
    1 + l^2 with the noise level l of the step: l = 0 for the ODE, l = 1 for the reverse SDE.
    """
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


@checked
class DPMSolver(Linear):
    """DPM-Solver (2206.00927, algorithms 1, 2) and DPM-Solver++ (2211.01095, algorithm 1), single-step.

    With lambda = log(alpha/sigma), a step from t to s approximates one of the exact solutions

        x_s = sigma_s/sigma_t x + sigma_s int e^lambda E[x_0 | x] dlambda        (DPM-Solver++),
        x_s = alpha_s/alpha_t x - alpha_s int e^-lambda E[eps | x] dlambda       (DPM-Solver).

    The view is E[x_0 | x] or E[eps | x]. The last stage of order 2 takes it as constant, with its value at the middle
    of the step in lambda. The last stage of order 3 takes it as linear in lambda, through its first and last values.

    Args:
        order: 1 (DDIM), 2 or 3; also the number of evaluations a step.
        view: what is integrated: "denoised", E[x_0 | x], is DPM-Solver++; "noise", E[eps | x], is DPM-Solver.

    Raises:
        ValueError: order or view is none of these; in a run, alpha = 0 at the start or sigma = 0 at the end of a
            transition.
    """

    grid = bounded_karras

    def __init__(self, order: int = 2, view: str = "denoised"):
        if view not in ("denoised", "noise"):
            raise ValueError(f"view must be 'denoised' or 'noise'; got {view!r}")
        self.order, self.view = check_order(order, 3), view

    def row(self, sde: SDE, nodes: Sequence[Point], target: Point, left: int) -> Row:
        here = nodes[0]
        check_signal(sde, here, self)
        h = target.lam - here.lam
        if math.isinf(h):
            raise ValueError(
                f"DPMSolver needs sigma > 0 where it ends; got sigma({float(target.t):g}) = 0: raise t_min"
            )
        parts = {1: (1.0,), 2: (0.5, 1.0), 3: (1 / 3, 2 / 3, 1.0)}[self.order]
        inner = torch.tensor([2 * (here.lam + part * h) for part in parts[:-1]], dtype=torch.float64)
        ends = [*points(sde, sde.time(inner).unbind()), target] if len(inner) else [target]
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
        """Return (a, scale, constant, slope), the coefficients of a step to `end`, of length h in lambda.

        For a view that is linear in lambda, V + D (lambda - lambda_t)/h, the exact result of the step is
        x_s = a x_t + scale (constant V + slope D).
        """
        data = self.view == "denoised"
        rate = 1 if data else -1
        constant = -math.expm1(-rate * h)
        a = end.sigma / here.sigma if data else end.alpha / here.alpha
        return a, end.alpha if data else end.sigma, constant, 1 - constant / (rate * h)
