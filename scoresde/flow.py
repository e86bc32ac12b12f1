r"""The probability-flow ODE, and the change of density along it.

    dx/dt = f x - g^2/2 score = alpha' E[x_0 | x] + sigma' E[eps | x]        (2011.13456, eq. 13)
    d log p_t(x_t)/dt = -tr(d velocity / dx)                                 (1806.07366; 2011.13456, eq. 39)

Neither t nor x are good variables for it. With r = sigma/alpha, the ratio of noise to signal, and the state in units of
its own size,

    w = x / (alpha^2 + sigma^2)^(1/2),        dw/dr = (E[eps | x] - r E[x_0 | x]) / (1 + r^2)^(3/2),

the flow is one and the same for all Gaussian paths; data of unit variance and no structure would stand still in it.
What moves w happens at r from the finest structure of the data to a few times its extent. So steps are equal in

    u = asinh(s / c),        1/s = 1/r + 1/R,

linear in r below c, logarithmic in between, and linear in 1/r above R, where all that is left to see is the mean of the
data. Up to r = infinity, which is u = asinh(R/c), everything is bounded: a path without signal at its end is no
exception. R = 30 is for data of about unit scale, and so is c, from 0.002 to 0.02: twenty times the r that the path
begins with, so that one which goes to finer detail (sub-VP) has steps there too.

The density of x is that of w, divided by (alpha^2 + sigma^2)^(d/2). All coefficients are combined in float64, from the
views of one network evaluation a step.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.counting import counting
from scoresde.divergence import Trace
from scoresde.protocols import Model
from scoresde.random_stream import RandomStream
from scoresde.score import BaseModel
from scoresde.sdes import SDE
from scoresde.solvers import Adams, Solver, Status
from scoresde.solvers.solver import variable
from scoresde.tensors import broadcast, dimensions, double, float64
from scoresde.wrappers import as_model

DEFAULT_SOLVER = Adams()
FINE, COARSE = (0.002, 0.02), 30.0  # the range of c; R
DETAIL = 20.0  # c in units of the first r


class Ratio:
    """The flow of w in u, see the module.

    Args:
        sde: the diffusion.
        fine, coarse: c, from the path if not given, and R.
    """

    def __init__(self, sde: SDE, fine: float | None = None, coarse: float = COARSE):
        ends = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
        first = math.exp(-0.5 * float(sde.log_snr(ends[0])))
        self.fine = min(max(DETAIL * first, FINE[0]), FINE[1]) if fine is None else fine
        self.sde, self.coarse = sde, coarse
        self._times, self._ends = ends, self._of_log_snr(sde.log_snr(ends))

    def _of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.asinh(1 / (self.fine * (torch.exp(0.5 * log_snr) + 1 / self.coarse)))

    def of_time(self, t: float) -> float:
        """u at time t."""
        return float(self._of_log_snr(self.sde.log_snr(torch.tensor(t, dtype=torch.float64))))

    def to_time(self, u: Tensor) -> Tensor:
        """t at u, () or (B,), float64."""
        u = float64(u).cpu()
        s = self.fine * torch.sinh(u)
        t = self.sde.time(-2 * (s.log() - (1 - s / self.coarse).clamp(min=0).log()))
        # At the ends of the range, where rounding may leave it (and r may be infinite), the times are known.
        t = torch.where(u <= self._ends[0], self._times[0], t)
        return torch.where(u >= self._ends[1], self._times[1], t)

    def scale(self, t: Tensor) -> Tensor:
        """x / w at time t, float64."""
        return self.sde.size(t)

    def coefficients(self, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) with dw/du = a E[x_0 | x] + b E[eps | x], float64, at u and its time t.

        With q = 1 - s/R, so that r = s/q: dr/du = (s^2 + c^2)^(1/2) / q^2, and the powers of q cancel.
        """
        s = self.fine * torch.sinh(float64(u).cpu())
        q = (1 - s / self.coarse).clamp(min=0)
        pace = torch.hypot(s, torch.full_like(s, self.fine)) / torch.hypot(s, q) ** 3
        return -pace * s, pace * q


class Time:
    """The flow of x in t, as it is written in papers: what the solvers of score_sde are given."""

    def __init__(self, sde: SDE):
        self.sde = sde
        if not math.isfinite(float(sde.drift(torch.tensor(sde.t_max, dtype=torch.float64)))):
            raise ValueError(
                f"a finite drift at t_max={sde.t_max:g} expected by a solver in t: lower t_max (by 1e-3, say)"
            )

    def of_time(self, t: float) -> float:
        """t."""
        return t

    def to_time(self, u: Tensor) -> Tensor:
        """u."""
        return float64(u).cpu()

    def scale(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def coefficients(self, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha', sigma')."""
        return self.sde.alpha_dot(t), self.sde.sigma_dot(t)


VARIABLES = {"ratio": Ratio, "time": Time}


@dataclass
class Carried:
    """States carried along the flow, per sample.

    x: (B, *) at time `t` (B,). divergence: log p at the start of the transition less log p at its end, nats (B, m), one
    column for each probe; (B, 0) without a trace. variance: of their mean, (B,), where the solver knows its weights.
    nfe, backward: evaluations of networks, and products with their Jacobians, int64 (B,). status: a `solvers.Status`
    (B,).
    """

    x: Tensor
    t: Tensor
    divergence: Tensor
    variance: Tensor | None
    nfe: Tensor
    backward: Tensor
    status: Tensor


def integrate(
    model: Model,
    x: Tensor,
    t_from: float,
    t_to: float,
    cond: Any = None,
    solver: Solver | None = None,
    trace: Trace | None = None,
    stream: RandomStream | None = None,
    differentiable: bool = False,
) -> Carried:
    """Carry x (B, *) along the probability flow from t_from to t_to.

    Args:
        model: the model.
        x: the state at t_from.
        cond: short for `model.given(cond)`.
        solver: default `DEFAULT_SOLVER`.
        trace: also integrate the divergence, with probes drawn from `noise`.
        differentiable: keep the graph, in x and in the parameters of the network; for solvers on a fixed grid.

    Raises:
        ValueError: a transition that leaves the SDE's range or goes nowhere; a gradient in parameters of the SDE.
    """
    model = as_model(model, cond)
    with torch.set_grad_enabled(differentiable), frozen(model, not differentiable):
        return _integrate(
            model, x, t_from, t_to, solver or DEFAULT_SOLVER, trace, stream or RandomStream(), differentiable
        )


def _integrate(
    model: BaseModel, x, t_from, t_to, solver: Solver, trace, stream: RandomStream, differentiable
) -> Carried:
    flow, count = _flow(model, solver, t_from, t_to, differentiable), len(x)
    estimate = None if trace is None else trace.bind(stream, x, differentiable)
    evaluations = torch.zeros(2, count, dtype=torch.int64)  # and products with the Jacobian

    def field(u: Tensor, w: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        t = flow.to_time(u)
        (data, eps), scale = flow.coefficients(u, t), flow.scale(t)
        part = model if rows is None else model.rows(rows, count)

        def velocity(w: Tensor) -> Tensor:
            return part.predict(broadcast(scale, w) * w, t).combine(data, eps)

        with counting() as counts:
            if estimate is None:
                value, integrands = velocity(w), torch.zeros(len(w), 0, dtype=w.dtype, device=w.device)
            else:
                value, estimates, variance = estimate(velocity, w, rows)
                integrands = torch.cat([estimates, variance[:, None]], dim=1).to(w.device, double(w))
        evaluations[:, slice(None) if rows is None else rows.cpu()] += torch.tensor(
            [[counts.forward], [counts.backward]]
        )
        return value, integrands

    first = flow.scale(torch.tensor(t_from, dtype=torch.float64))
    solution = solver(field, x / float(first), flow.of_time(t_from), flow.of_time(t_to))
    t = flow.to_time(solution.position)
    last = flow.scale(t)
    grown = (dimensions(x) * (last / first).log()).to(solution.integral)  # the density of x is that of w over scale^d
    divergence = solution.integral[:, :-1] + grown[:, None]
    variance = None if trace is None or solution.squared is None else solution.squared[:, -1]
    nfe, backward = evaluations.to(x.device)
    return Carried(broadcast(last, solution.x) * solution.x, t, divergence, variance, nfe, backward, solution.status)


def _flow(model: BaseModel, solver: Solver, t_from: float, t_to: float, differentiable: bool) -> "Ratio | Time":
    """The flow in the solver's variable, of a transition that makes sense."""
    sde = model.sde
    low, high = sorted((t_from, t_to))
    if not (sde.t_min <= low < high <= sde.t_max):
        raise ValueError(
            f"t_from and t_to must differ and lie in [{sde.t_min:g}, {sde.t_max:g}]; got t_from={t_from:g} and "
            f"t_to={t_to:g}"
        )
    if differentiable and isinstance(sde, nn.Module) and any(p.requires_grad for p in sde.parameters()):
        raise ValueError(
            "an SDE without parameters expected with differentiable=True: the path's own gradient is not carried "
            f"through the grid; {type(sde).__name__} has some: freeze them with sde.requires_grad_(False)"
        )
    return VARIABLES[variable(solver)](sde)


def like(states: Tensor, x: Tensor) -> Tensor:
    """States in the dtype of x if that is one of states: integers have no latents."""
    return states.to(x.dtype) if x.is_floating_point() else states


def carry(
    model: Model, x: Tensor, t_from: float, t_to: float, cond: Any = None, solver: Solver | None = None
) -> Tensor:
    """The states x (B, *) carried from t_from to t_to, all of them; in float64 on the way, where there is one.

    Raises:
        RuntimeError: some that did not arrive.
    """
    carried = integrate(model, x.to(double(x)), t_from, t_to, cond, solver)
    if failed := (carried.status != Status.OK).nonzero().flatten().tolist():
        words = ", ".join(sorted({Status(int(carried.status[i])).name for i in failed}))
        raise RuntimeError(
            f"{len(failed)} of {len(x)} samples did not reach t={t_to:g} ({words}), {failed[:8]} first: give the "
            "solver more steps, or ask flow.integrate, which returns where each of them is"
        )
    return like(carried.x, x)


@contextmanager
def frozen(model: Model, freeze: bool = True) -> Iterator[None]:
    """Within the block no parameter wants a gradient: products with the Jacobian then keep fewer activations."""
    wanting = [p for p in as_model(model).parameters() if p.requires_grad] if freeze else []
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)
