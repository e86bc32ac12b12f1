"""Kernel distances against their sums by hand, and against what they are on average."""

import math

import pytest
import torch

from scoresde.metrics import Discrepancy, energy_distance, mmd
from scoresde.metrics.kernels import gaussian, median_distance
from tests.conftest import close, f64, normal, within


def naive(x, y, kernel):
    """The U-statistic by its sums."""
    n, m = len(x), len(y)
    xx = sum(kernel(math.dist(x[a], x[b])) for a in range(n) for b in range(n) if a != b)
    yy = sum(kernel(math.dist(y[a], y[b])) for a in range(m) for b in range(m) if a != b)
    xy = sum(kernel(math.dist(a, b)) for a in x for b in y)
    return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)


def test_discrepancies_are_their_sums():
    x, y = normal(8, 3), normal(6, 3, seed=1)
    rows = x.tolist(), y.tolist()
    assert float(energy_distance(x, y)) == pytest.approx(naive(*rows, lambda d: -d))
    gaussians = lambda d: (math.exp(-d * d / 0.5) + math.exp(-d * d / 8)) / 2  # noqa: E731
    assert float(mmd(x, y, [0.5, 2.0])) == pytest.approx(naive(*rows, gaussians))
    statistic, i, j = Discrepancy(x, y, torch.neg), torch.tensor([5, 0, 3]), torch.tensor([4, 1])
    close(statistic(i, j), energy_distance(x[i], y[j]))


def test_mmd_of_gaussians_is_unbiased():
    """E k(x, y) = (h^2/(h^2 + 2))^(D/2) exp(-|m|^2/(2 (h^2 + 2))) for unit Gaussians |m| apart."""
    h, size = 1.5, 2
    mean = f64(0.8, -0.3)
    scale = (h * h / (h * h + 2)) ** (size / 2)
    expected = 2 * scale * (1 - math.exp(-float(mean.square().sum()) / (2 * (h * h + 2))))
    draws = [mmd(normal(40, size, seed=s), normal(30, size, seed=1000 + s) + mean, [h]) for s in range(300)]
    within(torch.stack(draws)[:, None], f64(expected))


def test_energy_distance_of_equal_gaussians_is_zero_on_average_and_of_points_exact():
    draws = [energy_distance(normal(20, 3, seed=s), normal(25, 3, seed=1000 + s)) for s in range(300)]
    within(torch.stack(draws)[:, None], f64(0.0))
    assert min(draws) < 0 < max(draws)
    zeros = torch.zeros(5, 2)
    assert float(energy_distance(zeros, zeros + f64(3.0, 4.0))) == pytest.approx(10.0)


def test_the_bandwidths_are_those_of_y():
    y = normal(300, 2)
    assert median_distance(y) == pytest.approx(1.665, abs=0.1)  # |x - y|^2 / 4 is exponential: 2 (log 2)^(1/2)
    assert median_distance(3 * y) == pytest.approx(3 * median_distance(y))
    median = median_distance(y)
    bandwidths = [median * scale for scale in (0.25, 0.5, 1, 2, 4)]
    x = normal(50, 2, seed=1) + 1
    close(mmd(x, y), mmd(x, y, bandwidths))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mmd(normal(4, 2), normal(4, 3)), r"one shape expected; got \(4, 2\) and \(4, 3\)"),
        (lambda: mmd(normal(4, 2), normal(4, 2), [1.0, 0.0]), "positive bandwidth"),
        (lambda: gaussian([]), "one positive bandwidth or more"),
        (lambda: mmd(normal(4, 2), torch.zeros(4, 2)), "samples that differ expected"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
