r"""Multilevel Monte Carlo: the mean of an accurate, expensive quantity from many cheap values and few corrections.

Y_0, Y_1, ..., Y_L are approximations of increasing accuracy and cost of a random quantity, such as the likelihood of an
image computed with more and more solver steps. The telescoping sum (Giles, "Multilevel Monte Carlo path simulation",
Operations Research 2008; "Multilevel Monte Carlo methods", Acta Numerica 2015)

    E[Y_L] = E[Y_0] + sum_l E[Y_l - Y_(l-1)]

is estimated term by term. Y_l and Y_(l-1) of one difference are computed from the same randomness, so that differences
have a small variance V_l, and the terms use independent draws. With a cost C_l of each draw, n_l ~ (V_l / C_l)^(1/2)
draws of level l reach a given variance sum_l V_l / n_l at the least cost.

**Items and repeats.** A draw is a pair (item, repeat). Items are either the members of a finite population, such as a
test set, or seeds, without a limit to their number. The value of item i is mu_i plus noise that differs between
repeats. With variance S^2 of mu_i over the population of N items and variance W^2 of the noise, the mean over n
distinct items of the mean of their r_i repeats has, around the mean of mu over the population, the variance

    S^2 (1/n - 1/N) + W^2 mean_i(1/r_i) / n

(Cochran, Sampling Techniques, chapters 2 and 10). Level 0 evaluates every item, so the choice of the population adds no
error; its spread S/N^(1/2) over other populations of N items is stated separately, as `population`. W^2 is estimated
within the items that have several repeats, and S^2 from the variance between the means of items. For seeds, all
variance counts as noise. A variance estimated with f degrees of freedom is multiplied by f / (f - 2), so that the
squared error divided by it has the mean 1 for normal values, in spite of the small pilots.

**Bias.** Levels are added until the remaining bias is at most a third of the tolerance. If the differences d_l decrease
at least in proportion to 1 / C_l, as refinements of one method do, and C_l at least doubles, the bias is at most |d_L|,
and |d_L| is at most |d_(L-1)| C_(L-1) / C_L. The larger of these two values is stated as the bias, because one
difference may vanish by chance, and the stated error is (sum of variances + bias^2)^(1/2).
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from scoresde.tensors import check_integer, check_number, float64

BIAS = 1 / 3  # largest remaining bias, as a fraction of the tolerance
SIGNIFICANT = 2  # a mean difference of fewer standard errors is measured again before it counts as bias
GROWTH = 2  # largest ratio of the draws of a level from one round to the next
LEAST_PILOT = 4  # with fewer draws a variance is not known to within a factor of three
APART = 2**40  # distance of the seeds, or of the repeats, of neighbouring levels
LIMIT = 10**8  # largest number of draws that is planned


@dataclass(frozen=True)
class Level:
    """One term of the telescoping sum.

    cost: cost of one draw, in any unit, such as evaluations of a network. values: a function from items (n,) and
    repeats (n,), int64, to float64 values (n, *): Y_0 for the first level, Y_l - Y_(l-1) for the others. A value must
    be a function of its (item, repeat) only, and different repeats must be independent.
    """

    name: str
    cost: float
    values: Callable[[Tensor, Tensor], Tensor]


@dataclass
class Term:
    """The estimate of one term.

    mean, stderr: the estimate and its standard error, (*). between, within: S^2 and W^2 of the module docstring, (*).
    items, draws: numbers of distinct items and of draws. cost: total cost of the draws.
    """

    name: str
    mean: Tensor
    stderr: Tensor
    between: Tensor
    within: Tensor
    items: int
    draws: int
    cost: float


@dataclass
class Multilevel:
    """A multilevel estimate; scalars are tensors of shape () for scalar values.

    mean: the estimate, (*). stderr: its standard error (*), from the variances of all terms. bias: the estimated bias
    of the last level, (*). error: (stderr^2 + bias^2)^(1/2), (*). population: standard deviation of the mean over other
    populations of the same size, (*); None for seeds. first: level 0 of each item, the mean over its repeats, in the
    order of the population (N, *); of the drawn items for seeds.
    """

    mean: Tensor
    stderr: Tensor
    bias: Tensor
    population: Tensor | None
    terms: list[Term]
    first: Tensor

    @property
    def error(self) -> Tensor:
        return torch.hypot(self.stderr, self.bias)

    @property
    def cost(self) -> float:
        return sum(term.cost for term in self.terms)


def estimate(
    levels: Sequence[Level],
    tolerance: float,
    population: int | None = None,
    pilot: int = 16,
    repeated: int = 32,
    seed: int = 0,
    refined: int = 1,
) -> Multilevel:
    """Estimate the mean of the most accurate level to within a tolerance; see the module docstring.

    The first three levels begin with a pilot; level 0 with all items of a finite population. The draws of all levels
    then grow together, at most by a factor of two in a round, to the optimal numbers for the variances known so far.
    Then the bias is checked. If it is too large, and the difference that sets it is within two standard errors of zero,
    this difference gets more draws; otherwise the next level is added.

    Args:
        levels: the terms from the cheapest to the most expensive, at least two. The later ones are only used if the
            bias needs them.
        tolerance: the error to reach, in root mean square over the components of a value.
        population: number N of items 0 ... N - 1; None for seeds. Items of level l are then l 2^40 + 0, 1, 2, ...
        pilot: number of draws with which a level begins; half of them are second repeats if the population is finite.
        repeated: for a finite population, the number of items of level 0 that are drawn twice at the beginning.
        seed: determines the random subsets of the population. Repeats of level l are l 2^40 + 0, 1, 2, ...
        refined: index of the first level that refines the one before; the bias is not estimated from earlier
            differences.

    Warns:
        UserWarning: the bias after the last level is more than a third of the tolerance.

    Raises:
        ValueError: the tolerance is not positive or needs more than LIMIT draws, `levels` has no level `refined`, costs
            do not increase from this level on, the pilot is too small or larger than the population, or a value is not
            finite.
    """
    check_number("tolerance", tolerance, low=0)
    _check(levels, population, pilot, repeated, refined)
    samples = [_Samples(level, i, population, seed) for i, level in enumerate(levels)]
    used = samples[: max(3, refined + 1)]
    small = BIAS * tolerance
    while True:
        for i, sample in enumerate(used):
            if not sample.draws:
                sample.begin(pilot, repeated if i == 0 else None)
        terms = [sample.term() for sample in used]
        goals = _allocate(terms, population, tolerance**2 * (1 - BIAS**2))
        short = [(sample, goal) for sample, goal in zip(used, goals, strict=True) if goal > sample.draws]
        bias, decisive = _bias(terms, refined)
        if not short and rms(bias) > small:
            term = terms[decisive]
            if rms(term.mean) < SIGNIFICANT * rms(term.stderr):
                short = [(used[decisive], GROWTH * term.draws)]
            elif len(used) < len(samples):
                used = samples[: len(used) + 1]
                continue
        if not short:
            break
        for sample, goal in short:
            sample.grow(min(goal, GROWTH * sample.draws))
    if rms(bias) > small:
        warnings.warn(
            f"the last level, {levels[-1].name}, still changes the mean by {rms(bias):.2g}, more than a third of "
            f"tolerance={tolerance:g}: add more accurate levels, or raise the tolerance",
            stacklevel=2,
        )
    mean = torch.stack([term.mean for term in terms]).sum(dim=0)
    stderr = torch.stack([term.stderr.square() for term in terms]).sum(dim=0).sqrt()
    spread = None if population is None else (terms[0].between / population).sqrt()
    return Multilevel(mean, stderr, bias, spread, terms, used[0].item_means())


def rms(values: Tensor) -> float:
    """Return the root mean square of the components of a value (*)."""
    return float(values.square().mean().sqrt())


@dataclass
class _Samples:
    """The draws of one level so far: positions in the random order of the items, values; repeats by position."""

    level: Level
    index: int
    population: int | None
    seed: int
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    positions: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    values: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def __post_init__(self):
        if self.population is not None:
            generator = torch.Generator().manual_seed(self.seed + APART * self.index)
            self.order = torch.randperm(self.population, generator=generator)
            self.counts = torch.zeros(self.population, dtype=torch.int64)

    @property
    def draws(self) -> int:
        return len(self.positions)

    def begin(self, pilot: int, repeated: int | None) -> None:
        """Draw `pilot` times; given `repeated`, draw all items of a finite population, `repeated` of them twice."""
        if self.population is None:
            return self.grow(pilot)
        once, twice = pilot - pilot // 2, pilot // 2
        if repeated is not None:
            once, twice = self.population, min(repeated, self.population)
        return self._draw(torch.cat([torch.arange(once), torch.arange(twice)]))

    def grow(self, total: int) -> None:
        """Draw until there are `total` draws: new items first, then further repeats of those with the fewest."""
        missing = total - self.draws
        if self.population is None:
            return self._draw(torch.arange(self.draws, total))
        counts, chosen = self.counts.clone(), []
        while missing > 0:
            least = (counts == counts.min()).nonzero().flatten()[:missing]
            counts[least] += 1
            chosen.append(least)
            missing -= len(least)
        return self._draw(torch.cat(chosen))

    def _draw(self, positions: Tensor) -> None:
        """Evaluate one further repeat of the items at these positions; a position may occur several times."""
        if self.population is None:
            items, repeats = APART * self.index + positions, torch.zeros_like(positions)
        else:
            ordered, index = positions.sort(stable=True)
            further = torch.arange(len(ordered)) - torch.searchsorted(ordered, ordered)  # of the same item in this call
            items, repeats = self.order[positions], torch.empty_like(positions)
            repeats[index] = APART * self.index + self.counts[ordered] + further
            self.counts += positions.bincount(minlength=len(self.counts))
        values = float64(self.level.values(items, repeats)).cpu()
        if len(values) != len(items):
            raise ValueError(f"{self.level.name} must return one value per draw, {len(items)}; got {len(values)}")
        finite = torch.isfinite(values.reshape(len(items), -1)).all(dim=1)
        if not bool(finite.all()):
            raise ValueError(
                f"{self.level.name} must have finite values; got NaN or infinity for {int((~finite).sum())} of "
                f"{len(items)} draws, the first of item {int(items[~finite][0])}: leave the level out or refine it"
            )
        self.values = torch.cat([self.values.reshape(-1, *values.shape[1:]), values])
        self.positions = torch.cat([self.positions, positions])

    def _sums(self) -> tuple[Tensor, Tensor]:
        """Return the number of draws (n,) and the mean (n, *) of each drawn position, in order."""
        drawn, index, counts = self.positions.unique(return_inverse=True, return_counts=True)
        sums = torch.zeros(len(drawn), *self.values.shape[1:], dtype=torch.float64).index_add(0, index, self.values)
        return counts, sums / _column(counts, sums)

    def item_means(self) -> Tensor:
        """Return the mean over its repeats of each drawn item (n, *), in the order of the population."""
        _, means = self._sums()
        if self.population is None:
            return means
        return means[self.order[self.positions.unique()].argsort()]

    def term(self) -> Term:
        """Return the estimate from the draws so far."""
        counts, means = self._sums()
        n, size = len(means), self.population or math.inf
        spread = means.var(dim=0)
        inverse, free = float((1 / counts.double()).mean()), int(counts.sum()) - n
        squares = self.values.square().sum(dim=0) - (_column(counts, means) * means.square()).sum(dim=0)
        within = squares.clamp(min=0) / free if free else spread / inverse
        between = (spread - within * inverse).clamp(min=0) * _caution(n - 1)
        within = within * _caution(free or n - 1)
        variance = between * (1 / n - 1 / size) + within * inverse / n
        cost = self.draws * self.level.cost
        return Term(self.level.name, means.mean(dim=0), variance.sqrt(), between, within, n, self.draws, cost)


def _column(counts: Tensor, values: Tensor) -> Tensor:
    """Return counts (n,), float64, in a shape that multiplies values (n, *)."""
    return counts.double().reshape(-1, *(1,) * (values.ndim - 1))


def _caution(freedom: int) -> float:
    """Return f / (f - 2), the mean square of Student's t; 3 for f < 3, where it is infinite."""
    freedom = max(freedom, 3)
    return freedom / (freedom - 2)


def _bias(terms: Sequence[Term], refined: int) -> tuple[Tensor, int]:
    """Return the bias (*) of the last level, see the module docstring, and the index of the term that decides it."""
    last, before = terms[-1], terms[-2]
    if len(terms) == refined + 1:
        return last.mean.abs(), refined
    expected = before.mean.abs() * (before.cost / before.draws) / (last.cost / last.draws)
    decisive = len(terms) - (1 if rms(last.mean) >= rms(expected) else 2)
    return torch.maximum(last.mean.abs(), expected), decisive


def _allocate(terms: Sequence[Term], population: int | None, variance: float) -> list[int]:
    """Return the number of draws of each level with the least cost for a given variance of the sum.

    With a multiplier m, level l gets m ((S^2 + W^2) / C)^(1/2) draws if these are at most N, and otherwise
    max(N, m (W^2 / C)^(1/2)). The multiplier is found by bisection.
    """
    size = population or math.inf
    parts = [(float(t.between.mean()), float(t.within.mean()), t.cost / t.draws) for t in terms]
    reported = [rms(term.stderr) ** 2 for term in terms]

    def draws(m: float) -> list[float]:
        goals = []
        for term, (s, w, c) in zip(terms, parts, strict=True):
            items = m * math.sqrt((s + w) / c)
            again = term.draws - term.items if term.items < size else 0
            goals.append(items + again if items <= size else max(size, m * math.sqrt(w / c)))
        return goals

    def reached(m: float) -> bool:
        total = 0.0
        for n, term, (s, w, _), now in zip(draws(m), terms, parts, reported, strict=True):
            items = min(term.items + n - term.draws, size)
            then = s * (1 / items - 1 / size) + w / (items if items < size else n) if n > term.draws else now
            total += min(now, then)
        return total <= variance

    high = 1.0
    while not reached(high):
        high *= 2
        if max(draws(high)) > LIMIT:
            raise ValueError(
                f"tolerance must need at most {LIMIT:.0e} draws of a level; got one that needs more: raise tolerance"
            )
    low = 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return [math.ceil(n) for n in draws(high)]


def _check(levels: Sequence[Level], population: int | None, pilot: int, repeated: int, refined: int) -> None:
    """Raise ValueError unless the arguments of `estimate` describe a multilevel estimate."""
    check_integer("refined", refined, 1)
    if len(levels) <= refined:
        raise ValueError(f"levels must be at least {refined + 1}; got {len(levels)}: add a more accurate level")
    costs = [level.cost for level in levels]
    if not all(c > 0 for c in costs) or any(a >= b for a, b in pairwise(costs[refined:])):
        raise ValueError(f"costs must be positive and increase from level {refined} on; got {costs}: sort the levels")
    check_integer("pilot", pilot, LEAST_PILOT)
    check_integer("repeated", repeated, 2)
    if population is not None and population < pilot:
        raise ValueError(f"population must be at least pilot={pilot}; got {population}: lower pilot")
