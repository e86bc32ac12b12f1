r"""Samplers side by side: how near their samples come to the truth, at equal numbers of network evaluations.

Each sampler draws n samples at each budget, from the same seeds: those of all samplers start from the same noise. They
are compared with a reference in model space, and stand beside what a perfect sampler would have, the same figures of n
draws from the truth itself (the noise floor; a distance between samples is not zero where the distributions are one):

the oracle     a mixture of Gaussians with its exact score: what is left of an error is the sampler's. The reference is
               draws of its marginal at t_min, and the moments of that are exact.
a run          a split of its data as the network was trained on it (dequantised, transformed). Errors of the network
               and of the sampler add up, and the floor is that of training data.

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
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from scoresde.analytic import GaussianMixture
from scoresde.build import CONFIG, Run, instantiate
from scoresde.metrics.vectors import (
    Discrepancy,
    PrincipalComponents,
    SlicedWasserstein,
    Statistic,
    bootstrap,
    covariance_error,
    directions,
    flatten,
    frechet_distance,
    gaussian,
    mean_error,
    median_bandwidths,
    moments,
)
from scoresde.protocols import ScoreModel
from scoresde.samplers import Sampler
from scoresde.sdes import SDE
from scoresde.tensors import Noise, float64
from scoresde.training.batches import split_condition, step_seed
from scoresde.training.checkpoint import replace_atomically

PROJECTIONS, COMPONENTS = 128, 32
MOST = 5000  # of a run's data that samples are compared with
FEWEST = 4
TRUTHS = ("exact draws", "training data")  # what rows without a sampler are called

Build = Callable[[int], Sampler]
Prepared = tuple[Statistic, tuple[Tensor, Tensor | None]]  # and the x and y to give to it


@dataclass(frozen=True)
class Row:
    """One figure of one sampler at one budget.

    sampler: its name, or one of `TRUTHS` in the rows of the noise floor, which have no budget, steps or seconds.
    budget, steps, nfe: the evaluations allowed, the steps made of them, the evaluations counted.
    seconds: median time of a batch of `batch` samples.
    metric, space: what is measured, and on what: "state", or the name of the features.
    value, low, high: the figure, and the interval of its expectation (`metrics.bootstrap`).
    n: samples. reference: what they are compared with.
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

    @property
    def is_floor(self) -> bool:
        """Whether these are draws from the truth."""
        return self.sampler in TRUTHS


@dataclass
class Reference:
    """What samples are compared with.

    Args:
        states: (M, *), draws from the truth.
        truth: others (n, *), independent of those: what a perfect sampler would draw.
        name: of the reference. floor: of the other draws, among `TRUTHS`.
        exact: mean (D,) and covariance (D, D) where they are known.
        features: of the Frechet distance; the states themselves if not given.
        metrics: measured where no others are asked for, the first one drawn.
    """

    states: Tensor
    truth: Tensor
    name: str
    floor: str = TRUTHS[0]
    exact: tuple[Tensor, Tensor] | None = None
    features: PrincipalComponents | None = None
    metrics: tuple[str, ...] = ("sliced_wasserstein", "mean_error", "covariance_error")
    directions: Tensor = field(init=False)
    bandwidths: list[float] = field(init=False)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(step_seed(0, 0, "directions"))
        self.directions = directions(self.states[0].numel(), PROJECTIONS, generator)
        self.bandwidths = median_bandwidths(self.states)

    @classmethod
    def of_mixture(cls, mixture: GaussianMixture, sde: SDE, n: int, seed: int = 0) -> "Reference":
        """Two times n draws from the marginal of a mixture at t_min, and the exact moments of that."""
        t = float64(sde.t_min)
        seeds = (step_seed(seed, i, "reference") for i in (0, 1))
        states, truth = (mixture.sample(n, sde, t, torch.Generator().manual_seed(one)) for one in seeds)
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        covariance = alpha**2 * mixture.covariance()
        covariance = covariance + sigma**2 * torch.eye(len(covariance), dtype=covariance.dtype)
        exact = alpha * mixture.mean().flatten(), covariance
        return cls(states, truth, f"{n} exact draws at t_min={sde.t_min:g}", exact=exact)

    @classmethod
    def of_run(cls, run: Run, n: int, split: str = "test", seed: int = 0, trust: Sequence[str] = ()) -> "Reference":
        """A split of a run's data, at most 5,000 of it, beside n of its training data, as its network saw them.

        Images have a Frechet distance, on the first 32 principal components of the training data ("pca-32").

        Raises:
            ValueError: no such split, or one of fewer than four samples.
        """
        states = data_states(run, split, MOST, seed, trust)
        truth = data_states(run, "train", max(n, MOST), seed + len(states), trust)
        features, metrics = None, cls.metrics
        if states.ndim == 4:
            features = PrincipalComponents.of(truth, min(COMPONENTS, truth[0].numel()))
            metrics = ("frechet_distance", "sliced_wasserstein", "mmd")
        kept = truth[_spaced(len(truth), n)]
        return cls(states, kept, f"{len(states)} of {split} data", TRUTHS[1], None, features, metrics)


def data_states(run: Run, split: str, most: int, seed: int = 0, trust: Sequence[str] = ()) -> Tensor:
    """A split of a run's data in model space, (N, *): evenly spaced in it, with the dequantisation of the training.

    Raises:
        ValueError: no such split, or fewer than four samples in it.
    """
    if (node := run.config.data.get(split)) is None:
        raise ValueError(f"{run.path} names no {split} data: set data.{split} in its {CONFIG}")
    dataset = instantiate(node, trust)
    if len(dataset) < FEWEST:
        raise ValueError(f"{FEWEST} samples or more of {split} data expected; {run.path} has {len(dataset)}")
    items = default_collate([dataset[i] for i in _spaced(len(dataset), most).tolist()])
    x, _ = split_condition(items, "cpu")
    seen = instantiate(run.config.data.get("training"), trust)
    seen = seen or {"transform": run.transform, "dequantization": run.dequantization}
    if (way := seen["dequantization"]) is not None:
        x = way.training_values(x, Noise(x.shape, seeds=range(seed, seed + len(x)), dtype=torch.float64))
    return float64(seen["transform"](x))


def _spaced(count: int, most: int) -> Tensor:
    """Indices of at most so many, evenly spaced, for datasets come sorted."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


def mixture_of_three() -> GaussianMixture:
    """The built-in oracle: three Gaussians in space of standard deviations 0.6, 0.25, 0.1, each turned another way."""
    means = torch.tensor([[1.2, 0.0, 0.3], [-0.8, 0.9, -0.4], [-0.3, -1.1, 0.5]], dtype=torch.float64)
    stds = torch.tensor([0.6, 0.25, 0.1], dtype=torch.float64).expand(3, 3)
    axes = torch.tensor([[0.5, 1.0, 0.2], [-0.7, 0.4, 1.1], [1.3, -0.6, 0.8]], dtype=torch.float64)
    turns = torch.linalg.matrix_exp(torch.linalg.cross(axes[:, None], torch.eye(3, dtype=torch.float64)[None]))
    return GaussianMixture(means, stds, torch.tensor([0.5, 0.3, 0.2]), turns)


def describe(mixture: GaussianMixture) -> str:
    """A mixture of Gaussians in words."""
    count, shape = len(mixture.means), tuple(mixture.event_shape)
    weights = ", ".join(f"{w:g}" for w in mixture.log_weights.exp().tolist())
    low, high = float(mixture.stds.min()), float(mixture.stds.max())
    turned = "" if mixture.rotation is None else "rotated "
    return f"{count} {turned}Gaussians over {shape}, weights {weights}, standard deviations {low:g} to {high:g}"


# --- what is measured


def _sliced(x: Tensor, reference: Reference) -> Prepared:
    statistic = SlicedWasserstein(x, reference.states, reference.directions)
    return statistic, statistic.all


def _mmd(x: Tensor, reference: Reference) -> Prepared:
    statistic = Discrepancy(x, reference.states, gaussian(reference.bandwidths))
    return statistic, statistic.all


def _energy(x: Tensor, reference: Reference) -> Prepared:
    statistic = Discrepancy(x, reference.states, torch.neg)
    return statistic, statistic.all


def _mean(x: Tensor, reference: Reference) -> Prepared:
    if (exact := reference.exact) is not None:
        return lambda some: mean_error(some, *exact), (x, None)
    return lambda some, others: mean_error(some, *moments(others)), (x, reference.states)


def _covariance(x: Tensor, reference: Reference) -> Prepared:
    if (exact := reference.exact) is not None:
        return lambda some: covariance_error(some, exact[1]), (x, None)
    return lambda some, others: covariance_error(some, moments(others)[1]), (x, reference.states)


def _frechet(x: Tensor, reference: Reference) -> Prepared:
    features = reference.features or flatten
    return (
        lambda some, others: frechet_distance(*moments(some), *moments(others)),
        (features(x), features(reference.states)),
    )


METRICS: dict[str, Callable[[Tensor, Reference], Prepared]] = {
    "sliced_wasserstein": _sliced,
    "mmd": _mmd,
    "energy_distance": _energy,
    "mean_error": _mean,
    "covariance_error": _covariance,
    "frechet_distance": _frechet,
}


# --- the comparison


def compare(
    model: ScoreModel,
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
) -> list[Row]:
    """Every sampler at every budget: its figures, their intervals, evaluations and seconds; the noise floor first.

    A sampler that gives NaN at a budget, or an infinity, is left out there.

    Args:
        model: in eval mode.
        samplers: by name, a function of the number of steps.
        budgets: numbers of evaluations for each sample.
        reference: what samples are compared with.
        metrics: names among `METRICS`; those of the reference unless given.
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
    names = tuple(metrics or reference.metrics)
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"metrics among {', '.join(METRICS)} expected; got {unknown[0]!r}")
    one = _Comparison(model, reference, names, n, min(batch_size, n), seed, repeats, resamples, level)
    planned = [(name, *plan) for name, build in samplers.items() for plan in one.plans(name, build, budgets)]
    truth = reference.truth
    rows = list(one.rows(truth, sampler=reference.floor, budget=None, steps=None, nfe=0, seconds=None, n=len(truth)))
    for name, budget, steps in tqdm(planned, "comparing", unit="row", disable=not progress):
        rows += one.measure(name, samplers[name](steps), budget, steps)
    return rows


@dataclass(frozen=True)
class _Comparison:
    """What all rows of a comparison share."""

    model: ScoreModel
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

    def measure(self, name: str, sampler: Sampler, budget: int, steps: int) -> list[Row]:
        """The rows of a sampler; none if it does not give numbers."""
        try:
            x, nfe = self.draw(sampler)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            warnings.warn(f"{name} at nfe={budget} is left out: {error}", stacklevel=3)
            return []
        seconds = self.time(sampler)
        return list(self.rows(x, sampler=name, budget=budget, steps=steps, nfe=nfe, seconds=seconds, n=self.n))

    def draw(self, sampler: Sampler) -> tuple[Tensor, int]:
        """The samples (n, *), and the evaluations of each."""
        drawn, nfe, seeds = [], 0, range(self.seed, self.seed + self.n)
        for start in range(0, self.n, self.batch):
            part = seeds[start : start + self.batch]
            result = sampler(self.model, shape=(len(part), *self.shape), seeds=part)
            drawn.append(result.x.cpu())
            nfe = max(nfe, result.nfe)
        return torch.cat(drawn), nfe

    def time(self, sampler: Sampler) -> float:
        """Median seconds of a batch."""
        seconds = []
        for _ in range(self.repeats):
            generator, started = torch.Generator().manual_seed(self.seed), time.perf_counter()
            sampler(self.model, shape=(self.batch, *self.shape), generator=generator).x.cpu()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)

    def rows(self, x: Tensor, **described: Any) -> Iterator[Row]:
        """A row for each metric of samples."""
        for index, metric in enumerate(self.metrics):
            statistic, samples = METRICS[metric](x, self.reference)
            halves = torch.Generator().manual_seed(step_seed(self.seed, index, "halves"))
            found = bootstrap(statistic, *samples, self.resamples, self.level, halves)
            features = self.reference.features if metric == "frechet_distance" else None
            yield Row(
                metric=metric,
                space=str(features or "state"),
                value=found.value,
                low=found.low,
                high=found.high,
                batch=self.batch,
                reference=self.reference.name,
                **described,
            )


# --- what is shown


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each sampler and budget under a line of titles: the figures +- half the width of their intervals."""
    metrics = list(dict.fromkeys((row.metric, row.space) for row in rows))
    titles = [metric if space == "state" else f"{metric} ({space})" for metric, space in metrics]
    lines = [["sampler", "NFE", "seconds", *titles]]
    for name, budget in dict.fromkeys((row.sampler, row.budget) for row in rows):
        mine = {(row.metric, row.space): row for row in rows if (row.sampler, row.budget) == (name, budget)}
        first = next(iter(mine.values()))
        cost = ["-", "-"] if first.seconds is None else [str(first.nfe), f"{first.seconds:.3g}"]
        lines.append([name, *cost, *(_figure(mine[key]) for key in metrics)])
    return lines


def _figure(row: Row) -> str:
    """value +- half the width, to two digits of the latter."""
    half = 0.5 * (row.high - row.low)
    digits = 1 - math.floor(math.log10(half)) if half > 0 and math.isfinite(half) else 4
    digits = min(max(digits, 0), 6)
    return f"{row.value:.{digits}f} +- {half:.{digits}f}"


def write_csv(rows: Sequence[Row], path: Path) -> Path:
    """All rows, a line each, with the names of the fields above them."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, [column.name for column in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)

    replace_atomically(path, write)
    return path
