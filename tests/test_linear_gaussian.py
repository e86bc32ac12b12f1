"""Posteriors and evidence of Gaussian mixtures under linear measurements, against conditioning and integration."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

import scoresde as ss
from scoresde.inverse import Inpainting, Linear, Nonlinear
from tests.conftest import close, f64, normal, oracle, seeded
from tests.inverse.cases import OPERATORS, matrix_of

CASES = [
    pytest.param(*OPERATORS[name], id=name)
    for name in ("inpainting vectors", "matrix", "singular matrix", "colour", "box", "fourier", "functions")
]


def noisy(operator, std):
    operator.noise_std = torch.as_tensor(std, dtype=torch.float64)
    return operator


@pytest.mark.parametrize("std", [0.01, 0.3, 3.0])
@pytest.mark.parametrize(("operator", "shape"), CASES)
def test_the_posterior_is_the_conditional_of_the_joint_gaussian(operator, shape, std):
    """For each component, by the block formula for the covariance of (x, y)."""
    mixture, matrix = oracle(shape), matrix_of(operator, shape)
    noise = std * torch.linspace(1, 2, len(matrix), dtype=torch.float64)
    y = operator(mixture.sample(1, generator=seeded(3)))
    operator = noisy(Linear(operator, operator.adjoint), noise.reshape(y.shape[1:]))
    posterior = mixture.posterior(operator, y[0])
    log_weights = []
    for k in range(3):
        part, target = mixture.component(k), posterior.component(k)
        mean, covariance = part.mean().flatten(), part.covariance()
        joint = matrix @ covariance @ matrix.mT + noise.square().diag()
        gain = torch.linalg.solve(joint, matrix @ covariance).mT
        close(target.mean().flatten(), mean + gain @ (y.flatten() - matrix @ mean), rtol=1e-7, atol=1e-8)
        reduced = covariance - gain @ matrix @ covariance
        close(target.covariance(), reduced, rtol=1e-7, atol=1e-8)
        log_weights.append(MultivariateNormal(matrix @ mean, joint).log_prob(y.flatten()) + mixture.log_weights[k])
    close(posterior.log_weights, torch.stack(log_weights).log_softmax(0), rtol=1e-7, atol=1e-7)
    evidence = torch.stack(log_weights).logsumexp(0)
    close(mixture.log_evidence(operator, y[0]), evidence, rtol=1e-7)
    close(mixture.log_evidence(operator, torch.cat((y, y + 0.1)))[0], evidence, rtol=1e-7)


def test_the_posterior_and_the_evidence_are_bayes_rule_on_a_grid():
    mixture, operator, y = oracle((2,)), Linear(f64(0.7, -1.2)[None], noise_std=0.3), f64(0.4)[None]
    axis = torch.linspace(-6, 6, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    joint = mixture.log_prob(grid) + operator.log_likelihood(y[None], grid)
    close(mixture.log_evidence(operator, y), joint.logsumexp(0) + 2 * (axis[1] - axis[0]).log(), rtol=1e-9)
    posterior = mixture.posterior(operator, y[None])
    density = joint.softmax(0)
    close(posterior.mean(), density @ grid, rtol=1e-7)
    centred = grid - density @ grid
    close(posterior.covariance(), (density[:, None] * centred).mT @ centred, rtol=1e-6)
    x = normal(5, 2)
    bayes = mixture.log_prob(x) + operator.log_likelihood(y[None], x) - mixture.log_evidence(operator, y)
    close(posterior.log_prob(x), bayes, rtol=1e-10)


def test_the_evidence_of_one_dimension_integrates_to_one_also_without_noise():
    mixture = ss.GaussianMixture(f64(-1.0, 2.0)[:, None], f64(0.3, 0.6), f64(0.3, 0.7))
    y = torch.linspace(-15, 15, 6001, dtype=torch.float64)[:, None]
    for std in (0.0, 0.5):
        evidence = mixture.log_evidence(Linear(f64(1.5).reshape(1, 1), noise_std=std), y)
        close(torch.trapezoid(evidence.exp(), y[:, 0]), f64(1.0), rtol=1e-10)
    x = y[::600] / 1.5
    exact = mixture.log_prob(x) - math.log(1.5)
    close(mixture.log_evidence(Linear(f64(1.5).reshape(1, 1)), y[::600]), exact, rtol=1e-10)


def test_small_noise_loses_no_digits():
    """With noise of 1e-9 the measured entry is known to 1e-9, and the others have their conditional law."""
    mixture = oracle((3,)).component(0)
    posterior = mixture.posterior(Inpainting([True, False, False], 1e-9), f64(0.7)[None])
    close(posterior.mean()[0], f64(0.7), rtol=1e-9)
    variance, covariance = posterior.stds.min().square(), mixture.covariance()
    close(variance, f64(1e-18), rtol=1e-6)
    gain = covariance[1:, 0] / covariance[0, 0]
    close(posterior.covariance()[1:, 1:], covariance[1:, 1:] - torch.outer(gain, covariance[0, 1:]), rtol=1e-7)
    close(posterior.mean()[1:], mixture.mean()[1:] + gain * (0.7 - mixture.mean()[0]), rtol=1e-7)


def test_weights_that_underflow_stay_positive():
    apart = ss.GaussianMixture(f64(-100.0, 100.0)[:, None], f64(1.0, 1.0))
    posterior = apart.posterior(Linear(torch.eye(1), noise_std=0.1), f64(100.0)[None])
    assert float(posterior.log_weights[0]) < -700
    close(posterior.mean(), f64(100.0)[None], rtol=1e-12)


MIXTURE = oracle((3,))
ENTRY = Inpainting([True, False, False], 0.1)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: MIXTURE.posterior(Inpainting([1, 0, 0]), torch.zeros(1)), ValueError, "noise_std must be positive"),
        (lambda: MIXTURE.posterior(ENTRY, torch.zeros(2)), ValueError, r"one measurement \(1,\).*got shape \(2,\)"),
        (lambda: MIXTURE.posterior(ENTRY, torch.zeros(2, 1)), ValueError, "y must be one measurement; got 2"),
        (lambda: MIXTURE.posterior(ENTRY, torch.full((1,), math.nan)), ValueError, "y must be finite"),
        (lambda: MIXTURE.posterior(Nonlinear(torch.sin, 0.1), torch.zeros(3)), TypeError, "operator must be linear"),
        (lambda: MIXTURE.posterior(3, torch.zeros(3)), TypeError, "operator must be an object with __call__ and adj"),
        (lambda: MIXTURE.posterior(ENTRY, [0.0]), TypeError, "y must be a tensor; got list"),
        (
            lambda: MIXTURE.log_evidence(Linear(torch.ones(2, 3)), torch.zeros(2)),
            ValueError,
            "noise_std must be positive where measurements are redundant.*got 0",
        ),
    ],
)
def test_bad_arguments_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()
