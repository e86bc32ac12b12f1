"""The probability-flow ODE, and the change of density along it.

    dx/dt = f x - g^2/2 score = alpha' E[x_0 | x] + sigma' E[eps | x]        (2011.13456, eq. 13)
    d log p_t(x_t)/dt = -tr(d velocity / dx)                                 (1806.07366; 2011.13456, eq. 39)

Time is a poor variable for it: almost all of the change happens at small t. With s = sigma/alpha, the ratio of noise to
signal, the ODE is solved in

    u = asinh(s / c),    ds/du = (s^2 + c^2)^(1/2),    dt/du = (ds/du) / (ds/dt),    ds/dt = s g^2 / (2 sigma^2),

linear in s below c, where the data looks smooth, and logarithmic above: for VP at c = 0.01, u goes from 0.1 to 10. The
coefficients of dx/du are combined in float64 from the views of one network evaluation.
"""

import math

import torch
from torch import Tensor

from scoresde.divergence import Trace
from scoresde.protocols import Condition, ScoreModel
from scoresde.sdes import SDE
from scoresde.solvers import RungeKutta, Solution, Solver
from scoresde.tensors import Noise, float64

DEFAULT_SOLVER = RungeKutta("rk4", steps=64)


class NoiseRatio:
    """The variable u = asinh((sigma/alpha) / scale) on an SDE.

    Args:
        sde: the diffusion.
        scale: noise-to-signal ratio c under which u turns linear, about the finest structure of the data.

    Raises:
        ValueError: an SDE with an infinite ratio at t_max (alpha = 0).
    """

    def __init__(self, sde: SDE, scale: float = 0.01):
        self.sde, self.scale = sde, float(scale)
        if not math.isfinite(self.of_time(sde.t_max)):
            raise ValueError(
                f"a finite sigma/alpha at t_max expected for the probability flow; {type(sde).__name__} has alpha=0 at "
                f"t_max={sde.t_max:g}: lower t_max (by 1e-3, say)"
            )

    def of_time(self, t: float) -> float:
        """u at time t."""
        ratio = torch.exp(-0.5 * self.sde.log_snr(torch.tensor(t, dtype=torch.float64)))
        return float(torch.asinh(ratio / self.scale))

    def to_time(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(t, dt/du) at u, float64."""
        ratio = self.scale * torch.sinh(float64(u).cpu())
        t = self.sde.time(-2 * torch.log(ratio))
        slope = 0.5 * ratio * (self.sde.diffusion(t) / self.sde.sigma(t)).square()
        return t, torch.hypot(ratio, torch.tensor(self.scale, dtype=torch.float64)) / slope


def integrate(
    model: ScoreModel,
    x: Tensor,
    t_from: float,
    t_to: float,
    cond: Condition = None,
    solver: Solver | None = None,
    trace: Trace | None = None,
    noise: Noise | None = None,
) -> Solution:
    """Carry x (B, *) along the probability flow from t_from to t_to.

    Args:
        model: the score model.
        x: the state at t_from.
        cond: the network's condition.
        solver: default `DEFAULT_SOLVER`.
        trace: also integrate the divergence, with probes drawn from `noise`.

    Returns:
        A solution whose state is (x,), or (x, integral of the divergence (B, probes)) where a trace is given.
    """
    solver = solver or DEFAULT_SOLVER
    sde, variable = model.sde, NoiseRatio(model.sde)
    estimate = None if trace is None else trace.bind(noise or Noise(x.shape, device=x.device, dtype=x.dtype))
    probes = getattr(trace, "probes", 1)

    def field(u: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        t, dt_du = variable.to_time(u)
        data, eps = sde.alpha_dot(t) * dt_du, sde.sigma_dot(t) * dt_du

        def velocity(x: Tensor) -> Tensor:
            return model.predict(x, t, cond).combine(data, eps)

        if estimate is None:
            return (velocity(state[0]),)
        value, traces = estimate(velocity, state[0])
        return value, traces.to(state[1])

    state: tuple[Tensor, ...] = (x,) if trace is None else (x, x.new_zeros(x.shape[0], probes))
    with torch.no_grad():
        return solver(field, state, variable.of_time(t_from), variable.of_time(t_to))
