"""Likelihoods and evidence bounds of single batches, from which `dataset_likelihood` evaluates a dataset."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from scoresde import bounds
from scoresde.arguments import MOST, CountOrZero, EvenCount, Range
from scoresde.bits import PRIOR, BitsPerDim, bits_per_dim, bound_terms
from scoresde.build import Run
from scoresde.dequantization import (
    AboveUniform,
    DataMap,
    Dequantization,
    Incomplete,
    TruncatedNormal,
    count_levels,
)
from scoresde.divergence import ExactTrace, Trace
from scoresde.evaluation.resumable import Numbers
from scoresde.likelihood import LogProb, conventions, log_prob
from scoresde.losses import Nodes
from scoresde.multilevel_bits import seeds_of
from scoresde.prior_mismatch import prior_mismatches
from scoresde.protocols import Condition, by_name
from scoresde.random_stream import RandomStream
from scoresde.score import device_of
from scoresde.solvers import Solver
from scoresde.tensors import dimensions, mean_and_error, send
from scoresde.training.batches import split_condition

REPEATED = 2**31  # added to the seed of a sample for its second, independent evaluation
BOUNDS = ("continuous", "discrete")

Tasks = dict[str, tuple[Tensor, Callable[[Tensor], Numbers]]]


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error (None for a single sample); an error of 0 or None is not printed."""

    mean: float
    stderr: float | None

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" +- {four_decimals(self.stderr)}" if self.stderr else "")


def four_decimals(error: float) -> str:
    """Return an error as text with four decimals, or with an exponent if all four would be zero."""
    return f"{error:.4f}" if error >= 5e-5 else f"{error:.1e}"


@dataclass(frozen=True)
class Budget:
    """The evaluations spent on the error estimates and the evidence bound of a likelihood.

    Args:
        samples: number of samples, evenly spaced in the dataset, that are evaluated a second time and with a finer
            solve; 0 skips these error estimates.
        bound: the evidence bound to report, "continuous" or "discrete"; None for no bound.
        bound_draws: evaluations of each sample for the bound, an even number.
        nodes: number of times of the Markov chain behind the discrete bound (`bounds.discrete`). They are equally
            spaced in log-SNR, from the time at which the noise fits into a grey level (`TruncatedNormal`).

    Raises:
        ValueError: an argument is out of range.
    """

    samples: CountOrZero = 64
    bound: str | None = "continuous"
    bound_draws: EvenCount = 32
    nodes: Annotated[int, Range(2, MOST)] = 1000

    def __post_init__(self):
        if self.samples < 0 or self.samples == 1:
            raise ValueError(f"budget.samples must be 0, or at least 2; got {self.samples}")
        if self.bound is not None and self.bound not in BOUNDS:
            raise ValueError(f"budget.bound must be one of {', '.join(BOUNDS)} or null; got {self.bound!r}")
        most = 2 * (self.nodes - 1)
        if self.bound_draws % 2 or not 2 <= self.bound_draws <= most:
            raise ValueError(
                f"budget.bound_draws must be even and from 2 to 2 (nodes - 1) = {most}; got {self.bound_draws}"
            )


@dataclass
class BatchLikelihood:
    """Likelihoods and bounds of batches of a dataset; a batch is given by the indices of its samples."""

    run: Run
    dataset: Dataset
    dequantization: Dequantization | None
    trace: Trace
    solver: Solver
    samples: int
    seed: int
    start: str
    conditional: bool = True

    def values(self, indices: Tensor, repeats: Tensor | None = None) -> Numbers:
        """Return negative log-likelihoods per dimension, NaN where the solver failed, their cost and conventions.

        `repeats` (B,) are numbers of independent repetitions with other draws; default 0.
        """
        x, cond, seeds = self._load(indices, repeats)
        model, data_map = self.run.model, DataMap(self.run.transform, self.dequantization)
        result: LogProb | BitsPerDim
        bits: BitsPerDim
        terms: dict[str, Tensor]
        try:
            if self.dequantization is None:
                data, stream = send(x, device_of(model) or x.device), RandomStream(seeds=seeds)
                state, drawn = data_map.draw_terms(data, stream, model.sde)
                result = log_prob(model, state, cond, self.trace, self.solver, seeds)
                terms = bound_terms([{PRIOR: result.value} | drawn], -dimensions(x))
                values = -(result.value + torch.stack(list(drawn.values())).sum(dim=0)) / dimensions(x)
                stated = None if result.stderr is None else result.stderr / dimensions(x)
                start, mismatch = f"data, t_min={model.sde.t_min:g}", float(prior_mismatches(model.sde, state).max())
                declared = conventions(model, data_map, self.trace, self.solver, start, mismatch)
                kind = f" (upper bound, {data_map.bounds})" if terms else ""
                declared = {"quantity": f"negative log-density, nats per dimension{kind}", **declared}
            else:
                shared: dict[str, Any] = {"trace": self.trace, "solver": self.solver, "seeds": seeds}
                try:
                    bits = bits_per_dim(model, x, data_map, cond, samples=self.samples, start=self.start, **shared)
                except Incomplete as error:
                    bits = error.result
                result, values, stated, declared = bits, bits.per_image, bits.trace_stderr, bits.conventions
                terms = bits.terms
        except RuntimeError as error:
            raise RuntimeError(f"samples {indices[0]} to {indices[-1]} of the dataset: {error}") from error
        if names := by_name(cond):
            declared = {**declared, "condition": f"given {' and '.join(names)}"}
        elif not self.conditional:
            declared = {**declared, "condition": "none: the network without its conditions"}
        levels = None if self.dequantization is None else count_levels(x, data_map.levels)
        counts = {name: getattr(result, name).tolist() for name in ("nfe", "backward", "status")}
        errors = None if stated is None else stated.tolist()
        numbers = {"value": values.tolist(), "error": errors, **counts, "levels": levels, "conventions": declared}
        numbers["terms"] = {name: part.tolist() for name, part in terms.items()}
        squared_error = getattr(self.run.transform, "squared_error", None)  # of an autoencoder
        return {**numbers, "squared_error": [] if squared_error is None else squared_error(x).tolist()}

    def bound(self, indices: Tensor, budget: Budget) -> Numbers:
        """Return evidence bounds, NaN for samples without one, and their conventions."""
        try:
            bound = self._bound(indices, budget)
        except Incomplete as error:
            bound = error.result
        return {"value": bound.per_image.tolist(), "conventions": bound.conventions}

    def _bound(self, indices: Tensor, budget: Budget) -> bounds.Bound:
        x, cond, seeds = self._load(indices)
        model, transform = self.run.model, self.run.transform
        shared: dict[str, Any] = {"cond": cond, "draws": budget.bound_draws, "seeds": seeds}
        if budget.bound == "continuous":
            return bounds.continuous(model, x, transform, dequantization=self.dequantization, **shared)
        # Start at the time of the dequantised states; if that is t_min, at the time when noise fits into a grey level.
        start = DataMap(transform, self.dequantization).start(model.sde)
        start = TruncatedNormal().start(model.sde, transform) if start is None else start
        return bounds.discrete(model, x, transform, times=Nodes(budget.nodes, "log_snr", start), **shared)

    def feasible(self, budget: Budget) -> Budget:
        """Return the budget; warn and leave out the bound if it cannot be computed for the first sample."""
        if budget.bound is None or self.dequantization is None:
            return replace(budget, bound=None)
        try:
            with warnings.catch_warnings(action="ignore", category=AboveUniform):
                self._bound(torch.tensor([0]), replace(budget, bound_draws=2))
        except (ValueError, RuntimeError) as error:
            warnings.warn(f"no {budget.bound} evidence bound is reported: {error}", stacklevel=3)
            return replace(budget, bound=None)
        return budget

    def tensors(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the tensors to hash: the dequantisation's weights, and the states and conditions of the dataset."""
        yield from getattr(self.dequantization, "state_dict", dict)().values()
        for indices in batches:
            x, cond, _ = self._load(indices)
            yield from (x, *(cond.values() if isinstance(cond, dict) else [] if cond is None else [cond]))

    def _load(self, indices: Tensor, repeats: Tensor | None = None) -> tuple[Tensor, Condition, list[int]]:
        """Return the states and conditions of a batch, on the CPU, and the seeds of its samples."""
        items = default_collate([self.dataset[int(i)] for i in indices])
        x, cond = split_condition(items, "cpu")
        seeds = [self.seed + int(i) for i in indices]
        if repeats is not None:
            seeds = seeds_of(seeds, torch.arange(len(seeds)), repeats)
        return x, cond if self.conditional else None, seeds


def tasks_of(evaluation: BatchLikelihood, budget: Budget, every: Tensor, subset: Tensor) -> Tasks:
    """Return {task: (indices of samples, function that evaluates a batch of indices)}.

    "values" are the likelihoods, "again" those from other random draws, "coarse" and "fine" those of two solves with
    the same fixed probe, and "bound" the evidence bounds.
    """
    tasks: Tasks = {"values": (every, evaluation.values)}
    if evaluation.dequantization is not None or not isinstance(evaluation.trace, ExactTrace):  # random values
        tasks["again"] = subset, replace(evaluation, seed=evaluation.seed + REPEATED).values
    if (finer := getattr(evaluation.solver, "finer", None)) is not None:
        coarse = replace(evaluation, samples=1, trace=evaluation.trace.kept())
        tasks |= {"coarse": (subset, coarse.values), "fine": (subset, replace(coarse, solver=finer()).values)}
    return tasks | bound_tasks(evaluation, budget, every)


def summands(results: Mapping[str, Numbers]) -> dict[str, Estimate]:
    """Return the means of the terms of the bound of an autoencoder, and of "kl"; none for other transforms.

    "kl" is the sum of "prior" and "entropy".
    """
    parts = [result["terms"] for part, result in results.items() if part.startswith("values-")]
    values = {name: torch.tensor([v for part in parts for v in part[name]], dtype=torch.float64) for name in parts[0]}
    if "entropy" in values:
        values["kl"] = values["prior"] + values["entropy"]
    return {name: Estimate(*mean_and_error(column)) for name, column in values.items()}


def bound_tasks(evaluation: BatchLikelihood, budget: Budget, every: Tensor) -> Tasks:
    """Return the task "bound" of `tasks_of`, or no task if the budget has no bound."""
    return {} if budget.bound is None else {"bound": (every, partial(evaluation.bound, budget=budget))}
