"""The Frechet distance against closed forms and SciPy; its standard error against repetitions."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from scoresde.metrics import frechet_distance, moments
from scoresde.metrics.frechet import frechet_influence, frechet_stderr
from tests.conftest import f64, normal


def spread(size, seed, rank=None):
    root = normal(size, rank or size, seed=seed)
    return root @ root.mT


@pytest.mark.parametrize("size", [1, 4, 12])
def test_frechet_distance_equals_scipys_matrix_root(size):
    mean1, mean2 = normal(size), normal(size, seed=1)
    c1, c2 = spread(size, 2), spread(size, 3)
    root = scipy.linalg.sqrtm(c1.numpy() @ c2.numpy())
    expected = float((mean1 - mean2).square().sum() + (c1 + c2).trace()) - 2 * np.trace(root).real
    assert float(frechet_distance(mean1, c1, mean2, c2)) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_in_closed_form():
    mean, zero = f64(3.0, 4.0), torch.zeros(2)
    a, b = torch.diag(f64(4.0, 9.0)), torch.diag(f64(1.0, 25.0))
    assert float(frechet_distance(mean, a, zero, b)) == pytest.approx(25 + 1 + 4)  # commuting: |a^(1/2) - b^(1/2)|^2
    assert float(frechet_distance(mean, a, mean, a)) == 0
    flat, turned = spread(6, 0, rank=2), torch.linalg.qr(normal(6, 6, seed=1)).Q  # rank 2
    assert float(frechet_distance(torch.zeros(6), flat, torch.zeros(6), flat)) == 0
    other = spread(6, 2)
    same = frechet_distance(torch.zeros(6), turned @ flat @ turned.mT, torch.zeros(6), turned @ other @ turned.mT)
    assert float(same) == pytest.approx(float(frechet_distance(torch.zeros(6), other, torch.zeros(6), flat)), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 12])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_a_distance_within_its_rounding_error_is_zero(rank, scale):
    """One covariance in two orders of summation: the difference has either sign, 1e-8 of the trace if singular."""
    for seed in range(20):
        mean, root = normal(12, seed=seed), scale * normal(12, rank, seed=100 + seed)
        assert float(frechet_distance(mean, root @ root.mT, mean, root.flip(1) @ root.flip(1).mT)) == 0
    nothing = torch.zeros(12, 12)
    assert float(frechet_distance(mean, nothing, mean, nothing)) == 0


def test_a_distance_above_its_rounding_error_is_not_set_to_zero():
    """The rounding error is at most 4e-14 of the trace where no variance is small; invalid input is not hidden."""
    covariance, zero = torch.linspace(1, 2, 12, dtype=torch.float64).diag(), torch.zeros(12, dtype=torch.float64)
    found = frechet_distance(zero + 2e-6, covariance, zero, covariance)
    assert float(found) == pytest.approx(12 * 2e-6**2, rel=1e-2)
    with pytest.raises(ValueError, match="the mean must be finite; got NaN or infinity in 12 of 12 numbers"):
        frechet_distance(zero * math.nan, covariance, zero, covariance)
    indefinite = torch.diag(f64(1.0, -1.0))
    assert float(frechet_distance(zero[:2], indefinite, zero[:2], indefinite)) == -2


def test_moments_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"mean \(2,\)"):
        frechet_distance(*moments(normal(4, 2)), *moments(normal(4, 3)))


def frechet(x, y):
    return frechet_distance(*moments(x), *moments(y))


def test_the_influence_is_the_derivative_by_the_weight_of_a_sample():
    """The sample x_i gets weight e, the others 1 - e: finite differences of the moments of this mixture."""
    x, y = normal(40, 3) * f64(1.0, 2.0, 0.5) + 0.3, normal(50, 3, seed=1)
    mean, covariance = x.mean(dim=0), x.mT.cov(correction=0)
    other = moments(y)
    expected = []
    for one in x:
        values = []
        for e in (1e-5, -1e-5):
            m = (1 - e) * mean + e * one
            second = (1 - e) * (covariance + torch.outer(mean, mean)) + e * torch.outer(one, one)
            values.append(frechet_distance(m, second - torch.outer(m, m), *other))
        expected.append((values[0] - values[1]) / 2e-5)
    expected, found = torch.stack(expected), frechet_influence(x, *other)
    # The covariances divide by 40 here and by 39 there.
    assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_the_standard_error_is_the_scatter_of_repetitions():
    x, shift = 1.3 * normal(150, 120, 4), f64(1.0, 0.0, 0.0, 0.0)
    y = normal(150, 150, 4, seed=1) + shift
    scatter = float(torch.stack([frechet(*pair) for pair in zip(x, y, strict=True)]).std())
    errors = torch.stack([frechet_stderr(*pair) for pair in zip(x, y, strict=True)])
    assert float(errors.mean()) == pytest.approx(scatter, rel=0.2)


def test_the_error_is_defined_for_fewer_samples_than_dimensions():
    x, y = normal(20, 50), normal(25, 50, seed=1) + 1
    assert 0 < float(frechet_stderr(x, y)) < float(frechet(x, y))
    assert float(frechet_stderr(x, x)) == pytest.approx(0, abs=1e-6)
