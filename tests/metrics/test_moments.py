"""Errors of moments and principal components against closed forms and NumPy."""

import math

import numpy as np
import pytest
import torch

from scoresde.metrics import PrincipalComponents, covariance_error, mean_error, moments
from tests.conftest import close, f64, normal, within


def test_errors_of_moments_in_closed_form():
    x = normal(200, 1, 3)
    mean, covariance = moments(x)
    assert np.allclose(covariance, np.cov(x.flatten(1).numpy().T))
    assert float(mean_error(x, mean, covariance)) == pytest.approx(0, abs=1e-12)
    assert float(mean_error(x + 2.0, mean, covariance)) == pytest.approx(2 * math.sqrt(3 / float(covariance.trace())))
    assert float(covariance_error(2 * x, covariance)) == pytest.approx(3.0)
    exact = torch.stack([mean_error(normal(50, 3, seed=s), torch.zeros(3), torch.eye(3)) ** 2 for s in range(400)])
    within(exact[:, None], f64(1 / 50))


def test_principal_components_have_the_variances_of_the_data():
    data = normal(500, 1, 2, 3) * f64(3.0, 1.0, 0.1) + 5
    features = PrincipalComponents.of(data, 4)
    assert str(features) == "pca-4"
    close(features.axes @ features.axes.mT, torch.eye(4, dtype=torch.float64), atol=1e-12)
    mean, covariance = moments(features(data))
    assert float(mean.abs().max()) < 1e-12
    largest = torch.linalg.eigvalsh(moments(data)[1]).flip(0)[:4]
    close(covariance, largest.diag(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_error(normal(4, 2), torch.zeros(3), torch.eye(3)), r"mean \(2,\) .* shapes \(3,\) and \(3, 3\)"),
        (lambda: moments(normal(4, 2) / 0), "x must be finite; got NaN or infinity in 4 of 4 samples"),
        (lambda: mean_error(normal(4, 2), *moments(torch.ones(4, 2))), "the covariance must not be zero"),
        (lambda: covariance_error(torch.ones(4, 2), torch.zeros(2, 2)), "the covariance must not be zero"),
        (lambda: covariance_error(normal(4, 2), torch.eye(2) / 0), "the covariance must be finite; .* in 2 of 2 rows"),
        (lambda: covariance_error(normal(4, 2), torch.eye(3)), r"covariance \(2, 2\); got"),
        (lambda: PrincipalComponents.of(normal(9, 4), 5), "1 to 4 principal components; got 5"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
