"""Points of a path, as tensors and as floats, and the kernels between two of them."""

import pytest
import torch

import scoresde as ss
from scoresde.sdes.transitions import points, posterior, transition
from tests.conftest import FINITE, PATHS, close, times


@pytest.mark.parametrize("sde", PATHS)
def test_a_point_is_the_path_at_its_time(sde):
    t = times(sde, n=9)
    point, alpha, sigma = sde.at(t), sde.alpha(t), sde.sigma(t)
    close((point.t, point.alpha, point.sigma), (t, alpha, sigma), rtol=0)
    close(point.lam, (alpha / sigma).log(), atol=1e-12)
    close(point.ratio, sigma / alpha, rtol=1e-10)
    close(point.size, sde.size(t), rtol=0)
    close(point.angle, (sigma / alpha).atan(), rtol=1e-12)
    for each, one in zip(t, points(sde, t.unbind()), strict=True):
        assert torch.equal(one.t, each)
        here = sde.at(each)
        for name in ("alpha", "sigma", "lam", "ratio", "size", "angle"):
            assert type(getattr(one, name)) is float
            assert getattr(one, name) == pytest.approx(float(getattr(here, name)), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("sde", FINITE)
def test_kernels_of_floats_are_those_of_tensors(sde):
    t = times(sde, n=6)
    for clean, noisy, s, u in zip(points(sde, t[:-1]), points(sde, t[1:]), t[:-1], t[1:], strict=True):
        kernel = [float(part) for part in sde.transition(s, u)]
        assert transition(clean, noisy) == pytest.approx(kernel, rel=1e-12)
        assert posterior(clean, noisy) == pytest.approx([float(part) for part in sde.posterior(u, s)], rel=1e-12)


@pytest.mark.parametrize("sde", PATHS)
def test_the_posterior_of_a_cleaner_state_is_the_conditional_of_a_joint_normal(sde):
    """Of (x_s, x_t) given x_0, with covariance r sigma_s^2: the formula of conditioning, for s < t."""
    s, t = times(sde, n=60)[::2], times(sde, n=60)[1::2]
    (a, b, variance), (r, v) = sde.posterior(t, s), sde.transition(s, t)
    gain = r * sde.sigma(s) ** 2 / sde.sigma(t) ** 2  # E[x_s | x_t, x_0] = alpha_s x_0 + gain (x_t - alpha_t x_0)
    close(a, gain, rtol=1e-11)
    terms = sde.alpha(s) + (sde.alpha(s) - gain * sde.alpha(t)).abs()
    assert bool(((b - sde.alpha(s) + gain * sde.alpha(t)).abs() <= 1e-14 * terms).all())
    schur = sde.sigma(s) ** 2 - gain * r * sde.sigma(s) ** 2
    assert bool(((variance - schur).abs() <= 1e-14 * sde.sigma(s) ** 2).all())
    assert bool((variance > 0).all())
    # With x_t = r x_s + v^(1/2) eps inserted: mean and variance of x_s again
    close(a * r * sde.alpha(s) + b, sde.alpha(s), rtol=1e-10)
    close(a**2 * (r**2 * sde.sigma(s) ** 2 + v) + variance, sde.sigma(s) ** 2, rtol=1e-10)


def test_a_time_without_signal_is_refused():
    sde = ss.VP(beta_max=1e12)
    clean, noisy = points(sde, [torch.tensor(0.5).double(), torch.tensor(1.0).double()])
    with pytest.raises(ValueError, match=r"alpha must be positive .* alpha\(t=0.5\) = 0.*beta_max"):
        transition(clean, noisy)
