"""Everything called published, against the update formulas of the original code, on continuous and discrete paths.

The formulas are those of the code of 2011.13456 (score_sde), with its tables of N = 1000 steps: beta_i in equal steps
from 0.1/N to 20/N for VP and sub-VP, sigma_i geometric from 0.01 to 50 for VE. `test_predictors` has the updates of
DDPM and NCSN on short tables, `test_fidelity` those of diffusers, and `test_heun` those of EDM.
"""

import math

import pytest
import torch

import scoresde as ss
from scoresde.random_stream import RandomStream
from scoresde.samplers import (
    DDIM,
    Ancestral,
    AnnealedLangevin,
    EulerMaruyama,
    Langevin,
    PredictorCorrector,
    ReverseDiffusion,
)
from tests.conftest import close, f64, make_transition, normal, oracle, seeded

N = 1000
BETAS = torch.linspace(0.1 / N, 20 / N, N, dtype=torch.float64)
BARS = (1 - BETAS).cumprod(0)
SIGMAS = torch.linspace(math.log(0.01), math.log(50), N, dtype=torch.float64).exp()
ONES = torch.ones(N, dtype=torch.float64)
PATHS = {  # the path, and the alpha_i = 1 - beta_i that the code multiplies the steps of its correctors by
    "vp": (ss.VP(), 1 - BETAS),
    "sub-vp": (ss.SubVP(), 1 - BETAS),
    "ve": (ss.VE(), ONES),
    "ddpm": (ss.DDPM(), 1 - BETAS),
    "ncsn": (ss.NCSN(), ONES),
}
EVERY_PATH = pytest.mark.parametrize("path", PATHS)
X, SNR = normal(4, 3), 0.16


def at(i):
    return f64(i / (N - 1))


def parts(path):
    sde, alphas = PATHS[path]
    return sde, alphas, oracle((3,)).score_model(sde)


@EVERY_PATH
@pytest.mark.parametrize("i", [1, 400, 599, 990, 999])
def test_langevin_correctors(path, i):
    """2011.13456, algorithms 4 and 5 ("langevin"), and "ald", which is NCSN's chain for VE."""
    (sde, alphas, model), t = parts(path), at(i)
    grad, z = model.score(X, t), RandomStream(seeded(1)).normal(X)
    rules = {
        Langevin(SNR, rule="batch_mean"): (SNR * z.norm(dim=1).mean() / grad.norm(dim=1).mean()) ** 2 * 2 * alphas[i],
        AnnealedLangevin(step=4 * SNR**2, steps=1): (SNR * sde.sigma(t)) ** 2 * 2 * alphas[i],
    }
    for corrector, step in rules.items():
        expected = X + step * grad + torch.sqrt(step * 2) * z
        close(corrector(model, X, t, RandomStream(seeded(1))) - X, expected - X, 1e-6)


@EVERY_PATH
def test_between_nodes_the_correctors_have_the_alpha_of_the_node_below(path):
    sde, alphas, _ = parts(path)
    times = (torch.tensor([3.2, 500.5, 998.99], dtype=torch.float64)) / (N - 1)
    close(sde.chain_alpha(times), alphas[[3, 500, 998]], 1e-9)
    assert 0 <= ss.ZeroTerminalSNR(sde).chain_alpha(f64(1.0)) <= 1


@pytest.mark.parametrize("path", ["vp", "sub-vp", "ve"])
@pytest.mark.parametrize("t", [0.2, 0.6, 0.99])
def test_euler_maruyama(path, t):
    _, _, model = parts(path)
    t, dt, z = f64(t), -1 / N, RandomStream(seeded(1)).normal(X)
    beta = 0.1 + t * 19.9
    if path == "ve":
        drift, diffusion = 0 * X, 0.01 * 5000**t * math.sqrt(2 * math.log(5000))
    else:
        discount = 1 - torch.exp(-2 * 0.1 * t - 19.9 * t**2) if path == "sub-vp" else 1.0
        drift, diffusion = -0.5 * beta * X, torch.sqrt(beta * discount)
    expected = X + (drift - diffusion**2 * model.score(X, t)) * dt + diffusion * math.sqrt(-dt) * z
    close(make_transition(EulerMaruyama(), model, X, t, t + dt, RandomStream(seeded(1))), expected, 1e-6, 1e-9)


@pytest.mark.parametrize("i", [1, 500, 999])
def test_predictors_of_ddpm(i):
    _, _, model = parts("ddpm")
    t, beta, z = at(i), BETAS[i], RandomStream(seeded(1)).normal(X)
    score = model.score(X, t)
    mean = (X + beta * score) / torch.sqrt(1 - beta)
    noise = {"forward": beta, "posterior": beta * (1 - BARS[i - 1]) / (1 - BARS[i])}  # DDPM's large and small variance
    updates = {ReverseDiffusion(): X - (torch.sqrt(1 - beta) * X - X) + beta * score + beta.sqrt() * z}
    updates |= {Ancestral(name): mean + variance.sqrt() * z for name, variance in noise.items()}
    eps = -torch.sqrt(1 - BARS[i]) * score
    clean = (X - torch.sqrt(1 - BARS[i]) * eps) / BARS[i].sqrt()
    for eta in (0.0, 0.5, 1.0):  # 2010.02502, eq. 12 and 16
        std = eta * torch.sqrt((1 - BARS[i - 1]) / (1 - BARS[i]) * (1 - BARS[i] / BARS[i - 1]))
        updates[DDIM(eta)] = BARS[i - 1].sqrt() * clean + torch.sqrt(1 - BARS[i - 1] - std**2) * eps + std * z
    for step, expected in updates.items():
        drawn = make_transition(step, model, X, t, at(i - 1), RandomStream(seeded(1)))
        close(drawn, expected, 1e-6, 1e-7)


@pytest.mark.parametrize("path", ["ve", "ncsn"])
@pytest.mark.parametrize("i", [2, 500, 999])
def test_predictors_of_ve(path, i):
    _, _, model = parts(path)
    t, z = at(i), RandomStream(seeded(1)).normal(X)
    score, step = model.score(X, t), SIGMAS[i] ** 2 - SIGMAS[i - 1] ** 2
    updates = {
        ReverseDiffusion(): X + step * score + step.sqrt() * z,
        Ancestral(): X + step * score + torch.sqrt(SIGMAS[i - 1] ** 2 * step / SIGMAS[i] ** 2) * z,
    }
    for predictor, expected in updates.items():
        close(make_transition(predictor, model, X, t, at(i - 1), RandomStream(seeded(1))), expected, 1e-6, 1e-9)


@pytest.mark.parametrize("path", ["ncsn", "ddpm"])
def test_the_predictor_corrector_sampler(path):
    """A corrector before each of N predictors, of which the last gives its mean: E[x_0 | x] from the lowest level.

    On the first 5 and the last 20 of the N times, as the whole run of the code would take them.
    """
    sde, alphas, model = parts(path)
    draws, x = RandomStream(seeded(1)), sde.prior_std * X
    indices = [*range(N - 1, N - 6, -1), *range(19, -1, -1)]
    for i, following in zip(indices, [*indices[1:], None], strict=True):
        t = at(i)
        grad, z = model.score(x, t), draws.normal(x)
        step = 2 * alphas[i] * (SNR * z.norm(dim=1).mean() / grad.norm(dim=1).mean()) ** 2
        x = x + step * grad + torch.sqrt(2 * step) * z
        score = model.score(x, t)
        if following is None:  # VE: x + sigma_0^2 score; VP: E[x_0 | x], as the code's x_mean would be with beta_0
            x = (x + sde.sigma(t) ** 2 * score) / sde.alpha(t)
            continue
        signal, noise = sde.alpha(t) / sde.alpha(at(following)), sde.sigma(at(following))
        forward = sde.sigma(t) ** 2 - (signal * noise) ** 2
        x = (2 - signal) * x + forward * score + forward.sqrt() * draws.normal(x)
    sampler = PredictorCorrector(
        ReverseDiffusion(),
        Langevin(SNR, rule="batch_mean"),
        grid=torch.stack([at(i) for i in indices]),
        order="corrector_first",
        denoise_final=True,
    )
    result = sampler(model, x_T=sde.prior_std * X, generator=seeded(1))
    close(result.x, x, 1e-6, 1e-6)
    assert result.nfe == 2 * len(indices)
