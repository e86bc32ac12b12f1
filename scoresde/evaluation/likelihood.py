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

import hashlib
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from scoresde import bounds
from scoresde.build import Run
from scoresde.dequantization import Dequantization, TruncatedNormal
from scoresde.divergence import ExactTrace, Hutchinson, Trace
from scoresde.evaluation.pieces import Numbers, Piece, evaluate, store
from scoresde.flow import DEFAULT_SOLVER
from scoresde.likelihood import bits_per_dim, conventions, log_prob
from scoresde.losses import Nodes
from scoresde.protocols import Condition, select
from scoresde.solvers import Solver, Status
from scoresde.tensors import dimensions
from scoresde.training.batches import split_condition

METRICS, PARTIAL = "metrics.jsonl", "likelihood"
AGAIN = 2**31  # added to the seed of a sample for its second, independent evaluation
BOUNDS = ("continuous", "discrete")


@dataclass(frozen=True)
class Budget:
    """How much goes into the errors of a likelihood.

    Args:
        samples: evaluated a second time, and once more by a finer solve; 0 for none.
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


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error (None of one sample)."""

    mean: float
    stderr: float | None

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.stderr is None else f" +- {self.stderr:.4f}")


@dataclass
class Likelihood:
    """A dataset's mean negative log-likelihood per dimension.

    mean, and stderr over samples (None of one); per_sample (N,); conventions: everything that moves the number.
    population, monte_carlo: the two parts of stderr, None where not measured. discretisation: what a finer solve adds
    to the mean. bound: the mean of an evidence bound. nfe: mean number of evaluations of a sample.
    """

    unit: str
    mean: float
    stderr: float | None
    per_sample: Tensor
    conventions: dict[str, str]
    nfe: float
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
) -> Likelihood:
    """The likelihood of a dataset under a run's model; sample i draws from seed + i, whatever its batch.

    Under torchrun the batches are shared among the processes, and the result is the same. Finished batches are kept in
    `<run>/likelihood` until all are there: an interrupted evaluation goes on where it stopped.

    Args:
        run: the model and its transform.
        dataset: items are states in data units, or (state, condition).
        dequantization: of integer levels, giving bits per dimension; None for continuous data, giving nats.
        trace, solver, samples: see `likelihood.bits_per_dim`.
        batch_size: samples at a time.
        progress: show a progress bar.
        budget: what to spend on errors; nothing if not given.
        seed: of the first sample.

    Warns:
        UserWarning: a dequantisation whose points start at a time that the network was not trained for.

    Raises:
        ValueError: see `likelihood.bits_per_dim`.
        RuntimeError: a solve that failed.
        Interrupted: Ctrl-C.
    """
    device = next((p.device for p in run.model.parameters()), torch.device("cpu"))
    x, cond = split_condition(default_collate([dataset[i] for i in range(len(dataset))]), device)  # type: ignore[arg-type]
    trace, solver, budget = trace or Hutchinson(), solver or DEFAULT_SOLVER, budget or Budget(0, None)
    _warn_of_another_lower_end(run, dequantization)
    one = _Solve(run, x, cond, dequantization, trace, solver, samples, seed)
    pieces = _pieces(one, budget, batch_size)
    described = (*map(str, (trace, solver, dequantization, samples, batch_size, budget, seed)), _digest(run, x))
    found = evaluate(pieces, store(run.path / PARTIAL, described), f"{one.unit}", progress)
    return _summary(one, budget, found)


@dataclass
class _Solve:
    """What takes some samples of the dataset to their numbers."""

    run: Run
    x: Tensor
    cond: Condition
    dequantization: Dequantization | None
    trace: Trace
    solver: Solver
    samples: int
    seed: int

    @property
    def unit(self) -> str:
        return "nats/dim" if self.dequantization is None else "bits/dim"

    @property
    def is_random(self) -> bool:
        """Whether another seed gives another value."""
        return self.dequantization is not None or not isinstance(self.trace, ExactTrace)

    def __call__(self, first: int, last: int) -> Numbers:
        """Values per dimension and evaluations of the samples first .. last - 1."""
        part, seeds = slice(first, last), range(self.seed + first, self.seed + last)
        x, cond, model, transform = self.x[part], select(self.cond, part), self.run.model, self.run.transform
        if self.dequantization is None:
            result = log_prob(model, transform(x), cond, self.trace, self.solver, seeds)
            if bool((failed := result.status != Status.OK).any()):
                status = Status(int(result.status[failed][0])).name
                raise RuntimeError(f"the solver failed for some samples of {first} .. {last - 1} ({status})")
            values = -(result.value + transform.log_det(x)) / dimensions(x)
            declared = conventions(model, transform, self.trace, self.solver, f"data, t_min={model.sde.t_min:g}")
            declared = {"quantity": "negative log-density, nats per dimension", **declared}
            return {"value": values.tolist(), "nfe": result.nfe.tolist(), "conventions": declared}
        way = (self.dequantization, self.samples, self.trace, self.solver)
        bits = bits_per_dim(model, x, transform, cond, *way, seeds)
        return {"value": bits.per_image.tolist(), "nfe": bits.nfe.tolist(), "conventions": bits.conventions}

    def bound(self, first: int, last: int, budget: Budget) -> Numbers:
        """The evidence bound of the samples first .. last - 1."""
        part, seeds = slice(first, last), range(self.seed + first, self.seed + last)
        model, x, transform = self.run.model, self.x[part], self.run.transform
        shared: dict[str, Any] = {"cond": select(self.cond, part), "draws": budget.bound_draws, "seeds": seeds}
        found: bounds.Bound
        if budget.bound == "continuous":
            found = bounds.continuous(model, x, transform, dequantization=self.dequantization, **shared)
        else:
            start = TruncatedNormal().start(model.sde, transform)  # where a level's bin holds the decoder's noise
            found = bounds.discrete(model, x, transform, times=Nodes(budget.nodes, "log_snr", start), **shared)
        return {"value": found.per_image.tolist(), "conventions": found.conventions}


def _pieces(one: _Solve, budget: Budget, batch_size: int) -> dict[str, Piece]:
    """The values; some again; some coarse and fine with a kept probe; the bound."""

    def parts(name: str, count: int, solve: Callable[[int, int], Numbers]) -> dict[str, Piece]:
        ends = [(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
        return {f"{name}-{first:06d}": partial(solve, first, last) for first, last in ends}

    some, finer = min(budget.samples, len(one.x)), getattr(one.solver, "finer", None)
    pieces = parts("values", len(one.x), one)
    if some and one.is_random:
        pieces |= parts("again", some, replace(one, seed=one.seed + AGAIN))
    if some and finer is not None:
        kept = one.trace if isinstance(one.trace, ExactTrace) else replace(one.trace, resample=False)
        same = replace(one, trace=kept, samples=1)
        pieces |= parts("coarse", some, same) | parts("fine", some, replace(same, solver=finer()))
    if budget.bound is not None and one.dequantization is not None:
        pieces |= parts("bound", len(one.x), partial(one.bound, budget=budget))
    return pieces


def _summary(one: _Solve, budget: Budget, found: dict[str, Numbers]) -> Likelihood:
    def column(name: str, key: str = "value") -> Tensor:
        numbers = [value for piece, part in found.items() if piece.startswith(f"{name}-") for value in part[key]]
        return torch.tensor(numbers, dtype=torch.float64)

    values, again, coarse, fine, bound = (column(name) for name in ("values", "again", "coarse", "fine", "bound"))
    mean, nfe = _estimate(values), float(column("values", "nfe").mean())
    result = Likelihood(one.unit, mean.mean, mean.stderr, values, found["values-000000"]["conventions"], nfe)
    if budget.samples and mean.stderr is not None:
        noise = float((values[: len(again)] - again).square().mean()) / 2 / len(values) if len(again) else 0.0
        result.monte_carlo = math.sqrt(noise)
        result.population = math.sqrt(max(mean.stderr**2 - noise, 0.0))
    if len(fine):
        result.discretisation = _estimate(fine - coarse)
    if len(bound):
        result.bound, result.bound_conventions = _estimate(bound), found["bound-000000"]["conventions"]
    return result


def _estimate(values: Tensor) -> Estimate:
    stderr = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(float(values.mean()), stderr)


def _warn_of_another_lower_end(run: Run, dequantization: Dequantization | None) -> None:
    trained, sde = run.dequantization, run.model.sde
    if dequantization is None or trained is None:
        return
    here, there = (way.start(sde, run.transform) for way in (dequantization, trained))
    if here != there:
        warnings.warn(
            f"this network was trained for {trained} dequantisation and is measured with {dequantization}: it never "
            "saw such states at the lower end, and the figure is worse than that of a network trained for them",
            stacklevel=3,
        )


def _digest(run: Run, x: Tensor) -> str:
    """What stands for the weights and the data of an evaluation."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (*run.model.state_dict().values(), x):
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def append_metrics(run: Path, row: dict[str, Any]) -> Path:
    """Add a line to the run's `metrics.jsonl`, in one write: commands at the same time do not lose each other's."""
    line, path = f"{json.dumps(row)}\n".encode(), run / METRICS
    run.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        file.write(line)
    return path
