"""Predictors against the update formulas as published, on discrete schedules; the optimal variance on a Gaussian."""

import pytest
import torch

import scoresde as ss
from scoresde.random_stream import RandomStream
from scoresde.samplers import Ancestral, EulerMaruyama, OptimalVariance, ReverseDiffusion, StochasticHeun
from tests.conftest import close, exact_model, f64, make_transition, normal, oracle, seeded, some

BETAS = torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)
BARS = (1 - BETAS).cumprod(0)
SIGMAS = torch.logspace(-2, 1, 50, dtype=torch.float64)
NODES = torch.linspace(0, 1, 50, dtype=torch.float64)
EVERY_INDEX = pytest.mark.parametrize("i", [1, 10, 49])
X, Z = normal(3, 2), normal(3, 2, seed=1)


class Fixed(RandomStream):
    """A stream that repeats one draw."""

    def __init__(self, z):
        super().__init__()
        self.z = z

    def normal(self, like, rows=None):
        return self.z


def check_step(step, model, t, s, expected):
    close(make_transition(step, model, X, t, s, Fixed(Z)), expected, 1e-7)


@EVERY_INDEX
def test_ddpm_updates(i):
    """2011.13456, eq. 46 (reverse diffusion) and eq. 4 (ancestral); 2006.11239, eq. 7 for beta-tilde."""
    model, beta = oracle((2,)).score_model(ss.Tabulated.from_alphas_cumprod(BARS)), BETAS[i]
    t, s, score = NODES[i], NODES[i - 1], model.score(X, NODES[i])
    check_step(ReverseDiffusion(), model, t, s, (2 - (1 - beta).sqrt()) * X + beta * score + beta.sqrt() * Z)
    mean, tilde = (X + beta * score) / (1 - beta).sqrt(), (1 - BARS[i - 1]) / (1 - BARS[i]) * beta
    check_step(Ancestral("forward"), model, t, s, mean + beta.sqrt() * Z)
    check_step(Ancestral(), model, t, s, mean + tilde.sqrt() * Z)


@EVERY_INDEX
def test_ncsn_updates(i):
    """2011.13456, eq. 46 with G^2 = sigma_i^2 - sigma_(i-1)^2, and eq. 47."""
    model = oracle((2,)).score_model(ss.Tabulated.from_sigmas(SIGMAS))
    t, s, score, step = NODES[i], NODES[i - 1], model.score(X, NODES[i]), SIGMAS[i] ** 2 - SIGMAS[i - 1] ** 2
    check_step(ReverseDiffusion(), model, t, s, X + step * score + step.sqrt() * Z)
    check_step(Ancestral(), model, t, s, X + step * score + SIGMAS[i - 1] / SIGMAS[i] * step.sqrt() * Z)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_euler_maruyama(level):
    sde, t, s = ss.VP(), f64(0.6), f64(0.58)
    model, beta, h = oracle((2,)).score_model(sde), sde.beta(t), t - s
    drift = -0.5 * beta * X - 0.5 * (1 + level**2) * beta * model.score(X, t)
    check_step(EulerMaruyama(level), model, t, s, X - h * drift + level * (beta * h).sqrt() * Z)


@pytest.mark.parametrize("kind", [EulerMaruyama, StochasticHeun])
def test_sigma_0_is_refused(kind):
    with pytest.raises(ValueError, match=r"needs sigma > 0, but sigma\(0\) = 0: raise t_min"):
        kind(l=0.0).plan(ss.VP(t_min=0.0), [tuple(f64(0.0, 0.5))])


@EVERY_INDEX
def test_the_learned_variance(i):
    """2102.09672, eq. 15: log Sigma = nu log beta + (1 - nu) log beta-tilde, with nu = (v + 1)/2 of the output v."""
    sde, v, t = ss.Tabulated.from_alphas_cumprod(BARS), torch.tanh(normal(3, 2, seed=9)), NODES[i]
    score = oracle((2,)).score_model(sde).score(X, t)

    def network(x, label, cond):
        return torch.cat([-sde.sigma(t) * score, v], dim=1)

    model = ss.ScoreModel(network, sde, "noise", learned_variance=True)
    beta, tilde = BETAS[i], (1 - BARS[i - 1]) / (1 - BARS[i]) * BETAS[i]
    spread = (0.5 * (v + 1) * beta.log() + 0.5 * (1 - v) * tilde.log()).exp().sqrt()
    expected = (X + beta * score) / (1 - beta).sqrt() + spread * Z
    check_step(Ancestral("learned"), model, t, NODES[i - 1], expected)


def test_a_learned_variance_needs_a_model_that_has_one():
    model = oracle((2,)).score_model(ss.VP())
    with pytest.raises(ValueError, match="needs a model with a learned variance, and this one has none"):
        make_transition(Ancestral("learned"), model, X, f64(0.6), f64(0.5), Fixed(Z))


# The optimal variance

STD, DRAWS = 0.5, 10_000


@pytest.fixture(scope="module", params=some("vp", "ve", "rectified"))
def gaussian(request):
    """A path, isotropic data of known variance, and the optimal variance estimated from draws of it."""
    mixture = ss.GaussianMixture(torch.full((1, 2), 1.5), f64(STD)[None])
    model = exact_model(mixture, request.param, "noise")
    data = mixture.sample(DRAWS, generator=seeded(1))
    return request.param, model, OptimalVariance(model, data, 64, generator=seeded(2))


def test_the_unexplained_noise_on_one_gaussian(gaussian):
    """Var(eps | x) = alpha^2 s^2 / (alpha^2 s^2 + sigma^2), and its estimate, a mean of squares, within its error."""
    sde, _, optimal = gaussian
    t = sde.time(optimal.log_snr)
    data = (STD * sde.alpha(t)).square()
    expected = data / (data + sde.sigma(t).square())
    estimates = f64(*(optimal.unexplained(float(level)) for level in optimal.log_snr))
    assert (estimates / expected - 1).abs().max() < 4.5 * (2 / (2 * DRAWS)) ** 0.5
    assert optimal.unexplained(-1e3) == pytest.approx(float(estimates[0]))
    assert optimal.unexplained(1e3) == pytest.approx(float(estimates[-1]))


@pytest.mark.parametrize("steps", [2, 5, 40])
def test_the_optimal_variance_on_one_gaussian(gaussian, steps):
    """2201.06503, theorem 1: q(x_s | x_t) of one Gaussian is Gaussian, 1/variance = 1/v_s + r^2/v, v_s that of x_s.

    Steps of any length then keep the law, which neither the variance of the posterior nor the forward one does.
    """
    sde, model, optimal = gaussian
    times = ss.samplers.uniform_log_snr(sde, steps)
    t, s = times[steps // 2], times[steps // 2 + 1]
    ratio, forward = sde.transition(s, t)
    before, after = (float((STD * sde.alpha(u)).square() + sde.sigma(u).square()) for u in (t, s))
    expected = 1 / (1 / after + float(ratio.square() / forward))
    zero, one = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)

    def affine(variance):
        """The gain and the variance of a step, which is affine in x and z here."""
        still, moved, noisy = (
            make_transition(Ancestral(variance), model, x, t, s, Fixed(z))
            for x, z in ((zero, zero), (one, zero), (zero, one))
        )
        return float((moved - still)[0, 0]), float((noisy - still)[0, 0]) ** 2

    gain, variance = affine(optimal)
    assert variance == pytest.approx(expected, rel=0.05)
    assert gain**2 * before + variance == pytest.approx(after, rel=0.05)
    for other, sign in (("posterior", -1), ("forward", 1)):
        gain, variance = affine(other)
        assert sign * (gain**2 * before + variance - after) > 0


def test_the_optimal_variance_where_no_signal_is_left():
    """Data N(0, 1) under a path of constant size stay N(0, 1) at any number of steps."""
    sde, n = ss.Cosine(t_max=1.0), 4000
    mixture = ss.GaussianMixture(torch.zeros(1, 2), torch.ones(1))
    optimal = OptimalVariance(mixture.score_model(sde), mixture.sample(n, generator=seeded(1)), generator=seeded(2))
    make = ss.samplers.PredictorCorrector(Ancestral(optimal), steps=2, grid="angle")
    x = make(mixture.score_model(sde), shape=(n, 2), generator=seeded(3)).x
    assert x.std() == pytest.approx(1.0, rel=0.04)


def test_bad_arguments():
    with pytest.raises(ValueError, match="variance must be one of posterior, forward, learned, or an OptimalVariance"):
        Ancestral("beta")
    with pytest.raises(ValueError, match="noise level l must be >= 0; got -1"):
        EulerMaruyama(-1.0)
