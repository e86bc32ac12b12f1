"""DDIM (2010.02502): steps that take E[x_0 | x] as constant, from deterministic (eta = 0) to ancestral (eta = 1)."""

import math
from collections.abc import Sequence

from scoresde.arguments import checked
from scoresde.samplers.linear import Linear, Row, Stage
from scoresde.sdes import SDE
from scoresde.sdes.transitions import Point, posterior


@checked
class DDIM(Linear):
    """DDIM (2010.02502, eq. 12): x_s = alpha_s E[x_0 | x] + (sigma_s^2 - c^2)^(1/2) E[eps | x] + c z.

    Args:
        eta: c divided by the standard deviation of q(x_s | x_t, x_0): 0 is deterministic (order 1), 1 is ancestral.

    Raises:
        ValueError: eta is not in [0, 1].
    """

    view = "denoised"

    def __init__(self, eta: float = 0.0):
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1]; got {eta}")
        self.eta, self.stochastic = eta, eta > 0
        self.default_steps = 500 if self.stochastic else 100

    def row(self, sde: SDE, nodes: Sequence[Point], target: Point, left: int) -> Row:
        here = nodes[0]
        c = self.eta * math.sqrt(posterior(target, here)[2]) if self.eta else 0.0
        a = math.sqrt(max(target.sigma**2 - c * c, 0.0)) / here.sigma  # 0 with eta = 1 where no signal is left
        return Row((Stage(here.t, a, (target.alpha - a * here.alpha,), c),))
