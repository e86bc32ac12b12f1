"""The named diffusions against the closed forms of their papers, written independently."""

import math

import pytest
import torch

import scoresde as ss
from tests.conftest import close, f64

B0, B1 = 0.1, 20.0


def beta(t):
    return B0 + t * (B1 - B0)


def integral(t):
    return 0.5 * t**2 * (B1 - B0) + t * B0


def signal(t):
    return math.exp(-0.25 * t**2 * (B1 - B0) - 0.5 * t * B0)


# alpha, sigma^2, f and g^2 as functions of time
FORMULAS = {
    "vp": (ss.VP(), signal, lambda t: -math.expm1(-integral(t)), lambda t: -0.5 * beta(t), beta),
    "sub-vp": (
        ss.SubVP(),
        signal,
        lambda t: math.expm1(-integral(t)) ** 2,
        lambda t: -0.5 * beta(t),
        lambda t: -beta(t) * math.expm1(-2 * integral(t)),
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
    "rectified": (ss.Rectified(), lambda t: 1 - t, lambda t: t**2, lambda t: -1 / (1 - t), lambda t: 2 * t / (1 - t)),
}


@pytest.mark.parametrize(("sde", "alpha", "variance", "drift", "squared"), FORMULAS.values(), ids=FORMULAS.keys())
def test_closed_forms(sde, alpha, variance, drift, squared):
    for fraction in (0.0, 1e-5, 0.013, 0.5, 0.87, 0.9999, 1.0):
        t = sde.t_min + fraction * (sde.t_max - sde.t_min)
        actual = sde.alpha(f64(t)), sde.sigma(f64(t)) ** 2, sde.drift(f64(t)), sde.diffusion(f64(t)) ** 2
        close(torch.stack(actual), f64(*(formula(t) for formula in (alpha, variance, drift, squared))), rtol=1e-12)


def test_published_constants():
    assert (ss.VP().t_min, ss.VP().t_max, ss.VP().prior_std) == (1e-5, 1.0, 1.0)
    assert (ss.Karras().t_min, ss.Karras().t_max, ss.Karras().prior_std) == (0.002, 80.0, 80.0)
    assert (ss.VE().t_min, ss.VE().t_max) == (1e-5, 1.0)


@pytest.mark.parametrize("kind", [ss.Cosine, ss.Rectified])
def test_the_signal_ends_at_exactly_one(kind):
    assert kind().t_max == 1 - 1e-3
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
        (lambda: ss.VP(beta_min=0.0), "0 < beta_min <= beta_max; got beta_min=0"),
        (lambda: ss.SubVP(beta_min=3.0, beta_max=1.0), "beta_max=1.0"),
        (lambda: ss.VE(sigma_min=2.0, sigma_max=1.0), "0 < sigma_min < sigma_max; got sigma_min=2.0, sigma_max=1"),
        (lambda: ss.VE(sigma_min=math.nan), "sigma_min must be a finite number; got nan"),
        (lambda: ss.Cosine(t_max=1.1), "t_max must be at most 1; got t_max=1.1"),
        (lambda: ss.Rectified(t_max=2), "t_max must be at most 1"),
        (lambda: ss.Karras(t_min=0), "t_min > 0.*got t_min=0"),
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
