"""SA-Solver (2309.05019): stochastic Adams methods for the reverse SDE, with a corrector."""

import math

from scoresde.arguments import Extended, checked
from scoresde.samplers.multistep import Multistep
from scoresde.sdes.transitions import Point


@checked
class SASolver(Multistep):
    """SA-Solver (2309.05019, algorithm 1): stochastic Adams predictor and corrector, one evaluation a step.

    Without noise (l = 0) its order of convergence is min(order, corrector) + 1, or `order` without a corrector; with
    noise its weak order is at most 2.

    With noise, take 10 steps or more: for Gaussian data, the variance of the samples is then right within a factor of
    two on every path, while with 5 steps it is up to four times too large. For fewer steps, take `UniPC` or
    `AngularAdams`.

    Args:
        order: number of values that the predictor interpolates, 1 to 4.
        corrector: number of values that the corrector interpolates besides the value at the end of the step, 0 (no
            corrector) to 4.
        l: noise level, tau in the paper; 0 is deterministic.
        low, high: the noise level is l where sigma/alpha is between them, and 0 elsewhere.
        final: number of values that the last transition interpolates at most; the transition before it interpolates at
            most `final` + 1, and so on; 0 for no limit.

    Raises:
        ValueError: order is not from 1 to 4, corrector is not from 0 to 4, l or final is negative, or 0 <= low < high
            does not hold.
    """

    def __init__(
        self,
        order: int = 3,
        corrector: int = 3,
        l: float = 1.0,  # noqa: E741
        low: float = 0.0,
        high: Extended = math.inf,
        final: int = 0,
    ):
        super().__init__(order, corrector, final, highest=4, l=l)
        if not 0 <= low < high:
            raise ValueError(f"low and high must satisfy 0 <= low < high; got low={low}, high={high}")
        self.low, self.high = low, high

    def level(self, here: Point) -> float:
        return self.l if self.low <= here.ratio <= self.high else 0.0
