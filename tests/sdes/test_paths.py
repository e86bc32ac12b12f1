"""The named diffusions against the closed forms of their papers, written independently."""

import math

import pytest
import torch

import scoresde as ss
from tests.conftest import close, f64

B0, B1 = 0.1, 20.0


def integral(t):
    return 0.5 * t**2 * (B1 - B0) + t * B0


# alpha, sigma^2, f and g^2 as functions of time
FORMULAS = {
    "vp": (
        ss.VP(),
        lambda t: math.exp(-0.25 * t**2 * (B1 - B0) - 0.5 * t * B0),
        lambda t: -math.expm1(-integral(t)),
        lambda t: -0.5 * (B0 + t * (B1 - B0)),
        lambda t: B0 + t * (B1 - B0),
    ),
    "sub-vp": (
        ss.SubVP(),
        lambda t: math.exp(-0.25 * t**2 * (B1 - B0) - 0.5 * t * B0),
        lambda t: math.expm1(-integral(t)) ** 2,
        lambda t: -0.5 * (B0 + t * (B1 - B0)),
        lambda t: -(B0 + t * (B1 - B0)) * math.expm1(-2 * integral(t)),
    ),
    "ve": (
        ss.VE(),
        lambda t: 1.0,
        lambda t: (0.01 * 5000**t) ** 2,
        lambda t: 0.0,
        lambda t: (0.01 * 5000**t) ** 2 * 2 * math.log(5000),
    ),
    "cosine": (
        ss.Cosine(),
        lambda t: math.cos(math.pi * t / 2),
        lambda t: math.sin(math.pi * t / 2) ** 2,
        lambda t: -math.pi / 2 * math.tan(math.pi * t / 2),
        lambda t: math.pi * math.tan(math.pi * t / 2),
    ),
    "karras": (ss.Karras(), lambda t: 1.0, lambda t: t**2, lambda t: 0.0, lambda t: 2 * t),
    "rectified": (
        ss.Rectified(),
        lambda t: 1 - t,
        lambda t: t**2,
        lambda t: -1 / (1 - t),
        lambda t: 2 * t / (1 - t),
    ),
}


@pytest.mark.parametrize("fraction", [0.0, 1e-5, 0.013, 0.5, 0.87, 0.9999, 1.0])
@pytest.mark.parametrize(("sde", "alpha", "variance", "drift", "squared"), FORMULAS.values(), ids=FORMULAS.keys())
def test_closed_forms(sde, alpha, variance, drift, squared, fraction):
    t = sde.t_min + fraction * (sde.t_max - sde.t_min)
    at = f64(t)
    close(sde.alpha(at), f64(alpha(t)), rtol=1e-12)
    close(sde.sigma(at).square(), f64(variance(t)), rtol=1e-12)
    close(sde.drift(at), f64(drift(t)), rtol=1e-12)
    close(sde.diffusion(at).square(), f64(squared(t)), rtol=1e-12)


def test_published_values_at_the_ends():
    zero, one = f64(0.0), f64(1.0)
    close(ss.VP().alpha(one), f64(math.exp(-0.25 * (20 - 0.1) - 0.5 * 0.1)))
    close(ss.VP().sigma(zero), zero)
    close(ss.SubVP().sigma(one), 1 - ss.SubVP().alpha(one) ** 2)
    close(ss.VE().sigma(zero), f64(0.01))
    close(ss.VE().sigma(one), f64(50.0))
    close(ss.VE().diffusion(zero), f64(0.01 * math.sqrt(2 * math.log(5000))))
    assert (ss.Karras().t_min, ss.Karras().t_max, ss.Karras().prior_std) == (0.002, 80.0, 80.0)
    assert (ss.VP().t_min, ss.VP().t_max, ss.VP().prior_std) == (1e-5, 1.0, 1.0)


def test_sub_vp_has_less_variance_than_vp_and_the_same_limit():
    t = torch.linspace(1e-5, 1, 100, dtype=torch.float64)
    vp, sub = ss.VP(), ss.SubVP()
    close(sub.alpha(t), vp.alpha(t))
    close(sub.sigma(t), vp.sigma(t) ** 2)
    assert bool((sub.diffusion(t) < vp.diffusion(t)).all())


@pytest.mark.parametrize("kind", [ss.Cosine, ss.Rectified])
def test_the_signal_ends_at_exactly_one(kind):
    sde = kind()
    assert sde.t_max == 1 - 1e-3
    assert float(sde.alpha(f64(sde.t_max))) > 0
    assert float(kind(t_max=1.0).alpha(f64(1.0))) == 0
    close(kind(t_max=1.0).sigma(f64(1.0)), f64(1.0))


@pytest.mark.parametrize("kind", [ss.VP, ss.SubVP])
def test_other_constants_and_a_constant_beta(kind):
    sde, t = kind(beta_min=2.0, beta_max=2.0), f64(0.25, 0.5)
    close(sde.alpha(t), torch.exp(-t))
    close(sde.drift(t), -torch.ones_like(t))
    close(sde.time(sde.log_snr(t)), t)
    sde = kind(beta_min=0.3, beta_max=80.0)  # B(1) = 40: the signal falls far below the noise
    t = f64(0.1, 0.5, 0.75, 0.9, 1.0)
    close(sde.time(sde.log_snr(t)), t, rtol=1e-14)


def test_other_constants_of_ve():
    sde = ss.VE(sigma_min=0.02, sigma_max=348.0)
    close(sde.sigma(f64(0.0, 0.5, 1.0)), f64(0.02, math.sqrt(0.02 * 348), 348.0))
    assert sde.prior_std == pytest.approx(348.0, rel=1e-12)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ss.VP(beta_min=0.0), "beta_min=0"),
        (lambda: ss.VP(beta_min=3.0, beta_max=1.0), "beta_max=1.0"),
        (lambda: ss.SubVP(beta_min=-1.0), "beta_min=-1"),
        (lambda: ss.VE(sigma_min=0.0), "sigma_min=0"),
        (lambda: ss.VE(sigma_min=2.0, sigma_max=1.0), "sigma_max=1"),
        (lambda: ss.VE(sigma_min=math.nan), "sigma_min=nan"),
        (lambda: ss.Cosine(t_max=1.1), "t_max <= 1 expected; got 1.1"),
        (lambda: ss.Rectified(t_max=2), "t_max <= 1 expected; got 2"),
        (lambda: ss.Karras(t_min=0), "t_min=0"),
    ],
)
def test_impossible_constants_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("sde", "shown"),
    [(ss.VP(), "beta_min=0.1, beta_max=20"), (ss.VE(), "sigma_min=0.01, sigma_max=50"), (ss.Cosine(), "t_max=0.999")],
)
def test_representation_shows_the_constants(sde, shown):
    assert shown in repr(sde)
