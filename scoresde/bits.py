"""Bits per dimension of images of integer grey levels.

Grey levels x are dequantised to x + u with u ~ q(u | x). Under an invertible transform T to model space,

    bits/dim = -[log p(T(x + u)) + log|det T'| - log q(u | x)] / (d log 2).

A transform whose cost is a bound, such as an autoencoder (`pipelines.latent`), has terms in place of log|det T'|.
`BitsPerDim.terms` holds them.

Scaling data to [0, 1] or [-1, 1] changes log p and log|det T'| by opposite amounts and leaves bits/dim unchanged.

With a tolerance, the mean is estimated by multilevel Monte Carlo (`scoresde.multilevel_bits`): a cheap solve of all
images, and the differences to more accurate ones on random subsets.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scoresde.counting import counting
from scoresde.data.transforms import CHANGE
from scoresde.dequantization import (
    AboveUniform,
    DataMap,
    Dequantization,
    Incomplete,
    check_levels,
    count_levels,
    levels_map,
    warn_if_above_uniform,
)
from scoresde.divergence import Trace
from scoresde.likelihood import conventions, log_prob_of, trace_for
from scoresde.losses import squared_errors
from scoresde.multilevel_bits import Draw, Draws, MultilevelLikelihood, multilevel_likelihood, seeds_of
from scoresde.prior_mismatch import prior_mismatches, warn_of_mismatch
from scoresde.probability_flow import DEFAULT_SOLVER, integrate
from scoresde.progress import progress_bar
from scoresde.protocols import Model, Transform
from scoresde.random_stream import RandomStream
from scoresde.result_table import Result, cost, counted, plus_minus, range_of, sample_columns, statuses, typical_error
from scoresde.score import BaseModel, device_of
from scoresde.sdes import SDE
from scoresde.solvers import Solver, Status
from scoresde.tensors import check_instance, check_integer, dimensions, double, float64, mean_and_error, send
from scoresde.wrappers import with_density

PRIOR = "prior"  # the term -log p of the states


@dataclass(repr=False)
class BitsPerDim(Result):
    """Bits per dimension of a set of images.

    mean: mean over images. stderr: standard error of that mean, over images (None for one image). per_image: (N,),
    float64. conventions: the settings that change the values: dequantisation, trace, solver, prior and time range.
    trace_stderr: the standard error of each image's value due to the stochastic trace estimate, in bits per dimension
    (N,), see `LogProb.stderr`. nfe, backward: network evaluations and products with Jacobians for each image
    (N,), summed over its dequantisations. status: a `solvers.Status` per image (N,), the worst of its dequantisations.
    multilevel: the error budget, if a tolerance was given; `stderr` then includes all of its errors, and `per_image`
    has the values of the first level plus the mean of the differences, with an error of `multilevel.accuracy`.
    terms: for a transform whose cost is a bound, such as an autoencoder, and samples=1: the summands of per_image by
    name, (N,) each, in bits per dimension; "prior" is -log p of the states, by the flow.
    """

    mean: float
    stderr: float | None
    per_image: Tensor
    conventions: dict[str, str]
    trace_stderr: Tensor | None
    nfe: Tensor
    backward: Tensor
    status: Tensor
    multilevel: MultilevelLikelihood | None = None
    terms: dict[str, Tensor] = field(default_factory=dict)

    def heading(self) -> str:
        return f"BitsPerDim of {counted(len(self.per_image), 'image')}"

    def columns(self) -> dict[str, list[Any]]:
        return sample_columns("bits_per_dim", "", self.per_image, self.trace_stderr, self.status, Status)

    def rows(self) -> dict[str, str]:
        return {
            "mean": f"{plus_minus(self.mean, self.stderr)} bits/dim",
            "range": range_of(self.per_image, "bits/dim"),
            "error": typical_error(self.trace_stderr, "bits/dim an image", "the trace"),
            "status": statuses(self.status, Status),
            "evaluations": cost(self.nfe, self.backward, "an image"),
            **self.conventions,
        }


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
    tolerance: float | None = None,
    levels: Sequence[int] | None = None,
    surrogate: Model | None = None,
) -> BitsPerDim:
    """Return the bits per dimension of images of integer grey levels, with their standard error.

        bits = -(log p(T(x + u)) + log|det dT| - log q(u | x)) / (d log 2),        u ~ q, d dimensions,

    an upper bound in expectation, with log p of `log_prob` and the dequantisation q (1511.01844; 2011.13456, section
    4.3).

        bits = ss.bits_per_dim(run.model, images, run.transform)
        print(bits.mean, bits.stderr, bits.conventions)

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
        tolerance: if given, estimate the mean over these images to within this error, in bits per dimension, by
            multilevel Monte Carlo; see `scoresde.multilevel_bits`. `solver` must have a number of steps, `trace` is
            that of the first level (default: as many fresh probes as the tolerance needs), and samples must be 1.
        levels: with a tolerance, the increasing numbers of steps; default `multilevel_bits.STEPS`.
        surrogate: with a tolerance, a model with an approximate likelihood of all images for level 0, and the attribute
            `solver`, such as a flow map of the model; the estimate is still that of `model`.

    Warns:
        AboveUniform: the mean is above log2(levels), the value of the uniform distribution over all grey levels; where
            the transform does not declare their number, over the integers from 0 to the largest value.
        UserWarning: see `log_prob`.

    Raises:
        ValueError: the images are not integers from 0 to `transform.levels` - 1 (continuous data has no bits: use
            `log_prob`, in nats), samples < 1, `start` is unknown or not allowed by the dequantisation, K > 1 with a
            trace that is too noisy or with a tolerance, levels or a surrogate without a tolerance, and see
            `multilevel_likelihood`.
        Incomplete: the solver failed for some images, which the message lists; `result` has the values of the others.
    """
    given, trace, solver, count = trace, trace_for(solver, trace), solver or DEFAULT_SOLVER, len(images)
    model, data_map = with_density(model, cond), levels_map(transform, dequantization)
    time, seeds = data_map.start(model.sde), range(count) if seeds is None else seeds
    check_samples(samples, start, data_map, model.sde, tolerance, levels)
    check_integer("batch_size", batch_size, 1)
    _check_images(images, seeds, data_map)
    if tolerance is not None:
        options: dict[str, Any] = {"start": start, "batch_size": batch_size}
        others = {"surrogate": None if surrogate is None else with_density(surrogate, cond)}
        return _multilevel(model, images, data_map, given, solver, seeds, tolerance, levels, options, **others)
    if surrogate is not None:
        check_surrogate(surrogate, tolerance)
    device, unit = device_of(model) or images.device, dimensions(images) * math.log(2)
    batches: list[Tensor] = []
    parts: list[dict[str, Tensor]] = []
    for first in progress_bar(range(0, count, batch_size), title="bits/dim", unit="batch", shown=progress):
        part = slice(first, first + batch_size)
        batch, stream = send(images[part], device), RandomStream(seeds=seeds[part])
        solve = partial(_solve_levels, model.rows(part, count), batch, data_map, trace, solver, stream, start)
        solved = [solve() for _ in range(samples)]
        batches.append(torch.stack([rows for rows, _ in solved], dim=1))
        parts.append(solved[0][1])
    values, stderr, nfe, backward, status, mismatches = torch.cat(batches, dim=2)  # each (K, N)
    mismatch = warn_of_mismatch(model.sde, mismatches[0])
    per_image = -(values.logsumexp(dim=0) - math.log(samples)) / unit
    is_solved = torch.isfinite(per_image)
    # d log mean_k p_k / d log p_k is the share of p_k in the sum.
    shares, variances = values.softmax(dim=0), None if bool(stderr[:, is_solved].isnan().any()) else stderr.square()
    trace_stderr = None if variances is None else (shares.square() * variances).sum(dim=0).sqrt() / unit
    where = f"{start}, t_min={model.sde.t_min:g}"
    if time is not None:
        where = f"alpha x at t={time:.4g}, where sigma/alpha is the noise of the dequantisation"
    declared = {
        "quantity": f"bits per dimension (upper bound, {data_map.bounds})",
        "dequantization": f"{data_map.dequantization}, {samples} per image",
        **conventions(model, data_map, trace, solver, where, mismatch),
    }
    if samples > 1 and bool(is_solved.any()):
        of_one = None if variances is None else float((shares * variances).sum(dim=0)[is_solved].mean())
        declared["inflation"] = _check_inflation(of_one, unit, inflation)
    per_image = torch.where(is_solved, per_image, math.nan)
    counts = nfe.sum(dim=0).long(), backward.sum(dim=0).long()
    worst = status.max(dim=0).values.long()
    result = BitsPerDim(*mean_and_error(per_image), per_image, declared, trace_stderr, *counts, worst)
    if samples == 1:
        result.terms = bound_terms(parts, -unit)
    if not bool(is_solved.all()):
        raise Incomplete(describe_failures(per_image, worst), result)
    warn_if_above_uniform(result.mean, count_levels(images, data_map.levels))
    return result


def _multilevel(
    model: BaseModel,
    images: Tensor,
    data_map: DataMap,
    trace: Trace | None,
    solver: Solver,
    seeds: Sequence[int],
    tolerance: float,
    levels: Sequence[int] | None,
    options: dict[str, Any],
    surrogate: BaseModel | None = None,
) -> BitsPerDim:
    """Return a multilevel estimate; the arguments are those of `bits_per_dim`."""
    declared: dict[str, str] = {}

    def draw_from(model: BaseModel, solver: Solver, trace: Trace, items: Tensor, repeats: Tensor) -> Draws:
        shared = {"trace": trace, "solver": solver, "seeds": seeds_of(seeds, items, repeats), **options}
        with warnings.catch_warnings(action="ignore", category=AboveUniform):  # checked below, for all images
            try:
                part = bits_per_dim(model.rows(items, len(images)), images[items.to(images.device)], data_map, **shared)
            except Incomplete as error:
                part = error.result
        if model is whole:
            declared.update(declared or part.conventions)
        return Draws(part.per_image, part.trace_stderr, part.nfe, part.backward)

    whole, cheap = model, None
    if surrogate is not None:
        check_surrogate(surrogate, tolerance)
        few: Any = surrogate.solver
        cheap = partial(draw_from, surrogate), few
    draw: Draw = partial(draw_from, model)
    found = multilevel_likelihood(draw, len(images), tolerance, solver, levels, trace, surrogate=cheap)
    declared |= found.conventions()
    warn_if_above_uniform(found.mean, count_levels(images, data_map.levels))
    cost, status = (found.nfe, found.backward), torch.full_like(found.nfe, Status.OK)
    return BitsPerDim(found.mean, found.stderr, found.per_sample, declared, None, *cost, status, found)


def bound_terms(parts: Sequence[dict[str, Tensor]], unit: float) -> dict[str, Tensor]:
    """Return the terms (N,) of a bound, divided by `unit`, from those of batches; none for an invertible transform."""
    terms = {name: torch.cat([part[name] for part in parts]) / unit for name in parts[0]}
    if not set(terms) - {CHANGE, PRIOR}:
        return {}
    return {name: values for name, values in terms.items() if name != CHANGE or bool(values.any())}


def _solve_levels(
    model: BaseModel, levels: Tensor, data_map: DataMap, trace: Trace, solver: Solver, stream: RandomStream, start: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the log-probability of grey levels (B, *) for one dequantisation, and its terms by name, nats (B,).

    The rows of the first result, a float64 tensor (6, B) on the CPU, are: the value in nats, its standard error (NaN
    where unknown), network evaluations, products with Jacobians, status, and `prior_mismatches` in nats per dimension.
    """
    sde = model.sde
    with torch.no_grad(), counting() as count:
        x, terms = data_map.draw_terms(levels.to(double(levels)), stream, sde)
        if start == "perturb":
            t, eps = float64(sde.t_min), stream.normal(x)
            errors, norms = squared_errors(model, x, t, eps)
            # log N(x; E[x_0 | x_t], (sigma/alpha)^2) - log q(x_t | x): log(2 pi) and log(sigma) cancel.
            terms[CHANGE] = terms[CHANGE] + (0.5 * (norms - errors) + dimensions(x) * sde.alpha(t).log())
            x = sde.perturb(x, t, eps)
    time = data_map.start(sde)
    carried = integrate(model, x, sde.t_min if time is None else time, sde.t_max, solver, trace, stream)
    solved = log_prob_of(model, trace, carried, carried.x)
    stderr = torch.full_like(solved.value, math.nan) if solved.stderr is None else solved.stderr
    nfe, backward = solved.nfe + count.forward, solved.backward + count.backward
    terms = {PRIOR: solved.value} | terms
    value = torch.stack(list(terms.values())).sum(dim=0)
    rows = (value, stderr, nfe, backward, solved.status, prior_mismatches(sde, x, time))
    return torch.stack([float64(row.cpu()) for row in rows]), {name: nats.cpu() for name, nats in terms.items()}


def _check_images(images: Tensor, seeds: Sequence[int], data_map: DataMap) -> None:
    if not len(images):
        raise ValueError("images must hold at least one image; got none")
    check_levels(images, data_map.levels)
    if len(seeds) != len(images):
        raise ValueError(f"expected one seed per sample, {len(images)} in all; got {len(seeds)}")


def check_surrogate(surrogate: Model, tolerance: float | None) -> None:
    """Raise ValueError for a surrogate without a tolerance, TypeError if the surrogate has no attribute `solver`."""
    if tolerance is None:
        raise ValueError("surrogate must come with a tolerance, the error to reach; got tolerance=None: give one")
    check_instance("surrogate.solver", getattr(surrogate, "solver", None), "__call__")


def check_samples(
    samples: int,
    start: str,
    data_map: DataMap,
    sde: SDE,
    tolerance: float | None = None,
    levels: Sequence[int] | None = None,
) -> None:
    """Raise ValueError if `bits_per_dim` does not accept this combination of arguments."""
    if not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be an integer, at least 1; got samples={samples!r}")
    if samples > 1 and tolerance is not None:
        raise ValueError(
            f"samples must be 1 with a tolerance; got {samples}: the log of a mean over dequantisations is biased by "
            "the noise of the trace; leave out the tolerance"
        )
    if levels is not None and tolerance is None:
        raise ValueError(f"levels need a tolerance, the error to reach; got levels={list(levels)} without one")
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
