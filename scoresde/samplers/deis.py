r"""Multistep methods for the probability flow, in sigma/alpha or in the angle atan(sigma/alpha).

In y = x/alpha and r = sigma/alpha the flow is dy/dr = E[eps | x]. So a step from t to s is

    x_s = alpha_s/alpha_t x_t + alpha_s \int_(r_t)^(r_s) E[eps | x] dr

with a polynomial for E[eps | x] through its last values: in r (rho-AB of DEIS), in t (t-AB), or with the classical
weights of Adams and Bashforth, as if the steps were equal (iPNDM).

r is infinite where no signal is left, and E[eps | x] changes fast where there is little noise. `AngularAdams` uses the
angle, in which the flow is bounded at both ends.
"""

from collections.abc import Sequence

import torch

from scoresde.arguments import checked
from scoresde.samplers.grids import angle
from scoresde.samplers.linear import Linear, Row, Stage, check_signal
from scoresde.samplers.multistep import NODES, QUADRATURE, Multistep, check_order, lagrange
from scoresde.sdes import SDE
from scoresde.sdes.transitions import Point

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@checked
class DEIS(Linear):
    r"""DEIS (2204.13902, eq. 15): Adams-Bashforth with exact weights, one evaluation a step.

        x_s = alpha_s/alpha_t x_t + alpha_s \int_(r_t)^(r_s) P(r) dr,        r = sigma/alpha,

    with P the polynomial through the last `order` values of E[eps | x].

    Args:
        order: number of values that the polynomial interpolates, 1 (DDIM) to 4.
        variable: variable of the polynomial, "ratio" (rho-AB, in r) or "time" (t-AB, in t).

    Raises:
        ValueError: order or variable is none of these; in a run, alpha = 0 at the start of a transition.
    """

    view = "noise"

    def __init__(self, order: int = 3, variable: str = "time"):
        if variable not in ("ratio", "time"):
            raise ValueError(f"variable must be 'ratio' or 'time'; got {variable!r}")
        self.past = self.order = check_order(order, 4)
        self.variable = variable

    def row(self, sde: SDE, nodes: Sequence[Point], target: Point, left: int) -> Row:
        here, in_time = nodes[0], self.variable == "time"
        check_signal(sde, here, self)
        *known, low, high = [float(point.t) if in_time else point.ratio for point in (*nodes, here, target)]
        at = 0.5 * (low + high) + 0.5 * (high - low) * NODES
        density = 0.5 * (high - low) * QUADRATURE
        if in_time:
            t = torch.from_numpy(at)
            slope = (sde.sigma_dot(t) * sde.alpha(t) - sde.sigma(t) * sde.alpha_dot(t)) / sde.alpha(t).square()
            density = density * slope.numpy()
            # The quadrature only has to resolve the shape of the polynomial: its constant part is made exact.
            density = density * (target.ratio - here.ratio) / density.sum()
        b = tuple((target.alpha * lagrange(known, at) @ density).tolist())
        return Row((Stage(here.t, target.alpha / here.alpha, b),))


@checked
class IPNDM(Linear):
    """iPNDM (2202.09778, eq. 12; 2204.13902, section 3.3): classical Adams-Bashforth weights on any grid.

        x_s = alpha_s/alpha_t x_t + alpha_s (r_s - r_t) sum_j w_j eps_j,        r = sigma/alpha,

    with eps_j the last values of E[eps | x] and w the weights for equal steps, (3/2, -1/2) at order 2. It has its
    nominal order on grids uniform in r, and at most order 2 on other smoothly varying grids.

    Args:
        order: number of values combined, 1 (DDIM) to 4.

    Raises:
        ValueError: order is not from 1 to 4; in a run, alpha = 0 at the start of a transition.
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


class AngularAdams(Multistep):
    """Adams-Bashforth predictor and Adams-Moulton corrector in the angle, one evaluation a step, for few steps.

    In the angle phi = atan(sigma/alpha) and w = x/(alpha^2 + sigma^2)^(1/2) the probability flow is

        dw/dphi = E[v | x],        v = cos(phi) eps - sin(phi) x_0        (2202.00512, section 4 and appendix D),

    bounded on all of [0, pi/2] for every path, so the method can start where no signal is left. The predictor
    integrates the polynomial through `order` values of E[v | x]. The corrector interpolates `corrector` values and the
    value at the end of the step, which is evaluated once (PEC mode). The order of convergence is min(order, corrector)
    + 1, or `order` without a corrector. With the default `final` = 1 it is at most 2, but with few steps the samples
    are more accurate than without a limit (`final` = 0).

        samples = ss.samplers.PredictorCorrector(ss.samplers.AngularAdams(), steps=10)(model, shape=(16, 1, 8, 8)).x

    Args:
        order: number of values that the predictor interpolates, 1 to 4.
        corrector: number of values that the corrector interpolates besides the value at the end of the step, 0 (no
            corrector) to 4.
        final: number of values that the last transition interpolates at most; the transition before it interpolates at
            most `final` + 1, and so on; 0 for no limit.

    Raises:
        ValueError: order is not from 1 to 4, corrector is not from 0 to 4, or final is negative.
    """

    grid = angle
    view = "v"

    def __init__(self, order: int = 3, corrector: int = 2, final: int = 1):
        super().__init__(order, corrector, final, highest=4)

    def coordinate(self, point: Point) -> float:
        return point.angle

    def transport(self, here: Point, target: Point) -> tuple[float, float]:
        return target.size / here.size, 0.0

    def weights(self, nodes: Sequence[Point], here: Point, target: Point) -> tuple[float, ...]:
        """Return the weights of the views for the step from `here` to `target`.

        They are the integrals of the Lagrange polynomials over the angle phi, times (alpha^2 + sigma^2)^(1/2) at
        `target`, which converts w to x (letters as in `AngularAdams`).
        """
        low, high = here.angle, target.angle
        at = 0.5 * (low + high) + 0.5 * (high - low) * NODES
        shapes = lagrange([node.angle for node in nodes], at)
        return tuple((target.size * 0.5 * (high - low) * shapes @ QUADRATURE).tolist())
