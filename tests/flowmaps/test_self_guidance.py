"""Self-guidance by likelihood: the closed form for Gaussians, the first-order gain of a mixture, cost, errors."""

import pytest
import torch

import scoresde as ss
from scoresde.flowmaps import Jump
from scoresde.flowmaps.self_guidance import guided_noise
from scoresde.samplers import PredictorCorrector
from tests.conftest import PATHS, close, f64, normal, seeded
from tests.flowmaps.exact import GaussianMap, MixtureMap, small_map


@pytest.mark.parametrize("sde", PATHS)
@pytest.mark.parametrize("w", [0.5, 3.0])
def test_guided_samples_of_a_gaussian_have_its_density_to_the_power_1_plus_w(sde, w):
    """p^(1 + w) has the same mean and 1/(1 + w) of the covariance: every deviation shrinks by its square root."""
    mean, std = normal(2, 2, seed=4), 0.3 + torch.rand(2, 2, generator=seeded(5), dtype=torch.float64)
    model, noise = GaussianMap(sde, mean, std, data_scale=0.7), sde.prior_std * normal(4, 2, 2)
    centre = model.sample(x_T=torch.zeros_like(noise))
    for steps in (1, 2):
        plain, guided = (model.sample(x_T=noise, steps=steps, guidance=value) for value in (0.0, w))
        close(guided - centre, (plain - centre) / (1 + w) ** 0.5, 1e-6, 1e-6)


def test_guided_samples_of_a_mixture_are_likelier_by_the_square_of_the_gradient():
    """log p(x(z')) - log p(x(z)) = |z' - z|^2 / (1 - (1 + w)^(-1/2)) to first order in w, and rises with w."""
    means, stds = f64([[1.0, 0.5], [-1.0, 0.2]]), f64(0.3, 0.6)
    mixture, sde, z = ss.GaussianMixture(means, stds, f64(0.7, 0.3)), ss.VP(), normal(32, 2)
    model = MixtureMap(sde, mixture)

    def log_p(noise):
        return mixture.log_prob(model.map(noise, sde.t_max, sde.t_min), sde, sde.t_min)

    w, before = 1e-5, log_p(z)
    moved = guided_noise(model, z, w)
    expected = (moved - z).square().sum(dim=1) / (1 - (1 + w) ** -0.5)
    alpha = float(sde.alpha(f64(sde.t_max)))  # the prior differs from the law at t_max by about alpha
    close(log_p(moved) - before, expected, rtol=0.1, atol=2 * w * alpha)
    assert float((moved - (1 + w) ** -0.5 * z).norm(dim=1).max()) > w / 10  # not only towards the origin
    gains = [float((log_p(guided_noise(model, z, w)) - before).mean()) for w in (0.1, 0.3, 1.0)]
    assert 0.03 < gains[0] < gains[1] < gains[2]  # nats


def test_guidance_costs_one_evaluation_and_one_backward_pass_and_does_not_depend_on_the_batch():
    model = small_map(ss.VP(), shape=(2, 2))
    result = PredictorCorrector(Jump(0.5), steps=3)(model, (4, 2, 2), seeds=range(4))
    assert (result.nfe, result.backward) == (4, 1)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    close(model.sample((1, 2, 2), steps=3, seeds=[2], guidance=0.5), result.x[2:3], 1e-5, 1e-5)
    assert float((model.sample((4, 2, 2), steps=3, seeds=range(4)) - result.x).abs().max()) > 1e-2


def test_only_states_at_t_max_are_guided():
    model, x = small_map(ss.VP(), shape=(3,)), normal(2, 3)
    grid = f64(0.6, 0.2, 1e-5)
    close(*(PredictorCorrector(Jump(w), grid=grid)(model, x_T=x).x for w in (0.0, 1.0)), rtol=0, atol=0)


def test_wrong_guidance_is_refused():
    model = small_map(ss.VP(), divergence=False)
    with pytest.raises(ValueError, match="guidance must be"):
        Jump(guidance=-0.5)
    with pytest.raises(ValueError, match="guidance must be"):
        model.sample((2, 3), guidance=-1.0)
    with pytest.raises(ValueError, match="must have a divergence"):
        model.sample((2, 3), seeds=[0, 1], guidance=1.0)
    assert len(model.sample((2, 3), seeds=[0, 1])) == 2
