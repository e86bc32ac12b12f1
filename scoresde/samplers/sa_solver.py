"""SA-Solver (2309.05019): stochastic Adams methods for the reverse SDE, with a corrector."""

import math

from scoresde.arguments import checked
from scoresde.samplers.multistep import Multistep
from scoresde.sdes.transitions import Point


@checked
class SASolver(Multistep):
    """SA-Solver (2309.05019, algorithm 1): stochastic Adams predictor and corrector, one evaluation a step.

    Its order is min(order, corrector) + 1 without noise (`order` without a corrector); its weak order with noise is at
    most 2.

    Args:
        order: values that the predictor interpolates, 1 to 4.
        corrector: values that the corrector interpolates besides the one at the end of the step, 0 (none) to 4.
        l: noise level, tau in the paper; 0 is deterministic.
        low, high: noise is added where sigma/alpha is between them; l is 0 elsewhere.
        final: the highest order of the last transition, one more for each transition before it; 0 for no limit.

    Raises:
        ValueError: an order, corrector, noise level or limit out of range, or low >= high.
    """

    def __init__(
        self,
        order: int = 3,
        corrector: int = 3,
        l: float = 1.0,  # noqa: E741
        low: float = 0.0,
        high: float = math.inf,
        final: int = 0,
    ):
        super().__init__(order, corrector, final, highest=4, l=l)
        if not 0 <= low < high:
            raise ValueError(f"low and high must satisfy 0 <= low < high; got low={low}, high={high}")
        self.low, self.high = low, high

    def level(self, here: Point) -> float:
        return self.l if self.low <= here.ratio <= self.high else 0.0
