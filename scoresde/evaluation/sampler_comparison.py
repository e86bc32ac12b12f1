r"""Samplers side by side: how near their samples come to the truth, at equal numbers of network evaluations.

Each sampler draws n samples at each budget, from the same seeds: those of all samplers start from the same noise. They
are compared with a reference (see `evaluation.references`), and stand beside what a perfect sampler would have, the
same figures of n draws from the truth itself. Of the exact score of a mixture, what is left of an error is the
sampler's; of a run, errors of the network and of the sampler add up, and the noise floor is that of training data.

A budget is a number of evaluations for each sample. How many steps it is worth is found by counting the evaluations of
two and of three steps; a method of two evaluations a step leaves one over from an odd budget. What a row states as its
NFE was counted while it was drawn.
"""

import csv
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.evaluation.references import FEWEST, TRUTHS, Reference, check_metrics, figures
from scoresde.progress import progress_bar
from scoresde.protocols import Model
from scoresde.samplers import Sampler
from scoresde.training.checkpoint import replace_atomically

Build = Callable[[int], Sampler]


@dataclass(frozen=True)
class ComparisonRow:
    """One figure of one sampler at one budget.

    sampler: its name, or one of `TRUTHS` in the rows of the noise floor, which have no budget, steps or seconds.
    budget, steps, nfe: the evaluations allowed, the steps made of them, the evaluations counted.
    seconds: median time of a batch of `batch` samples.
    metric, space: what is measured, and on what: "state", or the name of the features.
    value, low, high: the figure, and the interval of its expectation (`metrics.bootstrap`).
    n: samples. reference: what they are compared with. backward: backward passes through the network, counted.
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
        """Whether these are draws from the truth."""
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
) -> list[ComparisonRow]:
    """Every sampler at every budget: its figures, their intervals, evaluations and seconds; the noise floor first.

    A sampler that gives NaN at a budget, or an infinity, is left out there.

    Args:
        model: in eval mode.
        samplers: by name, a function of the number of steps.
        budgets: numbers of evaluations for each sample.
        reference: what samples are compared with.
        metrics: names among `references.METRICS`; those of the reference unless given.
        n: samples, drawn from seeds seed, ..., seed + n - 1.
        batch_size: samples at a time, and of the batch that is timed.
        seed: of everything random.
        repeats: timed runs of a batch, from one generator, after the samples were drawn.
        resamples, level: of the intervals, see `metrics.bootstrap`.
        progress: show a progress bar.

    Warns:
        UserWarning: a sampler that is left out at a budget, and why.

    Raises:
        ValueError: no sampler or no budget, numbers out of range, an unknown metric, a budget of less than one step, a
            sampler of a fixed cost.
        RuntimeError: a sampler that does not give numbers in two steps, or in three.
    """
    if not samplers or not budgets:
        raise ValueError(
            f"one sampler or more, and one budget or more, expected; got {list(samplers)}, {list(budgets)}"
        )
    numbers = {"n": n, "batch_size": batch_size, "repeats": repeats, **{f"nfe[{i}]": b for i, b in enumerate(budgets)}}
    for name, number in numbers.items():
        least = FEWEST if name == "n" else 1
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise ValueError(f"{name} as a whole number of {least} or more expected; got {number!r}")
    names = check_metrics(metrics, reference)
    one = _Comparison(model, reference, names, n, min(batch_size, n), seed, repeats, resamples, level)
    planned = [(name, *plan) for name, build in samplers.items() for plan in one.plans(name, build, budgets)]
    truth = reference.truth
    rows = list(one.rows(truth, sampler=reference.floor, budget=None, steps=None, nfe=0, seconds=None, n=len(truth)))
    for name, budget, steps in progress_bar(planned, title="comparing", unit="row", shown=progress):
        rows += one.measure(name, samplers[name](steps), budget, steps)
    return rows


@dataclass(frozen=True)
class _Comparison:
    """What all rows of a comparison share."""

    model: Model
    reference: Reference
    metrics: tuple[str, ...]
    n: int
    batch: int
    seed: int
    repeats: int
    resamples: int
    level: float

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.reference.states.shape[1:])

    def plans(self, name: str, build: Build, budgets: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(budget, steps) for each budget: the steps that it is worth, by the evaluations counted of two and three."""
        two, three = (build(steps)(self.model, shape=(1, *self.shape), seeds=[self.seed]).nfe for steps in (2, 3))
        each = three - two
        if each < 1:
            raise ValueError(f"a sampler whose evaluations grow with its steps expected; {name} has {two} and {three}")
        first = two - 2 * each
        for budget in budgets:
            if budget < first + each:
                raise ValueError(f"nfe={first + each} or more, one step of {name}, expected; got nfe={budget}")
            yield budget, (budget - first) // each

    def measure(self, name: str, sampler: Sampler, budget: int, steps: int) -> list[ComparisonRow]:
        """The rows of a sampler; none if it does not give numbers."""
        try:
            x, nfe, backward = self.draw(sampler)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            warnings.warn(f"{name} at nfe={budget} is left out: {error}", stacklevel=3)
            return []
        seconds = self.time(sampler)
        cost = {"budget": budget, "steps": steps, "nfe": nfe, "backward": backward, "seconds": seconds}
        return list(self.rows(x, sampler=name, **cost, n=self.n))

    def draw(self, sampler: Sampler) -> tuple[Tensor, int, int]:
        """The samples (n, *), and the evaluations and backward passes of each."""
        drawn, nfe, backward, seeds = [], 0, 0, range(self.seed, self.seed + self.n)
        for start in range(0, self.n, self.batch):
            part = seeds[start : start + self.batch]
            result = sampler(self.model, shape=(len(part), *self.shape), seeds=part)
            drawn.append(result.x.cpu())
            nfe, backward = max(nfe, result.nfe), max(backward, result.backward)
        return torch.cat(drawn), nfe, backward

    def time(self, sampler: Sampler) -> float:
        """Median seconds of a batch."""
        seconds = []
        for _ in range(self.repeats):
            generator, started = torch.Generator().manual_seed(self.seed), time.perf_counter()
            sampler(self.model, shape=(self.batch, *self.shape), generator=generator).x.cpu()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)

    def rows(self, x: Tensor, **described: Any) -> Iterator[ComparisonRow]:
        """A row for each metric of samples."""
        for metric, space, found in figures(x, self.reference, self.metrics, self.resamples, self.level, self.seed):
            yield ComparisonRow(
                metric=metric,
                space=space,
                value=found.value,
                low=found.low,
                high=found.high,
                batch=self.batch,
                reference=self.reference.name,
                **described,
            )


# --- what is shown


def table(rows: Sequence[ComparisonRow]) -> list[list[str]]:
    """A line for each sampler and budget under a line of titles: the figures +- half the width of their intervals."""
    metrics = list(dict.fromkeys((row.metric, row.space) for row in rows))
    titles = [metric if space == "state" else f"{metric} ({space})" for metric, space in metrics]
    lines = [["sampler", "NFE", "seconds", *titles]]
    for name, budget in dict.fromkeys((row.sampler, row.budget) for row in rows):
        mine = {(row.metric, row.space): row for row in rows if (row.sampler, row.budget) == (name, budget)}
        first = next(iter(mine.values()))
        evaluations = f"{first.nfe} + {first.backward} backward" if first.backward else str(first.nfe)
        cost = ["-", "-"] if first.seconds is None else [evaluations, f"{first.seconds:.3g}"]
        lines.append([name, *cost, *(_figure(mine[key]) for key in metrics)])
    return lines


def _figure(row: ComparisonRow) -> str:
    return plus_minus(row.value, 0.5 * (row.high - row.low))


def plus_minus(value: float, error: float | None) -> str:
    """value +- error, to two digits of the latter; four decimals of a value without an error."""
    if error is None or not math.isfinite(error):
        return f"{value:.4f}"
    digits = 1 - math.floor(math.log10(error)) if error > 0 else 4
    digits = min(max(digits, 0), 6)
    return f"{value:.{digits}f} +- {error:.{digits}f}"


def write_csv(rows: Sequence[ComparisonRow], path: Path) -> Path:
    """All rows, a line each, with the names of the fields above them."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, [column.name for column in fields(ComparisonRow)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)

    replace_atomically(path, write)
    return path
