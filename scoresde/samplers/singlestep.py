r"""Single-step methods of several evaluations: Heun's, as EDM has it, and the DPM-Solvers.

Heun's method is in y = x/alpha and r = sigma/alpha, where the flow is dy/dr = E[eps | x] (2206.00364, algorithm 1,
for any path). The DPM-Solvers are exponential Runge-Kutta methods in lambda = log(alpha/sigma), with E[x_0 | x] (++) or
E[eps | x] as what is integrated; with h = lambda_s - lambda_t,

    x_s = sigma_s/sigma_t x_t + alpha_s \int e^(lambda - lambda_s) E[x_0 | x] dlambda
        = alpha_s/alpha_t x_t - sigma_s \int e^(lambda_s - lambda) E[eps | x] dlambda.
"""

import math
from collections.abc import Sequence

import torch

from scoresde.samplers.exponential import check_order
from scoresde.samplers.grids import Transition
from scoresde.samplers.linear import Linear, Row, Stage, check_signal, upward
from scoresde.sdes import SDE
from scoresde.sdes.points import Point, points


def _heun(here: Point, target: Point) -> tuple[Stage, Stage]:
    """Euler's step from here to the target, and the mean of the slopes at both ends."""
    a, step = target.alpha / here.alpha, target.alpha * (target.ratio - here.ratio)
    return Stage(here.t, a, (step,)), Stage(target.t, a, (0.5 * step, 0.5 * step))


class Heun(Linear):
    """Heun's method in sigma/alpha (2206.00364, algorithm 1), of order 2, two evaluations a step.

    Raises:
        ValueError: in a run, alpha = 0 where it starts.
    """

    view = "noise"

    def row(self, sde: SDE, nodes: Sequence[Point], target: Point, left: int) -> Row:
        check_signal(sde, nodes[0], self)
        return Row(_heun(nodes[0], target))


class EDM(Linear):
    """EDM's stochastic sampler (2206.00364, algorithm 2): noise is added, r to (1 + gamma) r, before each step of Heun.

    Args:
        churn: S_churn; gamma is min(churn / number of steps, 2^(1/2) - 1).
        low, high: S_tmin and S_tmax, the sigma/alpha between which noise is added; r never goes beyond that of t_max.
        noise: S_noise, the size of the noise added.

    Raises:
        ValueError: a negative churn, a range that makes no sense; in a run, alpha = 0 where it starts.
    """

    view = "noise"

    def __init__(self, churn: float = 40.0, low: float = 0.0, high: float = math.inf, noise: float = 1.0):
        if not (churn >= 0 and 0 <= low < high and noise > 0):
            raise ValueError(f"churn >= 0, 0 <= low < high and noise > 0 expected; got {churn}, {low}, {high}, {noise}")
        self.churn, self.low, self.high, self.noise = churn, low, high, noise
        self.stochastic = churn > 0

    def plan(self, sde: SDE, transitions: Sequence[Transition]) -> list[Row]:
        """The coefficients of every transition; gamma depends on their number."""
        gamma = min(self.churn / max(len(transitions), 1), math.sqrt(2) - 1)
        starts, targets = (points(sde, times) for times in zip(*transitions, strict=True))
        return [self._row(sde, here, target, gamma) for here, target in zip(starts, targets, strict=True)]

    def _row(self, sde: SDE, here: Point, target: Point, gamma: float) -> Row:
        if self.stochastic and target.lam < here.lam:
            return upward(here, target)
        check_signal(sde, here, self)
        most = math.exp(-0.5 * float(sde.log_snr(torch.tensor(sde.t_max, dtype=torch.float64))))
        ratio = min(here.ratio * (1 + gamma), most)
        if not (self.low <= here.ratio <= self.high) or ratio <= here.ratio * (1 + 1e-12):
            return Row(_heun(here, target))
        raised = points(sde, [sde.time(torch.tensor(-2 * math.log(ratio), dtype=torch.float64))])[0]
        added = self.noise * raised.alpha * math.sqrt(max(raised.ratio**2 - here.ratio**2, 0.0))
        return Row(_heun(raised, target), kick=(raised.alpha / here.alpha, added))


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
