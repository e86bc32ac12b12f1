"""Correctors: their stationary law on a Gaussian is known in closed form."""

import pytest
import torch

import scoresde as ss
from scoresde.tensors import Noise

T = torch.tensor(0.5, dtype=torch.float64)


def stationary_variance(corrector, sde, shape, steps=400, n=4000):
    """Empirical variance after many corrector steps on N(0, 1) data, started from its marginal at T."""
    model = ss.GaussianMixture(torch.zeros(1, *shape), torch.ones(1)).score_model(sde)
    noise = Noise((n, *shape), torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.sqrt(sde.alpha(T) ** 2 + sde.sigma(T) ** 2) * noise.normal()
    for _ in range(steps):
        x = corrector(model, x, T, noise)
    return float(x.var())


@pytest.mark.parametrize("sde", [ss.VP(), ss.VE(), ss.Rectified()], ids=str)
@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)])
def test_langevin_has_its_own_stationary_law(sde, shape):
    """x + h s + (2h)^(1/2) z on N(0, v) settles at v / (1 - h / 2v), with h = 2 (snr sigma)^2 whatever the state."""
    variance = float(sde.alpha(T) ** 2 + sde.sigma(T) ** 2)
    step = 2 * float(0.3 * sde.sigma(T)) ** 2
    expected = variance / (1 - step / (2 * variance))
    assert stationary_variance(ss.samplers.Langevin(snr=0.3), sde, shape) == pytest.approx(expected, rel=0.04)


def test_annealed_langevin_is_ncsn_s_update():
    sde = ss.VE()
    model = ss.GaussianMixture(torch.zeros(1, 2), torch.ones(1)).score_model(sde)
    x = torch.ones(3, 2, dtype=torch.float64)
    draws = Noise(x.shape, torch.Generator().manual_seed(1), dtype=x.dtype)
    z = Noise(x.shape, torch.Generator().manual_seed(1), dtype=x.dtype).normal()
    # 1907.05600, algorithm 1: alpha_i = epsilon sigma_i^2 / sigma_L^2, with epsilon = 2e-5 and sigma_L = 0.01
    rate = 2e-5 * sde.sigma(T) ** 2 / 0.01**2
    expected = x + rate / 2 * model.score(x, T) + rate.sqrt() * z
    torch.testing.assert_close(ss.samplers.AnnealedLangevin(steps=1)(model, x, T, draws), expected)


def test_the_published_rule():
    """h = 2 (snr mean|z| / mean|score|)^2 (2011.13456, algorithm 5)."""
    sde = ss.VE()
    model = ss.GaussianMixture(torch.zeros(1, 2), torch.ones(1)).score_model(sde)
    x = torch.arange(6.0, dtype=torch.float64).reshape(3, 2)
    draws = Noise(x.shape, torch.Generator().manual_seed(1), dtype=x.dtype)
    z, score = Noise(x.shape, torch.Generator().manual_seed(1), dtype=x.dtype).normal(), model.score(x, T)
    h = 2 * (0.16 * z.norm(dim=1).mean() / score.norm(dim=1).mean()) ** 2
    expected = x + h * score + (2 * h).sqrt() * z
    torch.testing.assert_close(ss.samplers.Langevin(rule="batch_mean")(model, x, T, draws), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ss.samplers.Langevin(snr=0),
        lambda: ss.samplers.Langevin(steps=0),
        lambda: ss.samplers.Langevin(rule="norm"),
        lambda: ss.samplers.AnnealedLangevin(step=4),
        lambda: ss.samplers.AnnealedLangevin(steps=0),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(ValueError, match="expected"):
        make()
