"""Intervals from half-samples: their width for a mean, and their coverage."""

import math

import pytest
import torch

from scoresde.metrics import Discrepancy, SlicedWasserstein, bootstrap
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
        ({"x": normal(9), "resamples": 1}, "expected resamples >= 2 .* got 1 and 0.95"),
        ({"x": normal(9), "level": 1.0}, r"level in \(0, 1\); got 200 and 1.0"),
    ],
)
def test_wrong_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(torch.mean, **arguments)
