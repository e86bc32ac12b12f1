"""Intervals by halves: of a mean that of its standard error, and their coverage."""

import math

import pytest
import torch

from scoresde.metrics import Discrepancy, SlicedWasserstein, bootstrap
from scoresde.metrics.transport import directions
from tests.conftest import normal, seeded


def distance_of_means(x, y):
    return x.mean() - y.mean()


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    x, y = normal(400), 2 * normal(100, seed=1)
    found = bootstrap(distance_of_means, x, y, resamples=2000, level=0.9, generator=seeded())
    stderr = math.sqrt(float(x.var() / 400 + y.var() / 100))
    assert found.value == pytest.approx(float(x.mean() - y.mean()))
    assert found.high - found.low == pytest.approx(2 * 1.645 * stderr, rel=0.08)
    assert found.high + found.low == pytest.approx(2 * found.value, abs=0.2 * stderr)
    alone = bootstrap(torch.mean, x, resamples=2000, generator=seeded())
    assert alone.high - alone.low == pytest.approx(2 * 1.96 * float(x.std()) / 20, rel=0.08)


def test_the_interval_is_a_function_of_its_generator():
    x, y = normal(30), normal(20, seed=1)
    first, again, other = (bootstrap(distance_of_means, x, y, 20, generator=seeded(s)) for s in (0, 0, 1))
    assert first == again != other


@pytest.mark.slow
@pytest.mark.parametrize("apart", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["sliced", "energy"])
def test_the_coverage_of_intervals_of_distances(kind, apart):
    """Of what repetitions scatter around, between Gaussians in space; too wide where the distributions are one."""
    generator, u = seeded(), directions(3, 8, seeded(1))

    def statistic():
        x, y = (torch.randn(60, 3, generator=generator, dtype=torch.float64) for _ in range(2))
        x[:, 0] += apart
        return SlicedWasserstein(x, y, u) if kind == "sliced" else Discrepancy(x, y, torch.neg)

    expected = float(torch.stack([one(*one.all) for one in (statistic() for _ in range(600))]).mean())
    intervals = [bootstrap(one, *one.all, 60, generator=generator) for one in (statistic() for _ in range(150))]
    covered = sum(found.low <= expected <= found.high for found in intervals) / len(intervals)
    assert covered >= 0.87  # 0.95, less 3 standard errors of 150 trials and what 60 samples are not yet normal
    if apart:
        assert covered < 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap(torch.mean, normal(3)), r"4 samples or more expected; got \[3\]"),
        (lambda: bootstrap(torch.mean, normal(9), resamples=1), "two resamples or more"),
        (lambda: bootstrap(torch.mean, normal(9), level=1.0), r"level in \(0, 1\)"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
