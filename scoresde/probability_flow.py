r"""The probability-flow ODE, and the change of density along it.

    dx/dt = f x - g^2/2 score = alpha' E[x_0 | x] + sigma' E[eps | x]        (2011.13456, eq. 13)
    d log p_t(x_t)/dt = -tr(d velocity / dx)                                 (1806.07366; 2011.13456, eq. 39)

The flow is solved for a scaled state w as a function of a variable u, instead of x as a function of t. With S the scale
of the data, r = sigma / (alpha S) and

    w = x / (alpha^2 S^2 + sigma^2)^(1/2),        dw/dr = (E[eps | x] - r E[x_0 | x] / S) / (1 + r^2)^(3/2),

the ODE is the same for all Gaussian paths, and w is constant for data from N(0, S^2 I). The right-hand side is largest
for r between the finest structure of the data and a few times their extent. Steps are therefore equal in

    u = asinh(s / c),        1/s = 1/r + 1/R,

with a small number c and a large number R. u is linear in r below c, logarithmic from c to R, and linear in 1/r above
R, where the flow depends only on the mean of the data. Everything is bounded up to r = infinity, that is
u = asinh(R/c), so a path without signal at its end is no special case. R is 30, or 10 times the largest r at which the
data have structure if that is more. c is at most 0.02. If r at t_min is below 0.001 (sub-VP), c is twenty times this r,
at least 0.002, so that there are steps near t_min too.

Unless the solver has a `data_scale`, S is measured on the model for each sample before the solve, from a few
evaluations (`scoresde.data_scale`), and so are a smaller c for data with structure finer than c, and a larger R for
data with structure far above S. S is 1 for data of about unit scale.

The density of x is that of w divided by (alpha^2 S^2 + sigma^2)^(d/2). All coefficients are combined in float64, and
multiply the views E[x_0 | x] and E[eps | x] of one network evaluation.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.counting import Evaluations, counting
from scoresde.data_scale import measure
from scoresde.divergence import Trace
from scoresde.gradient_check import check_gradient
from scoresde.protocols import Model
from scoresde.random_stream import RandomStream
from scoresde.score import BaseModel
from scoresde.sdes import SDE
from scoresde.solvers import Adams, Solver, Status
from scoresde.solvers.solver import data_scale, variable
from scoresde.tensors import broadcast, check_instance, dimensions, double, float64, floating, recordable
from scoresde.wrappers import as_model, for_inference

DEFAULT_SOLVER = Adams()
COARSE, COARSE_OVER_EXTENT = 30.0, 10.0  # R of the module docstring, and R in units of `DataScale.extent`
C_RANGE, C_OVER_FIRST = (0.002, 0.02), 20.0  # the range of c, and c in units of r at t_min
# For data with finer structure, c in units of `DataScale.smooth`, and at least FINEST_C times r at t_min.
C_OVER_SMOOTH, FINEST_C = 4.0, 2.0


def _first(sde: SDE, data_scale: float) -> float:
    """Return r of the module docstring at t_min."""
    return math.exp(-0.5 * float(sde.log_snr(float64(sde.t_min)))) / data_scale


def _default_c(first: float) -> float:
    """Return c of the module docstring for data without finer structure; `first` is r at t_min."""
    return min(max(C_OVER_FIRST * first, C_RANGE[0]), C_RANGE[1])


class Ratio:
    """The flow of w in the variable u, see the module docstring.

    Args:
        sde: the diffusion.
        data_scale: the scale S of the data.
        smooth: a noise level sigma/alpha; the density of the data has no structure finer than it.
        extent: the largest noise level sigma/alpha at which the data still have structure, which sets R of the module
            docstring; 0 (the default) means unknown, and R is then 30.
    """

    def __init__(self, sde: SDE, data_scale: float = 1.0, smooth: float = math.inf, extent: float = 0.0):
        self.sde, self.data_scale = sde, data_scale
        self.coarse = max(COARSE, COARSE_OVER_EXTENT * extent / data_scale)
        self._shift = 2 * math.log(data_scale)  # from the log-SNR of the SDE to -2 log r
        first = _first(sde, data_scale)
        self.c = min(_default_c(first), max(C_OVER_SMOOTH * smooth / data_scale, FINEST_C * first))
        self._times = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
        self._ends = self._of_log_snr(sde.log_snr(self._times))

    def _of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.asinh(1 / (self.c * (torch.exp(0.5 * (log_snr + self._shift)) + 1 / self.coarse)))

    @classmethod
    def suited(
        cls, model: BaseModel, x: Tensor, t_from: float, t_to: float, data_scale: float | None
    ) -> tuple["list[Group]", Tensor]:
        """Choose a flow to solve for each state x (B, *); also return the network evaluations (B,) spent on the choice.

        If data_scale is None, S, c and R of the module docstring are measured for each sample. Otherwise S is
        data_scale, and c and R have their defaults. The result has the form explained at `Time.suited`.
        """
        if data_scale is not None:
            return [(cls(model.sde, data_scale), None)], torch.zeros(len(x), dtype=torch.int64)
        first = _first(model.sde, 1.0)

        def smooth_at(scale: Tensor) -> Tensor:
            return float64([_default_c(first / s) * s / C_OVER_SMOOTH for s in scale.tolist()])

        scale, smooth, extent, evaluations = measure(model, x, t_from, t_to, smooth_at)
        kinds, kind = torch.stack([scale, smooth, extent], dim=1).unique(dim=0, return_inverse=True)
        flows = [cls(model.sde, *values) for values in kinds.tolist()] or [cls(model.sde)]
        if len(flows) == 1:
            return [(flows[0], None)], evaluations
        return [(flow, (kind == i).nonzero().flatten().to(x.device)) for i, flow in enumerate(flows)], evaluations

    def of_time(self, t: float) -> float:
        """Return u of the module docstring at time t."""
        return float(self._of_log_snr(self.sde.log_snr(float64(t))))

    def to_time(self, u: Tensor) -> Tensor:
        """Return the time t, float64, at u of the module docstring, () or (B,)."""
        u = float64(u).cpu()
        s = self.c * torch.sinh(u)
        t = self.sde.time(-2 * (s.log() - (1 - s / self.coarse).clamp(min=0).log()) - self._shift)
        # At the ends of the range, t may be rounded out of it and r may be infinite: take t_min and t_max themselves.
        t = torch.where(u <= self._ends[0], self._times[0], t)
        return torch.where(u >= self._ends[1], self._times[1], t)

    def scale(self, t: Tensor) -> Tensor:
        """Return x / w = (alpha^2 S^2 + sigma^2)^(1/2) at time t, float64; letters as in the module docstring."""
        return torch.hypot(self.data_scale * self.sde.alpha(t), self.sde.sigma(t))

    def coefficients(self, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (a, b) with dw/du = a E[x_0 | x] + b E[eps | x], float64, at u and its time t.

        Letters as in the module docstring. With q = 1 - s/R, r = s/q and dr/du = (s^2 + c^2)^(1/2) / q^2. In
        dw/du = dw/dr dr/du, the powers of q cancel.
        """
        s = self.c * torch.sinh(float64(u).cpu())
        q = (1 - s / self.coarse).clamp(min=0)
        pace = torch.hypot(s, torch.full_like(s, self.c)) / torch.hypot(s, q) ** 3
        return -pace * s / self.data_scale, pace * q


class Time:
    """The flow of x in t, the form of the papers and of the solvers of score_sde.

    Raises:
        ValueError: the drift at t_max is infinite.
    """

    data_scale = 1.0

    def __init__(self, sde: SDE):
        self.sde = sde
        if not math.isfinite(float(sde.drift(float64(sde.t_max)))):
            raise ValueError(
                f"the drift is infinite at t_max={sde.t_max:g}, which a solver in t cannot reach: lower t_max (by 1e-3)"
            )

    @classmethod
    def suited(
        cls, model: BaseModel, x: Tensor, t_from: float, t_to: float, data_scale: float | None
    ) -> tuple["list[Group]", Tensor]:
        """Choose a flow to solve for each state x (B, *); also return the network evaluations (B,) spent on the choice.

        The flows are a list of pairs: a flow and the indices (n,) of its samples, or None if it is used for all.
        A flow in t does not depend on data_scale (see `solvers.Adams`), so there is only one.
        """
        return [(cls(model.sde), None)], torch.zeros(len(x), dtype=torch.int64)

    def of_time(self, t: float) -> float:
        """Return t: the variable u of this flow is the time."""
        return t

    def to_time(self, u: Tensor) -> Tensor:
        """Return u in float64: the variable u of this flow is the time."""
        return float64(u).cpu()

    def scale(self, t: Tensor) -> Tensor:
        """Return 1, the ratio of x to the state of this flow."""
        return torch.ones_like(t)

    def coefficients(self, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (a, b) with dx/dt = a E[x_0 | x] + b E[eps | x]: (alpha', sigma')."""
        return self.sde.alpha_dot(t), self.sde.sigma_dot(t)


Flow = Ratio | Time
Group = tuple[Flow, Tensor | None]  # a flow and the indices (n,) of its samples in the batch, None for all
VARIABLES: dict[str, type[Flow]] = {"ratio": Ratio, "time": Time}


@dataclass
class Carried:
    """The result of a solve of the flow, per sample.

    x: the state (B, *) at time `t` (B,). divergence: log p at the start of the solve minus log p at `t`, nats (B, m),
    one column per probe; (B, 0) without a trace. variance: variance of the mean of `divergence` over probes,
    (B,), None if the solver does not report it. nfe, backward: network evaluations, and products with Jacobians of the
    network, int64 (B,). status: a `solvers.Status` (B,).
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
    solver: Solver | None = None,
    trace: Trace | None = None,
    stream: RandomStream | None = None,
    differentiable: bool = False,
) -> Carried:
    """Solve the probability flow from t_from to t_to.

    Args:
        model: the model.
        x: the state (B, *) at t_from.
        solver: default `DEFAULT_SOLVER`.
        trace: if given, the divergence is integrated too.
        stream: stream that draws the probes of the trace.
        differentiable: if True, keep the graph for gradients in x and in the parameters of the network (for solvers
            with a fixed grid); if False, compute without gradients.

    Raises:
        ValueError: t_from and t_to are equal or outside the SDE's range, a gradient in parameters of the SDE is asked
            for, the model is in training mode with dropout or BatchNorm, or, with a trace, autograd does not give the
            model's derivative in x (`gradient_check`).
    """
    model, solver, count = for_inference(model), solver or DEFAULT_SOLVER, len(x)
    check_instance("solver", solver, "__call__")
    x = floating(x)
    _check_transition(model.sde, t_from, t_to, differentiable)
    if (own := getattr(solver, "carry", None)) is not None:
        return own(model, recordable(x), t_from, t_to, trace, differentiable)

    def solve(flow: Flow, group: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """Return state, time, divergence, its variance and status for the samples of one flow."""

        def field(u: Tensor, w: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
            if group is not None:
                rows = group if rows is None else group[rows]
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
            costs[:, slice(None) if rows is None else rows.cpu()] += _column(counts)
            return value, integrands

        start, first = x if group is None else x[group], flow.scale(float64(t_from))
        if trace is not None:
            part = model if group is None else model.rows(group, count)
            with counting() as counts:
                check_gradient(part, start, t_from, t_to, flow.data_scale, trace)
            costs[:, slice(None) if group is None else group.cpu()] += _column(counts)
        solution = solver(field, start / float(first), flow.of_time(t_from), flow.of_time(t_to))
        t = flow.to_time(solution.position)
        last = flow.scale(t)
        grown = (dimensions(x) * (last / first).log()).to(solution.integral)  # the density of x is that of w / scale^d
        divergence = solution.integral[:, :-1] + grown[:, None]
        variance = None if trace is None or solution.squared is None else solution.squared[:, -1]
        return broadcast(last, solution.x) * solution.x, t, divergence, variance, solution.status

    x = recordable(x)
    with torch.inference_mode(False), torch.set_grad_enabled(differentiable), frozen(model, not differentiable):
        costs = torch.zeros(2, count, dtype=torch.int64)  # evaluations, and products with the Jacobian
        flows, costs[0] = VARIABLES[variable(solver)].suited(model, x, t_from, t_to, data_scale(solver))
        estimate = None if trace is None else trace.bind(stream or RandomStream(), x, differentiable)
        solved = [solve(flow, group) for flow, group in flows]
        order = torch.cat([group for _, group in flows if group is not None]).argsort() if len(flows) > 1 else None
        x, t, divergence, variance, status = (_joined(parts, order) for parts in zip(*solved, strict=True))
        nfe, backward = costs.to(x.device)
    return Carried(x, t, divergence, variance, nfe, backward, status)


def _column(counts: Evaluations) -> Tensor:
    """Return the numbers of network evaluations and of Jacobian products as a column, int64 (2, 1)."""
    return torch.tensor([[counts.forward], [counts.backward]])


def _joined(parts: Sequence[Tensor | None], order: Tensor | None) -> Any:
    """Join the results of groups of samples in the order of the batch; return None if the results are None.

    Args:
        parts: one result per group.
        order: permutation of the joined samples into the order of the batch; None if there is only one group.
    """
    if order is None:
        return parts[0]
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors)[order] if tensors else None


def _check_transition(sde: SDE, t_from: float, t_to: float, differentiable: bool) -> None:
    """Raise ValueError if t_from and t_to are equal or out of range, or the SDE's parameters need a gradient."""
    low, high = sorted((t_from, t_to))
    if not (sde.t_min <= low < high <= sde.t_max):
        raise ValueError(
            f"t_from and t_to must differ and lie in [{sde.t_min:g}, {sde.t_max:g}]; got t_from={t_from:g} and "
            f"t_to={t_to:g}"
        )
    if differentiable and isinstance(sde, nn.Module) and any(p.requires_grad for p in sde.parameters()):
        raise ValueError(
            f"differentiable=True gives no gradient in the parameters of the SDE, but {type(sde).__name__} has some: "
            "freeze them with sde.requires_grad_(False)"
        )


def cast_like(states: Tensor, x: Tensor) -> Tensor:
    """Cast states to the dtype of x if that is a floating-point type."""
    return states.to(x.dtype) if x.is_floating_point() else states


def carry(model: Model, x: Tensor, t_from: float, t_to: float, solver: Solver | None = None) -> Tensor:
    """Solve the probability flow from states x (B, *) at t_from; return the states at t_to.

    The solve is in float64, or in float32 on a device without float64 (MPS). The result has the dtype of x if that is a
    floating-point type.

    Raises:
        RuntimeError: the solver failed for some samples.
    """
    carried = integrate(model, x.to(double(x)), t_from, t_to, solver)
    if failed := (carried.status != Status.OK).nonzero().flatten().tolist():
        names = ", ".join(sorted({Status(int(carried.status[i])).name for i in failed}))
        raise RuntimeError(
            f"{len(failed)} of {len(x)} samples did not reach t={t_to:g} ({names}), the first at {failed[:8]}: give "
            "the solver more steps, or call probability_flow.integrate to see the time that each sample reached"
        )
    return cast_like(carried.x, x)


@contextmanager
def frozen(model: Model, freeze: bool = True) -> Iterator[None]:
    """Set requires_grad=False on all parameters within the block, so products with the Jacobian store less."""
    trained = [p for p in as_model(model).parameters() if p.requires_grad] if freeze else []
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
