r"""Multistep methods for the probability flow with the noise as its velocity.

In y = x/alpha and r = sigma/alpha the flow is dy/dr = E[eps | x]. So a step from t to s is

    x_s = alpha_s/alpha_t x_t + alpha_s \int_(r_t)^(r_s) E[eps | x] dr

with a polynomial for E[eps | x] through its last values: in r (rho-AB of DEIS), in t (t-AB), or, as if the steps were
equal, with the classical weights of Adams and Bashforth (iPNDM).
"""

from collections.abc import Sequence

import torch

from scoresde.samplers.exponential import NODES, QUADRATURE, check_order, lagrange
from scoresde.samplers.linear import Linear, Point, Row, Stage
from scoresde.sdes import SDE

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def check_signal(sde: SDE, here: Point) -> None:
    """Raises ValueError where sigma/alpha is infinite."""
    if here.alpha == 0:
        raise ValueError(
            f"alpha > 0 expected where a method in sigma/alpha starts; {type(sde).__name__} has none at "
            f"t={float(here.t):g}: lower t_max, or use DDIM, DPMSolverPP or UniPC"
        )


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
        check_signal(sde, here)
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
        check_signal(sde, here)
        step = target.alpha * (target.ratio - here.ratio)
        b = tuple(step * weight for weight in ADAMS_BASHFORTH[len(nodes)])
        return Row((Stage(here.t, target.alpha / here.alpha, b),))
