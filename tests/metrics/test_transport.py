"""Optimal transport against SciPy, closed forms and its own sums."""

import math

import pytest
import scipy.stats
import torch

from scoresde.metrics import SlicedWasserstein, sliced_wasserstein, wasserstein
from scoresde.metrics.transport import directions
from tests.conftest import close, f64, normal, seeded, within


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sliced_wasserstein(normal(4), normal(4)), r"two samples or more, \(N, \*\), expected"),
        (lambda: sliced_wasserstein(normal(1, 2), normal(4, 2)), "two samples or more"),
        (lambda: sliced_wasserstein(normal(4, 2), normal(4, 2), 0), "one projection or more expected; got 0"),
        (lambda: sliced_wasserstein(normal(4, 2), normal(4, 2), normal(5, 3)), r"\(P, 2\) expected; got \(5, 3\)"),
        (lambda: wasserstein(normal(4), normal(4), 0.5), "order of 1 or more expected; got 0.5"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
