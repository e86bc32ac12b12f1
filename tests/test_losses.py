"""Denoising score matching: known minima, vanishing gradients, published weights and unbiased draws of time."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import cumulative_trapezoid, trapezoid

import scoresde as ss
from scoresde import losses
from tests.conftest import FINITE, close, exact_model, f64, gradient, normal, oracle, seeded, some, times, within

TYPES = ["noise", "data", "score", "velocity", "v", ss.predictions.Karras(0.7), ss.predictions.Denoiser(0.7)]
DENSITIES = {"uniform": losses.UniformTime(), "log-snr": losses.UniformLogSNR(), "log-normal": losses.LogNormal()}
# Ranges on which even the densities that do not suit a weighting estimate it with a moderate variance
MODERATE = [
    pytest.param(ss.VP(t_min=0.02), id="vp"),
    pytest.param(ss.VE(sigma_min=0.1, sigma_max=5.0), id="ve"),
    pytest.param(ss.Rectified(t_min=0.05, t_max=0.95), id="rectified"),
]


def named(prediction):
    return prediction if isinstance(prediction, str) else type(prediction).__name__.lower()


def snr(sde, t):
    return sde.alpha(t) ** 2 / sde.sigma(t) ** 2


def falling(sde, t):
    """-(log SNR)'."""
    return -gradient(lambda t: snr(sde, t).log(), t)


def published_density(name, sde, t):
    """The density of times, written independently."""
    if name == "uniform":
        return torch.full_like(t, 1 / (sde.t_max - sde.t_min))
    clean, noisy = (0.5 * snr(sde, f64(end)).log() for end in (sde.t_min, sde.t_max))
    if name == "log-snr":
        return falling(sde, t) / (2 * clean - 2 * noisy)
    log_sigma = torch.distributions.Normal(f64(-1.2), f64(1.2))  # 2206.00364, table 1: ln(sigma) ~ N(-1.2, 1.2^2)
    mass = log_sigma.cdf(-noisy) - log_sigma.cdf(-clean)
    return log_sigma.log_prob(-0.5 * snr(sde, t).log()).exp() * 0.5 * falling(sde, t) / mass


def published_omega(name, sde, t):
    """The weight of the squared error of the noise, from the formula of each paper in the paper's own terms."""
    s2 = 1 / snr(sde, t)  # the squared error of the data is s^2 times that of the noise, that of the score 1/sigma^2
    uniform = published_density("uniform", sde, t)
    if name == "variance":  # lambda = sigma^2 on the score
        return sde.sigma(t) ** 2 / sde.sigma(t) ** 2 * uniform
    if name == "likelihood":  # lambda = g^2 on the score, g^2 = (sigma^2)' - 2 (alpha'/alpha) sigma^2
        drift = gradient(sde.alpha, t) / sde.alpha(t)
        return (gradient(lambda t: sde.sigma(t) ** 2, t) - 2 * drift * sde.sigma(t) ** 2) / sde.sigma(t) ** 2
    if name == "karras":  # lambda = (s^2 + sigma_data^2) / (s sigma_data)^2 on the data
        return (s2 + 0.25) / (s2 * 0.25) * s2 * published_density("log-normal", sde, t)
    return torch.minimum(snr(sde, t), f64(5.0)) * s2 * uniform  # min(SNR, gamma) on the data


SUITED = {"variance": "uniform", "likelihood": "log-snr", "karras": "log-normal", "min_snr": "uniform"}


def grid(sde, n=20_000):
    """Times fine enough for a trapezoidal rule, whichever end the integrand grows at."""
    fine = np.concatenate((np.linspace(0, 1, n), np.geomspace(1e-10, 1, n), 1 - np.geomspace(1e-10, 1, n)))
    return torch.from_numpy(sde.t_min + (sde.t_max - sde.t_min) * np.unique(fine.clip(0, 1)))


# --- weights


@pytest.mark.parametrize("weighting", list(SUITED))
@pytest.mark.parametrize("sde", FINITE)
def test_weights_are_the_published_ones(sde, weighting):
    t = times(sde, n=41)
    omega = published_omega(weighting, sde, t)
    close(losses.WEIGHTINGS[weighting]().omega(sde, t), omega, rtol=1e-7)
    expected = omega / published_density(SUITED[weighting], sde, t)
    terms = losses.DenoisingScoreMatching(weighting)(ss.ScoreModel(lambda x, t, cond: x, sde), normal(41, 2), t=t)
    close(terms.weight, expected, rtol=1e-7)
    close(terms.t, t, rtol=0)


@pytest.mark.parametrize("sde", FINITE)
def test_importance_weight_of_likelihood_is_constant(sde):
    t = losses.UniformLogSNR().quantile(sde, torch.linspace(0.001, 0.999, 50, dtype=torch.float64))
    terms = losses.DenoisingScoreMatching("likelihood")(ss.ScoreModel(lambda x, t, cond: x, sde), normal(50, 2), t=t)
    ends = sde.log_snr(f64(sde.t_min, sde.t_max))
    close(terms.weight, (ends[0] - ends[1]).expand(50), rtol=1e-10)


def test_parameters_of_the_weightings():
    sde, t = ss.VP(), f64(0.1, 0.3, 0.9)
    close(losses.MinSNR(gamma=1.0).omega(sde, t) * (1 - 1e-5), torch.clamp(1 / snr(sde, t), max=1), rtol=1e-9)
    karras = losses.Karras(sigma_data=2.0, mean=0.3, std=0.8)
    expected = (1 + 1 / snr(sde, t) / 4) * losses.LogNormal(0.3, 0.8).density(sde, t)
    close(karras.omega(sde, t), expected, rtol=1e-10)
    assert (karras.times.mean, karras.times.std) == (0.3, 0.8)


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


# --- minima


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


# --- times


@pytest.mark.parametrize("name", list(DENSITIES))
@pytest.mark.parametrize("sde", [*FINITE, pytest.param(ss.ZeroTerminalSNR(ss.VP(), t_max=0.999), id="zero-snr-vp")])
def test_density_integrates_to_one_and_quantile_inverts_its_integral(sde, name):
    times, t = DENSITIES[name], grid(sde)
    density = times.density(sde, t)
    close(density, published_density(name, sde, t), rtol=1e-6)
    cumulative = cumulative_trapezoid(density, t, initial=0)
    assert cumulative[-1] == pytest.approx(1, abs=2e-5)
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    quantile = times.quantile(sde, u)
    assert np.abs(np.interp(quantile, t, cumulative) - u.numpy()).max() < 2e-5
    close(quantile[[0, -1]], f64(sde.t_min, sde.t_max), rtol=1e-9, atol=1e-12)


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


def test_stratified_times_are_unbiased_and_vary_less():
    sde, batch, repeats = ss.VP(t_min=0.02), 16, 300
    mixture = ss.GaussianMixture(torch.zeros(1, 32), f64(0.6)[None])
    model, x0, means = mixture.score_model(sde), mixture.sample(batch * repeats, generator=seeded()), {}
    for stratified in (True, False):
        loss, generator = losses.DenoisingScoreMatching("variance", stratified=stratified), seeded(1)
        t = torch.cat([loss.draw_times(sde, batch, generator) for _ in range(repeats)])
        means[stratified] = loss(model, x0, t=t, generator=generator).value.reshape(repeats, batch).mean(dim=1)
    t = grid(sde)
    kept = (sde.alpha(t) * 0.6) ** 2
    expected = trapezoid(kept / (kept + sde.sigma(t) ** 2) / (1 - 0.02), t)
    for stratified in (True, False):
        within(means[stratified], expected)
    assert float(means[True].var()) < 0.5 * float(means[False].var())


@pytest.mark.parametrize("weighting", list(SUITED))
@pytest.mark.parametrize("n", [1, 7, 64])
def test_stratified_times_cover_every_stratum(weighting, n):
    sde = ss.VP()
    loss = losses.DenoisingScoreMatching(weighting)
    drawn = [loss.draw_times(sde, n, seeded(seed)) for seed in range(5)]
    edges = loss.times.quantile(sde, torch.linspace(0, 1, n + 1, dtype=torch.float64))
    for t in drawn:
        assert t.shape == (n,)
        assert t.dtype == torch.float64
        assert torch.equal(
            torch.histc(torch.bucketize(t, edges[1:-1]).double(), n, 0, n - 1 or 1), torch.ones(n).double()
        )
    assert len({float(t[0]) for t in drawn}) == 5
    # Each place of the batch sees every time, not its own stratum alone: its first time is uniform in probability.
    places = torch.stack([loss.draw_times(sde, n, seeded(seed))[0] for seed in range(200)])
    assert float((places < loss.times.quantile(sde, f64(0.5))).double().mean()) == pytest.approx(0.5, abs=0.12)


def test_independent_times_leave_strata_empty():
    t = losses.DenoisingScoreMatching(stratified=False).draw_times(ss.VP(), 1000, seeded())
    assert len(torch.unique((t * 1000).long())) < 700  # 1 - 1/e of them on average


# --- randomness, gradients, errors


@pytest.mark.parametrize("stratified", [True, False])
def test_terms_repeat_with_the_generator(stratified):
    model, x0 = ss.ScoreModel(lambda x, label, cond: x, ss.VP()), normal(5, 3)
    loss = losses.DenoisingScoreMatching("likelihood", stratified=stratified)
    first, second, other = (loss(model, x0, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.value, second.value)
    assert torch.equal(first.t, second.t)
    assert not bool((first.t == other.t).any())


def test_gradient_is_that_of_the_value():
    sde, t, x0, eps = ss.VP(), f64(0.3, 0.6), normal(2, 3), normal(2, 3, seed=1)
    network = torch.nn.Linear(3, 3, bias=False, dtype=torch.float64)
    model = ss.ScoreModel(lambda x, label, cond: network(x), sde)
    losses.DenoisingScoreMatching()(model, x0, t=t, noise=eps).value.mean().backward()
    x = sde.perturb(x0, t, eps)
    close(network.weight.grad, 2 * (network(x) - eps).detach().T @ x / 6)


def test_own_weightings_and_densities():
    class Cubic(losses.TimeDensity):
        def quantile(self, sde, u):
            return u ** (1 / 3)

        def density(self, sde, t):
            return 3 * t**2

    class Half(losses.Weighting):
        def omega(self, sde, t):
            return torch.full_like(t, 0.5)

    model, t = ss.ScoreModel(lambda x, label, cond: x, ss.VP()), f64(0.5, 0.9)
    terms = losses.DenoisingScoreMatching(Half(), times=Cubic())(model, normal(2, 3), t=t)
    close(terms.weight, 0.5 / (3 * t**2))
    assert isinstance(losses.DenoisingScoreMatching(Half()).times, losses.UniformTime)
    for base in (losses.Weighting().omega, losses.TimeDensity().quantile, losses.TimeDensity().density):
        with pytest.raises(NotImplementedError, match="must define"):
            base(ss.VP(), t)


@pytest.mark.parametrize("name", ["log-snr", "log-normal"])
@pytest.mark.parametrize("sde", [ss.ZeroTerminalSNR(ss.VP()), ss.Rectified(t_min=0.0), ss.Cosine(t_max=1.0)])
def test_infinite_log_snr_is_refused_by_densities_over_it(sde, name):
    with pytest.raises(ValueError, match=r"finite log-SNR .* raise t_min, lower t_max, or pass times=UniformTime"):
        losses.DenoisingScoreMatching(times=DENSITIES[name]).draw_times(sde, 3)
    assert losses.DenoisingScoreMatching().draw_times(sde, 3).shape == (3,)


def test_bad_arguments_are_refused():
    loss, model = losses.DenoisingScoreMatching(), ss.ScoreModel(lambda x, label, cond: x, ss.VP())
    with pytest.raises(ValueError, match="variance, likelihood, karras, min_snr expected; got 'snr'"):
        losses.DenoisingScoreMatching("snr")
    with pytest.raises(ValueError, match=r"\(3,\)"):
        loss(model, normal(4, 2), t=f64(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        loss(model, normal(4, 2), noise=normal(1, 2))
