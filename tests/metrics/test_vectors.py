"""Distances between samples against closed forms, other implementations, and the samples' own statistics."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from scoresde.metrics import (
    Discrepancy,
    PrincipalComponents,
    SlicedWasserstein,
    bootstrap,
    covariance_error,
    energy_distance,
    frechet_distance,
    mean_error,
    mmd,
    moments,
    sliced_wasserstein,
    wasserstein,
)
from scoresde.metrics.vectors import directions, gaussian, median_distance
from tests.conftest import close, f64, normal, seeded, within

# --- optimal transport


@pytest.mark.parametrize(("n", "m"), [(7, 7), (5, 8), (6, 4), (1, 9), (30, 20)])
def test_wasserstein_on_the_line_is_scipys(n, m):
    x, y = normal(n), normal(m, seed=1) + 0.5
    assert float(wasserstein(x, y, 1)) == pytest.approx(scipy.stats.wasserstein_distance(x, y), rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(5, 8), (6, 4)])
def test_quantiles_of_other_numbers_are_those_of_repeated_samples(n, m):
    """Each value m times, and n times: the same distributions, now of equal numbers."""
    x, y = normal(3, n), normal(3, m, seed=1)
    repeated = x.repeat_interleave(m, dim=1), y.repeat_interleave(n, dim=1)
    for order in (1, 2, 3.5):
        close(wasserstein(x, y, order), wasserstein(*repeated, order))


def test_wasserstein_of_shifted_and_scaled_values():
    x = normal(50)
    assert float(wasserstein(x, x.flip(0) + 3.0, 4)) == pytest.approx(3.0)
    # W_2^2 of x and c x: the values stay in order.
    assert float(wasserstein(x, 2 * x)) == pytest.approx(float(x.square().mean().sqrt()))


def test_directions_are_uniform_on_the_sphere():
    u = directions(3, 4000, seeded())
    close(u.norm(dim=1), torch.ones(4000, dtype=torch.float64))
    within(u, torch.zeros(3))
    within(u[:, 0].square()[:, None], f64(1 / 3))
    assert directions(1, 20).tolist() == [[1.0]]


@pytest.mark.parametrize("shape", [(2,), (5,), (1, 2, 2)], ids=str)
def test_sliced_wasserstein_of_a_shift_and_of_gaussians(shape):
    size = math.prod(shape)
    x, shift = normal(400, *shape), 3.0 * normal(*shape, seed=1)
    along = directions(size, 64, seeded()) @ shift.flatten()
    expected = float(along.square().mean().sqrt())
    assert float(sliced_wasserstein(x, x + shift, 64, generator=seeded())) == pytest.approx(expected)
    # Of equal Gaussians apart, any u: the distance of their means along u, and what 1,500 samples vary.
    far = float(sliced_wasserstein(normal(1500, *shape, seed=2), x + shift, 64, generator=seeded()))
    assert far == pytest.approx(expected, rel=0.1)


def test_sliced_wasserstein_is_the_mean_over_directions():
    x, y, u = normal(12, 3), normal(9, 3, seed=1), directions(3, 5, seeded())
    each = torch.stack([wasserstein(x @ one, y @ one, 3) for one in u])
    close(sliced_wasserstein(x, y, u, order=3), each.pow(3).mean() ** (1 / 3))
    statistic, i, j = SlicedWasserstein(x, y, u), torch.tensor([7, 0, 3]), torch.tensor([8, 1])
    close(statistic(i, j), sliced_wasserstein(x[i], y[j], u))


# --- kernels


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


# --- moments


def test_errors_of_moments():
    x = normal(200, 1, 3)
    mean, covariance = moments(x)
    assert np.allclose(covariance, np.cov(x.flatten(1).numpy().T))
    assert float(mean_error(x, mean, covariance)) == pytest.approx(0, abs=1e-12)
    assert float(mean_error(x + 2.0, mean, covariance)) == pytest.approx(2 * math.sqrt(3 / float(covariance.trace())))
    assert float(covariance_error(2 * x, covariance)) == pytest.approx(3.0)
    exact = torch.stack([mean_error(normal(50, 3, seed=s), torch.zeros(3), torch.eye(3)) ** 2 for s in range(400)])
    within(exact[:, None], f64(1 / 50))


def spread(size, seed, rank=None):
    root = normal(size, rank or size, seed=seed)
    return root @ root.mT


@pytest.mark.parametrize("size", [1, 4, 12])
def test_frechet_distance_is_that_of_scipys_roots(size):
    mean1, mean2 = normal(size), normal(size, seed=1)
    c1, c2 = spread(size, 2), spread(size, 3)
    root = scipy.linalg.sqrtm(c1.numpy() @ c2.numpy())
    expected = float((mean1 - mean2).square().sum() + (c1 + c2).trace()) - 2 * np.trace(root).real
    assert float(frechet_distance(mean1, c1, mean2, c2)) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_in_closed_form():
    mean, zero = f64(3.0, 4.0), torch.zeros(2)
    a, b = torch.diag(f64(4.0, 9.0)), torch.diag(f64(1.0, 25.0))
    assert float(frechet_distance(mean, a, zero, b)) == pytest.approx(25 + 1 + 4)  # commuting: |a^(1/2) - b^(1/2)|^2
    assert float(frechet_distance(mean, a, mean, a)) == pytest.approx(0, abs=1e-12)
    flat, turned = spread(6, 0, rank=2), torch.linalg.qr(normal(6, 6, seed=1)).Q  # of points in a plane
    assert float(frechet_distance(torch.zeros(6), flat, torch.zeros(6), flat)) == pytest.approx(0, abs=1e-6)
    other = spread(6, 2)
    same = frechet_distance(torch.zeros(6), turned @ flat @ turned.mT, torch.zeros(6), turned @ other @ turned.mT)
    assert float(same) == pytest.approx(float(frechet_distance(torch.zeros(6), other, torch.zeros(6), flat)), rel=1e-6)


def test_principal_components_have_the_variances_of_the_data():
    data = normal(500, 1, 2, 3) * f64(3.0, 1.0, 0.1) + 5
    features = PrincipalComponents.of(data, 4)
    assert str(features) == "pca-4"
    close(features.axes @ features.axes.mT, torch.eye(4, dtype=torch.float64), atol=1e-12)
    mean, covariance = moments(features(data))
    assert float(mean.abs().max()) < 1e-12
    largest = torch.linalg.eigvalsh(moments(data)[1]).flip(0)[:4]
    close(covariance, largest.diag(), rtol=1e-9, atol=1e-9)


# --- intervals


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


# --- wrong input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sliced_wasserstein(normal(4), normal(4)), r"two samples or more, \(N, \*\), expected"),
        (lambda: sliced_wasserstein(normal(1, 2), normal(4, 2)), "two samples or more"),
        (lambda: mmd(normal(4, 2), normal(4, 3)), r"one shape expected; got \(4, 2\) and \(4, 3\)"),
        (lambda: sliced_wasserstein(normal(4, 2), normal(4, 2), 0), "one projection or more expected; got 0"),
        (lambda: sliced_wasserstein(normal(4, 2), normal(4, 2), normal(5, 3)), r"\(P, 2\) expected; got \(5, 3\)"),
        (lambda: wasserstein(normal(4), normal(4), 0.5), "order of 1 or more expected; got 0.5"),
        (lambda: mmd(normal(4, 2), normal(4, 2), [1.0, 0.0]), "positive bandwidth"),
        (lambda: gaussian([]), "one positive bandwidth or more"),
        (lambda: mmd(normal(4, 2), torch.zeros(4, 2)), "samples that differ expected"),
        (lambda: mean_error(normal(4, 2), torch.zeros(3), torch.eye(3)), "a mean of 2 numbers"),
        (lambda: covariance_error(normal(4, 2), torch.eye(3)), r"covariance \(2, 2\) expected"),
        (lambda: frechet_distance(*moments(normal(4, 2)), *moments(normal(4, 3))), "a mean of 2 numbers"),
        (lambda: PrincipalComponents.of(normal(9, 4), 5), "1 to 4 principal components expected; got 5"),
        (lambda: bootstrap(torch.mean, normal(3)), r"4 samples or more expected; got \[3\]"),
        (lambda: bootstrap(torch.mean, normal(9), resamples=1), "two resamples or more"),
        (lambda: bootstrap(torch.mean, normal(9), level=1.0), r"level in \(0, 1\)"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
