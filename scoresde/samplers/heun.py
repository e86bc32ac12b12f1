"""Heun's method and EDM's stochastic sampler (2206.00364), for any path.

In y = x/alpha and r = sigma/alpha the probability flow is dy/dr = E[eps | x] (algorithm 1).
"""

import math
from collections.abc import Sequence

import torch

from scoresde.arguments import Extended, checked
from scoresde.samplers.grids import Transition, bounded_karras
from scoresde.samplers.linear import Linear, Row, Stage, check_signal, upward
from scoresde.sdes import SDE
from scoresde.sdes.transitions import Point, points


def _heun(here: Point, target: Point) -> tuple[Stage, Stage]:
    """Return Euler's step from `here` to `target`, and the step with the mean of the slopes at both ends."""
    a, step = target.alpha / here.alpha, target.alpha * (target.ratio - here.ratio)
    return Stage(here.t, a, (step,)), Stage(target.t, a, (0.5 * step, 0.5 * step))


class Heun(Linear):
    """Heun's method in r = sigma/alpha (2206.00364, algorithm 1), of order 2, two evaluations a step.

        y = alpha_s/alpha_t x + alpha_s (r_s - r_t) E[eps | x],
        x_s = alpha_s/alpha_t x + alpha_s (r_s - r_t) (E[eps | x] + E[eps | y]) / 2.

    The method has no settings; `PredictorCorrector(Heun(), steps=...)` has the grid and the number of steps.

    Raises:
        ValueError: in a run, alpha = 0 at the start of a transition.
    """

    grid = bounded_karras
    view = "noise"

    def row(self, sde: SDE, nodes: Sequence[Point], target: Point, left: int) -> Row:
        check_signal(sde, nodes[0], self)
        return Row(_heun(nodes[0], target))


@checked
class EDM(Linear):
    """EDM's stochastic sampler (2206.00364, algorithm 2): Heun's method, with noise added before each step.

    The added noise raises r = sigma/alpha to (1 + gamma) r.

    Args:
        churn: S_churn; gamma is min(churn / number of steps, 2^(1/2) - 1).
        low, high: S_tmin and S_tmax: noise is added where r is between them; r never exceeds its value at t_max.
        noise: S_noise, the standard deviation of the added noise divided by the value that gives (1 + gamma) r.

    Raises:
        ValueError: churn is negative, 0 <= low < high does not hold, or noise is not positive; in a run, alpha = 0 at
            the start of a transition.
    """

    grid = bounded_karras
    view = "noise"

    def __init__(self, churn: float = 40.0, low: float = 0.0, high: Extended = math.inf, noise: float = 1.0):
        if not (churn >= 0 and 0 <= low < high and noise > 0):
            raise ValueError(
                f"EDM needs churn >= 0, 0 <= low < high and noise > 0; got {churn=}, {low=}, {high=}, {noise=}"
            )
        self.churn, self.low, self.high, self.noise = churn, low, high, noise
        self.stochastic = churn > 0

    def plan(self, sde: SDE, transitions: Sequence[Transition]) -> list[Row]:
        """Return the coefficients of every transition; gamma (see `EDM`) depends on the number of transitions."""
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
