r"""The likelihood of a run's model on a dataset, with error estimates.

The unit is bits per dimension for quantised data and nats per dimension for continuous data. Three errors of the mean
are reported separately:

population        standard deviation of the mean over other datasets of the same size. Its square is the variance
                  between samples, minus the Monte Carlo variance of each sample, divided by the number of samples.
Monte Carlo       standard deviation of the mean over other probes and dequantisations of the same samples, from the
                  squared differences between two evaluations of some samples with independent draws.
discretisation    change of the mean under a finer solve: the mean difference on some samples, with the same fixed
                  probe in both solves, so that it has no Monte Carlo noise.

The squares of the first two add up to the squared standard error over samples, the error to quote with the mean. The
third is a bias. An evidence bound for the reverse SDE is reported next to the likelihood of the probability flow.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from scoresde import bounds
from scoresde.arguments import MOST, Count, CountOrZero, EvenCount, Few, Range
from scoresde.build import Run
from scoresde.dequantization import (
    AboveUniform,
    DataMap,
    Dequantization,
    Incomplete,
    TruncatedNormal,
    count_levels,
    warn_if_above_uniform,
)
from scoresde.divergence import ExactTrace, Trace
from scoresde.evaluation.generation import check_count
from scoresde.evaluation.references import evenly_spaced
from scoresde.evaluation.resumable import Numbers, directory_for, evaluate, fingerprint
from scoresde.likelihood import (
    BitsPerDim,
    LogProb,
    bits_per_dim,
    check_samples,
    conventions,
    describe_failures,
    log_prob,
    trace_for,
)
from scoresde.losses import Nodes
from scoresde.prior_mismatch import prior_mismatches
from scoresde.probability_flow import DEFAULT_SOLVER
from scoresde.protocols import Condition
from scoresde.random_stream import RandomStream
from scoresde.score import device_of
from scoresde.solvers import Solver
from scoresde.tensors import dimensions, mean_and_error, send
from scoresde.training.batches import split_condition

PARTIAL = "likelihood"
FORMAT = 2  # of the stored results of batches; those of another format are not read
REPEATED = 2**31  # added to the seed of a sample for its second, independent evaluation
BOUNDS = ("continuous", "discrete")

Tasks = dict[str, tuple[Tensor, Callable[[Tensor], Numbers]]]


@dataclass(frozen=True)
class Budget:
    """The evaluations spent on the error estimates and the evidence bound of a likelihood.

    Args:
        samples: number of samples, evenly spaced in the dataset, that are evaluated a second time and with a finer
            solve; 0 skips these error estimates.
        bound: the evidence bound to report, "continuous" or "discrete"; None for no bound.
        bound_draws: evaluations of each sample for the bound, an even number.
        nodes: number of times of the discrete chain, equally spaced in log-SNR from the time at which the noise fits
            into a grey level.

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


@dataclass
class DatasetLikelihood:
    """Mean negative log-likelihood of a dataset, per dimension.

    Attributes:
        unit: "bits/dim" or "nats/dim".
        mean, stderr: the mean over samples and its standard error (None for one sample).
        per_sample: the values of the samples, (N,).
        conventions: the choices that affect the values (solver, trace, dequantisation, ...), by name.
        nfe, backward: mean numbers of network evaluations and of products with Jacobians per sample.
        population, monte_carlo: the two parts of stderr, see the module docstring; None if not measured.
        discretisation: the change of the mean under a finer solve; None if not measured.
        bound, bound_conventions: the mean of an evidence bound and its conventions; None if not measured.
    """

    unit: str
    mean: float
    stderr: float | None
    per_sample: Tensor
    conventions: dict[str, str]
    nfe: float
    backward: float
    population: float | None = None
    monte_carlo: float | None = None
    discretisation: Estimate | None = None
    bound: Estimate | None = None
    bound_conventions: dict[str, str] = field(default_factory=dict)


def evaluate_likelihood(
    run: Run,
    dataset: Dataset,
    dequantization: Dequantization | None,
    trace: Trace | None = None,
    solver: Solver | None = None,
    samples: Few = 1,
    batch_size: Count = 256,
    progress: bool = True,
    budget: Budget | None = None,
    seed: int = 0,
    start: str = "data",
) -> DatasetLikelihood:
    """Return the likelihood of a dataset under a run's model. Sample i draws from seed + i, whatever its batch.

    Under torchrun the batches are shared among processes, with the same result. Finished batches are stored in
    `<run>/likelihood` until all are complete, so that an interrupted evaluation resumes.

    Args:
        run: supplies the model and its transform.
        dataset: items are states in data units, or (state, condition); an item must be the same at every access.
        dequantization: dequantisation of integer grey levels, for a result in bits per dimension; None for continuous
            data, for a result in nats per dimension.
        trace, solver, samples, start: see `likelihood.bits_per_dim`.
        batch_size: samples at a time.
        progress: show a progress bar.
        budget: evaluations spent on error estimates and an evidence bound; by default neither is computed.
        seed: the seed of the first sample.

    Warns:
        UserWarning: the network was not trained on data dequantised in this way, the evidence bound cannot be
            computed, or the bits per dimension are above log2(number of grey levels).

    Raises:
        ValueError: an empty dataset, and see `likelihood.bits_per_dim`.
        Incomplete: the solver failed for some samples. The message lists them and has the mean of the others; `result`
            has their likelihoods, and NaN for the failed ones and for the mean.
        Interrupted: Ctrl-C.
    """
    check_settings(run, dataset, dequantization, samples=samples, batch_size=batch_size, start=start)
    count = len(dataset)  # type: ignore[arg-type]
    trace, solver, budget = trace_for(solver, trace), solver or DEFAULT_SOLVER, budget or Budget(0, None)
    _warn_if_untrained(run, dequantization)
    evaluation = _Evaluation(run, dataset, dequantization, trace, solver, samples, seed, start)
    budget = evaluation.feasible(budget)
    every, subset = torch.arange(count), evenly_spaced(count, budget.samples)
    contents = fingerprint(run.model, run.transform, evaluation.tensors(every.split(batch_size)))
    settings = [*map(str, (FORMAT, trace, solver, dequantization, samples, batch_size, budget, seed, start)), contents]
    parts = {
        f"{name}-{i:06d}": partial(function, batch)
        for name, (indices, function) in _tasks(evaluation, budget, every, subset).items()
        for i, batch in enumerate(indices.split(batch_size) if len(indices) else ())
    }
    unit = "nats/dim" if dequantization is None else "bits/dim"
    with warnings.catch_warnings(action="ignore", category=AboveUniform):  # checked below, for all samples
        results = evaluate(parts, directory_for(run.path / PARTIAL, settings), unit, progress)
    likelihood = _summary(results, unit, subset)
    if dequantization is not None:
        levels = max(result["levels"] for part, result in results.items() if part.startswith("values-"))
        warn_if_above_uniform(likelihood.mean, levels)
    return likelihood


def check_settings(
    run: Run,
    dataset: Dataset,
    dequantization: Dequantization | None,
    samples: int = 1,
    batch_size: int = 256,
    start: str = "data",
    **_: Any,
) -> None:
    """Raise ValueError if `evaluate_likelihood` does not accept these arguments, which are cheap to check."""
    if not len(dataset):  # type: ignore[arg-type]
        raise ValueError("the dataset is empty: expected at least one sample")
    check_count("batch_size", batch_size)
    check_samples(samples, start, DataMap(run.transform, dequantization), run.model.sde)


@dataclass
class _Evaluation:
    """Likelihoods and bounds of batches of a dataset; a batch is given by the indices of its samples."""

    run: Run
    dataset: Dataset
    dequantization: Dequantization | None
    trace: Trace
    solver: Solver
    samples: int
    seed: int
    start: str

    def values(self, indices: Tensor) -> Numbers:
        """Return negative log-likelihoods per dimension, NaN where the solver failed, their cost and conventions."""
        x, cond, seeds = self._load(indices)
        model, data_map = self.run.model, DataMap(self.run.transform, self.dequantization)
        result: LogProb | BitsPerDim
        bits: BitsPerDim
        try:
            if self.dequantization is None:
                state, nats = data_map.draw(send(x, device_of(model) or x.device), RandomStream(seeds=seeds), model.sde)
                result = log_prob(model, state, cond, self.trace, self.solver, seeds)
                values = -(result.value + nats) / dimensions(x)
                start, mismatch = f"data, t_min={model.sde.t_min:g}", float(prior_mismatches(model.sde, state).max())
                declared = conventions(model, data_map, self.trace, self.solver, start, mismatch)
                declared = {"quantity": "negative log-density, nats per dimension", **declared}
            else:
                shared: dict[str, Any] = {"trace": self.trace, "solver": self.solver, "seeds": seeds}
                try:
                    bits = bits_per_dim(model, x, data_map, cond, samples=self.samples, start=self.start, **shared)
                except Incomplete as error:
                    bits = error.result
                result, values, declared = bits, bits.per_image, bits.conventions
        except RuntimeError as error:
            raise RuntimeError(f"samples {indices[0]} to {indices[-1]} of the dataset: {error}") from error
        levels = None if self.dequantization is None else count_levels(x, data_map.levels)
        counts = {name: getattr(result, name).tolist() for name in ("nfe", "backward", "status")}
        return {"value": values.tolist(), **counts, "levels": levels, "conventions": declared}

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
        """Return the budget, without the bound if that fails for the first sample; called before the evaluation."""
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
        """Yield the weights of the dequantisation, and the states and conditions of the dataset."""
        yield from getattr(self.dequantization, "state_dict", dict)().values()
        for indices in batches:
            x, cond, _ = self._load(indices)
            yield from (x, *(cond.values() if isinstance(cond, dict) else [] if cond is None else [cond]))

    def _load(self, indices: Tensor) -> tuple[Tensor, Condition, list[int]]:
        """Return states and conditions on the CPU, and seeds."""
        items = default_collate([self.dataset[int(i)] for i in indices])
        return *split_condition(items, "cpu"), [self.seed + int(i) for i in indices]


def _tasks(evaluation: _Evaluation, budget: Budget, every: Tensor, subset: Tensor) -> Tasks:
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
    if budget.bound is not None:
        tasks["bound"] = every, partial(evaluation.bound, budget=budget)
    return tasks


def _summary(results: dict[str, Numbers], unit: str, subset: Tensor) -> DatasetLikelihood:
    """Combine the results of all parts, the batches of each task; raise Incomplete if the solver failed for samples."""

    def column(name: str, key: str = "value") -> Tensor:
        numbers = [value for part, result in results.items() if part.startswith(f"{name}-") for value in result[key]]
        return torch.tensor(numbers, dtype=torch.float64)

    values, again, coarse, fine, bound = (column(name) for name in ("values", "again", "coarse", "fine", "bound"))
    mean, stderr = mean_and_error(values)
    nfe, backward = (float(column("values", key).mean()) for key in ("nfe", "backward"))
    likelihood = DatasetLikelihood(unit, mean, stderr, values, results["values-000000"]["conventions"], nfe, backward)
    if bool((failed := ~torch.isfinite(values)).any()):
        solved = values[~failed]
        message = describe_failures(values, column("values", "status"))
        if len(solved):
            others = Estimate(*mean_and_error(solved))
            message += f". The other {len(solved)} have a mean of {others} {unit}, which is not that of the dataset"
        raise Incomplete(message, likelihood)
    if len(again):
        again = _finite("second evaluation", values[subset] - again)
    fine, bound = _finite("finer solve", fine - coarse), _finite("evidence bound", bound)
    if len(subset) and stderr is not None:
        noise = float(again.square().mean()) / 2 / len(values) if len(again) else 0.0
        likelihood.monte_carlo = math.sqrt(noise)
        likelihood.population = math.sqrt(max(stderr**2 - noise, 0.0))
    if len(fine):
        likelihood.discretisation = Estimate(*mean_and_error(fine))
    if len(bound):
        likelihood.bound = Estimate(*mean_and_error(bound))
        likelihood.bound_conventions = results["bound-000000"]["conventions"]
    return likelihood


def _finite(name: str, values: Tensor) -> Tensor:
    """Return the finite values; if there are others, warn that these samples have no `name`."""
    finite = values[torch.isfinite(values)]
    if missing := len(values) - len(finite):
        warnings.warn(f"{missing} of {len(values)} samples have no {name}: they are left out there", stacklevel=4)
    return finite


def _warn_if_untrained(run: Run, dequantization: Dequantization | None) -> None:
    """Warn if the network was trained on other states at the lowest time than those of this dequantisation."""
    if dequantization is None or (run.dequantization is None and not run.trained_on_levels):
        return
    trained = "no" if run.trained_on_levels else str(run.dequantization)
    start = DataMap(run.transform, dequantization).start(run.model.sde)
    if start != run.data_map.start(run.model.sde) or (run.trained_on_levels and start is None):
        warnings.warn(
            f"the network was trained with {trained} dequantisation and is evaluated with {dequantization}: expect a "
            "worse likelihood than from a network trained with the latter",
            stacklevel=3,
        )
