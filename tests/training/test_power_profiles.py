"""Profiles of power-function averages: against the recursion, the integrals they tend to, and least squares."""

import math

import pytest
import scipy
import torch

from scoresde.training import power_profiles
from scoresde.training.power_profiles import combination, gamma_of, inner_products, rate, sigma_rel_of
from tests.conftest import close, f64, normal

WIDTHS = [0.01, 0.05, 0.1, 0.2, 0.28]


def profile(sigma_rel, step, length):
    """The weights of theta(1) .. theta(length) in the average after `step`, by the recursion."""
    weights = torch.zeros(length, dtype=torch.float64)
    for i in range(1, step + 1):
        share = rate(gamma_of(sigma_rel), i)
        weights *= 1 - share
        weights[i - 1] += share
    return weights


@pytest.mark.parametrize("sigma_rel", [1e-4, *WIDTHS, 0.2886])
def test_width_and_exponent_are_inverse_functions(sigma_rel):
    gamma = gamma_of(sigma_rel)
    assert gamma > 0
    assert sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-12)


def test_the_width_is_the_standard_deviation_of_the_density():
    for gamma, published in ((6.94, 0.1), (16.97, 0.05)):  # 2312.02696, section 3.1
        mean, second = ((gamma + 1) * scipy.integrate.quad(pow, 0, 1, (gamma + k,))[0] for k in (1, 2))
        assert sigma_rel_of(gamma) == pytest.approx(math.sqrt(second - mean**2), rel=1e-9)
        assert sigma_rel_of(gamma) == pytest.approx(published, rel=1e-3)
    assert sigma_rel_of(0) == pytest.approx(power_profiles.WIDEST)


@pytest.mark.parametrize("sigma_rel", [0, -0.1, 0.2887, math.nan])
def test_widths_out_of_range_are_refused(sigma_rel):
    with pytest.raises(ValueError, match=rf"sigma_rel must lie between 0 and 0.2887.*got {sigma_rel}"):
        gamma_of(sigma_rel)


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_the_weights_of_steps_are_differences_of_powers(sigma_rel):
    i = torch.arange(0, 51, dtype=torch.float64) / 50
    close(profile(sigma_rel, 50, 60)[:50], (i ** (gamma_of(sigma_rel) + 1)).diff(), rtol=1e-11, atol=1e-15)
    assert float(profile(sigma_rel, 50, 60).sum()) == pytest.approx(1, rel=1e-13)
    assert rate(gamma_of(sigma_rel), 10**12) == pytest.approx((gamma_of(sigma_rel) + 1) * 1e-12, rel=1e-9)


@pytest.mark.parametrize("chunk", [1, 7, 2**18])
def test_inner_products_are_those_of_the_recursion(chunk, monkeypatch):
    monkeypatch.setattr(power_profiles, "CHUNK", chunk)
    steps = [30, 1, 2, 100, 55, 30, 100]
    widths = [0.05, 0.1, 0.05, 0.1, 0.28, 0.2, 0.01]
    rows = torch.stack([profile(width, step, 100) for width, step in zip(widths, steps, strict=True)])
    close(inner_products(steps, widths), rows @ rows.T, rtol=1e-10, atol=1e-15)


def test_inner_products_of_many_steps_tend_to_integrals():
    steps, widths = [300_000, 700_000, 700_000], [0.1, 0.05, 0.2]
    a, t = f64(*(gamma_of(width) for width in widths)), f64(*steps)
    lower, upper = torch.minimum(t[:, None], t), torch.maximum(t[:, None], t)
    later = torch.where(t[:, None] > t, a[:, None], a)  # equal steps: 1 to any power
    integrals = (a[:, None] + 1) * (a + 1) / (a[:, None] + a + 1) / upper * (lower / upper) ** later
    close(inner_products(steps, widths), integrals, rtol=2e-9)
    coarse = inner_products([3, 7, 7], widths) * 1e-5
    assert float((coarse / integrals - 1).abs().max()) > 0.05


@pytest.mark.parametrize("steps", [[20, 40], [10, 20, 30, 40], [1, 3, 39, 40]])
def test_the_combination_is_the_least_squares_solution_of_sum_one(steps):
    sources = torch.stack([profile(width, step, 40) for step in steps for width in (0.05, 0.1)])
    target = profile(0.15, 40, 40)
    rows = torch.cat([sources, target[None]])
    x, residual = combination(rows @ rows.T)
    rest = torch.linalg.lstsq((sources[1:] - sources[0]).T, (target - sources[0])[:, None], driver="gelsd").solution
    expected = torch.cat([1 - rest.sum(0), rest[:, 0]])
    close(x @ sources, expected @ sources, rtol=1e-6, atol=1e-7)
    assert float(x.sum()) == pytest.approx(1, abs=1e-12)
    assert residual == pytest.approx(float((x @ sources - target).norm() / target.norm()), abs=1e-7)
    for seed in range(5):
        change = normal(len(x), seed=seed)
        other = x + 0.01 * (change - change.mean())
        assert (other @ sources - target).norm() > (x @ sources - target).norm()


@pytest.mark.parametrize("steps", [[1, 2, 3, 1000], [500, 501, 999, 1000], list(range(4, 1001, 4))])
def test_almost_equal_profiles_get_no_large_coefficients(steps):
    widths = [0.05, 0.1] * len(steps)
    x, residual = combination(inner_products([step for step in steps for _ in (0, 1)] + [1000], [*widths, 0.12]))
    assert float(x.abs().sum()) < 3
    assert residual < 0.1
