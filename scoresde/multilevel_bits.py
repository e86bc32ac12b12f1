r"""Multilevel estimates of the mean negative log-likelihood of a test set.

The items of `multilevel.estimate` are the samples of the set, and the levels are solves of the probability flow with
more and more steps. A draw of a level has its own dequantisation and its own probes.

level 0        all samples, few steps, m probes drawn anew at every evaluation
level l        random samples, the difference between n_l and n_(l-1) steps, with the same dequantisation and the same
               probe, kept along both paths, so that its noise cancels

The expectation over probes is that of the exact trace at every level, because the path does not depend on the probes,
and the integral is linear in them. The terms therefore sum to the expectation of the last level.

With a surrogate, such as the jumps of a flow map, level 0 is its approximate value, which needs no probes, and level 1
the difference between n_1 steps of the model and the surrogate, with the same dequantisation. The sum is that of the
model, however wrong the surrogate is: its error only costs draws of level 1.

A draw whose path n_l steps do not resolve is solved with 2 n_l, 4 n_l, ... steps. Whether n_l steps resolve a path does
not depend on the probes, so n_l steps have the same expectation in both terms in which they occur.

The noise of level 0 has the variance W^2 = P^2 / m + D^2, with P^2 from the probes and D^2 from the dequantisation.
Differences with exact traces on a few samples cannot reduce W^2, since their variance would be P^2 itself. Probes share
the forward pass of an evaluation, so m > 1 is worth its cost unless one probe for each sample is enough: m is chosen
from 1, 2, 4, 8 by the variances of a pilot. A given trace keeps its own number of probes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from scoresde.divergence import Hutchinson, Trace
from scoresde.multilevel import APART, Level, Multilevel, estimate
from scoresde.solvers import Solver
from scoresde.solvers.solver import StepSolver, with_steps
from scoresde.tensors import check_integer, check_number

STEPS = (12, 24, 48, 96, 192, 384, 768)
PROBES = (1, 2, 4, 8)
PILOT = 16
PLAN = 1000 * APART  # repeats of the draws that choose m, apart from those of all levels
REPEAT = 2**64  # distance of the seeds of two repeats of a sample
DOUBLINGS = 4  # of the steps, before a draw counts as failed
BEFORE = 8  # passes of a solve before its first step: the scale of the data, and the check of the derivative


@dataclass
class Draws:
    """Negative log-likelihoods per dimension of draws, and their cost.

    value: float64 (n,), in bits or nats per dimension, NaN where the solver failed. trace_stderr: the standard error of
    each due to the probes (n,), None if unknown. nfe, backward: network evaluations and products with Jacobians, (n,).
    """

    value: Tensor
    trace_stderr: Tensor | None
    nfe: Tensor
    backward: Tensor


Draw = Callable[[StepSolver, Trace, Tensor, Tensor], Draws]
"""(solver, trace, items (n,), repeats (n,)) -> `Draws`; the randomness is a function of (item, repeat)."""


@dataclass
class MultilevelLikelihood:
    """A multilevel estimate of the mean negative log-likelihood per dimension of N samples.

    estimate: the estimate with its terms. per_sample: level 0 of each sample plus the sum of the differences, (N,),
    with the same mean as the estimate. accuracy: standard deviation of an entry of `per_sample` around the expected
    value of the last level. trace: the trace of level 0. probes, dequantization: the parts of the standard error of
    level 0 that are due to probes and to dequantisation; None with a given trace or a surrogate. nfe, backward: network
    evaluations and products with Jacobians spent on each sample, int64 (N,).
    """

    estimate: Multilevel
    per_sample: Tensor
    accuracy: float
    trace: Trace
    probes: float | None
    dequantization: float | None
    nfe: Tensor
    backward: Tensor

    @property
    def mean(self) -> float:
        return float(self.estimate.mean)

    @property
    def error(self) -> float:
        """The standard error of the mean for these samples, the bias of the last level included."""
        return float(self.estimate.error)

    @property
    def population(self) -> float:
        """The standard deviation of the mean over other sets of as many samples."""
        return float(self.estimate.population)  # type: ignore[arg-type]

    @property
    def stderr(self) -> float:
        """The standard error of the mean as an estimate for all data: `population` and `error` combined."""
        return math.hypot(self.population, self.error)

    def conventions(self) -> dict[str, str]:
        """Return a description of the choices that affect the value: the solver of the last level, and the trace."""
        steps = ", ".join(term.name for term in self.estimate.terms)
        return {"trace": f"{self.trace} at level 0, kept probes in the differences", "levels": steps}

    def terms(self) -> list[dict[str, Any]]:
        """Return the error budget: for each term its name, mean, standard error, and numbers of samples and draws."""
        return [
            {"name": t.name, "mean": float(t.mean), "stderr": float(t.stderr), "samples": t.items, "draws": t.draws}
            for t in self.estimate.terms
        ]


def multilevel_likelihood(
    draw: Draw,
    count: int,
    tolerance: float,
    solver: Solver,
    levels: Sequence[int] | None = None,
    trace: Trace | None = None,
    seed: int = 0,
    surrogate: tuple[Draw, StepSolver] | None = None,
) -> MultilevelLikelihood:
    """Estimate the mean negative log-likelihood of `count` samples to within a tolerance; see the module docstring.

    Args:
        draw: evaluates draws.
        count: number N of samples.
        tolerance: the error of the mean to reach beyond that of the choice of samples, per dimension.
        solver: a `StepSolver`, whose number of steps the levels replace.
        levels: numbers of steps, increasing; default `STEPS`.
        trace: the trace of level 0; by default Hutchinson's estimator with m probes.
        seed: determines the random subsets.
        surrogate: evaluates draws of a cheaper model, and its solver; see the module docstring.

    Raises:
        ValueError: see `check_multilevel` and `multilevel.estimate`.
    """
    levels = STEPS if levels is None else tuple(levels)
    check_multilevel(count, tolerance, solver, levels)
    meter = _Meter(draw, count)
    solvers = [with_steps(solver, steps) for steps in levels]
    variance = None
    if surrogate is not None:
        trace = trace or Hutchinson()
    if trace is None:
        trace, variance = _plan(meter, count, tolerance, solvers[0])
    kept = Hutchinson().kept() if variance is not None else trace.kept()
    passes = meter.passes_per_evaluation(solvers[0], trace)
    kept_passes = passes if variance is None else 2.0  # `kept` has as many probes as a given trace

    def first(items: Tensor, repeats: Tensor) -> Tensor:
        return meter(solvers[0], trace, items, repeats).value

    def difference(coarse: StepSolver, fine: StepSolver) -> Callable[[Tensor, Tensor], Tensor]:
        def values(items: Tensor, repeats: Tensor) -> Tensor:
            return meter(fine, kept, items, repeats).value - meter(coarse, kept, items, repeats).value

        return values

    terms = [Level(f"{levels[0]} steps", (levels[0] + 1) * passes + BEFORE, first)]
    if surrogate is not None:
        terms = _with_surrogate(terms[0], surrogate, trace, meter)
    for i, (few, many) in enumerate(pairwise(levels)):
        cost = kept_passes * (few + many + 2) + 2 * BEFORE
        terms.append(Level(f"{few} to {many} steps", cost, difference(*solvers[i : i + 2])))
    refined = 1 if surrogate is None else 2
    found = estimate(terms, tolerance, count, PILOT, repeated=2 * PILOT, seed=seed, refined=refined)
    return _summary(found, trace, variance, meter)


def _with_surrogate(level: Level, surrogate: tuple[Draw, StepSolver], trace: Trace, meter: "_Meter") -> list[Level]:
    """Return two levels in place of one: the values of a surrogate, and the difference of the level from them."""
    draw, solver = surrogate
    cheap = _Meter(draw, 0)
    cheap.nfe, cheap.backward = meter.nfe, meter.backward  # the same counts

    def value(items: Tensor, repeats: Tensor) -> Tensor:
        return cheap(solver, trace, items, repeats).value

    def difference(items: Tensor, repeats: Tensor) -> Tensor:
        return level.values(items, repeats) - value(items, repeats)

    cost = float(solver.steps)
    return [Level(f"surrogate, {solver}", cost, value), Level(f"{level.name} less it", level.cost + cost, difference)]


def check_multilevel(count: int, tolerance: float, solver: Solver, levels: Sequence[int]) -> None:
    """Raise ValueError unless these arguments of `multilevel_likelihood` are valid; TypeError for the wrong kind."""
    check_number("tolerance", tolerance, low=0)
    if not hasattr(solver, "steps"):
        raise ValueError(
            f"solver must have a number of steps for a multilevel estimate; got {solver}: use solvers.Adams(), or "
            "leave out the tolerance"
        )
    for i, steps in enumerate(levels):
        check_integer(f"levels[{i}]", steps, 1)
    if len(levels) < 2 or any(few >= many for few, many in pairwise(levels)):
        raise ValueError(f"levels must be at least two increasing numbers of steps; got {list(levels)}")
    if count < PILOT:
        raise ValueError(
            f"a multilevel estimate must have at least {PILOT} samples for its pilot; got {count}: leave out the "
            "tolerance"
        )


def seeds_of(seeds: Sequence[int], items: Tensor, repeats: Tensor) -> list[int]:
    """Return one seed for each draw; that of the repeat 0 of a sample is the sample's own."""
    return [int(seeds[i]) + REPEAT * r for i, r in zip(items.tolist(), repeats.tolist(), strict=True)]


class _Meter:
    """Evaluates draws and adds up their cost for each sample."""

    def __init__(self, draw: Draw, count: int):
        self.draw = draw
        self.nfe, self.backward = torch.zeros(2, count, dtype=torch.int64)

    def __call__(self, solver: StepSolver, trace: Trace, items: Tensor, repeats: Tensor) -> Draws:
        """Evaluate draws; those that fail with few steps again with more, see the module docstring."""
        draws = self._evaluate(solver, trace, items, repeats)
        for doubling in range(1, DOUBLINGS + 1):
            failed = ~torch.isfinite(draws.value)
            if not bool(failed.any()):
                break
            finer = with_steps(solver, solver.steps * 2**doubling)
            draws.value[failed] = self._evaluate(finer, trace, items[failed], repeats[failed]).value
        return draws

    def _evaluate(self, solver: StepSolver, trace: Trace, items: Tensor, repeats: Tensor) -> Draws:
        draws = self.draw(solver, trace, items, repeats)
        self.nfe.index_add_(0, items, draws.nfe.long().cpu())
        self.backward.index_add_(0, items, draws.backward.long().cpu())
        return draws

    def passes_per_evaluation(self, solver: StepSolver, trace: Trace) -> float:
        """Return the number of passes through the network, forward and backward, of an evaluation with its trace."""
        items = torch.zeros(1, dtype=torch.int64)
        once = self(solver, trace, items, items + PLAN)
        return 1 + max(float(once.backward.sum()) - 2, 0) / (solver.steps + 1)


def _plan(meter: _Meter, count: int, tolerance: float, solver: StepSolver) -> tuple[Trace, float]:
    """Return the trace of level 0 with the number of probes of the least cost, and P^2, from a pilot.

    PILOT samples are drawn twice with two probes. Half of the squared tolerance is assigned to level 0, which needs
    max(N, 2 W^2 / tolerance^2) draws.
    """
    items = torch.arange(count)[:: count // PILOT][:PILOT]
    both = torch.cat([items, items])
    draws = meter(solver, Hutchinson(probes=2), both, torch.arange(2).repeat_interleave(PILOT) + PLAN + 1)
    probes = 2 * float(draws.trace_stderr.square().nanmean())  # type: ignore[union-attr]
    first, second = draws.value.chunk(2)
    whole = float((first - second).square().nanmean()) / 2  # P^2 / 2 + D^2
    other = max(whole - probes / 2, probes / 64)

    def cost(m: int) -> float:
        needed = max(count, 2 * (probes / m + other) / tolerance**2)
        return needed * ((solver.steps + 1) * (1 + m) + BEFORE)

    return Hutchinson(probes=min(PROBES, key=cost)), probes


def _summary(found: Multilevel, trace: Trace, variance: float | None, meter: _Meter) -> MultilevelLikelihood:
    first, *others = found.terms
    per_sample = found.first + (found.mean - found.first.mean())
    noise = len(per_sample) * float(first.stderr.square())
    spread = noise + sum(float(term.between) for term in others)
    probes = dequantization = None
    if variance is not None:
        count = getattr(trace, "probes", 1)
        share = min(variance / count / max(float(first.within), variance / count), 1.0)
        probes, dequantization = (float(first.stderr) * math.sqrt(part) for part in (share, 1 - share))
    accuracy = math.sqrt(spread)
    cost = meter.nfe, meter.backward
    return MultilevelLikelihood(found, per_sample, accuracy, trace, probes, dequantization, *cost)
