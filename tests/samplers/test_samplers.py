"""Every SDE x method, and x corrector, against the oracle: mean, covariance, and a two-sample test."""

from functools import cache

import pytest
import torch

import scoresde as ss
from tests.conftest import oracle, seeded
from tests.samplers.methods import FROM_NOISE, METHODS, setup

SDES = [ss.VP(t_min=1e-3), ss.SubVP(t_min=1e-3), ss.VE(), ss.Cosine(), ss.Karras(), ss.Rectified()]
ZERO_SNR = ss.ZeroTerminalSNR(ss.VP(t_min=1e-3))
PREDICTORS = [ss.samplers.EulerMaruyama(), ss.samplers.ReverseDiffusion(), ss.samplers.Ancestral()]
CORRECTORS = [ss.samplers.Langevin(snr=0.1), ss.samplers.AnnealedLangevin(step=0.04, steps=1)]
N = 800
RELABELINGS = 999


def name(value):
    return type(value).__name__ + getattr(value, "variance", "")


@cache
def relabelings(n):
    """Labels +1 and -1 of 2n pooled samples, (2n, 1 + RELABELINGS): the true ones, and random permutations of them."""
    labels, generator = torch.cat([torch.ones(n), -torch.ones(n)]), seeded(11)
    return torch.stack([labels, *(labels[torch.randperm(2 * n, generator=generator)] for _ in range(RELABELINGS))], 1)


def two_sample_test(x, y):
    """The p-value of equal laws for x and y, (n, *): energy distance (Szekely and Rizzo 2013), permutation test.

    Twice the mean distance between samples less those within each is -s^T D s / n^2, s being the labels and D the
    distances of the pooled samples; p is the share of labelings, the true one among them, with one at least as large.
    """
    pooled = torch.cat([x, y]).flatten(1).double()
    labels = relabelings(len(x))
    energy = -(labels * (torch.cdist(pooled, pooled).float() @ labels)).sum(dim=0)
    return float((energy >= energy[0]).float().mean())


@cache
def reference(shape, sde):
    """Draws of the oracle at t_min."""
    return oracle(shape).sample(N, sde, sde.t_min, generator=seeded(123))


def check_against_oracle(samples, mixture, sde, tolerance=0.16):
    """Moments within `tolerance` standard deviations, and a law that the two-sample test does not reject."""
    flat, exact = samples.flatten(1).double(), mixture.covariance()
    scale = exact.diagonal().sqrt()
    assert ((flat.mean(dim=0) - mixture.mean().flatten()).abs() / scale).max() < tolerance
    assert ((torch.cov(flat.T) - exact) / scale / scale[:, None]).abs().max() < tolerance
    assert two_sample_test(samples, reference(tuple(samples.shape[1:]), sde)) > 1 / (1 + RELABELINGS)


def start(mixture, sde, n=N):
    """The exact marginal at t_max: what is tested is the sampler, not the prior's mismatch."""
    return mixture.sample(n, sde, sde.t_max, generator=seeded(7))


@pytest.mark.parametrize("seed", range(3))
def test_the_two_sample_test(seed):
    """It does not reject the oracle itself, but a shift by a third of a standard deviation, or 25% more spread."""
    mixture, sde = oracle((3,)), SDES[0]
    x, y = mixture.sample(N, sde, sde.t_min, generator=seeded(seed)), reference((3,), sde)
    scale = mixture.covariance().diagonal().sqrt()
    assert two_sample_test(x, y) > 0.01
    assert two_sample_test(x + 0.33 * scale, y) == pytest.approx(1 / (1 + RELABELINGS))
    assert two_sample_test(mixture.mean() + 1.25 * (x - mixture.mean()), y) == pytest.approx(1 / (1 + RELABELINGS))


def check_method(method, sde, steps, grid):
    """The law of a method's samples over vectors, started from the exact marginal at t_max."""
    mixture = oracle((3,))
    method, model = setup(method, mixture, sde)
    sampler = ss.samplers.PredictorCorrector(method, steps=steps, grid=grid)
    check_against_oracle(sampler(model, x_T=start(mixture, sde), generator=seeded()).x, mixture, sde)


@pytest.mark.parametrize("sde", SDES, ids=name)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_law_of_the_oracle(method, sde):
    check_method(method, sde, METHODS[method][1], "uniform_log_snr")


@pytest.mark.parametrize("method", [method for method in METHODS if method.startswith(FROM_NOISE)])
def test_methods_that_start_from_pure_noise_have_the_law_of_the_oracle(method):
    check_method(method, ZERO_SNR, METHODS[method][1], "quadratic")


@pytest.mark.parametrize("method", [method for method in METHODS if not method.startswith(FROM_NOISE)])
def test_other_methods_refuse_pure_noise(method):
    with pytest.raises(ValueError, match="alpha > 0 expected"):
        check_method(method, ZERO_SNR, 10, "uniform_time")


@pytest.mark.slow
@pytest.mark.parametrize("sde", SDES, ids=name)
@pytest.mark.parametrize("predictor", PREDICTORS, ids=name)
@pytest.mark.parametrize("corrector", CORRECTORS, ids=name)
def test_correctors_keep_the_law_of_the_oracle(sde, predictor, corrector):
    mixture = oracle((3,))
    sampler = ss.samplers.PredictorCorrector(predictor, corrector, steps=120, grid="uniform_log_snr")
    result = sampler(mixture.score_model(sde), x_T=start(mixture, sde), generator=seeded())
    check_against_oracle(result.x, mixture, sde)


@pytest.mark.parametrize("order", ["predictor_first", "corrector_first"])
@pytest.mark.parametrize("sde", [ss.VP(), ss.VE()], ids=name)
def test_both_orders_on_images(sde, order):
    mixture = oracle((1, 2, 2))
    sampler = ss.samplers.PredictorCorrector(
        ss.samplers.ReverseDiffusion(), ss.samplers.Langevin(snr=0.1), 150, "uniform_log_snr", order
    )
    x = sampler(mixture.score_model(sde), x_T=start(mixture, sde), generator=seeded()).x
    check_against_oracle(x, mixture, sde)


@pytest.mark.parametrize("sde", [ss.VP(), ss.VE()], ids=name)
def test_correctors_alone_are_annealed_langevin_dynamics(sde):
    mixture = oracle((3,))
    corrector = ss.samplers.AnnealedLangevin(step=0.1, steps=20)
    sampler = ss.samplers.PredictorCorrector(None, corrector, steps=60, grid="uniform_log_snr")
    result = sampler(mixture.score_model(sde), x_T=start(mixture, sde), generator=seeded())
    assert result.nfe == 60 * 20
    check_against_oracle(result.x, mixture, sde, tolerance=0.24)


@pytest.mark.parametrize("solver", [None, ss.solvers.TorchDiffEq()], ids=["runge_kutta", "torchdiffeq"])
@pytest.mark.parametrize("sde", SDES, ids=name)
def test_the_probability_flow_has_the_law_of_the_oracle(sde, solver):
    mixture = oracle((3,))
    result = ss.samplers.ProbabilityFlow(solver)(mixture.score_model(sde), x_T=start(mixture, sde))
    check_against_oracle(result.x, mixture, sde)


def test_the_grid_uniform_in_time():
    mixture, sde = oracle((3,)), ss.VP(t_min=1e-3)
    sampler = ss.samplers.PredictorCorrector(ss.samplers.ReverseDiffusion(), steps=1000)
    x = sampler(mixture.score_model(sde), x_T=start(mixture, sde), generator=seeded()).x
    check_against_oracle(x, mixture, sde)


def test_the_larger_variance_of_ddpm():
    mixture, sde = oracle((3,)), ss.VP()
    sampler = ss.samplers.PredictorCorrector(ss.samplers.Ancestral("forward"), steps=250, grid="uniform_log_snr")
    x = sampler(mixture.score_model(sde), x_T=start(mixture, sde), generator=seeded()).x
    check_against_oracle(x, mixture, sde)
