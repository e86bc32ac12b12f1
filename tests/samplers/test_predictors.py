"""Predictors against the update formulas as published, on discrete schedules."""

import pytest
import torch

import scoresde as ss
from scoresde.tensors import Noise
from tests.conftest import oracle

BETAS = torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)
SIGMAS = torch.logspace(-2, 1, 50, dtype=torch.float64)


class Fixed(Noise):
    """A stream that repeats one draw."""

    def __init__(self, z):
        super().__init__(z.shape, dtype=z.dtype)
        self.z = z

    def normal(self):
        return self.z


def transition(sde, i):
    """x_i -> x_(i-1) with the score there, on a table of 50 nodes."""
    generator = torch.Generator().manual_seed(i)
    x, z = (torch.randn(3, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    nodes = torch.linspace(0, 1, 50, dtype=torch.float64)
    model = oracle((2,)).score_model(sde)
    return model, x, nodes[i], nodes[i - 1], Fixed(z), z, model.score(x, nodes[i])


@pytest.mark.parametrize("i", [1, 10, 49])
def test_ddpm_updates(i):
    alphas = 1 - BETAS
    bars = alphas.cumprod(0)
    model, x, t, s, noise, z, score = transition(ss.Tabulated.from_alphas_cumprod(bars), i)
    beta = BETAS[i]
    # 2011.13456, eq. 46 (reverse diffusion) and eq. 4 (ancestral); 2006.11239, eq. 7 for beta-tilde
    torch.testing.assert_close(
        ss.samplers.ReverseDiffusion()(model, x, t, s, noise),
        (2 - (1 - beta).sqrt()) * x + beta * score + beta.sqrt() * z,
    )
    mean = (x + beta * score) / (1 - beta).sqrt()
    torch.testing.assert_close(ss.samplers.Ancestral("forward")(model, x, t, s, noise), mean + beta.sqrt() * z)
    tilde = (1 - bars[i - 1]) / (1 - bars[i]) * beta
    torch.testing.assert_close(ss.samplers.Ancestral()(model, x, t, s, noise), mean + tilde.sqrt() * z)


@pytest.mark.parametrize("i", [1, 10, 49])
def test_ncsn_updates(i):
    model, x, t, s, noise, z, score = transition(ss.Tabulated.from_sigmas(SIGMAS), i)
    step = SIGMAS[i] ** 2 - SIGMAS[i - 1] ** 2
    # 2011.13456, eq. 46 with G^2 = sigma_i^2 - sigma_(i-1)^2, and eq. 47
    torch.testing.assert_close(
        ss.samplers.ReverseDiffusion()(model, x, t, s, noise), x + step * score + step.sqrt() * z
    )
    spread = SIGMAS[i - 1] / SIGMAS[i] * step.sqrt()
    torch.testing.assert_close(ss.samplers.Ancestral()(model, x, t, s, noise), x + step * score + spread * z)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_euler_maruyama(level):
    sde = ss.VP()
    model, x, t, s, noise, z, score = transition(sde, 30)
    beta, h = sde.beta(t), t - s
    drift = -0.5 * beta * x - 0.5 * (1 + level**2) * beta * score
    expected = x - h * drift + level * (beta * h).sqrt() * z
    torch.testing.assert_close(ss.samplers.EulerMaruyama(level)(model, x, t, s, noise), expected)


def test_ancestral_starts_where_no_signal_is_left():
    """At alpha = 0 the mean is alpha_s E[x_0] + ...: finite, though the score cannot give x_0."""
    sde = ss.ZeroTerminalSNR(ss.VP())
    mixture = ss.GaussianMixture(torch.full((1, 2), 0.4), torch.tensor([0.3]))
    t, s = (torch.tensor(v, dtype=torch.float64) for v in (1.0, 0.9))
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = ss.samplers.Ancestral()(mixture.score_model(sde), x, t, s, Fixed(torch.zeros_like(x)))
    torch.testing.assert_close(out, sde.alpha(s).expand_as(x) * 0.4)


@pytest.mark.parametrize("make", [lambda: ss.samplers.Ancestral("beta"), lambda: ss.samplers.EulerMaruyama(-1.0)])
def test_bad_arguments(make):
    with pytest.raises(ValueError, match="expected"):
        make()
