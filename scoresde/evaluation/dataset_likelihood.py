r"""The likelihood of a run on a dataset, with what is uncertain about it.

Bits per dimension of quantised data, nats per dimension of continuous data. Three errors are told apart, and none is
counted in another:

population        how the mean would differ on other samples of the same number: the variance between samples, without
                  the Monte-Carlo noise of each, over their number.
Monte Carlo       how the mean would differ on these very samples with other probes and dequantisations: from the
                  squared differences between two evaluations of some samples with independent draws.
discretisation    what a finer solve would change: the mean difference on some samples, both with one and the same
                  probe kept, so that no noise hides it.

The first two add up, in squares, to the standard error over samples, which is the figure to quote beside the mean. The
third is a bias. Beside the likelihood of the probability flow stands an evidence bound, that of the reverse SDE.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from scoresde import bounds
from scoresde.build import Run
from scoresde.dequantization import DataMap, Dequantization, TruncatedNormal
from scoresde.divergence import ExactTrace, Hutchinson, Trace
from scoresde.evaluation.generation import describe
from scoresde.evaluation.resumable import Numbers, Piece, digest, evaluate, path_of, store
from scoresde.flow import DEFAULT_SOLVER
from scoresde.likelihood import BitsPerDim, LogProb, bits_per_dim, conventions, log_prob
from scoresde.losses import Nodes
from scoresde.protocols import Condition
from scoresde.random_stream import RandomStream
from scoresde.score import device_of
from scoresde.solvers import Solver, Status
from scoresde.tensors import dimensions, mean_and_error, send
from scoresde.training.batches import split_condition

PARTIAL = "likelihood"
AGAIN = 2**31  # added to the seed of a sample for its second, independent evaluation
BOUNDS = ("continuous", "discrete")


@dataclass(frozen=True)
class Budget:
    """How much goes into the errors of a likelihood.

    Args:
        samples: evenly spaced in the dataset, that are evaluated a second time, and by a finer solve; 0 for none.
        bound: "continuous" or "discrete", the evidence bound to report beside; None for none.
        bound_draws: evaluations of each sample for it, even.
        nodes: of the discrete chain, equally spaced in log-SNR from where the noise fits into a level.

    Raises:
        ValueError: an argument out of its range.
    """

    samples: int = 64
    bound: str | None = "continuous"
    bound_draws: int = 32
    nodes: int = 1000

    def __post_init__(self):
        if self.samples < 0 or self.samples == 1:
            raise ValueError(f"samples 0, or 2 and more, expected; got {self.samples}")
        if self.bound is not None and self.bound not in BOUNDS:
            raise ValueError(f"bound among {', '.join(BOUNDS)}, or null, expected; got {self.bound!r}")
        if self.bound_draws < 2 or self.bound_draws % 2 or self.bound_draws > 2 * (self.nodes - 1):
            raise ValueError(
                f"bound_draws even, from 2 to twice the {self.nodes - 1} steps of the chain, expected; got "
                f"{self.bound_draws}"
            )


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error (None of one sample)."""

    mean: float
    stderr: float | None

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.stderr is None else f" +- {self.stderr:.4f}")


@dataclass
class DatasetLikelihood:
    """A dataset's mean negative log-likelihood per dimension.

    mean, and stderr over samples (None of one); per_sample (N,); conventions: everything that moves the number.
    population, monte_carlo: the two parts of stderr, None where not measured. discretisation: what a finer solve adds
    to the mean. bound: the mean of an evidence bound. nfe, backward: mean numbers of evaluations of a sample, and
    of products with Jacobians beside them.
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
    samples: int = 1,
    batch_size: int = 256,
    progress: bool = True,
    budget: Budget | None = None,
    seed: int = 0,
    start: str = "data",
) -> DatasetLikelihood:
    """The likelihood of a dataset under a run's model; sample i draws from seed + i, whatever its batch.

    Under torchrun the batches are shared among the processes, and the result is the same. Finished batches are kept in
    `<run>/likelihood` until all are there: an interrupted evaluation goes on where it stopped.

    Args:
        run: the model and its transform.
        dataset: items are states in data units, or (state, condition), the same each time they are asked for.
        dequantization: of integer levels, giving bits per dimension; None for continuous data, giving nats.
        trace, solver, samples, start: see `likelihood.bits_per_dim`.
        batch_size: samples at a time.
        progress: show a progress bar.
        budget: what to spend on errors; nothing if not given.
        seed: of the first sample.

    Warns:
        UserWarning: a dequantisation whose points are no states that the network was trained for; an evidence bound
            that cannot be given, and why.

    Raises:
        ValueError: an empty dataset, and see `likelihood.bits_per_dim`.
        RuntimeError: a solve that failed.
        Interrupted: Ctrl-C.
    """
    if not len(dataset):  # type: ignore[arg-type]
        raise ValueError("a dataset of one sample or more expected; this one is empty")
    trace, solver, budget = trace or Hutchinson(), solver or DEFAULT_SOLVER, budget or Budget(0, None)
    _warn_of_another_lower_end(run, dequantization)
    one = _Solve(run, dataset, dequantization, trace, solver, samples, seed, start)
    budget = one.possible(budget)
    described = (
        *map(str, (trace, solver, dequantization, samples, batch_size, budget, seed, start)),
        _digest(one, batch_size),
    )
    found = evaluate(_pieces(one, budget, batch_size), store(run.path / PARTIAL, described), one.unit, progress)
    return _summary(one, budget, found)


@dataclass
class _Solve:
    """What takes some samples of the dataset to their numbers."""

    run: Run
    dataset: Dataset
    dequantization: Dequantization | None
    trace: Trace
    solver: Solver
    samples: int
    seed: int
    start: str

    @property
    def unit(self) -> str:
        return "nats/dim" if self.dequantization is None else "bits/dim"

    @property
    def is_random(self) -> bool:
        """Whether another seed gives another value."""
        return self.dequantization is not None or not isinstance(self.trace, ExactTrace)

    def __call__(self, indices: Tensor) -> Numbers:
        """Values per dimension and evaluations of some samples, and the conventions."""
        try:
            return self._values(indices)
        except RuntimeError as error:
            raise RuntimeError(f"among samples {int(indices[0])} .. {int(indices[-1])}: {error}") from error

    def _values(self, indices: Tensor) -> Numbers:
        x, cond, seeds = self._of(indices)
        model, data_map = self.run.model, DataMap(self.run.transform, self.dequantization)
        if self.dequantization is None:
            state, nats = data_map.draw(send(x, device_of(model) or x.device), RandomStream(seeds=seeds), model.sde)
            result = log_prob(model, state, cond, self.trace, self.solver, seeds)
            if bool((failed := result.status != Status.OK).any()):
                status = Status(int(result.status[failed][0])).name
                raise RuntimeError(f"the solver failed for {int(failed.sum())} ({status})")
            values = -(result.value + nats) / dimensions(x)
            declared = conventions(model, data_map, self.trace, self.solver, f"data, t_min={model.sde.t_min:g}")
            declared = {"quantity": "negative log-density, nats per dimension", **declared}
            return self._numbers(values, result, declared)
        settings: dict[str, Any] = {"samples": self.samples, "trace": self.trace, "solver": self.solver}
        bits = bits_per_dim(model, x, data_map, cond, **settings, seeds=seeds, start=self.start)
        return self._numbers(bits.per_image, bits, bits.conventions)

    @staticmethod
    def _numbers(values: Tensor, result: LogProb | BitsPerDim, declared: dict[str, str]) -> Numbers:
        counts = {"nfe": result.nfe.tolist(), "backward": result.backward.tolist()}
        return {"value": values.tolist(), **counts, "conventions": declared}

    def _of(self, indices: Tensor) -> tuple[Tensor, Condition, list[int]]:
        """States and conditions, on the CPU, and seeds."""
        items = default_collate([self.dataset[int(i)] for i in indices])
        return *split_condition(items, "cpu"), [self.seed + int(i) for i in indices]

    @property
    def count(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def bound(self, indices: Tensor, budget: Budget) -> Numbers:
        """The evidence bound of some samples."""
        x, cond, seeds = self._of(indices)
        model, transform = self.run.model, self.run.transform
        shared: dict[str, Any] = {"cond": cond, "draws": budget.bound_draws, "seeds": seeds}
        found: bounds.Bound
        if budget.bound == "continuous":
            found = bounds.continuous(model, x, transform, dequantization=self.dequantization, **shared)
        else:
            first = None if self.dequantization is None else self.dequantization.start(model.sde, transform)
            if first is None:
                first = TruncatedNormal().start(model.sde, transform)  # where a level's bin holds the decoder's noise
            found = bounds.discrete(model, x, transform, times=Nodes(budget.nodes, "log_snr", first), **shared)
        return {"value": found.per_image.tolist(), "conventions": found.conventions}

    def possible(self, budget: Budget) -> Budget:
        """The budget, without a bound that this model does not have: better known before the long part than after."""
        if budget.bound is None or self.dequantization is None:
            return replace(budget, bound=None)
        try:
            self.bound(torch.tensor([0]), replace(budget, bound_draws=2))
        except (ValueError, RuntimeError) as error:
            warnings.warn(f"no {budget.bound} evidence bound beside the value: {error}", stacklevel=3)
            return replace(budget, bound=None)
        return budget


def _pieces(one: _Solve, budget: Budget, batch_size: int) -> dict[str, Piece]:
    """The values; some again; some coarse and fine with a kept probe; the bound."""

    everything, some = torch.arange(one.count), _subset(one, budget)

    def parts(name: str, indices: Tensor, solve: Callable[[Tensor], Numbers]) -> dict[str, Piece]:
        batches = indices.split(batch_size) if len(indices) else ()
        return {f"{name}-{i:06d}": partial(solve, batch) for i, batch in enumerate(batches)}

    pieces = parts("values", everything, one)
    if one.is_random:
        pieces |= parts("again", some, replace(one, seed=one.seed + AGAIN))
    if (finer := getattr(one.solver, "finer", None)) is not None:
        kept = one.trace if isinstance(one.trace, ExactTrace) else replace(one.trace, resample=False)
        same = replace(one, trace=kept, samples=1)
        pieces |= parts("coarse", some, same) | parts("fine", some, replace(same, solver=finer()))
    if budget.bound is not None:
        pieces |= parts("bound", everything, partial(one.bound, budget=budget))
    return pieces


def _subset(one: _Solve, budget: Budget) -> Tensor:
    """The samples that errors are measured on: evenly spaced, for datasets come sorted."""
    count = one.count
    return torch.linspace(0, count - 1, min(budget.samples, count)).round().long()


def _summary(one: _Solve, budget: Budget, found: dict[str, Numbers]) -> DatasetLikelihood:
    def column(name: str, key: str = "value") -> Tensor:
        numbers = [value for piece, part in found.items() if piece.startswith(f"{name}-") for value in part[key]]
        return torch.tensor(numbers, dtype=torch.float64)

    values, again, coarse, fine, bound = (column(name) for name in ("values", "again", "coarse", "fine", "bound"))
    mean, conditions = _estimate(values), found["values-000000"]["conventions"]
    nfe, backward = (float(column("values", key).mean()) for key in ("nfe", "backward"))
    result = DatasetLikelihood(one.unit, mean.mean, mean.stderr, values, conditions, nfe, backward)
    if budget.samples and mean.stderr is not None:
        noise = float((values[_subset(one, budget)] - again).square().mean()) / 2 / len(values) if len(again) else 0.0
        result.monte_carlo = math.sqrt(noise)
        result.population = math.sqrt(max(mean.stderr**2 - noise, 0.0))
    if len(fine):
        result.discretisation = _estimate(fine - coarse)
    if len(bound):
        result.bound, result.bound_conventions = _estimate(bound), found["bound-000000"]["conventions"]
    return result


def _estimate(values: Tensor) -> Estimate:
    return Estimate(*mean_and_error(values))


def _warn_of_another_lower_end(run: Run, dequantization: Dequantization | None) -> None:
    """Levels spread over their intervals, or states around their centres from some time on: a network knows one."""
    if dequantization is None or (run.dequantization is None and not run.trained_on_levels):
        return
    trained = "no" if run.trained_on_levels or run.dequantization is None else str(run.dequantization)
    there = None if run.dequantization is None else run.dequantization.start(run.model.sde, run.transform)
    here = dequantization.start(run.model.sde, run.transform)
    if here != there or (run.trained_on_levels and here is None):
        warnings.warn(
            f"this network was trained for {trained} dequantisation and is measured with {dequantization}: it never "
            "saw such states at the lower end, and the figure is worse than that of a network trained for them",
            stacklevel=3,
        )


def _digest(one: _Solve, batch_size: int) -> str:
    """What stands for the model, the data and the dequantisation of an evaluation."""
    sde = one.run.model.sde
    learned: dict[str, Tensor] = one.dequantization.state_dict() if isinstance(one.dequantization, nn.Module) else {}

    def tensors() -> Iterator[Tensor]:
        yield from (*one.run.model.state_dict().values(), *learned.values(), *path_of(sde))
        for indices in torch.arange(one.count).split(batch_size):
            x, cond, _ = one._of(indices)
            yield from (x, *(cond.values() if isinstance(cond, dict) else [] if cond is None else [cond]))

    return digest(tensors(), f"{describe(one.run.model)} {one.run.transform} {sde.prior_std}")
