r"""Comparison of samplers: how close their samples come to the truth, at equal numbers of network evaluations.

Every sampler draws n samples at each budget from the same seeds, so that all samplers start from the same noise. The
samples are compared with a reference (see `evaluation.references`). The noise floor is the value of the same metrics
for n draws from the true distribution. With the exact score of a mixture, the error above the noise floor is that of
the sampler. With a run, the errors of the network and of the sampler add up, and training data give the noise floor.

A budget is a number of network evaluations (NFE) per sample. The number of steps that fits into a budget follows from
the evaluations counted with two and with three steps; a method of two evaluations a step leaves one evaluation of an
odd budget unused. The NFE of a row is counted while the samples of the row are drawn.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.evaluation.generation import check_count
from scoresde.evaluation.references import TRUTHS, Reference, metric_values
from scoresde.metrics.intervals import FEWEST
from scoresde.progress import progress_bar
from scoresde.protocols import Condition, Model, select
from scoresde.result_table import plus_minus, write_columns
from scoresde.samplers import Sampler
from scoresde.wrappers import as_model

Build = Callable[[int], Sampler]


@dataclass(frozen=True)
class ComparisonRow:
    """One metric of one sampler at one budget.

    Attributes:
        sampler: name of the sampler. Rows of the noise floor have one of `TRUTHS`, and no budget, steps or seconds.
        budget, steps, nfe: evaluations allowed, steps made, evaluations counted, for each sample.
        seconds: median time of a batch of `batch` samples.
        metric, space: name of the metric, and "state" or the name of the features that it is computed on.
        value, low, high: value of the metric, and interval of the metric's expectation (`metrics.bootstrap`).
        n: number of samples.
        reference: name of the reference.
        backward: backward passes through the network, counted for each sample.
    """

    sampler: str
    budget: int | None
    steps: int | None
    nfe: int
    seconds: float | None
    batch: int
    metric: str
    space: str
    value: float
    low: float
    high: float
    n: int
    reference: str
    backward: int = 0

    @property
    def is_floor(self) -> bool:
        """Whether the row belongs to the noise floor."""
        return self.sampler in TRUTHS


# --- the comparison


def compare(
    model: Model,
    samplers: Mapping[str, Build],
    budgets: Sequence[int],
    reference: Reference,
    metrics: Sequence[str] | None = None,
    n: int = 1000,
    batch_size: int = 1000,
    seed: int = 0,
    repeats: int = 3,
    resamples: int = 200,
    level: float = 0.95,
    progress: bool = True,
    cond: Condition = None,
    learned: Collection[str] = (),
) -> list[ComparisonRow]:
    """Return the rows of the noise floor, then the metrics, evaluations and seconds of every sampler at every budget.

    A sampler whose samples are not finite at a budget is left out at this budget.

    Args:
        model: in eval mode.
        samplers: by name, functions that return a sampler with a given number of steps; for those in `learned`, with
            a given number of evaluations.
        budgets: numbers of evaluations per sample.
        reference: the states that samples are compared with.
        metrics: names among `references.METRICS`; by default those of the reference.
        n: number of samples, drawn from seeds seed, ..., seed + n - 1.
        batch_size: samples at a time, also in the batch that is timed.
        seed: the seed of all random draws.
        repeats: number of times that a batch is timed, after the samples are drawn.
        resamples, level: number of half-samples and level of the intervals, see `metrics.bootstrap`.
        progress: show a progress bar.
        cond: the condition of the n samples, with leading dimension n.
        learned: the names of samplers that exist for some numbers of evaluations only.

    Warns:
        UserWarning: a sampler is left out at a budget, with the reason.

    Raises:
        ValueError: there is no sampler or no budget, a number is out of range, a metric is unknown, a budget is below
            the cost of one step, or the evaluations of a sampler do not grow with the number of steps.
        RuntimeError: samples drawn with two or three steps, to count evaluations, are not finite.
    """
    if not samplers or not budgets:
        raise ValueError(
            f"samplers and budgets must have at least one entry each; got {list(samplers)} and {list(budgets)}"
        )
    check_count("n", n, FEWEST)
    counts = {"batch_size": batch_size, "repeats": repeats, **{f"nfe[{i}]": nfe for i, nfe in enumerate(budgets)}}
    for name, count in counts.items():
        check_count(name, count)
    shape, batch, seeds = tuple(reference.states.shape[1:]), min(batch_size, n), range(seed, seed + n)

    def of_rows(rows: slice) -> Model:
        return as_model(model, select(cond, rows, n))

    def rows_of(x: Tensor, **cost: Any) -> list[ComparisonRow]:
        shared = {**cost, "batch": batch, "n": len(x), "reference": reference.name}
        measured = metric_values(x, reference, metrics, resamples, level, seed)
        return [ComparisonRow(metric=metric, space=space, **vars(value), **shared) for metric, space, value in measured]

    planned: list[tuple[str, int, int]] = []
    for name, build in samplers.items():
        if name in learned:
            planned += [(name, budget, budget) for budget in budgets]
            continue
        planned += [(name, *plan) for plan in plans(of_rows(slice(0, 1)), (1, *shape), seed, name, build, budgets)]
    rows = rows_of(reference.truth, sampler=reference.floor, budget=None, steps=None, nfe=0, seconds=None)
    for name, budget, steps in progress_bar(planned, title="comparing", unit="row", shown=progress):
        sampler = samplers[name](steps)
        try:
            x, nfe, backward = _draw(of_rows, sampler, shape, seeds, batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            warnings.warn(f"{name} at nfe={budget} is left out: {error}", stacklevel=2)
            continue
        seconds = statistics.median(
            _seconds(of_rows(slice(0, batch)), sampler, (batch, *shape), seed) for _ in range(repeats)
        )
        rows += rows_of(x, sampler=name, budget=budget, steps=steps, nfe=nfe, backward=backward, seconds=seconds)
    return rows


def plans(
    model: Model, shape: tuple[int, ...], seed: int, name: str, build: Build, budgets: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """Yield (budget, number of steps that fit into it), from the evaluations counted with two and three steps."""
    two, three = (build(steps)(model, shape=shape, seeds=[seed]).nfe for steps in (2, 3))
    each = three - two
    if each < 1:
        raise ValueError(
            f"the evaluations of {name} must grow with the number of steps; got {two} with 2 steps and {three} with 3"
        )
    first = two - 2 * each
    for budget in budgets:
        if budget < first + each:
            raise ValueError(f"nfe must be at least {first + each}, one step of {name}; got {budget}")
        yield budget, (budget - first) // each


def _draw(
    of_rows: Callable[[slice], Model], sampler: Sampler, shape: tuple[int, ...], seeds: range, batch: int
) -> tuple[Tensor, int, int]:
    """Return samples (n, *) on the CPU, and the evaluations and backward passes for each sample.

    of_rows: function from a slice of the samples to the model with their conditions.
    """
    drawn = []
    for i in range(0, len(seeds), batch):
        part = seeds[i : i + batch]
        result = sampler(of_rows(slice(i, i + batch)), shape=(len(part), *shape), seeds=part)
        drawn.append((result.x.cpu(), result.nfe, result.backward))
    x, nfe, backward = zip(*drawn, strict=True)
    return torch.cat(x), max(nfe), max(backward)


def _seconds(model: Model, sampler: Sampler, shape: tuple[int, ...], seed: int) -> float:
    """Return the time of drawing one batch, in seconds."""
    generator, started = torch.Generator().manual_seed(seed), time.perf_counter()
    sampler(model, shape=shape, generator=generator).x.cpu()
    return time.perf_counter() - started


# --- output


def table(rows: Sequence[ComparisonRow]) -> list[list[str]]:
    """Return the cells of a table: a title line, then a line for each sampler and budget with its cost and metrics.

    The +- of a metric is half the width of its interval.
    """
    metrics = list(dict.fromkeys((row.metric, row.space) for row in rows))
    titles = [metric if space == "state" else f"{metric} ({space})" for metric, space in metrics]
    lines = [["sampler", "NFE", "seconds", *titles]]
    for name, budget in dict.fromkeys((row.sampler, row.budget) for row in rows):
        cells = {(row.metric, row.space): row for row in rows if (row.sampler, row.budget) == (name, budget)}
        first = next(iter(cells.values()))
        evaluations = f"{first.nfe} + {first.backward} backward" if first.backward else str(first.nfe)
        cost = ["-", "-"] if first.seconds is None else [evaluations, f"{first.seconds:.3g}"]
        values = [plus_minus(cells[key].value, 0.5 * (cells[key].high - cells[key].low)) for key in metrics]
        lines.append([name, *cost, *values])
    return lines


def write_csv(rows: Sequence[Any], path: Path, kind: type = ComparisonRow) -> Path:
    """Write rows, instances of the dataclass `kind`, as CSV below a line with the names of the fields; return path."""
    return write_columns(path, {column.name: [getattr(row, column.name) for row in rows] for column in fields(kind)})
