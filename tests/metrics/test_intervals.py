"""Intervals from half-samples, their width for a mean and their coverage; Wilson's interval of a fraction."""

import math

import pytest
import torch

from scoresde.metrics import Discrepancy, SlicedWasserstein, bootstrap, wilson
from scoresde.metrics.transport import directions
from tests.conftest import normal, seeded


def distance_of_means(x, y):
    return x.mean() - y.mean()


def test_the_interval_of_a_mean_has_the_width_of_its_standard_error():
    x, y = normal(400), 2 * normal(100, seed=1)
    interval = bootstrap(distance_of_means, x, y, resamples=2000, level=0.9, generator=seeded())
    stderr = math.sqrt(float(x.var() / 400 + y.var() / 100))
    assert interval.value == pytest.approx(float(x.mean() - y.mean()))
    assert interval.high - interval.low == pytest.approx(2 * 1.645 * stderr, rel=0.08)
    assert interval.high + interval.low == pytest.approx(2 * interval.value, abs=0.2 * stderr)
    single = bootstrap(torch.mean, x, resamples=2000, generator=seeded())
    assert single.high - single.low == pytest.approx(2 * 1.96 * float(x.std()) / 20, rel=0.08)


@pytest.mark.parametrize("z", [1.0, 1.96])
@pytest.mark.parametrize(("count", "total"), [(0, 1), (0, 200), (1, 200), (37, 50), (200, 200)])
def test_the_ends_of_wilsons_interval_solve_its_equation(count, total, z):
    interval = wilson(count, total, z)
    assert interval.value == count / total
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    for end in {interval.low, interval.high} - {interval.value}:
        assert abs(interval.value - end) == pytest.approx(z * math.sqrt(end * (1 - end) / total), rel=1e-9)
    if count == 0:
        assert interval.high == pytest.approx(z**2 / (total + z**2))


def test_wilsons_interval_covers_the_probability():
    """68% at one standard deviation, on average over probabilities: its coverage oscillates with p."""
    binomial = torch.distributions.Binomial(20, probs=torch.linspace(0.02, 0.98, 97, dtype=torch.float64))
    counts = torch.arange(21, dtype=torch.float64)[:, None]
    ends = [wilson(int(count), 20) for count in counts]
    low, high = (torch.tensor([getattr(end, name) for end in ends], dtype=torch.float64) for name in ("low", "high"))
    inside = (low[:, None] <= binomial.probs) & (binomial.probs <= high[:, None])
    coverage = (inside * binomial.log_prob(counts).exp()).sum(dim=0)
    assert float(coverage.mean()) == pytest.approx(0.68, abs=0.03)


def test_fractions_without_trials_are_refused():
    for arguments in ((0, 0), (3, 2), (-1, 2), (1, 2, 0.0)):
        with pytest.raises(ValueError, match="expected 0 <= count <= total, total >= 1 and z > 0; got count="):
            wilson(*arguments)


def test_a_statistic_that_is_not_finite_is_refused():
    message = "must be finite; it is nan for all samples, and NaN or infinite for 9 of 9 random halves of them"
    with pytest.raises(ValueError, match=message):
        bootstrap(lambda x: x.mean() * math.nan, normal(8), resamples=9)


@pytest.mark.parametrize("x", [torch.ones(20), torch.full((21,), 0.1), torch.zeros(9), 3 + 1e-16 * normal(40)])
def test_constant_samples_give_no_interval(x):
    """The interval had the length 0."""
    with pytest.raises(ValueError, match=r"must vary among halves of the samples; got [013.]+ for all 50 halves"):
        bootstrap(torch.mean, x, resamples=50)
    with pytest.raises(ValueError, match="must vary among halves"):
        bootstrap(distance_of_means, x, x, resamples=50)
    assert bootstrap(torch.mean, 3 + 1e-12 * normal(40), resamples=50).high > 3


def test_the_interval_is_a_function_of_its_generator():
    x, y = normal(30), normal(20, seed=1)
    first, again, other = (bootstrap(distance_of_means, x, y, 20, generator=seeded(s)) for s in (0, 0, 1))
    assert first == again != other


@pytest.mark.slow
@pytest.mark.parametrize(("statistic", "shift"), [("sliced", 0.0), ("energy", 1.0)])
def test_intervals_cover_the_expectation(statistic, shift):
    """Between Gaussians in 3 dimensions; intervals are too wide where the distributions are equal."""
    generator, u = seeded(), directions(3, 8, seeded(1))

    def draw():
        x, y = (torch.randn(60, 3, generator=generator, dtype=torch.float64) for _ in range(2))
        x[:, 0] += shift
        return SlicedWasserstein(x, y, u) if statistic == "sliced" else Discrepancy(x, y, torch.neg)

    expected = float(torch.stack([one(*one.all) for one in (draw() for _ in range(600))]).mean())
    intervals = [bootstrap(one, *one.all, 60, generator=generator) for one in (draw() for _ in range(150))]
    covered = sum(interval.low <= expected <= interval.high for interval in intervals) / len(intervals)
    assert covered >= 0.87  # 0.95 minus 3 standard errors of 150 trials, and 60 samples are not yet normal
    if shift:
        assert covered < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": normal(3)}, r"needs at least 4 samples; got \[3\]"),
        ({"x": normal(9), "resamples": 1}, "expected an integer resamples >= 2 .* got resamples=1 and level=0.95"),
        ({"x": normal(9), "level": 1.0}, r"level in \(0, 1\); got resamples=200 and level=1.0"),
    ],
)
def test_wrong_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(torch.mean, **arguments)
