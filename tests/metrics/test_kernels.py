"""Kernel distances against explicit sums, and against their expectations."""

import math

import pytest
import torch

from scoresde.metrics import Discrepancy, energy_distance, mmd
from scoresde.metrics.kernels import gaussian, median_bandwidths
from tests.conftest import close, f64, normal, within


def explicit(x, y, kernel):
    """The U-statistic as a sum over pairs."""
    n, m = len(x), len(y)
    xx = sum(kernel(math.dist(x[a], x[b])) for a in range(n) for b in range(n) if a != b)
    yy = sum(kernel(math.dist(y[a], y[b])) for a in range(m) for b in range(m) if a != b)
    xy = sum(kernel(math.dist(a, b)) for a in x for b in y)
    return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)


def test_discrepancies_equal_explicit_sums():
    x, y = normal(8, 3), normal(6, 3, seed=1)
    rows = x.tolist(), y.tolist()
    assert float(energy_distance(x, y)) == pytest.approx(explicit(*rows, lambda d: -d))
    gaussians = lambda d: (math.exp(-d * d / 0.5) + math.exp(-d * d / 8)) / 2  # noqa: E731
    assert float(mmd(x, y, [0.5, 2.0])) == pytest.approx(explicit(*rows, gaussians))
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


def test_default_bandwidths_are_multiples_of_the_median_distance_in_y():
    x, y = normal(50, 2, seed=1) + 1, normal(300, 2)
    bandwidths = f64(*median_bandwidths(y))
    close(bandwidths / bandwidths[2], f64(0.25, 0.5, 1, 2, 4))
    assert float(bandwidths[2]) == pytest.approx(1.665, abs=0.1)  # |x - y|^2/4 is exponential: 2 (log 2)^(1/2)
    close(mmd(x, y), mmd(x, y, bandwidths.tolist()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mmd(normal(4, 2), normal(4, 3)), r"the same shape; got \(4, 2\) and \(4, 3\)"),
        (lambda: mmd(normal(4, 2), normal(4, 2) / 0), "y must be finite; got NaN or infinity in 4 of 4 samples"),
        (lambda: energy_distance(normal(4, 2) / 0, normal(4, 2)), "x must be finite; got NaN or infinity in 4 of 4"),
        (lambda: mmd(normal(4, 2), normal(4, 2), [1.0, 0.0]), "all positive"),
        (lambda: gaussian([]), "at least one bandwidth"),
        (lambda: mmd(normal(4, 2), torch.zeros(4, 2)), "the median distance between samples of y is 0"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
