"""Exact log-likelihood by the probability-flow ODE, and bits per dimension.

    log p(x) = log p_prior(x(t_max)) + integral of tr(d velocity / dx) dt from t_start to t_max,   x(t_start) = x

(1806.07366; 2011.13456, section 4.3 and eq. 39). `encode` solves the ODE from data to noise, `decode` from noise to
data; `sample_with_log_prob` draws samples and returns their log p from one solve.

Bits per dimension of integer grey levels x, dequantised to x + u with u ~ q(u | x), under an invertible transform T to
model space:

    bits/dim = -[log p(T(x + u)) + log|det T'| - log q(u | x)] / (d log 2).

Scaling data to [0, 1] or [-1, 1] changes log p and log|det T'| by opposite amounts and leaves bits/dim unchanged.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scoresde.counting import counting
from scoresde.dequantization import (
    DataMap,
    Dequantization,
    Incomplete,
    check_levels,
    count_levels,
    levels_map,
    warn_if_above_uniform,
)
from scoresde.divergence import Hutchinson, Trace
from scoresde.losses import squared_errors
from scoresde.prior_mismatch import LARGE_MISMATCH, prior_mismatches, warn_of_mismatch
from scoresde.probability_flow import DEFAULT_SOLVER, Carried, carry, cast_like, integrate
from scoresde.progress import progress_bar
from scoresde.protocols import Model, Transform
from scoresde.random_stream import RandomStream
from scoresde.score import BaseModel, device_of
from scoresde.sdes import SDE
from scoresde.solvers import Solver, Status
from scoresde.solvers.solver import controls_integrals
from scoresde.tensors import (
    check_instance,
    check_integer,
    check_real,
    dimensions,
    double,
    empty_states,
    float64,
    mean_and_error,
    send,
    sum_dims,
)
from scoresde.wrappers import with_density


@dataclass
class LogProb:
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


@dataclass
class RoundTrip:
    """Data after encoding and decoding.

    latent: x(t_max), (B, *). x: the decoded data (B, *). error: root mean square over the dimensions of the difference
    between decoded and given data, float64 (B,).
    """

    latent: Tensor
    x: Tensor
    error: Tensor


@dataclass
class BitsPerDim:
    """Bits per dimension of a set of images.

    mean: mean over images. stderr: standard error of that mean, over images (None for one image). per_image: (N,),
    float64. conventions: the settings that change the values: dequantisation, trace, solver, prior and time range.
    trace_stderr: the standard error of each image's value due to the stochastic trace estimate, in bits per dimension
    (N,), see `LogProb.stderr`. nfe, backward: network evaluations and products with Jacobians for each image
    (N,), summed over its dequantisations. status: a `solvers.Status` per image (N,), the worst of its dequantisations.
    """

    mean: float
    stderr: float | None
    per_image: Tensor
    conventions: dict[str, str]
    trace_stderr: Tensor | None
    nfe: Tensor
    backward: Tensor
    status: Tensor


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
) -> LogProb:
    """Return log p(x) in nats, by the probability-flow ODE.

    Args:
        model: the model, in eval mode.
        x: states (B, *) at t_start.
        cond: condition, short for `model.given(cond)`.
        trace: default `Hutchinson(probes=1)`; or `ExactTrace()`. With `solvers.SciPy`, whose error control includes the
            divergence, the probes of the first evaluation are used throughout.
        solver: default `probability_flow.DEFAULT_SOLVER`, which has a fixed cost; `solvers.AdaptiveAdams()` controls
            the error of each sample.
        seeds: one integer per sample, for the probes; sample i then has the same value in any batch.
        t_start: time of x, default t_min.
        generator: generator of the probes, instead of seeds.
        differentiable: if True, keep the graph of `value` and `latent` for gradients in x and in the parameters, with
            memory that grows with the number of evaluations; if False, compute without gradients.

    Warns:
        PriorMismatch: the noise at t_max does not hide the states x, so that the prior is not the distribution of the
            latents (see `scoresde.prior_mismatch`).

    Raises:
        ValueError: the model is in training mode, its flow is not invertible (thresholding), x holds NaN or infinity,
            or t_start is out of range.
    """
    model = with_density(model, cond)
    check_real("x", x)
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x must be finite; got NaN or infinity: remove or repair these states")
    t_start = model.sde.t_min if t_start is None else t_start
    trace, stream = trace_for(solver, trace), RandomStream(generator, seeds, len(x))
    carried = integrate(model, x.to(double(x)), t_start, model.sde.t_max, solver, trace, stream, differentiable)
    warn_of_mismatch(model.sde, prior_mismatches(model.sde, x, t_start))
    result = _log_prob(model, trace, carried, carried.x)
    result.latent = cast_like(carried.x, x)
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
    result = _log_prob(model, trace, carried, z, sign=-1)
    result.latent = cast_like(z, start)
    solved = carried.x[carried.status == Status.OK]
    warn_of_mismatch(model.sde, prior_mismatches(model.sde, solved), "samples")
    return cast_like(carried.x, start), result


def _log_prob(model: BaseModel, trace: Trace, carried: Carried, latent: Tensor, sign: int = 1) -> LogProb:
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
    """Return the latent x(t_max) (B, *) of data x (B, *) = x(t_start), with t_start = t_min by default.

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
    """Return the data x(t_end) (B, *) of a latent z (B, *) = x(t_max), with t_end = t_min by default.

    This is the inverse of `encode`.

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
    """Encode data x (B, *), decode the latent, and return both results with the error of the decoded data."""
    latent = encode(model, x, cond, solver)
    decoded = decode(model, latent, cond, solver)
    return RoundTrip(latent, decoded, (sum_dims((decoded - x).square()) / dimensions(x)).sqrt())


def bits_per_dim(
    model: Model,
    images: Tensor,
    transform: Transform | DataMap,
    cond: Any = None,
    dequantization: Dequantization | None = None,
    samples: int = 1,
    trace: Trace | None = None,
    solver: Solver | None = None,
    seeds: Sequence[int] | None = None,
    start: str = "data",
    batch_size: int = 256,
    progress: bool = False,
    inflation: float = 1e-3,
) -> BitsPerDim:
    """Return the bits per dimension of images of integer grey levels.

    Args:
        model: the model, in eval mode.
        images: integer grey levels (N, *), of any dtype, on any device; each batch is sent to the model's device.
        transform: map from grey levels (and the values between them) to model space; or a `DataMap`, which includes the
            dequantisation.
        cond: condition with leading dimension N, short for `model.given(cond)`.
        dequantization: `Uniform()` by default, `TruncatedNormal()` or a trained `Variational`; use the one that the
            network was trained for.
        samples: K dequantisations per image, averaged in probability (an importance-weighted bound, 1509.00519).
        trace, solver: see `log_prob`.
        seeds: one integer per image; default 0, 1, 2, ..., so that the result is reproducible.
        start: "data" takes the dequantised values as x(t_min), as the published code does (`TruncatedNormal` sets
            another time). "perturb" adds noise up to t_min to the values, and the residual term of a Gaussian decoder
            to log p, which gives a lower bound on the likelihood (2101.09258, B.2).
        batch_size: number of images in a batch.
        progress: whether to show a progress bar.
        inflation: with samples > 1, the largest accepted bias due to a random trace, in bits per dimension. The log of
            the mean of exp(noisy log p) is too large by half the variance of the noise, and is then no lower bound.

    Warns:
        AboveUniform: the mean is above log2(levels), the value of the uniform distribution over all grey levels; where
            the transform does not declare their number, over the integers from 0 to the largest value.
        UserWarning: see `log_prob`.

    Raises:
        ValueError: the images are not integers from 0 to `transform.levels` - 1 (continuous data has no bits: use
            `log_prob`, in nats), samples < 1, `start` is unknown or not allowed by the dequantisation, or K > 1 with a
            trace that is too noisy.
        Incomplete: the solver failed for some images, which the message lists; `result` has the values of the others.
    """
    trace, solver, count = trace_for(solver, trace), solver or DEFAULT_SOLVER, len(images)
    model, data_map = with_density(model, cond), levels_map(transform, dequantization)
    time, seeds = data_map.start(model.sde), range(count) if seeds is None else seeds
    check_samples(samples, start, data_map, model.sde)
    check_integer("batch_size", batch_size, 1)
    _check_images(images, seeds, data_map)
    device, unit = device_of(model) or images.device, dimensions(images) * math.log(2)
    batches = []
    for first in progress_bar(range(0, count, batch_size), title="bits/dim", unit="batch", shown=progress):
        part = slice(first, first + batch_size)
        levels, stream = send(images[part], device), RandomStream(seeds=seeds[part])
        solve = partial(_solve_levels, model.rows(part, count), levels, data_map, trace, solver, stream, start)
        batches.append(torch.stack([solve() for _ in range(samples)], dim=1))
    values, stderr, nfe, backward, status, mismatches = torch.cat(batches, dim=2)  # each (K, N)
    mismatch = warn_of_mismatch(model.sde, mismatches[0])
    per_image = -(values.logsumexp(dim=0) - math.log(samples)) / unit
    solved = torch.isfinite(per_image)
    # d log mean_k p_k / d log p_k is the share of p_k in the sum.
    shares, variances = values.softmax(dim=0), None if bool(stderr[:, solved].isnan().any()) else stderr.square()
    trace_stderr = None if variances is None else (shares.square() * variances).sum(dim=0).sqrt() / unit
    where = f"{start}, t_min={model.sde.t_min:g}"
    if time is not None:
        where = f"alpha x at t={time:.4g}, where sigma/alpha is the noise of the dequantisation"
    declared = {
        "quantity": "bits per dimension (upper bound, by dequantisation)",
        "dequantization": f"{data_map.dequantization}, {samples} per image",
        **conventions(model, data_map, trace, solver, where, mismatch),
    }
    if samples > 1 and bool(solved.any()):
        of_one = None if variances is None else float((shares * variances).sum(dim=0)[solved].mean())
        declared["inflation"] = _check_inflation(of_one, unit, inflation)
    per_image = torch.where(solved, per_image, math.nan)
    counts = nfe.sum(dim=0).long(), backward.sum(dim=0).long()
    worst = status.max(dim=0).values.long()
    result = BitsPerDim(*mean_and_error(per_image), per_image, declared, trace_stderr, *counts, worst)
    if not bool(solved.all()):
        raise Incomplete(describe_failures(per_image, worst), result)
    warn_if_above_uniform(result.mean, count_levels(images, data_map.levels))
    return result


def _solve_levels(
    model: BaseModel, levels: Tensor, data_map: DataMap, trace: Trace, solver: Solver, stream: RandomStream, start: str
) -> Tensor:
    """Return the log-probability of grey levels (B, *) for one dequantisation.

    The rows of the result, a float64 tensor (6, B) on the CPU, are: the value in nats, its standard error (NaN where
    unknown), network evaluations, products with Jacobians, status, and `prior_mismatches` in nats per dimension.
    """
    sde = model.sde
    with torch.no_grad(), counting() as count:
        x, nats = data_map.draw(levels.to(double(levels)), stream, sde)
        if start == "perturb":
            t, eps = float64(sde.t_min), stream.normal(x)
            errors, norms = squared_errors(model, x, t, eps)
            # log N(x; E[x_0 | x_t], (sigma/alpha)^2) - log q(x_t | x): log(2 pi) and log(sigma) cancel.
            nats = nats + (0.5 * (norms - errors) + dimensions(x) * sde.alpha(t).log())
            x = sde.perturb(x, t, eps)
    time = data_map.start(sde)
    carried = integrate(model, x, sde.t_min if time is None else time, sde.t_max, solver, trace, stream)
    solved = _log_prob(model, trace, carried, carried.x)
    stderr = torch.full_like(solved.value, math.nan) if solved.stderr is None else solved.stderr
    nfe, backward = solved.nfe + count.forward, solved.backward + count.backward
    rows = (solved.value + nats, stderr, nfe, backward, solved.status, prior_mismatches(sde, x, time))
    return torch.stack([float64(row.cpu()) for row in rows])


def _check_images(images: Tensor, seeds: Sequence[int], data_map: DataMap) -> None:
    if not len(images):
        raise ValueError("images must hold at least one image; got none")
    check_levels(images, data_map.levels)
    if len(seeds) != len(images):
        raise ValueError(f"expected one seed per sample, {len(images)} in all; got {len(seeds)}")


def check_samples(samples: int, start: str, data_map: DataMap, sde: SDE) -> None:
    """Raise ValueError if `bits_per_dim` does not accept the argument `samples` or `start`."""
    if not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be an integer, at least 1; got samples={samples!r}")
    if start not in ("data", "perturb"):
        raise ValueError(f"start must be 'data' or 'perturb'; got {start!r}")
    if start == "perturb" and data_map.start(sde) is not None:
        raise ValueError(
            f"start must be 'data' for a dequantisation that sets the start time itself ({data_map.dequantization}); "
            f"got {start!r}"
        )


def describe_failures(values: Tensor, status: Tensor) -> str:
    """Return an error message: which of the values (N,) are not finite, and the status of their solves."""
    failed = torch.nonzero(~torch.isfinite(values)).flatten()
    names = sorted({Status(int(s)).name for s in status[failed]} - {"OK"}) or ["non-finite value"]
    listed = f"the first at {failed[:8].tolist()}" if len(failed) > 8 else f"at {failed.tolist()}"
    return (
        f"the solver failed for {len(failed)} of {len(values)} samples, {listed} ({', '.join(names)}): give it more "
        "steps, or call log_prob on those samples to see the status of each"
    )


def _check_inflation(variance: float | None, unit: float, tolerance: float) -> str:
    """Return a description of the bias of log mean exp(log p) that is due to the noise of log p.

    Args:
        variance: variance of the noise of log p, nats^2; None if it is unknown.
        unit: one bit per dimension in nats, d log 2.
        tolerance: largest accepted bias, bits per dimension.

    Raises:
        ValueError: the bias is larger than `tolerance`.
    """
    bias = math.inf if variance is None else variance / 2 / unit
    if bias > tolerance:
        amount = "an unknown amount (one fixed probe)" if variance is None else f"{bias:.2g} bits/dim"
        raise ValueError(
            f"the trace is too noisy for samples > 1: averaging exp(noisy log p) inflates the likelihood by {amount}, "
            f"and inflation={tolerance:g} is allowed: use ExactTrace(), or more probes with resample=True"
        )
    return f"at most {bias:.1e} bits/dim, from the trace"
