r"""Multistep methods for the probability flow, in sigma/alpha or in the angle atan(sigma/alpha).

In y = x/alpha and r = sigma/alpha the flow is dy/dr = E[eps | x]. So a step from t to s is

    x_s = alpha_s/alpha_t x_t + alpha_s \int_(r_t)^(r_s) E[eps | x] dr

with a polynomial for E[eps | x] through its last values: in r (rho-AB of DEIS), in t (t-AB), or, as if the steps were
equal, with the classical weights of Adams and Bashforth (iPNDM).

r is infinite where no signal is left, and E[eps | x] changes fast where little noise is. With the angle phi =
atan(sigma/alpha) and the state in units of its own size, w = x/(alpha^2 + sigma^2)^(1/2), the flow is

    dw/dphi = E[v | x],        v = cos(phi) eps - sin(phi) x_0

(v of 2202.00512, section 4 and appendix D), bounded on all of [0, pi/2], for any path: `AngularAdams`.
"""

from collections.abc import Sequence

import torch

from scoresde.samplers.exponential import NODES, QUADRATURE, check_order, lagrange, limited
from scoresde.samplers.linear import Linear, Row, Stage, check_signal
from scoresde.sdes import SDE
from scoresde.sdes.points import Point

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class DEIS(Linear):
    """DEIS (2204.13902, eq. 15): Adams-Bashforth of exact weights, one evaluation a step.

    Args:
        order: 1 (DDIM) to 4: values interpolated.
        variable: of the polynomial: "ratio" (rho-AB), or "time" (t-AB).

    Raises:
        ValueError: another order or variable; in a run, alpha = 0 where it starts.
    """

    view = "noise"

    def __init__(self, order: int = 3, variable: str = "time"):
        if variable not in ("ratio", "time"):
            raise ValueError(f"variable 'ratio' or 'time' expected; got {variable!r}")
        self.past = self.order = check_order(order, 4)
        self.variable = variable

    def row(self, sde: SDE, nodes: Sequence[Point], target: Point, left: int) -> Row:
        here = nodes[0]
        check_signal(sde, here, self)
        in_time = self.variable == "time"
        ends = (float(here.t), float(target.t)) if in_time else (here.ratio, target.ratio)
        at = 0.5 * (ends[0] + ends[1]) + 0.5 * (ends[1] - ends[0]) * NODES
        density = 0.5 * (ends[1] - ends[0]) * QUADRATURE
        if in_time:
            t = torch.from_numpy(at)
            slope = (sde.sigma_dot(t) * sde.alpha(t) - sde.sigma(t) * sde.alpha_dot(t)) / sde.alpha(t).square()
            density = density * slope.numpy()
            # What the polynomial in t is about is its shape: the constant part is exact.
            density = density * (target.ratio - here.ratio) / density.sum()
        shapes = lagrange([float(node.t) if in_time else node.ratio for node in nodes], at)
        b = tuple((target.alpha * shapes @ density).tolist())
        return Row((Stage(here.t, target.alpha / here.alpha, b),))


class IPNDM(Linear):
    """iPNDM (2202.09778, eq. 12; 2204.13902, section 3.3): classical Adams-Bashforth weights on any grid.

    Of its order on grids uniform in sigma/alpha; on others that vary smoothly, of order 2 at most.

    Args:
        order: 1 (DDIM) to 4.

    Raises:
        ValueError: another order; in a run, alpha = 0 where it starts.
    """

    view = "noise"

    def __init__(self, order: int = 4):
        self.past = self.order = check_order(order, 4)

    def row(self, sde: SDE, nodes: Sequence[Point], target: Point, left: int) -> Row:
        here = nodes[0]
        check_signal(sde, here, self)
        step = target.alpha * (target.ratio - here.ratio)
        b = tuple(step * weight for weight in ADAMS_BASHFORTH[len(nodes)])
        return Row((Stage(here.t, target.alpha / here.alpha, b),))


class AngularAdams(Linear):
    """Adams-Bashforth predictor and Adams-Moulton corrector in the angle, one evaluation a step, for few steps.

    The predictor interpolates `order` values of E[v | x], the corrector `corrector` of them and the one ahead, which
    is evaluated once (PEC): of order min(order, corrector) + 1, or `order` without a corrector, and 2 with `final` = 1,
    which is better with few steps. Bounded at both ends: it begins where no signal is left, too.

    Args:
        order: 1 to 4.
        corrector: 0 (none) to 4.
        final: order of the last transition at most, one more for each before it; 0 for no such limit.

    Raises:
        ValueError: another order or corrector, a negative limit.
    """

    view = "v"

    def __init__(self, order: int = 3, corrector: int = 2, final: int = 1):
        self.order = check_order(order, 4)
        if corrector not in range(5) or final < 0:
            raise ValueError(f"a corrector from 0 to 4 and final >= 0 expected; got {corrector}, {final}")
        self.corrector, self.final = corrector, final
        self.past = max(order, corrector)

    def row(self, sde: SDE, nodes: Sequence[Point], target: Point, left: int) -> Row:
        here, known = nodes[0], limited(nodes[: self.order], target, left, self.final)
        return Row((Stage(here.t, target.size / here.size, _angular_weights(known, here, target)),))

    def correction(self, nodes: Sequence[Point], target: Point, left: int) -> tuple[float, ...]:
        if not self.corrector:
            return ()
        known = limited(nodes[: self.corrector], target, left, self.final)
        return _angular_weights([target, *known], nodes[0], target)


def _angular_weights(nodes: Sequence[Point], here: Point, target: Point) -> tuple[float, ...]:
    """The size of the target times the integral from here to there of each Lagrange polynomial in the angle."""
    low, high = here.angle, target.angle
    at = 0.5 * (low + high) + 0.5 * (high - low) * NODES
    shapes = lagrange([node.angle for node in nodes], at)
    return tuple((target.size * 0.5 * (high - low) * shapes @ QUADRATURE).tolist())
