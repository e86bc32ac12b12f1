"""The hybrid objective: published coefficients and terms, the optimal variance, and the gradients of its two parts."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import scoresde as ss
from scoresde import losses
from tests.conftest import DDPM, INSTANCES, NCSN, close, f64, normal, seeded, within
from tests.losses.networks import Trained, column, with_variance

SHAPES = [(3,), (1, 2, 2)]
CHAINS = [
    pytest.param(INSTANCES["ddpm"], losses.Nodes(), id="ddpm"),
    pytest.param(INSTANCES["ncsn"], losses.Nodes(), id="ncsn"),
    pytest.param(ss.VP(), losses.Nodes(20), id="vp"),
    pytest.param(ss.SubVP(t_min=0.01), losses.Nodes(20), id="sub-vp"),
    pytest.param(ss.Rectified(), losses.Nodes(10), id="rectified"),
]


def learning(sde, prediction="noise", fraction=0.3):
    """A model that depends on the state and on the label, with nu = `fraction`."""
    return with_variance(
        ss.ScoreModel(lambda x, label, cond: torch.tanh(x + 0.5 * column(label, x)), sde, prediction), fraction
    )


def bound(loss, model, x0, t, noise):
    """The term of L_vlb alone, in bits per dimension: the factor of lambda N."""
    simple = losses.DenoisingScoreMatching(loss.weighting, loss.times)(model, x0, t=t, noise=noise)
    terms = loss(model, x0, t=t, noise=noise)
    close(terms.weight, simple.weight)
    return (terms.value - simple.value) / (loss.vlb_weight * len(loss.times.nodes(model.sde)))


def bits(nats):
    return nats.flatten(1).mean(dim=1) / math.log(2)


def coefficients(sde, time):
    return sde.alpha(time), sde.sigma(time)


# --- terms


def posterior_of_ddpm(k):
    """Mean's coefficients of x_0 and x_k, beta and the clipped beta_tilde (2006.11239, eq. 6, 7; 2102.09672's code)."""
    before = np.append(1.0, DDPM[:-1])
    betas = 1 - DDPM / before
    variance = betas * (1 - before) / (1 - DDPM)
    clipped = np.append(variance[1], variance[1:])
    data, state = betas * np.sqrt(before) / (1 - DDPM), (1 - before) * np.sqrt(1 - betas) / (1 - DDPM)
    return tuple(torch.from_numpy(c)[k] for c in (data, state, betas, clipped))


def posterior_of_ncsn(k):
    """2011.13456, eq. 47 and appendix F, with sigma_(-1) = 0 and the same clipping."""
    before = np.append(0.0, NCSN[:-1])
    betas = NCSN**2 - before**2
    variance = before**2 * betas / NCSN**2
    clipped = np.append(variance[1], variance[1:])
    return tuple(torch.from_numpy(c)[k] for c in (betas / NCSN**2, before**2 / NCSN**2, betas, clipped))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("path", "posterior"), [("ddpm", posterior_of_ddpm), ("ncsn", posterior_of_ncsn)])
def test_the_terms_are_those_of_the_published_chain(path, posterior, shape):
    """Also of each sample alone."""
    sde, loss = INSTANCES[path], losses.Hybrid()
    k = torch.tensor([0, 1, 2, 50, 98, 99, 0])
    n, nodes = len(k), sde.nodes
    x0, eps, nu = normal(n, *shape), normal(n, *shape, seed=1), torch.rand(n, generator=seeded(2)).double()
    model = learning(sde, fraction=nu)
    x = sde.perturb(x0, nodes[k], eps)
    predicted = model.noise(x, nodes[k])
    denoised = (x - column(sde.sigma(nodes[k]), x) * predicted) / column(sde.alpha(nodes[k]), x)
    data, state, beta, tilde = (column(c, x) for c in posterior(k))
    std = torch.exp(0.5 * (column(nu, x) * beta.log() + (1 - column(nu, x)) * tilde.log()))
    true, model_step = Normal(data * x0 + state * x, tilde.sqrt()), Normal(data * denoised + state * x, std)
    term = torch.where(column(k == 0, x), -Normal(denoised, std).log_prob(x0), kl_divergence(true, model_step))
    terms = loss(model, x0, t=nodes[k], noise=eps)
    simple = (predicted - eps).square().flatten(1).mean(dim=1)
    close(terms.value, simple + 0.001 * len(nodes) * bits(term), rtol=1e-7)
    close(terms.weight, torch.ones(n, dtype=torch.float64))
    for i in range(n):
        row = slice(i, i + 1)
        alone = loss(learning(sde, fraction=nu[row]), x0[row], t=nodes[k[row]], noise=eps[row]).value
        close(alone, terms.value[row])


@pytest.mark.parametrize(("prediction", "shape"), [*zip(["noise", "v", "karras", "data"], 2 * SHAPES, strict=True)])
@pytest.mark.parametrize(("sde", "times"), CHAINS)
def test_the_terms_are_the_divergences_of_two_gaussian_steps(sde, times, prediction, shape):
    """The posterior by conditioning the joint Gaussian of (x_s, x_t) given x_0, for any path and prediction type."""
    nodes = times.nodes(sde)
    k = torch.arange(1, len(nodes)) if len(nodes) < 50 else torch.tensor([1, 2, 30, 70, len(nodes) - 1])
    t, n = nodes[k], len(k)
    x0, eps = normal(n, *shape), normal(n, *shape, seed=1)
    model, x = learning(sde, prediction), sde.perturb(x0, t, eps)
    (alpha_s, sigma_s), (alpha, sigma) = ([column(c, x) for c in coefficients(sde, nodes[j])] for j in (k - 1, k))
    covariance = alpha / alpha_s * sigma_s**2  # of x_s and x_t, given x_0
    tilde, beta = sigma_s**2 - covariance**2 / sigma**2, sigma**2 - (alpha / alpha_s * sigma_s) ** 2

    def mean(data):
        return alpha_s * data + covariance / sigma**2 * (x - alpha * data)

    std = torch.exp(0.5 * (0.3 * beta.log() + 0.7 * tilde.log()))
    term = kl_divergence(Normal(mean(x0), tilde.sqrt()), Normal(mean(model.denoise(x, t)), std))
    actual = bound(losses.Hybrid(vlb_weight=1.0, times=times), model, x0, t, eps)
    close(actual, bits(term), rtol=1e-5, atol=1e-9)


def test_float32_loses_no_digits():
    """Coefficients are float64: at the clean end of a fine chain beta and beta_tilde are 1e-9 and less."""
    sde, times = ss.VP(t_min=1e-5), losses.Nodes(10_000)
    t, x0, eps = times.nodes(sde)[torch.tensor([0, 1, 2, 9, 9999])], normal(5, 3), normal(5, 3, seed=1)
    single, double = (
        losses.Hybrid(times=times)(learning(sde, "noise", 0.7), x0.to(dtype), t=t, noise=eps.to(dtype)).value.double()
        for dtype in (torch.float32, torch.float64)
    )
    close(single, double, rtol=2e-5)


# --- the optimal variance


def best_variance(sde, nodes, std):
    """For data of N(m, std^2 I), at every node: beta_tilde, beta and the variance of the reverse step.

    It is Var[x_s | x_t], by conditioning the joint Gaussian of (x_s, x_t); at node 0 Var[x_0 | x_t].
    """
    (alpha_s, sigma_s), (alpha, sigma) = (coefficients(sde, time) for time in (nodes[:-1], nodes[1:]))
    beta = sigma**2 - (alpha / alpha_s * sigma_s) ** 2
    tilde = beta * (sigma_s / sigma) ** 2
    signal, noise = (c[0] ** 2 for c in coefficients(sde, nodes[:1]))
    first = std**2 * noise / (signal * std**2 + noise)
    covariance = alpha * alpha_s * std**2 + alpha / alpha_s * sigma_s**2
    best = (alpha_s * std) ** 2 + sigma_s**2 - covariance**2 / ((alpha * std) ** 2 + sigma**2)
    return torch.cat([tilde[:1], tilde]), torch.cat([noise[None], beta]), torch.cat([first[None], best])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_bound_of_the_true_chain_is_the_entropy_of_the_data(shape):
    """For a Gaussian every reverse step is Gaussian: L_vlb and the divergence from the prior sum to -E log p."""
    sde, std, n = ss.Tabulated.from_alphas_cumprod(torch.from_numpy(DDPM[::50].copy())), 0.5, 40_000
    mixture, nodes = ss.GaussianMixture(torch.zeros(1, *shape), f64(std)[None]), sde.nodes
    loss = losses.Hybrid(vlb_weight=1.0, stratified=False)
    tilde, beta, best = best_variance(sde, nodes, std)
    nu = (best / tilde).log() / (beta / tilde).log()
    x0, eps = mixture.sample(n, generator=seeded(1)), normal(n, *shape, seed=2)
    t = loss.draw_times(sde, n, seeded(3))
    model = with_variance(mixture.score_model(sde), nu[loss.times.index(sde, t)])
    terms = len(nodes) * bound(loss, model, x0, t, eps)
    alpha, sigma = coefficients(sde, nodes[-1])
    # With the true marginal as the prior the divergence is the mutual information of x_0 and x_T.
    information = 0.5 * ((alpha * std) ** 2 / sigma**2 + 1).log() / math.log(2)
    within(terms, 0.5 * math.log2(2 * math.pi * math.e * std**2) - information)


# --- gradients


def gradients(loss, model, x0):
    model.zero_grad()
    loss(model, x0, generator=seeded(1)).value.mean().backward()
    return {name: p.grad.clone() for name, p in model.network.named_parameters()}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mean_learns_from_the_first_term_alone(shape):
    x0 = torch.cat([normal(8, *shape).float()] * 4)
    model = ss.ScoreModel(Trained(shape, doubled=True), INSTANCES["ddpm"], learned_variance=True)
    times = losses.Nodes(3)  # node 0 is among them
    simple = gradients(losses.DenoisingScoreMatching(times=times), model, x0)
    for weight, width in ((0.0, None), (10.0, None), (10.0, 0.01)):
        hybrid = gradients(losses.Hybrid(weight, width, times=times), model, x0)
        for name in ("mean.weight", "mean.bias"):
            assert float(simple[name].abs().sum()) > 0
            close(hybrid[name], simple[name], rtol=1e-5, atol=1e-7)
        for name in ("spread.weight", "spread.bias"):
            assert float(simple[name].abs().sum()) == 0
            assert (float(hybrid[name].abs().sum()) > 0) == (weight > 0)


# --- the decoder


@pytest.mark.parametrize(("levels", "low", "high"), [(256, -1.0, 1.0), (17, 0.0, 2.0), (2, -1.0, 1.0)])
def test_the_probabilities_of_bins_sum_to_one(levels, low, high):
    x, width = torch.linspace(low, high, levels, dtype=torch.float64), (high - low) / (levels - 1)
    for mean, std in product((-1.5, -1.0, 0.0, 0.77, 4.0), (1e-3, 0.02, 0.3, 5.0)):
        means, stds = torch.full_like(x, mean), torch.full_like(x, std)
        log_prob = losses.bin_log_prob(x, means, stds, width, low, high)
        close(log_prob.exp().sum(), f64(1.0), rtol=1e-12)
        edges = Normal(f64(mean), f64(std)).cdf((x[:-1] + x[1:]) / 2)
        masses = torch.cat([edges, f64(1.0)[None]]) - torch.cat([f64(0.0)[None], edges])
        close(log_prob.exp(), masses, rtol=0, atol=1e-13)


def test_narrow_bins_have_the_density_and_distant_bins_do_not_underflow():
    x, mean, std = f64(0.2, 0.2, 0.2, 0.2), f64(0.2, 0.25, -0.4, 0.21), f64(0.1, 0.02, 0.3, 0.01)
    narrow = losses.bin_log_prob(x, mean, std, 1e-6, -1.0, 1.0)
    close(narrow, Normal(mean, std).log_prob(x) + math.log(1e-6), rtol=1e-8)
    mean, std = f64(0.9, -0.9, 0.9, -0.9, 0.3).requires_grad_(), f64(1e-4, 1e-4, 1e-5, 1e-4, 1e-3).requires_grad_()
    distant = losses.bin_log_prob(f64(0.0, 0.0, -1.0, 1.0, -1.0), mean, std, 0.2, -1.0, 1.0)
    distant.sum().backward()
    for values in (distant, mean.grad, std.grad):
        assert bool(torch.isfinite(values).all())
    # The tail of a normal distribution: log Phi(-z) = -z^2/2 - log(z (2 pi)^(1/2)) + O(1/z^2).
    z = f64((0.9 - 0.1) / 1e-4)
    close(distant[0].detach(), -(z**2) / 2 - (z * math.sqrt(2 * math.pi)).log(), rtol=1e-9)
    assert float(mean.grad[0]) < 0 < float(mean.grad[1])
    assert bool((std.grad > 0).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_node_zero_has_the_probability_of_the_bin(shape):
    """2006.11239, eq. 13, at the levels -1, -0.5 .. 1 of data on [-1, 1]."""
    sde, width = INSTANCES["ddpm"], 0.5
    x0 = width * torch.randint(-2, 3, (50, *shape), generator=seeded()).double()
    eps, t = normal(50, *shape, seed=1), torch.zeros(50, dtype=torch.float64)
    model = learning(sde, fraction=12.0)  # a standard deviation of 0.3, with bins of 0.5
    x = sde.perturb(x0, t, eps)
    _, _, beta, tilde = posterior_of_ddpm(torch.tensor([0]))
    std = torch.exp(0.5 * (12 * beta.log() - 11 * tilde.log()))
    predicted = Normal(model.denoise(x, t), std)
    upper = torch.where(x0 > 0.99, 1.0, predicted.cdf(x0 + width / 2))
    lower = torch.where(x0 < -0.99, 0.0, predicted.cdf(x0 - width / 2))
    actual = bound(losses.Hybrid(1.0, width, times=losses.Nodes()), model, x0, t, eps)
    close(actual, bits(-(upper - lower).log()), rtol=1e-9, atol=1e-12)
    assert float(actual.max()) > 0.1
    other = losses.Hybrid(1.0, width, low=-2.0, high=2.0)
    assert not torch.allclose(bound(other, model, x0, t, eps), actual)
    later = sde.nodes[[3]].expand(50)
    close(bound(losses.Hybrid(1.0, width), model, x0, later, eps), bound(losses.Hybrid(1.0), model, x0, later, eps))


# --- errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"times": losses.UniformTime()}, TypeError, "times must be losses.Nodes.* got UniformTime"),
        ({"vlb_weight": -1.0}, ValueError, "vlb_weight must be >= 0; got -1.0"),
        ({"bin_width": 0.0}, ValueError, r"bin_width must lie in \(0, high - low\]; got 0.0"),
        ({"bin_width": 0.1, "low": 1.0, "high": 0.0}, ValueError, "low=1.0, high=0.0"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        losses.Hybrid(**arguments)


@pytest.mark.parametrize(
    ("model", "times", "t", "message"),
    [
        (ss.ScoreModel(lambda x, label, cond: x, INSTANCES["ddpm"]), None, None, "learned_variance=True"),
        (learning(ss.VP()), None, None, "VP has no nodes"),
        (learning(INSTANCES["ddpm"]), None, f64(0.5), "t must be one of the 1000 nodes; got 0.5"),
        (
            learning(ss.VP(t_min=0.0)),
            losses.Nodes(5),
            f64(0.0),
            r"posterior variance at node 0 \(t=0\) of VP is 0: raise t_min",
        ),
    ],
)
def test_bad_models_and_times_are_refused(model, times, t, message):
    with pytest.raises(ValueError, match=message):
        losses.Hybrid(times=times)(model, normal(4, 2), t=t)


def test_a_chain_may_end_without_signal():
    sde = ss.ZeroTerminalSNR(ss.VP())
    terms = losses.Hybrid(times=losses.Nodes(5))(learning(sde, "v"), normal(5, 2), generator=seeded())
    assert bool(torch.isfinite(terms.value).all())
