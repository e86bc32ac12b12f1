"""Every SDE x predictor x corrector against the oracle: mean, covariance, and a two-sample distance."""

from functools import cache

import pytest
import torch

import scoresde as ss
from tests.conftest import oracle

SDES = [ss.VP(t_min=1e-3), ss.SubVP(t_min=1e-3), ss.VE(), ss.Cosine(), ss.Karras(), ss.Rectified()]
PREDICTORS = [
    ss.samplers.EulerMaruyama(),
    ss.samplers.ReverseDiffusion(),
    ss.samplers.Ancestral(),
]
CORRECTORS = [None, ss.samplers.Langevin(snr=0.1), ss.samplers.AnnealedLangevin(step=0.04, steps=1)]
N = 800


def name(value):
    return type(value).__name__ + getattr(value, "variance", "")


def energy_distance(x, y):
    """Twice the mean distance between samples, less those within each (Szekely and Rizzo 2013); 0 for equal laws."""
    x, y = x.flatten(1).double(), y.flatten(1).double()
    return float(2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean())


@cache
def null(shape, sde):
    """Draws of the oracle at t_min, and the largest energy distance between five pairs of such draws."""
    mixture, generator = oracle(shape), torch.Generator().manual_seed(123)
    draws = [mixture.sample(N, sde, sde.t_min, generator=generator) for _ in range(10)]
    return draws[0], max(energy_distance(draws[2 * i], draws[2 * i + 1]) for i in range(5))


def check_against_oracle(samples, mixture, sde, tolerance=0.16):
    """Moments within `tolerance` standard deviations, and an energy distance near that of the oracle to itself."""
    flat, exact = samples.flatten(1).double(), mixture.covariance()
    scale = exact.diagonal().sqrt()
    assert ((flat.mean(dim=0) - mixture.mean().flatten()).abs() / scale).max() < tolerance
    assert ((torch.cov(flat.T) - exact) / scale / scale[:, None]).abs().max() < tolerance
    reference, largest = null(tuple(samples.shape[1:]), sde)
    assert energy_distance(samples, reference) < 3 * largest


def start(mixture, sde, n=N):
    """The exact marginal at t_max: what is tested is the sampler, not the prior's mismatch."""
    return mixture.sample(n, sde, sde.t_max, generator=torch.Generator().manual_seed(7))


@pytest.mark.slow
@pytest.mark.parametrize("sde", SDES, ids=name)
@pytest.mark.parametrize("predictor", PREDICTORS, ids=name)
@pytest.mark.parametrize("corrector", CORRECTORS, ids=name)
def test_samples_have_the_law_of_the_oracle(sde, predictor, corrector):
    mixture = oracle((3,))
    sampler = ss.samplers.PredictorCorrector(predictor, corrector, steps=120, grid="uniform_log_snr")
    generator = torch.Generator().manual_seed(0)
    result = sampler(mixture.score_model(sde), x_T=start(mixture, sde), generator=generator)
    check_against_oracle(result.x, mixture, sde)


@pytest.mark.parametrize("order", ["predictor_first", "corrector_first"])
@pytest.mark.parametrize("sde", [ss.VP(), ss.VE()], ids=name)
def test_both_orders_on_images(sde, order):
    mixture = oracle((1, 2, 2))
    sampler = ss.samplers.PredictorCorrector(
        ss.samplers.ReverseDiffusion(), ss.samplers.Langevin(snr=0.1), 150, "uniform_log_snr", order
    )
    x = sampler(mixture.score_model(sde), x_T=start(mixture, sde), generator=torch.Generator().manual_seed(0)).x
    check_against_oracle(x, mixture, sde)


@pytest.mark.parametrize("sde", [ss.VP(), ss.VE()], ids=name)
def test_correctors_alone_are_annealed_langevin_dynamics(sde):
    mixture = oracle((3,))
    corrector = ss.samplers.AnnealedLangevin(step=0.1, steps=20)
    sampler = ss.samplers.PredictorCorrector(None, corrector, steps=60, grid="uniform_log_snr")
    result = sampler(mixture.score_model(sde), x_T=start(mixture, sde), generator=torch.Generator().manual_seed(0))
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
    x = sampler(mixture.score_model(sde), x_T=start(mixture, sde), generator=torch.Generator().manual_seed(0)).x
    check_against_oracle(x, mixture, sde)


def test_the_larger_variance_of_ddpm():
    mixture, sde = oracle((3,)), ss.VP()
    sampler = ss.samplers.PredictorCorrector(ss.samplers.Ancestral("forward"), steps=250, grid="uniform_log_snr")
    x = sampler(mixture.score_model(sde), x_T=start(mixture, sde), generator=torch.Generator().manual_seed(0)).x
    check_against_oracle(x, mixture, sde)
