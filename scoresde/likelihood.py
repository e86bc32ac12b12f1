"""Exact log-likelihood by the probability-flow ODE.

    log p(x) = log p_prior(x(t_max)) + integral of tr(d velocity / dx) dt from t_start to t_max,   x(t_start) = x

(1806.07366; 2011.13456, section 4.3 and eq. 39). `encode` solves the ODE from data to noise, `decode` from noise to
data; `sample_with_log_prob` draws samples and returns their log p from one solve.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde.dequantization import DataMap
from scoresde.divergence import Hutchinson, Trace
from scoresde.prior_mismatch import LARGE_MISMATCH, prior_mismatches, warn_of_mismatch
from scoresde.probability_flow import Carried, carry, cast_like, integrate
from scoresde.protocols import Model, Transform
from scoresde.random_stream import RandomStream
from scoresde.result_table import (
    Result,
    cost,
    counted,
    mean_of,
    range_of,
    sample_columns,
    states,
    statuses,
    typical_error,
)
from scoresde.score import BaseModel, device_of
from scoresde.solvers import Solver, Status
from scoresde.solvers.solver import controls_integrals
from scoresde.tensors import (
    check_instance,
    check_real,
    dimensions,
    double,
    empty_states,
    float64,
    sum_dims,
)
from scoresde.wrappers import with_density


@dataclass(repr=False)
class LogProb(Result):
    """log p(x) of each sample.

    value: nats (B,), float64. stderr: standard error of the trace estimate in nats (B,): zero for an exact trace,
    measured from the spread of two or more probes, an upper bound (in mean square) for one probe that is drawn anew at
    each evaluation, None for one fixed probe. latent: x(t_max), (B, *). nfe: network evaluations (B,), including those
    that measure the scale of the data. backward: products with Jacobians of the network (B,). status: a
    `solvers.Status` per sample (B,); where it is not OK, value is NaN and latent is the last valid state, at `time`
    (B,). per_probe: log p(x) as each probe of the trace gives it, nats (B, m), float64; value is their mean. With equal
    seeds, column k has the same probes for every model and every condition.
    """

    value: Tensor
    stderr: Tensor | None
    latent: Tensor
    nfe: Tensor
    backward: Tensor
    status: Tensor
    time: Tensor
    per_probe: Tensor

    def heading(self) -> str:
        return f"LogProb of {counted(len(self.value), 'sample')}"

    def columns(self) -> dict[str, list[Any]]:
        return sample_columns("log_likelihood", "_nats", self.value, self.stderr, self.status, Status)

    def rows(self) -> dict[str, str]:
        return {
            "mean": mean_of(self.value, "nats"),
            "range": range_of(self.value, "nats"),
            "error": typical_error(self.stderr, "nats a sample", "the trace"),
            "status": statuses(self.status, Status),
            "evaluations": cost(self.nfe, self.backward),
        }


@dataclass(repr=False)
class RoundTrip(Result):
    """Data after encoding and decoding.

    latent: x(t_max), (B, *). x: the decoded data (B, *). error: root mean square over the dimensions of the difference
    between decoded and given data, float64 (B,).
    """

    latent: Tensor
    x: Tensor
    error: Tensor

    def heading(self) -> str:
        return f"RoundTrip of {counted(len(self.x), 'sample')}"

    def rows(self) -> dict[str, str]:
        return {"states": states(self.x), "error": typical_error(self.error, "a dimension", "encoding and decoding")}


def conventions(
    model: BaseModel, data_map: DataMap, trace: Trace, solver: Solver, start: str, mismatch: float = 0.0
) -> dict[str, str]:
    """Return a description of every choice that changes a likelihood of the model.

    Args:
        mismatch: the largest of `prior_mismatches`, in nats per dimension; described if it exceeds LARGE_MISMATCH.
    """
    prior = f"N(0, {model.sde.prior_std:g}^2) at t_max={model.sde.t_max:g}"
    if mismatch > LARGE_MISMATCH:
        prior += f", up to {mismatch:.2g} nats/dim from the distribution of the noisy data"
    return {
        "density": f"probability flow of {model.density}",
        "start": start,
        "trace": str(trace),
        "solver": str(solver),
        "transform": str(data_map),
        "prior": prior,
    }


def trace_for(solver: Solver | None, trace: Trace | None) -> Trace:
    """Return the solver's own trace if it has one; else `trace` or `Hutchinson(probes=1)`.

    The probes are fixed if the solver controls the divergence's error.
    """
    trace = getattr(solver, "trace", None) or trace or Hutchinson()
    check_instance("trace", trace, "bind", "kept")
    return trace.kept() if solver is not None and controls_integrals(solver) else trace


def log_prob(
    model: Model,
    x: Tensor,
    cond: Any = None,
    trace: Trace | None = None,
    solver: Solver | None = None,
    seeds: Sequence[int] | None = None,
    t_start: float | None = None,
    generator: torch.Generator | None = None,
    differentiable: bool = False,
    transform: Transform | DataMap | None = None,
) -> LogProb:
    """Return log p(x) in nats, by the probability-flow ODE.

        log p(x) = log p_prior(x(t_max)) + integral of tr(d velocity / dx) dt from t_start to t_max

    (2011.13456, eq. 39). With `transform=run.transform`, x are data in their own units, and the result is
    their density in these units,

        log p_data(x) = log p(T(x)) + log|det dT/dx|.

        result = ss.log_prob(run.model, data, transform=run.transform, seeds=range(len(data)))
        print(result.value.mean(), result.stderr)

    Args:
        model: the model, in eval mode.
        x: states (B, *) at t_start, in model space; or data, with `transform`.
        cond: condition, short for `model.given(cond)`.
        trace: default `Hutchinson(probes=1)`; or `ExactTrace()`. With `solvers.SciPy`, whose error control includes the
            divergence, the probes of the first evaluation are used throughout.
        solver: default `solvers.Adams()`, which has a fixed cost; `solvers.AdaptiveAdams()` controls the error of each
            sample.
        seeds: one integer per sample, for the probes; sample i then has the same value in any batch.
        t_start: time of x, default t_min.
        generator: generator of the probes, instead of seeds.
        differentiable: if True, keep the graph of `value` and `latent` for gradients in x and in the parameters, with
            memory that grows with the number of evaluations; if False, compute without gradients.
        transform: the map T from data to model space, or a `DataMap`, whose dequantisation then makes `value` a lower
            bound on average. None: x are states.

    Warns:
        PriorMismatch: the noise at t_max does not hide the states x, so that the prior is not the distribution of the
            latents (see `scoresde.prior_mismatch`).

    Raises:
        ValueError: the model is in training mode, its flow is not invertible (thresholding), x holds NaN or infinity,
            t_start is out of range or given with `transform`, or x are not the data that the transform takes.
    """
    model = with_density(model, cond)
    check_real("x", x)
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x must be finite; got NaN or infinity: remove or repair these states")
    trace, stream, nats = trace_for(solver, trace), RandomStream(generator, seeds, len(x)), None
    if transform is not None:
        if t_start is not None:
            raise ValueError(f"t_start must be None with transform, which gives data at t_min; got {t_start}")
        data_map = transform if isinstance(transform, DataMap) else DataMap(transform)
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            x, nats = data_map.draw(x.to(double(x)), stream, model.sde)
        t_start = data_map.start(model.sde)
    t_start = model.sde.t_min if t_start is None else t_start
    carried = integrate(model, x.to(double(x)), t_start, model.sde.t_max, solver, trace, stream, differentiable)
    warn_of_mismatch(model.sde, prior_mismatches(model.sde, x, t_start))
    result = log_prob_of(model, trace, carried, carried.x)
    result.latent = cast_like(carried.x, x)
    if nats is not None:
        result.value, result.per_probe = result.value + nats, result.per_probe + nats.detach()[:, None]
    return result


def sample_with_log_prob(
    model: Model,
    shape: Sequence[int] | None = None,
    x_T: Tensor | None = None,
    cond: Any = None,
    trace: Trace | None = None,
    solver: Solver | None = None,
    seeds: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, LogProb]:
    """Return samples x (B, *) of the probability flow and their log p(x), from one solve that starts at the prior.

    Args:
        model: the model, in eval mode.
        shape, x_T: the shape (B, *) of states to draw from the prior, or the states at t_max to start from.
        cond, trace, solver, seeds, generator: see `log_prob`.
        device: device of the states that are drawn; default: that of the model.

    Warns:
        PriorMismatch: the noise at t_max does not hide the samples, so that the prior is not the distribution of
            the latents.

    Raises:
        ValueError: the model is in training mode, or its flow is not invertible (thresholding); both or neither of
            shape and x_T are given.
    """
    model = with_density(model, cond)
    if (shape is None) == (x_T is None):
        raise ValueError("expected exactly one of shape=(B, *) and the starting states x_T")
    start = x_T if x_T is not None else empty_states(shape, None, device or device_of(model))
    trace, stream, z = trace_for(solver, trace), RandomStream(generator, seeds, len(start)), start.to(double(start))
    if x_T is None:
        z = model.sde.prior_std * stream.normal(z)
    carried = integrate(model, z, model.sde.t_max, model.sde.t_min, solver, trace, stream)
    result = log_prob_of(model, trace, carried, z, sign=-1)
    result.latent = cast_like(z, start)
    solved = carried.x[carried.status == Status.OK]
    warn_of_mismatch(model.sde, prior_mismatches(model.sde, solved), "samples")
    return cast_like(carried.x, start), result


def log_prob_of(model: BaseModel, trace: Trace, carried: Carried, latent: Tensor, sign: int = 1) -> LogProb:
    """Return log p(x) from `carried`, a solve that ends (sign 1) or starts (sign -1) at `latent`.

    If `carried.divergence` has an autograd graph, `value` of the result keeps it.
    """
    ok = carried.status == Status.OK
    with torch.set_grad_enabled(carried.divergence.requires_grad):
        value = model.sde.prior_log_prob(latent) + sign * float64(carried.divergence).mean(dim=1)
        value = torch.where(ok, value, math.nan)
    stderr = trace.standard_error(carried.divergence.detach(), carried.variance)
    if stderr is not None:
        stderr = torch.where(ok, float64(stderr.detach()), math.nan)
    per_probe = model.sde.prior_log_prob(latent)[:, None] + sign * float64(carried.divergence)
    per_probe = torch.where(ok[:, None], per_probe, math.nan).detach()
    return LogProb(value, stderr, latent, carried.nfe, carried.backward, carried.status, carried.t, per_probe)


def encode(
    model: Model, x: Tensor, cond: Any = None, solver: Solver | None = None, t_start: float | None = None
) -> Tensor:
    """Return the latent x(t_max) (B, *) of data x by the probability-flow ODE dx/dt = velocity(x, t).

        z = ss.encode(model, x)
        x = ss.decode(model, z)

    Args:
        model: the model, in eval mode.
        x: data (B, *) in model space, at t_start.
        cond: condition, short for `model.given(cond)`.
        solver: ODE solver; default `solvers.Adams()`, of fixed cost.
        t_start: time of x; default t_min.

    Warns:
        PriorMismatch: the noise at t_max does not hide the data, so that the prior is not the distribution of the
            latents.

    Raises:
        ValueError: the model is in training mode, or its flow is not invertible (thresholding).
        RuntimeError: the solver failed for some samples.
    """
    model, t_start = with_density(model, cond), model.sde.t_min if t_start is None else t_start
    latent = carry(model, x, t_start, model.sde.t_max, solver)
    warn_of_mismatch(model.sde, prior_mismatches(model.sde, x, t_start))
    return latent


def decode(
    model: Model, z: Tensor, cond: Any = None, solver: Solver | None = None, t_end: float | None = None
) -> Tensor:
    """Return the data x(t_end) (B, *) of a latent by the probability-flow ODE dx/dt = velocity(x, t).

    It is the inverse of `encode`.

    Args:
        model: the model, in eval mode.
        z: latents (B, *) = x(t_max).
        cond: condition, short for `model.given(cond)`.
        solver: ODE solver; default `solvers.Adams()`, of fixed cost.
        t_end: time of the result; default t_min.

    Warns:
        PriorMismatch: the noise at t_max does not hide the result, so that the prior is not the distribution of
            the latents.

    Raises:
        ValueError: the model is in training mode, or its flow is not invertible (thresholding).
        RuntimeError: the solver failed for some samples.
    """
    model, t_end = with_density(model, cond), model.sde.t_min if t_end is None else t_end
    x = carry(model, z, model.sde.t_max, t_end, solver)
    warn_of_mismatch(model.sde, prior_mismatches(model.sde, x, t_end), "samples")
    return x


def round_trip(model: Model, x: Tensor, cond: Any = None, solver: Solver | None = None) -> RoundTrip:
    """Encode data x, decode the latent, and return both results with the error of the decoded data.

    The error measures the solver: an exact solution of the flow returns x.

    Args:
        model: the model, in eval mode.
        x: data (B, *) in model space.
        cond: condition, short for `model.given(cond)`.
        solver: ODE solver; default `solvers.Adams()`, of fixed cost.

    Raises:
        ValueError, RuntimeError: see `encode`.
    """
    latent = encode(model, x, cond, solver)
    decoded = decode(model, latent, cond, solver)
    return RoundTrip(latent, decoded, (sum_dims((decoded - x).square()) / dimensions(x)).sqrt())
