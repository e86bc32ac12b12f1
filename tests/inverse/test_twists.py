"""The Gaussian p(y | x_t) against the dense normal law, and the draws of x_0 against the conditional of a Gaussian."""

import pytest
import torch
from torch.distributions import MultivariateNormal

from scoresde.inverse.twists import GaussianTwist, measured
from scoresde.random_stream import RandomStream
from tests.conftest import close, f64, normal, within
from tests.inverse.standins import Function, Images, Matrix

TALL = torch.cat([normal(4, 4), normal(2, 4, seed=1)])  # more measurements than dimensions
CASES = {
    "spectrum": Images(normal(3, 4), (2, 2), 0.3),
    "matrix": Images(normal(3, 4), (2, 2), 0.3, has_spectrum=False),
    "rank": Images(normal(3, 1) @ normal(1, 4), (2, 2), 0.3),
    "rank of a matrix": Images(normal(3, 1) @ normal(1, 4), (2, 2), 0.3, has_spectrum=False),
    "tall": Images(TALL, (2, 2), 0.3),
    "several noise levels": Images(normal(3, 4), (2, 2), f64(0.1, 0.5, 2.0)),
    "no noise": Images(normal(3, 4), (2, 2), 0.0),
    "no noise of a matrix": Images(normal(3, 4), (2, 2), 0.0, has_spectrum=False),
}


def parts(name):
    operator = CASES[name]
    y, x = normal(1, len(operator.matrix), seed=2), normal(5, 2, 2, seed=3)
    noise = operator.noise_std.expand(len(operator.matrix))
    return operator, y, x, noise.square().diag()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variance", [0.0, 0.7])
def test_the_density_is_the_dense_one(name, variance):
    operator, y, x, noise = parts(name)
    twist, matrix = GaussianTwist(operator, y, x), operator.matrix
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
    operator, y, x, noise = parts(name)
    variance, n, matrix = 0.7, 4000, operator.matrix
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
    twist, x = GaussianTwist(Function(lambda x: x.square(), 0.5), f64([1.0, 2.0]), normal(3, 2)), normal(3, 2)
    law = torch.distributions.Normal(x.square(), (0.25 + 0.3) ** 0.5)
    close(twist.log_prob(x, 0.3), law.log_prob(f64(1.0, 2.0)).sum(dim=1))
    assert twist.draw(x, 0.3, RandomStream(seeds=[0])) is x


def test_one_measurement_serves_all_states_and_others_are_refused():
    operator, x = Matrix(normal(3, 4)), normal(5, 4)
    y = normal(5, 3)
    assert torch.equal(measured(operator, y, x), y)
    assert torch.equal(measured(operator, y[0], x), y[:1].expand(5, 3))
    for wrong in (normal(4, 3), normal(5, 2), normal(4), normal(1, 1, 3)):
        with pytest.raises(ValueError, match=r"y must be one measurement \(3,\), or one for each of the 5 states"):
            measured(operator, wrong, x)
    with pytest.raises(ValueError, match="noise_std must be positive for all"):
        GaussianTwist(Matrix(normal(2, 4), f64(0.1, 0.0)), normal(1, 2), x)


def test_measurements_that_depend_on_each_other_need_noise():
    for has_spectrum in (True, False):
        twist = GaussianTwist(Matrix(TALL, 0.0, has_spectrum), normal(1, 6), normal(5, 4))
        with pytest.raises(ValueError, match="noise_std must be positive for this operator"):
            twist.check(0.5)
