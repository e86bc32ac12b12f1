"""Optimal transport against SciPy, closed forms and explicit means over directions."""

import pytest
import scipy.stats
import torch

from scoresde.metrics import SlicedWasserstein, sliced_wasserstein, wasserstein
from scoresde.metrics.transport import directions
from tests.conftest import close, f64, normal, seeded, within


@pytest.mark.parametrize(("n", "m"), [(7, 7), (5, 8), (6, 4), (1, 9), (30, 20)])
def test_wasserstein_on_the_line_equals_scipy(n, m):
    x, y = normal(n), normal(m, seed=1) + 0.5
    assert float(wasserstein(x, y, 1)) == pytest.approx(scipy.stats.wasserstein_distance(x, y), rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(5, 8), (6, 4)])
def test_samples_of_different_sizes_equal_repeated_samples_of_one_size(n, m):
    x, y = normal(3, n), normal(3, m, seed=1)
    repeated = x.repeat_interleave(m, dim=1), y.repeat_interleave(n, dim=1)
    for order in (1, 2, 3.5):
        close(wasserstein(x, y, order), wasserstein(*repeated, order))


def test_wasserstein_of_shifted_and_scaled_values():
    x = normal(50)
    assert float(wasserstein(x, x.flip(0) + 3.0, 4)) == pytest.approx(3.0)
    # W_2^2 of x and c x: scaling keeps the order of the values.
    assert float(wasserstein(x, 2 * x)) == pytest.approx(float(x.square().mean().sqrt()))


def test_directions_are_uniform_on_the_sphere():
    u = directions(3, 4000, seeded())
    close(u.norm(dim=1), f64(*[1.0] * 4000))
    within(u, f64(0.0, 0.0, 0.0))
    within(u[:, 0].square()[:, None], f64(1 / 3))
    assert directions(1, 20).tolist() == [[1.0]]


def test_sliced_wasserstein_is_a_mean_over_directions_of_all_or_some_samples():
    x, y, u = normal(12, 3), normal(9, 3, seed=1), directions(3, 5, seeded())
    images = x.reshape(12, 1, 3, 1), y.reshape(9, 1, 3, 1)
    each = f64(*(float(wasserstein(x @ one, y @ one, 3)) for one in u))
    close(sliced_wasserstein(*images, u, order=3), each.pow(3).mean() ** (1 / 3))
    close(sliced_wasserstein(x, y, 5, generator=seeded()), sliced_wasserstein(x, y, u))
    statistic, i, j = SlicedWasserstein(x, y, u), f64(7, 0, 3).long(), f64(8, 1).long()
    close(statistic(i, j), sliced_wasserstein(x[i], y[j], u))


NAN = normal(4, 2).index_fill(0, torch.tensor([2]), torch.nan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sliced_wasserstein(normal(4), normal(4)), r"x must have shape \(N, \*\) .*; got \(4,\)"),
        (lambda: sliced_wasserstein(normal(4, 2), normal(4, 2), 0), "at least 1 projection; got 0"),
        (lambda: sliced_wasserstein(normal(4, 2), normal(4, 2), normal(5, 3)), r"\(P, 2\); got \(5, 3\)"),
        (lambda: sliced_wasserstein(normal(4, 2), NAN), r"y must be finite; got NaN or infinity in 1 of 4 .* \[2\]"),
        (lambda: wasserstein(NAN[:, 0], normal(4)), "x must be finite; got NaN or infinity in 1 of 4"),
        (lambda: wasserstein(normal(3, 4), normal(4)), r"same leading dimensions; got \(3, 4\) and \(4,\)"),
        (lambda: wasserstein(normal(4), normal(4), 0.5), "order >= 1; got 0.5"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
