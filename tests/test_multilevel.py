"""Multilevel estimates: calibrated and of optimal cost for quantities whose mean is known."""

import math
from dataclasses import replace

import pytest
import torch

from scoresde.multilevel import APART, GROWTH, Level, _caution, estimate, rms
from tests.conftest import close, f64, normal

LAST = pytest.mark.filterwarnings("ignore:the last level")  # the noise of its difference may exceed the tolerance

N, COSTS = 400, (1.0, 2.0, 4.0, 8.0, 16.0)
MEANS = f64(1.0, 0.1, 0.02, 0.002, 0.0002)  # of Y_0 and of the differences
BETWEEN, WITHIN = f64(0.3, 0.04, 0.01, 0.003, 0.001), f64(0.1, 0.02, 0.01, 0.002, 0.0005)


class Synthetic:
    """N items with values MEANS + BETWEEN a + WITHIN b: a is one normal number per item, b one per draw.

    The noise of a draw is a function of its level, item and repeat; `draws` records all of these.
    """

    def __init__(self, seed=0, shape=(), skewed=False):
        spread = normal(len(MEANS), N, *shape, seed=seed)
        spread = (spread.exp() - math.exp(0.5)) / 2.16 if skewed else spread  # log-normal, of mean 0 and variance 1
        self.items = torch.stack([m + s * a for m, s, a in zip(MEANS, BETWEEN, spread, strict=True)])
        self.seed, self.shape, self.draws = seed, shape, []

    def levels(self):
        return [Level(f"level {i}", cost, self.level(i)) for i, cost in enumerate(COSTS)]

    def level(self, i):
        noise = normal(N, 64, *self.shape, seed=1000 * self.seed + i + 1)

        def values(items, repeats):
            own = repeats - APART * i
            self.draws += [(i, *draw) for draw in zip(items.tolist(), own.tolist(), strict=True)]
            return self.items[i][items] + WITHIN[i] * noise[items, own]

        return values

    @property
    def truth(self):
        return self.items.mean(dim=1).sum(dim=0)


def seeds_only(draw):
    """Levels without a population, from a function (level, items) -> values (n, *)."""
    return [Level(f"level {i}", c, lambda items, repeats, i=i: draw(i, items - APART * i)) for i, c in enumerate(COSTS)]


@LAST
@pytest.mark.parametrize(("tolerance", "skewed"), [(0.01, False), (0.006, True)])
def test_the_stated_error_is_calibrated(tolerance, skewed):
    """The mean square of error / stated error is 1, within 4.5 of its standard errors plus the caution of the bias."""
    squares, signed = [], []
    for seed in range(50):
        case = Synthetic(seed, skewed=skewed)
        found = estimate(case.levels(), tolerance, N, seed=seed)
        signed.append(float((found.mean - case.truth) / found.error))
        squares.append(signed[-1] ** 2)
    squares, signed = f64(*squares), f64(*signed)
    assert abs(float(signed.mean())) < 4.5 / math.sqrt(len(signed))
    spread = float(squares.std()) / math.sqrt(len(squares))
    assert 0.8 - 4.5 * spread < float(squares.mean()) < 1.05 + 4.5 * spread


def test_all_items_are_on_level_0_and_no_draw_occurs_twice():
    case = Synthetic()
    found = estimate(case.levels(), 0.004, N)
    assert len(set(case.draws)) == len(case.draws) == sum(term.draws for term in found.terms)
    assert {item for level, item, _ in case.draws if level == 0} == set(range(N))
    for level, term in enumerate(found.terms):
        assert term.items == len({item for i, item, _ in case.draws if i == level})
        close(term.cost, COSTS[level] * term.draws)
    close(found.cost, sum(term.cost for term in found.terms))


def test_the_values_of_level_0_are_those_of_the_items_in_their_order():
    case = Synthetic()
    found = estimate(case.levels(), 0.01, N)
    error = found.first - case.items[0]
    assert len(found.first) == N
    assert 0.8 * WITHIN[0] < error.std() < 1.1 * WITHIN[0]
    close(found.population, BETWEEN[0] / math.sqrt(N), rtol=0.2)
    close(found.terms[0].within.sqrt(), WITHIN[0], rtol=0.4)


@LAST
def test_the_draws_are_those_of_the_least_cost():
    """n_l ~ (V_l / C_l)^(1/2), and a total cost of (sum (V_l C_l)^(1/2))^2 / error^2, for an infinite population."""
    variances = BETWEEN**2

    def draw(i, items):
        return MEANS[i] + BETWEEN[i] * normal(int(items[-1]) + 1, seed=i)[items]

    found = estimate(seeds_only(draw), 0.002, pilot=64)
    count = len(found.terms)
    ratios = f64(*[term.draws for term in found.terms]) / (variances / f64(*COSTS)).sqrt()[:count]
    assert float(ratios[:3].max() / ratios[:3].min()) < 1.3
    least = float((variances * f64(*COSTS)).sqrt()[:count].sum() ** 2 / found.stderr**2)
    assert least * 0.9 < found.cost < least * 1.4
    assert abs(float(found.mean - MEANS[:count].sum())) < 4.5 * float(found.stderr)


def test_a_sample_of_seeds_has_the_standard_error_of_its_mean():
    def draw(i, items):
        return MEANS[i] + BETWEEN[i] * normal(int(items[-1]) + 1, 3, seed=i)[items]

    found = estimate(seeds_only(draw), 0.02)
    assert found.population is None
    assert found.mean.shape == found.stderr.shape == found.bias.shape == (3,)
    assert rms(found.error) <= 0.02
    drawn = draw(0, torch.arange(found.terms[0].draws))
    close(found.first, drawn)
    caution = (len(drawn) - 1) / (len(drawn) - 3)
    close(found.terms[0].stderr, drawn.std(dim=0) * math.sqrt(caution / len(drawn)))


def test_a_difference_from_an_approximation_of_another_kind_is_no_bias():
    """Level 0 is off by 3; levels 2 and 3 refine level 1, so that |d_1| = 3 says nothing about them."""
    case = Synthetic()
    others = [
        replace(level, values=lambda items, repeats, level=level: level.values(items, repeats - APART))
        for level in case.levels()[1:]
    ]
    surrogate = Level("surrogate", 0.5, lambda items, repeats: case.items[0][items] - 3.0)
    corrected = Level("level 0 less it", 50.0, lambda items, repeats: f64(3.0).expand(len(items)))
    found = estimate([surrogate, corrected, *others], 0.2, N, refined=2)
    _, _, before, last = found.terms
    close(found.bias, last.mean.abs().maximum(before.mean.abs() * COSTS[1] / COSTS[2]))
    assert abs(float(found.mean - case.truth)) < 4.5 * float(found.error)


def test_a_pilot_of_two_items_is_not_trusted():
    """With one degree of freedom a variance is multiplied by more than one with many."""
    factors = [_caution(freedom) for freedom in range(1, 30)]
    assert factors == sorted(factors, reverse=True)
    close(f64(factors[9]), f64(10 / 8))


def test_components_are_estimated_together():
    case = Synthetic(shape=(2, 2))
    found = estimate(case.levels(), 0.006, N)
    assert found.first.shape == (N, 2, 2)
    assert rms(found.error) <= 0.006
    assert bool(((found.mean - case.truth).abs() < 4.5 * found.error).all())


def test_levels_are_added_until_the_bias_is_small():
    used = [len(estimate(Synthetic().levels(), tolerance, N).terms) for tolerance in (0.2, 0.05, 0.005)]
    assert used == [3, 4, 5]
    with pytest.warns(UserWarning, match="the last level, level 2, still changes the mean by"):
        found = estimate(Synthetic().levels()[:3], 0.01, N)
    assert float(found.error) > 0.01
    close(found.bias, (found.terms[2].mean.abs()).maximum(found.terms[1].mean.abs() / 2))


@LAST
def test_no_level_grows_faster_than_its_variance_is_known():
    case = Synthetic()
    sizes = {}

    def counted(i, values):
        def draw(items, repeats):
            sizes.setdefault(i, []).append(len(items))
            return values(items, repeats)

        return draw

    levels = [replace(level, values=counted(i, level.values)) for i, level in enumerate(case.levels())]
    estimate(levels, 0.002, N)
    for requests in sizes.values():
        totals = torch.tensor(requests).cumsum(0)
        assert bool((totals[1:] <= GROWTH * totals[:-1]).all())


def test_a_result_is_a_function_of_the_seed():
    first, again, other = (estimate(Synthetic().levels(), 0.01, N, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.mean, again.mean)
    assert not torch.equal(first.mean, other.mean)


def test_a_value_without_noise_has_no_error():
    levels = [Level(f"{i}", c, lambda items, repeats, i=i: MEANS[i].expand(len(items))) for i, c in enumerate(COSTS)]
    found = estimate(levels, 0.03, N)
    close(found.mean, MEANS[: len(found.terms)].sum())
    assert float(found.stderr) < 1e-12


NAN = torch.full((), math.nan)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tolerance": 0.0}, "tolerance must be .* more than 0; got 0"),
        ({"tolerance": math.nan}, "tolerance must be finite"),
        ({"tolerance": 1e-7}, "tolerance must need at most 1e.08 draws"),
        ({"levels": Synthetic().levels()[:1]}, "levels must be at least 2; got 1"),
        ({"levels": Synthetic().levels()[::-1]}, "increase from level 1 on"),
        ({"population": 10}, "population must be at least pilot=16; got 10"),
        ({"pilot": 2}, "pilot must be at least 4; got 2"),
        (
            {"levels": [*Synthetic().levels()[:1], Level("bad", 2.0, lambda i, r: NAN.expand(len(i)))]},
            "bad must have fin",
        ),
        ({"levels": [*Synthetic().levels()[:1], Level("bad", 2.0, lambda i, r: f64(1.0, 2.0))]}, "one value per draw"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate(**{"levels": Synthetic().levels(), "tolerance": 0.01, "population": N, **arguments})
