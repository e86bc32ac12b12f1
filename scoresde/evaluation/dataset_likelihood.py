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
third is a bias. With a tolerance, the mean is a multilevel estimate (`scoresde.multilevel_bits`), whose terms take the
place of the last two. An evidence bound for the reverse SDE is reported next to the likelihood of the probability flow.

Data with labels y have the likelihood given the label, p(x | y). Two more values are reported: the cost of the label
itself, -log p(y) under the class frequencies of the training data, and the joint likelihood of sample and label, the
sum of the two.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from scoresde.arguments import Count, Distinct, Few, Positive
from scoresde.bits import check_samples, check_surrogate, describe_failures
from scoresde.build import Run
from scoresde.dequantization import (
    AboveUniform,
    DataMap,
    Dequantization,
    Incomplete,
    warn_if_above_uniform,
)
from scoresde.divergence import Trace
from scoresde.evaluation.batch_likelihood import (
    BatchLikelihood,
    Budget,
    Estimate,
    Tasks,
    bound_tasks,
    summands,
    tasks_of,
)
from scoresde.evaluation.dataset_multilevel import evaluate_multilevel
from scoresde.evaluation.generation import check_count
from scoresde.evaluation.labels import label_nats, labels_of
from scoresde.evaluation.references import evenly_spaced
from scoresde.evaluation.resumable import Numbers, directory_for, evaluate, fingerprint
from scoresde.likelihood import trace_for
from scoresde.multilevel_bits import STEPS, MultilevelLikelihood, check_multilevel
from scoresde.probability_flow import DEFAULT_SOLVER
from scoresde.solvers import Solver
from scoresde.tensors import dimensions, mean_and_error
from scoresde.training.batches import split_condition
from scoresde.training.locks import shared

PARTIAL = "likelihood"
FORMAT = 4  # of the stored results of batches; those of another format are not read


@dataclass
class DatasetLikelihood:
    """Mean negative log-likelihood of a dataset, per dimension.

    Attributes:
        unit: "bits/dim" or "nats/dim".
        mean, stderr: the mean over samples and its standard error (None for one sample).
        per_sample: the values of the samples, (N,).
        errors: standard errors of per_sample due to the stochastic trace, (N,), see `likelihood.LogProb.stderr`; None
            if they are unknown.
        status: a `solvers.Status` of each sample, (N,); None for a multilevel estimate.
        conventions: the choices that affect the values (solver, trace, dequantisation, ...), by name.
        nfe, backward: mean numbers of network evaluations and of products with Jacobians per sample.
        population, monte_carlo: the two parts of stderr, see the module docstring; None if not measured.
        discretisation: the change of the mean under a finer solve; None if not measured.
        bound, bound_conventions: the mean of an evidence bound and its conventions; None if not measured.
        label: mean of -log p(y) of the labels that the likelihood is given, in `unit`; None without labels, or if a
            class does not occur in the training data.
        joint: mean of -log p(x, y), the value of a sample plus -log p(y), in `unit`; None if `label` is None.
        summands: means of the summands of the bound of an autoencoder by name, see `bits.BitsPerDim.terms`, and "kl",
            the sum of "prior" and "entropy"; none for other transforms.
        reconstruction: root mean square error of an autoencoder's reconstructions, in data units; None without one.
        terms: name, mean, standard error, and numbers of samples and draws of each term of a multilevel estimate.
        beyond, bias: the standard error of a multilevel estimate for these samples, and the bias that it includes.
        parts: {cause: part of the standard error of the first term} of a multilevel estimate.
        accuracy: the error of an entry of per_sample of a multilevel estimate.
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
    label: Estimate | None = None
    joint: Estimate | None = None
    summands: dict[str, Estimate] = field(default_factory=dict)
    reconstruction: float | None = None
    terms: list[dict[str, Any]] = field(default_factory=list)
    beyond: float | None = None
    bias: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    accuracy: float | None = None
    errors: Tensor | None = None
    status: Tensor | None = None


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
    conditional: bool = True,
    training_labels: Mapping[str, Tensor] | None = None,
    tolerance: Positive | None = None,
    levels: Annotated[Sequence[Few], Distinct(least=2)] | None = None,
    surrogate: Run | None = None,
) -> DatasetLikelihood:
    """Return the likelihood of a dataset under a run's model. Sample i draws from seed + i in any batch.

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
        conditional: if True, the likelihood is given the conditions of the dataset; if False, it is that of the
            network without conditions, as condition dropout trains it.
        training_labels: labels of the training data by name, for the likelihood of the labels themselves.
        tolerance, levels: see `bits.bits_per_dim`; also for continuous data, in nats per dimension. The budget is then
            spent on the bound only.
        surrogate: with a tolerance, the run of a flow map that evaluates all samples as level 0, see
            `bits.bits_per_dim`; the estimate is still that of `run`.

    Warns:
        UserWarning: the network was not trained on data dequantised in this way, the evidence bound cannot be
            computed, or the bits per dimension are above log2(number of grey levels).

    Raises:
        ValueError: an empty dataset, and see `likelihood.bits_per_dim`.
        Incomplete: the solver failed for some samples. The message lists them and has the mean of the others; `result`
            has their likelihoods, and NaN for the failed ones and for the mean.
        Interrupted: Ctrl-C.
    """
    check_settings(
        run, dataset, dequantization, samples, batch_size, start, conditional, tolerance, levels, solver, surrogate
    )
    count = len(dataset)  # type: ignore[arg-type]
    given, trace, solver, budget = trace, trace_for(solver, trace), solver or DEFAULT_SOLVER, budget or Budget(0, None)
    _warn_if_untrained(run, dequantization)
    evaluation = BatchLikelihood(run, dataset, dequantization, trace, solver, samples, seed, start, conditional)
    budget = evaluation.feasible(budget)
    every, subset = torch.arange(count), evenly_spaced(count, budget.samples)
    contents = [fingerprint(run.model, run.transform, evaluation.tensors(every.split(batch_size)))]
    contents += [] if surrogate is None else [fingerprint(surrogate.model, surrogate.transform)]
    options = FORMAT, given, solver, dequantization, samples, batch_size, budget, seed, start, conditional, tolerance
    directory = directory_for(run.path / PARTIAL, [*map(str, (*options, levels)), *contents])
    unit = "nats/dim" if dequantization is None else "bits/dim"

    def results_of(tasks: Tasks) -> dict[str, Numbers]:
        parts = {
            f"{name}-{i:06d}": partial(function, batch)
            for name, (indices, function) in tasks.items()
            for i, batch in enumerate(indices.split(batch_size) if len(indices) else ())
        }
        return evaluate(parts, directory, unit, progress)

    with warnings.catch_warnings(action="ignore", category=AboveUniform):  # checked below, for all samples
        if tolerance is None:
            results = results_of(tasks_of(evaluation, budget, every, subset))
            grey_levels = max(
                (r["levels"] or 0 for part, r in results.items() if part.startswith("values-")), default=0
            )
            likelihood = _summary(results, unit, subset)
        else:
            with shared(directory):
                cheap = None if surrogate is None else replace(evaluation, run=surrogate)
                found, declared, grey_levels = evaluate_multilevel(
                    evaluation, tolerance, levels, given, batch_size, directory, unit, progress, cheap
                )
                likelihood = _of_multilevel(found, declared, unit)
                _add_bound(likelihood, results_of(bound_tasks(evaluation, budget, every)))
    if training_labels and conditional:
        add_labels(likelihood, dataset, training_labels)
    if dequantization is not None:
        warn_if_above_uniform(likelihood.mean, grey_levels)
    return likelihood


def check_settings(
    run: Run,
    dataset: Dataset,
    dequantization: Dequantization | None,
    samples: int = 1,
    batch_size: int = 256,
    start: str = "data",
    conditional: bool = True,
    tolerance: float | None = None,
    levels: Sequence[int] | None = None,
    solver: Solver | None = None,
    surrogate: Run | None = None,
    **_: Any,
) -> None:
    """Raise ValueError if `evaluate_likelihood` would refuse these arguments; the network is not evaluated."""
    if not len(dataset):  # type: ignore[arg-type]
        raise ValueError("the dataset is empty: expected at least one sample")
    check_count("batch_size", batch_size)
    check_samples(samples, start, DataMap(run.transform, dequantization), run.model.sde, tolerance, levels)
    if surrogate is not None:
        check_surrogate(surrogate.model, tolerance)
    if tolerance is not None:
        check_multilevel(len(dataset), tolerance, solver or DEFAULT_SOLVER, levels or STEPS)  # type: ignore[arg-type]
    if not conditional and (names := getattr(run.model, "conditional", ())):
        raise ValueError(
            f"a likelihood without conditions needs a network trained with condition dropout; {run.path} was trained "
            f"with {' and '.join(names)} for every sample: train it with condition.dropout=0.1"
        )


def _summary(results: dict[str, Numbers], unit: str, subset: Tensor) -> DatasetLikelihood:
    """Combine the results of all tasks (see `tasks_of`); raise Incomplete if the solver failed for some samples."""

    column = partial(_column, results)
    values, again, coarse, fine = (column(name) for name in ("values", "again", "coarse", "fine"))
    mean, stderr = mean_and_error(values)
    nfe, backward = (float(column("values", key).mean()) for key in ("nfe", "backward"))
    likelihood = DatasetLikelihood(unit, mean, stderr, values, results["values-000000"]["conventions"], nfe, backward)
    likelihood.status = column("values", "status").long()
    if results["values-000000"]["error"] is not None:
        likelihood.errors = column("values", "error")
    if bool((failed := ~torch.isfinite(values)).any()):
        solved = values[~failed]
        message = describe_failures(values, column("values", "status"))
        if len(solved):
            others = Estimate(*mean_and_error(solved))
            message += f". The other {len(solved)} have a mean of {others} {unit}, which is not that of the dataset"
        raise Incomplete(message, likelihood)
    if len(again):
        again = _finite("second evaluation", values[subset] - again)
    fine = _finite("finer solve", fine - coarse)
    if len(subset) and stderr is not None:
        noise = float(again.square().mean()) / 2 / len(values) if len(again) else 0.0
        likelihood.monte_carlo = math.sqrt(noise)
        likelihood.population = math.sqrt(max(stderr**2 - noise, 0.0))
    likelihood.summands = summands(results)
    if len(squares := column("values", "squared_error")):
        likelihood.reconstruction = float(squares.mean().sqrt())
    if len(fine):
        likelihood.discretisation = Estimate(*mean_and_error(fine))
    _add_bound(likelihood, results)
    return likelihood


def _column(results: Mapping[str, Numbers], name: str, key: str = "value") -> Tensor:
    """Return the numbers of a task under a key, in the order of its samples, float64."""
    numbers = [value for part, result in results.items() if part.startswith(f"{name}-") for value in result[key]]
    return torch.tensor(numbers, dtype=torch.float64)


def _add_bound(likelihood: DatasetLikelihood, results: Mapping[str, Numbers]) -> None:
    """Set the evidence bound of a likelihood, if the results of all tasks have one."""
    bound = _finite("evidence bound", _column(results, "bound"))
    if len(bound):
        likelihood.bound = Estimate(*mean_and_error(bound))
        likelihood.bound_conventions = results["bound-000000"]["conventions"]


def _of_multilevel(found: MultilevelLikelihood, declared: dict[str, str], unit: str) -> DatasetLikelihood:
    """Return a multilevel estimate as a `DatasetLikelihood`."""
    nfe, backward = (float(counts.double().mean()) for counts in (found.nfe, found.backward))
    parts = {"probes": found.probes, "dequantisation": found.dequantization}
    return DatasetLikelihood(
        unit,
        found.mean,
        found.stderr,
        found.per_sample,
        declared,
        nfe,
        backward,
        population=found.population,
        terms=found.terms(),
        beyond=found.error,
        bias=float(found.estimate.bias),
        parts={name: error for name, error in parts.items() if error is not None},
        accuracy=found.accuracy,
    )


def add_labels(likelihood: DatasetLikelihood, dataset: Dataset, training_labels: Mapping[str, Tensor]) -> None:
    """Set `label` and `joint` of a likelihood, from the labels that the dataset and the training data both have."""
    labels = {name: values for name, values in labels_of(dataset).items() if name in training_labels}
    if not labels:
        return
    state, _ = split_condition(default_collate([dataset[0]]), "cpu")
    costs = label_nats(labels, training_labels) / dimensions(state)
    costs = costs / math.log(2) if likelihood.unit == "bits/dim" else costs
    if not bool(costs.isfinite().all()):
        warnings.warn(
            "the likelihood of the labels is left out: a class does not occur in the training data", stacklevel=3
        )
        return
    likelihood.label = Estimate(*mean_and_error(costs))
    likelihood.joint = Estimate(*mean_and_error(likelihood.per_sample + costs))


def _finite(name: str, values: Tensor) -> Tensor:
    """Return the finite values; if some are not finite, warn that their samples have no `name`."""
    finite = values[torch.isfinite(values)]
    if missing := len(values) - len(finite):
        warnings.warn(f"{missing} of {len(values)} samples have no {name}: its mean leaves them out", stacklevel=4)
    return finite


def _warn_if_untrained(run: Run, dequantization: Dequantization | None) -> None:
    """Warn if the network was not trained on data dequantised in this way."""
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
