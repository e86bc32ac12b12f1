"""Denoising score matching: known minima, the discrete objectives of the papers, unbiased draws of time."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid

import scoresde as ss
from scoresde import losses
from tests.conftest import DDPM, FINITE, INSTANCES, NCSN, close, exact_model, f64, normal, oracle, seeded, some, within
from tests.losses.published import (
    DENSITIES,
    SUITED,
    TYPES,
    falling,
    grid,
    named,
    published_density,
    published_omega,
    snr,
)

# Ranges on which even the densities that do not suit a weighting estimate it with a moderate variance
MODERATE = [
    pytest.param(ss.VP(t_min=0.02), id="vp"),
    pytest.param(ss.VE(sigma_min=0.1, sigma_max=5.0), id="ve"),
    pytest.param(ss.Rectified(t_min=0.05, t_max=0.95), id="rectified"),
]


@pytest.mark.parametrize("shape", [(4, 3), (2, 2), (2, 1, 4, 4)])
@pytest.mark.parametrize("weighting", list(SUITED))
@pytest.mark.parametrize("prediction", TYPES, ids=named)
def test_value_is_the_weighted_error_of_the_noise_view(prediction, weighting, shape):
    """Computed from the network's own target, it equals the error of the model's noise, whatever the type."""
    sde, x0, eps = ss.VP(), normal(*shape), normal(*shape, seed=1)
    t = torch.linspace(0.05, 0.9, shape[0], dtype=torch.float64)
    seen = []

    def network(x, label, cond):
        seen.append((x, label, cond))
        return torch.tanh(x) + 0.1

    model, cond = ss.ScoreModel(network, sde, prediction), normal(shape[0], 2)
    terms = losses.DenoisingScoreMatching(weighting)(model, x0, cond, t=t, noise=eps)
    x = sde.perturb(x0, t, eps)
    error = (model.noise(x, t) - eps).square().flatten(1).mean(dim=1)
    weight = published_omega(weighting, sde, t) / published_density(SUITED[weighting], sde, t)
    close(terms.value, weight * error, rtol=1e-8)
    close(seen[0][0], seen[1][0])
    close(seen[0][1], model.prediction.c_noise(sde, t))
    assert torch.equal(seen[0][2], cond)
    each = losses.DenoisingScoreMatching(weighting)(model, x0[1:2], cond[1:2], t=t[1:2], noise=eps[1:2])
    close(each.value, terms.value[1:2])


@pytest.mark.parametrize("prediction", TYPES, ids=named)
def test_float32_loses_no_digits_at_small_t(prediction):
    """An error of 0.1 in the noise at t = 1e-5 of VP, in a float32 network and float32 data."""
    sde, t = ss.VP(), torch.full((64,), 1e-5, dtype=torch.float64)
    x0, eps, wrong = normal(64, 3), normal(64, 3, seed=1), 0.1 * normal(64, 3, seed=2)
    resolved = ss.predictions.resolve(prediction)
    p, q = (c[:, None] for c in resolved.target(sde, t))
    to_output = (resolved.determinant(sde, t) / sde.alpha(t))[:, None]
    output = (p * x0 + q * eps + to_output * wrong).float()
    model = ss.ScoreModel(lambda x, label, cond: output, sde, prediction)
    terms = losses.DenoisingScoreMatching()(model, x0.float(), t=t, noise=eps.float())
    assert terms.value.dtype == torch.float32
    # A data network shows an error of the noise times sigma = 1e-3: three digits lost in its output already.
    close(
        terms.value.double(),
        wrong.square().mean(dim=1),
        rtol=1e-2 if named(prediction) in ("data", "denoiser") else 2e-5,
    )


@pytest.mark.parametrize("weighting", list(SUITED))
@pytest.mark.parametrize(
    ("sde", "prediction"),
    [
        *((each.values[0], prediction) for each in some("vp") for prediction in TYPES),
        *(
            (each.values[0], prediction)
            for each in some("ve", "rectified")
            for prediction in ("noise", "data", "velocity")
        ),
        *((each.values[0], "v") for each in some("sub-vp", "cosine", "karras", "ddpm")),
    ],
    ids=lambda value: named(value) if not isinstance(value, ss.SDE) else type(value).__name__,
)
def test_exact_score_attains_the_known_minimum_with_a_vanishing_gradient(sde, prediction, weighting):
    """The minimum is the weighted E[tr Cov(eps | x_t)] / d, and Cov(eps | x_t) = SNR Cov(x_0 | x_t)."""
    n, mixture = 3000, oracle((3,))
    loss = losses.DenoisingScoreMatching(weighting, stratified=False)
    generator = seeded(1)
    x0, eps = mixture.sample(n, generator=generator), torch.randn(n, 3, generator=generator, dtype=torch.float64)
    t = loss.draw_times(sde, n, generator)

    def feature(x, t):
        growth = (
            1 + 2 / snr(sde, t).sqrt() if weighting == "karras" else torch.ones_like(t)
        )  # its weight grows as 1/SNR
        return (torch.tanh(x) + 0.5) / growth[:, None]

    amount = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    model = exact_model(mixture, sde, prediction, amount, feature)
    terms = loss(model, x0, t=t, noise=eps)
    weights, means, stds = mixture.posterior(sde.perturb(x0, t, eps), sde, t)
    mean = torch.einsum("bk,bkd->bd", weights, means)
    trace = (weights * (means**2 + stds**2).sum(dim=2)).sum(dim=1) - mean.square().sum(dim=1)
    within(terms.value.detach() - terms.weight * snr(sde, t) * trace / 3, 0.0)

    (slope,) = torch.autograd.grad(terms.value.sum(), amount)
    within(slope, 0.0)

    wrong = torch.full_like(amount, 0.3).requires_grad_()
    model = exact_model(mixture, sde, prediction, wrong, feature)
    worse = loss(model, x0, t=t, noise=eps)
    (slope,) = torch.autograd.grad(worse.value.sum(), wrong)
    assert float(slope.mean()) > 8 * float(slope.std()) / math.sqrt(n)
    assert float(worse.value.detach().mean()) > float(terms.value.detach().mean())


def lattice(loss, sde, n=20_000):
    """Times at the midpoints of equal probabilities, each with the four signs of (x_0, eps): exact second moments."""
    t = loss.times.quantile(sde, (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    return t.repeat_interleave(4), *(signs.repeat(n, 1)[:, i : i + 1] for i in range(2))


@pytest.mark.parametrize("std", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("sde", FINITE)
def test_likelihood_loss_of_one_gaussian_is_a_difference_of_logarithms(sde, std):
    r"""With the exact score, \int -(log SNR)' SNR s^2 / (1 + SNR s^2) dt = log(1 + SNR s^2) between the ends."""
    loss = losses.DenoisingScoreMatching("likelihood")
    t, x0, eps = lattice(loss, sde, n=2000)
    model = ss.GaussianMixture(torch.zeros(1, 1), f64(std)[None]).score_model(sde)
    clean, noisy = snr(sde, f64(sde.t_min, sde.t_max))
    expected = torch.log1p(clean * std**2) - torch.log1p(noisy * std**2)
    close(loss(model, std * x0, t=t, noise=eps).value.mean(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("believed", "scale"), [(0.8, 1.0), (0.7, 1.0), (1.1, 1.0), (0.8, 0.7), (0.8, 1.5), (1.1, 0.9)]
)
@pytest.mark.parametrize("sde", some("vp", "sub-vp", "rectified"))
def test_likelihood_loss_bounds_the_negative_log_likelihood(sde, believed, scale):
    r"""Theorem 1 of 2101.09258 on N(0, 0.8^2), for the reverse SDE with `scale` times the score of N(0, believed^2).

    -E log p_model(x) <= L/2 - 1/2 \int g^2/sigma^2 dt - \int f dt - E log prior(x_T), all at t_min, with equality where
    the model is the score of any diffusion (theorem 2), right or wrong, but for the mismatch at t_max.
    The model's law is N(0, V) with, backward in time, dV = (-2 f - 2 scale g^2/v) V + g^2 and v its believed variance:
    V I = V I at t_max + \int g^2 I dt, I = alpha^(4 scale - 2) v^(-2 scale).
    """
    std, loss = 0.8, losses.DenoisingScoreMatching("likelihood")
    mixture = ss.GaussianMixture(torch.zeros(1, 1), f64(believed)[None])
    model = exact_model(
        mixture, sde, "noise", scale - 1, lambda x, t: -sde.sigma(t)[:, None] * mixture.score(x, sde, t)
    )
    t, x0, eps = lattice(loss, sde)
    value = loss(model, std * x0, t=t, noise=eps).value.mean()

    t = grid(sde)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    v, marginal = (alpha * believed) ** 2 + sigma**2, (alpha * std) ** 2 + sigma**2
    factor = alpha ** (4 * scale - 2) * v ** (-2 * scale)
    grown = trapezoid(sigma**2 * falling(sde, t) * factor, t)
    variance = (sde.prior_std**2 * factor[-1] + grown) / factor[0]
    nll = 0.5 * (2 * math.pi * variance).log() + 0.5 * marginal[0] / variance

    fall = snr(sde, t[0]).log() - snr(sde, t[-1]).log()
    prior = -sde.prior_log_prob(marginal[-1].sqrt().reshape(1, 1))[0]  # quadratic: its mean at the standard deviation
    gap = float(0.5 * value - 0.5 * fall - (alpha[-1] / alpha[0]).log() + prior - nll)
    if scale == 1:
        assert abs(gap) < 1e-5
    else:
        assert 1e-3 < gap < 2


def test_nothing_is_infinite_where_no_signal_is_left():
    sde, x0 = ss.ZeroTerminalSNR(ss.VP()), normal(2, 3)
    model = ss.ScoreModel(lambda x, label, cond: torch.tanh(x), sde, "v")
    for weighting in ("variance", "min_snr"):
        terms = losses.DenoisingScoreMatching(weighting)(model, x0, t=f64(0.5, 1.0), generator=seeded())
        assert bool(torch.isfinite(terms.value).all())
        assert terms.value.tolist()[1] == 0  # eps is x there: nothing to learn about it


@pytest.mark.parametrize("name", list(DENSITIES))
@pytest.mark.parametrize("weighting", list(SUITED))
@pytest.mark.parametrize("sde", MODERATE)
def test_every_density_of_times_estimates_the_same_objective(sde, weighting, name):
    r"""On one Gaussian the exact score leaves \int omega v_0 / v_t dt, v the variances of signal and of x_t."""
    std, n = 0.6, 4000
    t = grid(sde)
    kept = (sde.alpha(t) * std) ** 2
    expected = trapezoid(published_omega(weighting, sde, t) * kept / (kept + sde.sigma(t) ** 2), t)
    mixture = ss.GaussianMixture(torch.zeros(1, 6), f64(std)[None])
    loss = losses.DenoisingScoreMatching(weighting, times=DENSITIES[name], stratified=False)
    value = loss(mixture.score_model(sde), mixture.sample(n, generator=seeded()), generator=seeded(1)).value
    within(value, expected)
    assert float(value.std()) / n**0.5 < 0.1 * expected  # a bound on the error that the comparison allows


def test_gradient_is_that_of_the_value():
    sde, t, x0, eps = ss.VP(), f64(0.3, 0.6), normal(2, 3), normal(2, 3, seed=1)
    network = torch.nn.Linear(3, 3, bias=False, dtype=torch.float64)
    model = ss.ScoreModel(lambda x, label, cond: network(x), sde)
    losses.DenoisingScoreMatching()(model, x0, t=t, noise=eps).value.mean().backward()
    x = sde.perturb(x0, t, eps)
    close(network.weight.grad, 2 * (network(x) - eps).detach().T @ x / 6)


# --- the discrete objectives of the papers


def probe(x, label, cond=None):
    """A network that depends on the state and on the label."""
    column = label.reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x + column) - 0.3 * column


@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)])
def test_on_the_nodes_of_ddpm_it_is_l_simple(shape):
    """2006.11239, eq. 14 (and algorithm 1): the plain mean over steps of ||eps - eps_theta(x_k, k)||^2, here over d."""
    sde, loss = INSTANCES["ddpm"], losses.DenoisingScoreMatching("variance", losses.Nodes())
    x0, eps = normal(1000, *shape), normal(1000, *shape, seed=1)
    terms = loss(ss.ScoreModel(probe, sde), x0, noise=eps, generator=seeded())
    k = np.rint(999 * terms.t.numpy()).astype(int)
    assert sorted(k) == list(range(1000))
    expected = []
    for i, step in enumerate(k):
        x = math.sqrt(DDPM[step]) * x0[i] + math.sqrt(1 - DDPM[step]) * eps[i]
        output = probe(x[None], f64(step / 999)[None])[0]
        expected.append(float((eps[i] - output).square().mean()))
    close(terms.value, torch.tensor(expected, dtype=torch.float64), rtol=1e-9)
    close(terms.weight, torch.ones(1000, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)])
@pytest.mark.parametrize("prediction", ["score", "noise"])
def test_on_the_nodes_of_ncsn_half_the_sum_is_its_objective(prediction, shape):
    """1907.05600: ell(sigma) = 1/2 E ||s(x~, sigma) + (x~ - x)/sigma^2||^2 (eq. 5), mean_i sigma_i^2 ell(sigma_i)."""
    sde, n = INSTANCES["ncsn"], len(NCSN)
    x, eps, sigmas = normal(n, *shape), normal(n, *shape, seed=1), torch.from_numpy(NCSN)
    model = ss.ScoreModel(probe, sde, prediction)
    loss = losses.DenoisingScoreMatching("variance", losses.Nodes(), reduction="half_sum")
    terms = loss(model, x, noise=eps, generator=seeded())
    i = torch.from_numpy(np.rint(99 * terms.t.numpy()).astype(int))
    assert torch.equal(i.sort().values, torch.arange(n))
    objective = 0.0
    for row, level in enumerate(sigmas[i]):
        noisy = x[row] + level * eps[row]
        output = probe(noisy[None], terms.t[row : row + 1])[0]
        score = output if prediction == "score" else -output / level
        objective += level**2 * 0.5 * (score + (noisy - x[row]) / level**2).square().sum() / n
    close(terms.value.mean(), objective, rtol=1e-9)


@pytest.mark.parametrize("weighting", list(SUITED))
@pytest.mark.parametrize("shape", [(5, 3), (2, 1, 4, 4)])
def test_half_sum_is_half_of_the_dimensions_times_the_mean(shape, weighting):
    model, x0, t = ss.ScoreModel(probe, ss.VP(), "v"), normal(*shape), torch.linspace(0.1, 0.9, shape[0])
    mean, half_sum = (
        losses.DenoisingScoreMatching(weighting, reduction=r)(model, x0, t=t, noise=normal(*shape, seed=1))
        for r in ("mean", "half_sum")
    )
    close(half_sum.value, x0[0].numel() / 2 * mean.value)
    close(half_sum.weight, mean.weight)


def test_unknown_arguments_are_refused():
    with pytest.raises(ValueError, match="variance, likelihood, karras, min_snr expected; got 'snr'"):
        losses.DenoisingScoreMatching("snr")
    with pytest.raises(ValueError, match="'mean' or 'half_sum' expected; got 'sum'"):
        losses.DenoisingScoreMatching(reduction="sum")
