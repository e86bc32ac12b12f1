"""Denoising score matching: known minima, the discrete objectives of the papers, unbiased draws of time."""

import math
from itertools import cycle

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid

import scoresde as ss
from scoresde import losses
from tests.conftest import DDPM, FINITE, INSTANCES, NCSN, close, exact_model, f64, normal, oracle, seeded, within
from tests.losses.networks import column
from tests.losses.published import (
    SUITED,
    TYPES,
    falling,
    grid,
    named,
    published_density,
    published_omega,
    snr,
)

SHAPES = [(3,), (1, 2, 2)]


@pytest.mark.parametrize(("weighting", "shape"), [*zip(SUITED, cycle([(2, 2), (2, 1, 4, 4)]), strict=False)])
@pytest.mark.parametrize("prediction", TYPES, ids=named)
def test_the_value_is_the_weighted_squared_error_of_the_models_noise(prediction, weighting, shape):
    """Also where it is computed from the network's own target; half_sum is d/2 times the mean."""
    sde, x0, eps = ss.VP(), normal(*shape), normal(*shape, seed=1)
    t = torch.linspace(0.05, 0.9, shape[0], dtype=torch.float64)
    inputs = []

    def network(x, label, cond):
        inputs.append((x, label, cond))
        return torch.tanh(x) + 0.1

    model, cond = ss.ScoreModel(network, sde, prediction), normal(shape[0], 2)
    loss = losses.DenoisingScoreMatching(weighting)
    terms = loss(model, x0, cond, t=t, noise=eps)
    x = sde.perturb(x0, t, eps)
    error = (model.noise(x, t) - eps).square().flatten(1).mean(dim=1)
    weight = published_omega(weighting, sde, t) / published_density(SUITED[weighting], sde, t)
    close(terms.value, weight * error, rtol=1e-8)
    close(inputs[0][0], inputs[1][0])
    close(inputs[0][1], model.prediction.c_noise(sde, t))
    assert torch.equal(inputs[0][2], cond)
    close(loss(model, x0[1:], cond[1:], t=t[1:], noise=eps[1:]).value, terms.value[1:])
    half_sum = losses.DenoisingScoreMatching(weighting, reduction="half_sum")(model, x0, cond, t=t, noise=eps)
    close(half_sum.value, x0[0].numel() / 2 * terms.value)
    close(half_sum.weight, terms.weight)


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
    # The output of a data network contains the error of the noise times sigma = 1e-3: three digits are lost there.
    tolerance = 1e-2 if named(prediction) in ("data", "denoiser") else 2e-5
    close(terms.value.double(), wrong.square().mean(dim=1), rtol=tolerance)


EXACT = {"sub-vp": "v", "ve": "data", "rectified": "velocity", "cosine": "noise", "karras": "v", "ddpm": "v"}


@pytest.mark.parametrize(
    ("path", "prediction", "weighting"),
    [
        *(("vp", prediction, "likelihood") for prediction in TYPES),
        *(("sub-vp", EXACT["sub-vp"], weighting) for weighting in SUITED),
        *((path, EXACT[path], weighting) for path, weighting in zip([*EXACT][1:], cycle(SUITED), strict=False)),
    ],
    ids=lambda value: value if isinstance(value, str) else named(value),
)
def test_the_exact_score_attains_the_known_minimum_with_a_vanishing_gradient(path, prediction, weighting):
    """The minimum is the weighted E[tr Cov(eps | x_t)] / d, and Cov(eps | x_t) = SNR Cov(x_0 | x_t)."""
    n, sde, mixture = 3000, INSTANCES[path], oracle((3,))
    loss, generator = losses.DenoisingScoreMatching(weighting, stratified=False), seeded(1)
    x0, eps = mixture.sample(n, generator=generator), torch.randn(n, 3, generator=generator, dtype=torch.float64)
    t = loss.draw_times(sde, n, generator)

    def feature(x, t):
        growth = 1 + 2 / snr(sde, t).sqrt() if weighting == "karras" else torch.ones_like(t)  # of its weight: 1/SNR
        return (torch.tanh(x) + 0.5) / growth[:, None]

    def evaluate(amount):
        amounts = torch.full((n,), amount, dtype=torch.float64, requires_grad=True)
        terms = loss(exact_model(mixture, sde, prediction, amounts, feature), x0, t=t, noise=eps)
        return terms, terms.value.detach(), torch.autograd.grad(terms.value.sum(), amounts)[0]

    terms, value, slope = evaluate(0.0)
    weights, means, stds = mixture.denoising_posterior(sde.perturb(x0, t, eps), sde, t)
    mean = torch.einsum("bk,bkd->bd", weights, means)
    trace = (weights * (means**2 + stds**2).sum(dim=2)).sum(dim=1) - mean.square().sum(dim=1)
    within(value - terms.weight * snr(sde, t) * trace / 3, 0.0)
    within(slope, 0.0)
    _, worse, slope = evaluate(0.3)
    assert float(slope.mean()) > 8 * float(slope.std()) / math.sqrt(n)
    assert float(worse.mean()) > float(value.mean())


def lattice(loss, sde, n):
    """Times at the midpoints of equal probabilities, each with the four signs of (x_0, eps): exact second moments."""
    t = loss.times.quantile(sde, (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    return t.repeat_interleave(4), *(signs.repeat(n, 1)[:, i : i + 1] for i in range(2))


@pytest.mark.parametrize("sde", FINITE)
def test_the_likelihood_loss_of_a_gaussian_is_a_difference_of_logarithms(sde):
    r"""With the exact score, \int -(log SNR)' SNR s^2 / (1 + SNR s^2) dt = log(1 + SNR s^2) between the ends."""
    loss = losses.DenoisingScoreMatching("likelihood")
    t, x0, eps = lattice(loss, sde, n=2000)
    clean, noisy = snr(sde, f64(sde.t_min, sde.t_max))
    for std in (0.1, 2.0):
        model = ss.GaussianMixture(torch.zeros(1, 1), f64(std)[None]).score_model(sde)
        expected = torch.log1p(clean * std**2) - torch.log1p(noisy * std**2)
        close(loss(model, std * x0, t=t, noise=eps).value.mean(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("believed", "scale"), [(0.8, 1.0), (0.7, 1.0), (1.1, 1.0), (0.8, 0.7), (0.8, 1.5), (1.1, 0.9)]
)
@pytest.mark.parametrize("sde", [ss.VP(), ss.SubVP(), ss.Rectified()])
def test_the_likelihood_loss_bounds_the_negative_log_likelihood(sde, believed, scale):
    r"""Theorem 1 of 2101.09258 on N(0, 0.8^2), for the reverse SDE with `scale` times the score of N(0, believed^2).

    -E log p_model(x) <= L/2 - 1/2 \int g^2/sigma^2 dt - \int f dt - E log prior(x_T), all at t_min, with equality if
    the model is the score of any diffusion (theorem 2), right or wrong, up to the mismatch at t_max.
    The model's law is N(0, V) with, backward in time, dV = (-2 f - 2 scale g^2/v) V + g^2 and v its believed variance:
    V I = V I at t_max + \int g^2 I dt, I = alpha^(4 scale - 2) v^(-2 scale).
    """
    std, loss = 0.8, losses.DenoisingScoreMatching("likelihood")
    mixture = ss.GaussianMixture(torch.zeros(1, 1), f64(believed)[None])
    model = exact_model(
        mixture, sde, "noise", scale - 1, lambda x, t: -sde.sigma(t)[:, None] * mixture.score(x, sde, t)
    )
    t, x0, eps = lattice(loss, sde, n=20_000)
    value = loss(model, std * x0, t=t, noise=eps).value.mean()
    t = grid(sde, n=20_000)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    v, marginal = (alpha * believed) ** 2 + sigma**2, (alpha * std) ** 2 + sigma**2
    factor = alpha ** (4 * scale - 2) * v ** (-2 * scale)
    variance = (sde.prior_std**2 * factor[-1] + trapezoid(sigma**2 * falling(sde, t) * factor, t)) / factor[0]
    nll = 0.5 * (2 * math.pi * variance).log() + 0.5 * marginal[0] / variance
    fall = snr(sde, t[0]).log() - snr(sde, t[-1]).log()
    prior = -sde.prior_log_prob(marginal[-1].sqrt().reshape(1, 1))[0]  # quadratic: its mean at the standard deviation
    gap = float(0.5 * value - 0.5 * fall - (alpha[-1] / alpha[0]).log() + prior - nll)
    assert abs(gap) < 1e-5 if scale == 1 else 1e-3 < gap < 2


def test_the_value_is_finite_without_signal():
    sde, x0 = ss.ZeroTerminalSNR(ss.VP()), normal(2, 3)
    model = ss.ScoreModel(lambda x, label, cond: torch.tanh(x), sde, "v")
    for weighting in ("variance", "min_snr"):
        terms = losses.DenoisingScoreMatching(weighting)(model, x0, t=f64(0.5, 1.0), generator=seeded())
        assert bool(torch.isfinite(terms.value).all())
        assert terms.value.tolist()[1] == 0  # x is eps there: nothing is to be learned


# --- the discrete objectives of the papers


def probe(x, label, cond=None):
    """A network that depends on the state and on the label."""
    return torch.tanh(x + column(label, x)) - 0.3 * column(label, x)


@pytest.mark.parametrize("shape", SHAPES)
def test_on_the_nodes_of_ddpm_the_objective_is_l_simple(shape):
    """2006.11239, eq. 14 (and algorithm 1): the mean over steps of ||eps - eps_theta(x_k, k)||^2, here over d."""
    sde, loss = INSTANCES["ddpm"], losses.DenoisingScoreMatching("variance", losses.Nodes())
    x0, eps = normal(1000, *shape), normal(1000, *shape, seed=1)
    terms = loss(ss.ScoreModel(probe, sde), x0, noise=eps, generator=seeded())
    k = np.rint(999 * terms.t.numpy()).astype(int)
    assert sorted(k) == list(range(1000))
    alpha_bar = column(torch.from_numpy(DDPM[k]), x0)
    x = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
    expected = (eps - probe(x, torch.from_numpy(k / 999))).square().flatten(1).mean(dim=1)
    close(terms.value, expected, rtol=1e-9)
    close(terms.weight, torch.ones(1000, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prediction", ["score", "noise"])
def test_on_the_nodes_of_ncsn_half_the_sum_is_its_objective(prediction, shape):
    """1907.05600: ell(sigma) = 1/2 E ||s(x~, sigma) + (x~ - x)/sigma^2||^2 (eq. 5), mean_i sigma_i^2 ell(sigma_i)."""
    sde, n = INSTANCES["ncsn"], len(NCSN)
    x, eps = normal(n, *shape), normal(n, *shape, seed=1)
    loss = losses.DenoisingScoreMatching("variance", losses.Nodes(), reduction="half_sum")
    terms = loss(ss.ScoreModel(probe, sde, prediction), x, noise=eps, generator=seeded())
    i = np.rint(99 * terms.t.numpy()).astype(int)
    assert sorted(i) == list(range(n))
    sigma = column(torch.from_numpy(NCSN[i]), x)
    noisy = x + sigma * eps
    output = probe(noisy, terms.t)
    score = output if prediction == "score" else -output / sigma
    objective = 0.5 * (sigma * (score + (noisy - x) / sigma**2)).square().sum() / n
    close(terms.value.mean(), objective, rtol=1e-9)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'half_sum'; got 'sum'"):
        losses.DenoisingScoreMatching(reduction="sum")
