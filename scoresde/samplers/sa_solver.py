"""SA-Solver (2309.05019): stochastic Adams methods for the reverse SDE, with a corrector."""

import math
from collections.abc import Sequence

from scoresde.samplers.exponential import check_order, limited, transport, weights
from scoresde.samplers.linear import Linear, Row, Stage
from scoresde.samplers.predictors import check_level
from scoresde.sdes import SDE
from scoresde.sdes.points import Point


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
