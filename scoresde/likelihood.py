"""Exact log-likelihood through the probability-flow ODE, and bits per dimension.

    log p(x) = log p_prior(x(t_max)) + integral of tr(d velocity / dx) dt from t_start to t_max,   x(t_start) = x

(1806.07366; 2011.13456, section 4.3 and eq. 39). `encode` and `decode` are the two directions of the same ODE;
`sample_with_log_prob` samples and evaluates in one pass.

Bits per dimension of integer levels x, dequantised to x + u with u ~ q(u | x), under an invertible transform T to model
space:

    bits/dim = -[log p(T(x + u)) + log|det T'| - log q(u | x)] / (d log 2).

Scaling data to [0, 1] or [-1, 1] changes log p and log|det T'| by opposite amounts: the figure stays.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde.counting import counting
from scoresde.dequantization import DataMap, Dequantization, levels_map
from scoresde.divergence import Hutchinson, Trace
from scoresde.flow import DEFAULT_SOLVER, Carried, carry, integrate, like
from scoresde.losses import squared_errors
from scoresde.progress import progress_bar
from scoresde.protocols import Model, Transform
from scoresde.random_stream import RandomStream
from scoresde.score import BaseModel, device_of
from scoresde.solvers import Solver, Status
from scoresde.tensors import dimensions, double, float64, mean_and_error, send, sum_dims
from scoresde.wrappers import as_model, require_density

INFLATION = 1e-3  # bits per dimension: what a random trace may add to an importance-weighted bound


@dataclass
class LogProb:
    """log p(x) per sample.

    value: nats (B,), float64. stderr: standard error of the trace estimate in nats (B,): zero of an exact trace,
    measured from two probes on, an upper bound (in mean square) of one fresh probe, None of one kept probe. latent:
    x(t_max), (B, *). nfe: evaluations of networks (B,), counted where they run; backward: products with their Jacobians
    beside them (B,). status: a `solvers.Status` per sample (B,); where it is not OK, value is NaN and latent the last
    sound state, at `time` (B,).
    """

    value: Tensor
    stderr: Tensor | None
    latent: Tensor
    nfe: Tensor
    backward: Tensor
    status: Tensor
    time: Tensor


@dataclass
class RoundTrip:
    """Data carried to the prior and back: latent and x (B, *); error, root mean square per dimension (B,), float64."""

    latent: Tensor
    x: Tensor
    error: Tensor


@dataclass
class BitsPerDim:
    """Bits per dimension of a set of images.

    mean: over images. stderr: of that mean, over images (None for one image). per_image: (N,), float64. conventions:
    everything that moves the number. trace_stderr: the part of each that comes from a random trace, in bits per
    dimension (N,), see `LogProb.stderr`. nfe, backward: evaluations and products with Jacobians of each image (N,), all
    its dequantisations together.
    """

    mean: float
    stderr: float | None
    per_image: Tensor
    conventions: dict[str, str]
    trace_stderr: Tensor | None
    nfe: Tensor
    backward: Tensor


def conventions(model: BaseModel, data_map: DataMap, trace: Trace, solver: Solver, start: str) -> dict[str, str]:
    """What moves any likelihood of a model, in words."""
    return {
        "density": f"of the probability flow of {model.density}",
        "start": start,
        "trace": str(trace),
        "solver": str(solver),
        "transform": str(data_map),
        "prior": f"N(0, {model.sde.prior_std:g}^2) at t_max={model.sde.t_max:g}",
    }


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
    """log p(x) in nats, by the probability-flow ODE.

    Args:
        model: the model, in eval mode.
        x: (B, *), taken as the state at t_start.
        cond: short for `model.given(cond)`.
        trace: `Hutchinson(probes=1)` by default, or `ExactTrace()`.
        solver: `flow.DEFAULT_SOLVER` if not given, of fixed cost; `solvers.AdaptiveAdams()` controls errors per sample.
        seeds: one per sample, for the probes; sample i then has the same value in any batch.
        t_start: t_min by default.
        generator: for the probes instead of seeds.
        differentiable: keep the graph of `value` and `latent`, in x and in the parameters; memory grows with the
            number of evaluations.

    Raises:
        ValueError: a model with active dropout, or whose flow has no density, a state that is not finite, a t_start out
            of range.
    """
    model = _with_density(model, cond)
    if not bool(torch.isfinite(x).all()):
        raise ValueError("finite states expected; got NaN or infinity in x")
    sde, trace, stream = model.sde, trace or Hutchinson(), RandomStream(generator, seeds, len(x))
    t_start = sde.t_min if t_start is None else t_start
    if not sde.t_min <= t_start < sde.t_max:
        raise ValueError(f"t_start in [{sde.t_min:g}, {sde.t_max:g}) expected; got {t_start}")
    return _log_prob(model, x, trace, solver, stream, t_start, differentiable)


def _with_density(model: Model, cond: Any) -> BaseModel:
    """The conditional model, if its flow has a density."""
    model = as_model(model, cond)
    require_density(model)
    return model


def _log_prob(
    model: BaseModel, x, trace, solver, stream: RandomStream, t_start: float, differentiable: bool = False
) -> LogProb:
    carried = integrate(model, x.to(double(x)), t_start, model.sde.t_max, None, solver, trace, stream, differentiable)
    with torch.set_grad_enabled(differentiable):
        value = model.sde.prior_log_prob(carried.x) + float64(carried.divergence).mean(dim=1)
    return _result(trace, carried, value, like(carried.x, x))


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
    """Samples x (B, *) of the probability flow and their log p(x), from one pass down from the prior.

    Args:
        model: the model, in eval mode.
        shape, x_T: the shape (B, *) of states drawn from the prior, or the states at t_max to start from.
        cond, trace, solver, seeds, generator: as of `log_prob`.
        device: of the states drawn; the model's by default.

    Raises:
        ValueError: a model with active dropout, or whose flow has no density; both or neither of shape and x_T.
    """
    model = _with_density(model, cond)
    if (shape is None) == (x_T is None):
        raise ValueError("a shape (B, *) or a starting state x_T expected, exactly one of them")
    start = x_T if x_T is not None else torch.empty(tuple(shape or ()), device=device or device_of(model))
    stream, z = RandomStream(generator, seeds, len(start)), start.to(double(start))
    if x_T is None:
        z = model.sde.prior_std * stream.normal(z)
    trace = trace or Hutchinson()
    carried = integrate(model, z, model.sde.t_max, model.sde.t_min, None, solver, trace, stream)
    value = model.sde.prior_log_prob(z) - float64(carried.divergence).mean(dim=1)
    return like(carried.x, start), _result(trace, carried, value, like(z, start))


def _result(trace: Trace, carried: Carried, value: Tensor, latent: Tensor) -> LogProb:
    ended = carried.status == Status.OK
    stderr = trace.standard_error(carried.divergence.detach(), carried.variance)
    if stderr is not None:
        stderr = torch.where(ended, float64(stderr.detach()), math.nan)
    value = torch.where(ended, value, math.nan)
    return LogProb(value, stderr, latent, carried.nfe, carried.backward, carried.status, carried.t)


def encode(
    model: Model, x: Tensor, cond: Any = None, solver: Solver | None = None, t_start: float | None = None
) -> Tensor:
    """The latent x(t_max) (B, *) of data x (B, *) taken as x(t_start), t_min by default.

    Raises:
        ValueError: a model with active dropout, or whose flow has no density.
        RuntimeError: samples that did not arrive.
    """
    model = _with_density(model, cond)
    return carry(model, x, model.sde.t_min if t_start is None else t_start, model.sde.t_max, None, solver)


def decode(
    model: Model, z: Tensor, cond: Any = None, solver: Solver | None = None, t_end: float | None = None
) -> Tensor:
    """The data x(t_end) (B, *), t_min by default, of a latent z (B, *) = x(t_max): the inverse of `encode`.

    Raises:
        ValueError: a model with active dropout, or whose flow has no density.
        RuntimeError: samples that did not arrive.
    """
    model = _with_density(model, cond)
    return carry(model, z, model.sde.t_max, model.sde.t_min if t_end is None else t_end, None, solver)


def round_trip(model: Model, x: Tensor, cond: Any = None, solver: Solver | None = None) -> RoundTrip:
    """Encode data x (B, *), decode it again, and say by how much it came back different."""
    latent = encode(model, x, cond, solver)
    back = decode(model, latent, cond, solver)
    return RoundTrip(latent, back, (sum_dims((back - x).square()) / dimensions(x)).sqrt())


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
    inflation: float = INFLATION,
) -> BitsPerDim:
    """Bits per dimension of images of integer levels.

    Args:
        model: the model, in eval mode.
        images: integer levels (N, *), of any dtype, on any device: batches of them are sent to the model's.
        transform: from levels (and the values between them) to model space, with its log-determinant; or a `DataMap`,
            which includes the dequantisation.
        cond: short for `model.given(cond)`, leading N.
        dequantization: `Uniform()` by default, `TruncatedNormal()` or a trained `Variational`: the one that the network
            was trained for.
        samples: K dequantisations per image, averaged in probability (an importance-weighted bound, 1509.00519).
        trace, solver: see `log_prob`.
        seeds: one per image; default 0, 1, 2, ..., so that the figure is reproducible.
        start: "data" takes the dequantised point as x(t_min), as the published code does (a truncated-normal
            dequantisation says itself at which time its points are states). "perturb" noises it to t_min and adds the
            Gaussian decoder's residual term, a lower bound on the likelihood (2101.09258, B.2).
        batch_size: images at a time.
        progress: show a progress bar.
        inflation: with samples > 1, the largest accepted effect of a random trace, bits per dimension: the mean of
            exp(noisy log p) is too large by half the variance of the noise, which no longer is a bound.

    Raises:
        ValueError: values that are not integers (continuous data has no bits: use `log_prob`, in nats), samples < 1,
            an unknown start, one that the dequantisation does not allow, or K > 1 with a trace that is too noisy.
        RuntimeError: a solve that failed, with the images concerned.
    """
    trace, solver = trace or Hutchinson(), solver or DEFAULT_SOLVER
    images = images.byte() if images.dtype == torch.bool else images
    _check_bits(images, samples, start)
    model, data_map = _with_density(model, cond), levels_map(transform, dequantization)
    time = data_map.start(model.sde)
    if time is not None and start == "perturb":
        raise ValueError(f"start='data' expected: {data_map.dequantization} says at which time its points are states")
    seeds, count = range(len(images)) if seeds is None else seeds, len(images)
    if len(seeds) != count:
        raise ValueError(f"one seed per sample expected, {count} of them; got {len(seeds)}")
    rows: list[_Bound] = []
    device = device_of(model) or images.device
    for first in progress_bar(range(0, count, batch_size), title="bits/dim", unit="batch", shown=progress):
        part = slice(first, first + batch_size)
        one = _Solve(model.rows(part, count), data_map, trace, solver, RandomStream(seeds=seeds[part]), start, time)
        batch = send(images[part], device)
        rows.append(_Bound.of([one(batch) for _ in range(samples)]))
    unit = dimensions(images) * math.log(2)
    per_image = -torch.cat([row.value for row in rows]).cpu() / unit
    if len(failed := torch.nonzero(~torch.isfinite(per_image)).flatten().tolist()):
        statuses = sorted({Status(int(s)).name for row in rows for s in row.status.unique()} - {"OK"})
        statuses = statuses or ["a value that is not finite"]
        raise RuntimeError(
            f"the solver failed for {len(failed)} of {len(images)} images, {failed[:8]} first ({', '.join(statuses)}): "
            "give it more steps, or look at those images with log_prob, which returns a status"
        )
    variance, of_one = (
        None if getattr(rows[0], name) is None else torch.cat([getattr(row, name) for row in rows]).cpu()
        for name in ("variance", "of_one")
    )
    if time is None:
        where = f"{start}, t_min={model.sde.t_min:g}"
    else:
        where = f"alpha x at t={time:.4g}, where sigma/alpha is the dequantisation's"
    declared = {
        "quantity": "bits per dimension (upper bound, by dequantisation)",
        "dequantization": f"{data_map.dequantization}, {samples} per image",
        **conventions(model, data_map, trace, solver, where),
    }
    if samples > 1:
        declared["inflation"] = _check_inflation(of_one, unit, inflation)
    trace_stderr = None if variance is None else variance.sqrt() / unit
    nfe, backward = (torch.cat([getattr(row, name) for row in rows]).cpu() for name in ("nfe", "backward"))
    return BitsPerDim(*mean_and_error(per_image), per_image, declared, trace_stderr, nfe, backward)


@dataclass
class _Bound:
    """log of the mean of K likelihoods, nats (B,); their trace variance, of that value and of one of them on average
    (B,), or None; evaluations and products with Jacobians; statuses."""

    value: Tensor
    variance: Tensor | None
    of_one: Tensor | None
    nfe: Tensor
    backward: Tensor
    status: Tensor

    @classmethod
    def of(cls, solves: Sequence[LogProb]) -> "_Bound":
        values = torch.stack([solve.value for solve in solves])
        value = values.logsumexp(dim=0) - math.log(len(solves))
        squares = [solve.stderr.square() for solve in solves if solve.stderr is not None]
        variance = of_one = None
        if squares:  # d value / d value_k is the share of the k-th likelihood in their sum
            shares, of_each = values.softmax(dim=0), torch.stack(squares)
            variance, of_one = (shares.square() * of_each).sum(dim=0), (shares * of_each).sum(dim=0)
        status = torch.stack([solve.status for solve in solves]).amax(dim=0)
        nfe, backward = (torch.stack([getattr(s, name) for s in solves]).sum(dim=0) for name in ("nfe", "backward"))
        return cls(value, variance, of_one, nfe, backward, status)


@dataclass
class _Solve:
    """What takes levels (B, *) to their log-probability by one dequantisation."""

    model: BaseModel
    data_map: DataMap
    trace: Trace
    solver: Solver
    stream: RandomStream
    start: str
    time: float | None

    def __call__(self, images: Tensor) -> LogProb:
        """In nats; the latent and the evaluations of its solve."""
        sde = self.model.sde
        with torch.no_grad(), counting() as count:
            x, nats = self.data_map.draw(images.to(double(images)), self.stream, sde)
            if self.start == "perturb":
                x, residual = _perturb(self.model, x, self.stream)
                nats = nats + residual
        time = sde.t_min if self.time is None else self.time
        solve = _log_prob(self.model, x, self.trace, self.solver, self.stream, time)
        solve.value = solve.value + nats
        solve.nfe, solve.backward = solve.nfe + count.forward, solve.backward + count.backward
        return solve


def _check_bits(images: Tensor, samples: int, start: str) -> None:
    if not len(images):
        raise ValueError("one image or more expected; got none")
    if not bool((images == images.round()).all()):
        raise ValueError("integer grey levels expected; continuous data has no bits per dimension: use log_prob (nats)")
    if samples < 1:
        raise ValueError(f"one sample or more expected; got samples={samples}")
    if start not in ("data", "perturb"):
        raise ValueError(f"start 'data' or 'perturb' expected; got {start!r}")


def _check_inflation(variance: Tensor | None, unit: float, tolerance: float) -> str:
    """What the noise of a trace adds to a mean of probabilities, in words; variances in nats^2 (N,)."""
    estimate = math.inf if variance is None else float(variance.mean()) / 2 / unit
    if estimate > tolerance:
        known = "unknown of a single kept probe" if variance is None else f"{estimate:.2g} bits/dim"
        raise ValueError(
            f"an ExactTrace expected with samples > 1: averaging exp(noisy log p) inflates the likelihood, here by an "
            f"amount {known}, beyond inflation={tolerance:g}; take ExactTrace(), or more fresh probes"
        )
    return f"at most {estimate:.1e} bits/dim, from the trace"


def _perturb(model: BaseModel, x: Tensor, stream: RandomStream) -> tuple[Tensor, Tensor]:
    """(x_t at t_min, log N(x; E[x_0 | x_t], (sigma/alpha)^2) - log q(x_t | x) in nats (B,))."""
    sde, eps = model.sde, stream.normal(x)
    t = torch.tensor(sde.t_min, dtype=torch.float64)
    errors, norms = squared_errors(model, x, t, eps)
    # Both densities share log(2 pi) and log(sigma); what is left of the scales is log(alpha), once per dimension.
    return sde.perturb(x, t, eps), 0.5 * (norms - errors) + dimensions(x) * sde.alpha(t).log()
