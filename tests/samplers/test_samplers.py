"""The law of samples against the oracle: mean, covariance, and a two-sample test."""

from functools import cache

import pytest
import torch

import scoresde as ss
from tests.conftest import oracle, seeded
from tests.samplers.methods import METHODS, representatives, setup

SDES = [ss.SubVP(t_min=1e-3), ss.VE(), ss.Rectified()]
LAWS = [name for name, method in METHODS.items() if method.steps]
# Every method on one path, and one of each class on the others: most methods only see points of a path.
CASES = [(name, sde) for sde in SDES for name in (LAWS if sde is SDES[0] else representatives(LAWS))]
N = 800
RELABELINGS = 499


def id_of(value):
    return value if isinstance(value, str) else type(value).__name__


@cache
def relabelings(n):
    """Labels +1 and -1 of 2n pooled samples, (2n, 1 + RELABELINGS): the true ones, and random permutations of them."""
    labels, generator = torch.cat([torch.ones(n), -torch.ones(n)]), seeded(11)
    return torch.stack([labels, *(labels[torch.randperm(2 * n, generator=generator)] for _ in range(RELABELINGS))], 1)


def two_sample_test(x, y):
    """The p-value of equal laws for x and y, (n, *): energy distance (Szekely and Rizzo 2013), permutation test.

    The energy distance, twice the mean distance between samples minus those within each, is -s^T D s / n^2 with labels
    s and distances D of the pooled samples. p is the fraction of labelings, the true one included, with one at least
    as large.
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
    """Assert moments within `tolerance` standard deviations, and a law that the two-sample test does not reject."""
    flat, exact = samples.flatten(1).double(), mixture.covariance()
    scale = exact.diagonal().sqrt()
    assert ((flat.mean(dim=0) - mixture.mean().flatten()).abs() / scale).max() < tolerance
    assert ((torch.cov(flat.T) - exact) / scale / scale[:, None]).abs().max() < tolerance
    assert two_sample_test(samples, reference(tuple(samples.shape[1:]), sde)) > 1 / (1 + RELABELINGS)


def start(mixture, sde, n=N):
    """The exact marginal at t_max, so that the test does not see the mismatch of the prior."""
    return mixture.sample(n, sde, sde.t_max, generator=seeded(7))


def check_sampler(sampler, model, sde, shape=(3,), tolerance=0.16):
    """Assert the law of the samples, and return the result."""
    mixture = oracle(shape)
    result = sampler(model or mixture.score_model(sde), x_T=start(mixture, sde), generator=seeded())
    check_against_oracle(result.x, mixture, sde, tolerance)
    return result


@pytest.mark.parametrize("seed", range(2))
def test_the_two_sample_test_accepts_the_oracle_and_rejects_small_changes(seed):
    """A shift by a third of a standard deviation, and 25% more spread."""
    mixture, sde = oracle((3,)), SDES[0]
    x, y = mixture.sample(N, sde, sde.t_min, generator=seeded(seed)), reference((3,), sde)
    scale = mixture.covariance().diagonal().sqrt()
    assert two_sample_test(x, y) > 0.01
    assert two_sample_test(x + 0.33 * scale, y) == pytest.approx(1 / (1 + RELABELINGS))
    assert two_sample_test(mixture.mean() + 1.25 * (x - mixture.mean()), y) == pytest.approx(1 / (1 + RELABELINGS))


@pytest.mark.parametrize(("name", "sde"), CASES, ids=id_of)
def test_every_method_has_the_law_of_the_oracle(name, sde):
    step, model = setup(name, oracle((3,)), sde)
    check_sampler(ss.samplers.PredictorCorrector(step, None, METHODS[name].steps, "uniform_log_snr"), model, sde)


@pytest.mark.parametrize("name", [name for name in representatives(LAWS) if METHODS[name].from_noise])
def test_methods_that_can_start_from_pure_noise_have_the_law_of_the_oracle(name):
    sde = ss.ZeroTerminalSNR(ss.VP(t_min=1e-3))
    step, model = setup(name, oracle((3,)), sde)
    check_sampler(ss.samplers.PredictorCorrector(step, None, METHODS[name].steps, "quadratic"), model, sde)


@pytest.mark.parametrize("order", ["predictor_first", "corrector_first"])
@pytest.mark.parametrize("sde", [ss.VP(), ss.VE()], ids=id_of)
@pytest.mark.parametrize("corrector", [ss.samplers.Langevin(0.1), ss.samplers.AnnealedLangevin(0.04, 1)], ids=id_of)
def test_correctors_keep_the_law_of_the_oracle_on_images(sde, corrector, order):
    predictor = ss.samplers.ReverseDiffusion()
    sampler = ss.samplers.PredictorCorrector(predictor, corrector, 150, "uniform_log_snr", order)
    check_sampler(sampler, None, sde, (1, 2, 2))


def test_correctors_alone_are_annealed_langevin_dynamics():
    corrector = ss.samplers.AnnealedLangevin(step=0.1, steps=20)
    sampler = ss.samplers.PredictorCorrector(None, corrector, 60, "uniform_log_snr")
    assert check_sampler(sampler, None, ss.VP(), tolerance=0.24).nfe == 60 * 20


@pytest.mark.parametrize(("solver", "sde"), [(None, SDES[0]), (ss.solvers.TorchDiffEq(), SDES[1])], ids=id_of)
def test_the_probability_flow_has_the_law_of_the_oracle(sde, solver):
    check_sampler(ss.samplers.ProbabilityFlow(solver), None, sde)


@pytest.mark.parametrize("step", [ss.samplers.DDIM(), ss.samplers.UniPC()], ids=id_of)
def test_a_step_called_as_a_sampler_has_the_law_of_the_oracle(step):
    assert check_sampler(step, None, ss.VP()).nfe == step.default_steps
