"""The Gaussian p(y | x_t) against the dense normal law, and the draws of x_0 against the conditional of a Gaussian."""

import pytest
import torch
from torch.distributions import MultivariateNormal

from scoresde.inverse import Linear, Nonlinear
from scoresde.inverse.twists import CorrelatedTwist, GaussianTwist, measured
from scoresde.random_stream import RandomStream
from tests.conftest import close, f64, normal, within
from tests.inverse.cases import by_functions, matrix_of

TALL = torch.cat([normal(4, 4), normal(2, 4, seed=1)])


def linear(matrix, noise_std):
    return Linear(matrix, noise_std=noise_std, shape=(2, 2))


CASES = {
    "spectrum": linear(normal(3, 4), 0.3),
    "functions": by_functions(normal(3, 4), (2, 2), 0.3),
    "rank 1": linear(normal(3, 1) @ normal(1, 4), 0.3),
    "rank 1 by functions": by_functions(normal(3, 1) @ normal(1, 4), (2, 2), 0.3),
    "more measurements than dimensions": linear(TALL, 0.3),
    "several noise levels": linear(normal(3, 4), f64(0.1, 0.5, 2.0)),
    "no noise": linear(normal(3, 4), 0.0),
    "no noise by functions": by_functions(normal(3, 4), (2, 2), 0.0),
}


def parts(name):
    """An operator and its matrix, a measurement, states, and the covariance of the noise."""
    operator = CASES[name]
    matrix = matrix_of(operator, (2, 2))
    noise = operator.noise_std.expand(len(matrix)).square().diag()
    return operator, matrix, normal(1, len(matrix), seed=2), normal(5, 2, 2, seed=3), noise


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variance", [0.0, 0.7])
def test_the_density_is_the_dense_one(name, variance):
    operator, matrix, y, x, noise = parts(name)
    twist = GaussianTwist(operator, y, x)
    if not variance and not noise.any():
        with pytest.raises(ValueError, match="noise_std must be positive"):
            twist.check(variance)
        return
    twist.check(variance)
    covariance = noise + variance * matrix @ matrix.mT
    close(twist.log_prob(x, variance), MultivariateNormal(operator(x), covariance).log_prob(y), 1e-9)
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(twist.log_prob(point, variance).sum(), point)
    expected = torch.linalg.solve(covariance, (y - operator(x)).mT).mT @ matrix
    close(gradient, expected.reshape(x.shape), 1e-8, 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_the_draws_have_the_conditional_mean_and_covariance(name):
    operator, matrix, y, x, noise = parts(name)
    variance, n = 0.7, 4000
    gain = variance * matrix.mT @ torch.linalg.inv(noise + variance * matrix @ matrix.mT)
    mean = x[0].flatten() + gain @ (y[0] - operator(x[:1])[0])
    covariance = variance * torch.eye(4, dtype=torch.float64) - variance * gain @ matrix
    twist = GaussianTwist(operator, y, x)
    draws = twist.draw(x[:1].expand(n, 2, 2), variance, RandomStream(seeds=[0])).flatten(1)
    if not noise.any():
        close(draws @ matrix.mT, y.expand(n, -1), 1e-9, 1e-9)
    within(draws, mean)
    centred = draws - mean
    within(torch.einsum("ni,nj->nij", centred, centred) + 1e-12 * normal(n, 4, 4), covariance)


def test_a_function_is_measured_with_isotropic_variance_and_leaves_the_draw_alone():
    twist, x = GaussianTwist(Nonlinear(lambda x: x.square(), 0.5), f64([1.0, 2.0]), normal(3, 2)), normal(3, 2)
    law = torch.distributions.Normal(x.square(), (0.25 + 0.3) ** 0.5)
    close(twist.log_prob(x, 0.3), law.log_prob(f64(1.0, 2.0)).sum(dim=1))
    assert twist.draw(x, 0.3, RandomStream(seeds=[0])) is x


def test_one_measurement_serves_all_states_and_others_are_refused():
    operator, x = Linear(normal(3, 4)), normal(5, 4)
    y = normal(5, 3)
    assert torch.equal(measured(operator, y, x), y)
    assert torch.equal(measured(operator, y[0], x), y[:1].expand(5, 3))
    for wrong in (normal(4, 3), normal(5, 2), normal(4), normal(1, 1, 3)):
        with pytest.raises(ValueError, match=r"y must be one measurement \(3,\), or one for each of the 5 samples"):
            measured(operator, wrong, x)
    with pytest.raises(ValueError, match="noise_std must be positive for all"):
        GaussianTwist(Linear(normal(2, 4), noise_std=f64(0.1, 0.0)), normal(1, 2), x)


def test_measurements_that_depend_on_each_other_need_noise():
    for operator in (Linear(TALL), by_functions(TALL, (4,))):
        twist = GaussianTwist(operator, normal(1, 6), normal(5, 4))
        with pytest.raises(ValueError, match="noise_std must be positive for this operator"):
            twist.check(0.5)


@pytest.mark.parametrize("name", [name for name in CASES if name != "rank 1 by functions"])
def test_correlated_data_have_the_dense_density_and_the_conditional_draws(name):
    operator, matrix, y, x, noise = parts(name)
    factor, n = normal(4, 4, seed=7), 4000
    covariance = factor @ factor.mT
    twist = CorrelatedTwist(operator, y, x, covariance)
    shrunk = twist.variances / (2 + twist.variances)  # any function of the eigenvalues
    spread = covariance @ torch.linalg.inv(2 * torch.eye(4, dtype=torch.float64) + covariance)
    total = noise + matrix @ spread @ matrix.mT
    twist.check(shrunk)
    close(twist.log_prob(x, shrunk), MultivariateNormal(operator(x), total).log_prob(y), 1e-9)
    gain = spread @ matrix.mT @ torch.linalg.inv(total)
    mean = x[0].flatten() + gain @ (y[0] - operator(x[:1])[0])
    draws = twist.draw(x[:1].expand(n, 2, 2), shrunk, RandomStream(seeds=[0])).flatten(1)
    within(draws, mean)
    centred = draws - mean
    left = spread - gain @ matrix @ spread
    within(torch.einsum("ni,nj->nij", centred, centred) + 1e-12 * normal(n, 4, 4), left)


def test_covariances_of_other_data_are_refused():
    x, y = normal(5, 4), normal(1, 2)
    operator = Linear(normal(2, 4), noise_std=0.1)
    bad = {
        r"symmetric matrix \(4, 4\) for states of 4 numbers; got \(3, 3\)": torch.eye(3),
        r"symmetric matrix \(4, 4\)": normal(4, 4),
        "no negative eigenvalues; got -2": f64(1, 1, 1, -2).diag(),
    }
    for message, covariance in bad.items():
        with pytest.raises(ValueError, match=message):
            CorrelatedTwist(operator, y, x, covariance)
    with pytest.raises(TypeError, match="needs a linear operator"):
        CorrelatedTwist(Nonlinear(lambda x: x, 0.1), y, x, torch.eye(4))
    twist = CorrelatedTwist(Linear(TALL), normal(1, 6), x, torch.eye(4))
    with pytest.raises(ValueError, match="noise_std must be positive for this operator"):
        twist.check(twist.variances)
