"""Predictors against the update formulas as published, on discrete schedules; the optimal variance on a Gaussian."""

from functools import cache

import pytest
import torch

import scoresde as ss
from scoresde.random_stream import RandomStream
from scoresde.samplers.sampler import make_transition
from tests.conftest import exact_model, f64, normal, oracle, seeded, some

BETAS = torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)
SIGMAS = torch.logspace(-2, 1, 50, dtype=torch.float64)


class Fixed(RandomStream):
    """A stream that repeats one draw."""

    def __init__(self, z):
        super().__init__()
        self.z = z

    def normal(self, like, rows=None):
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
        make_transition(ss.samplers.ReverseDiffusion(), model, x, t, s, noise),
        (2 - (1 - beta).sqrt()) * x + beta * score + beta.sqrt() * z,
    )
    mean = (x + beta * score) / (1 - beta).sqrt()
    torch.testing.assert_close(
        make_transition(ss.samplers.Ancestral("forward"), model, x, t, s, noise), mean + beta.sqrt() * z
    )
    tilde = (1 - bars[i - 1]) / (1 - bars[i]) * beta
    torch.testing.assert_close(make_transition(ss.samplers.Ancestral(), model, x, t, s, noise), mean + tilde.sqrt() * z)


@pytest.mark.parametrize("i", [1, 10, 49])
def test_ncsn_updates(i):
    model, x, t, s, noise, z, score = transition(ss.Tabulated.from_sigmas(SIGMAS), i)
    step = SIGMAS[i] ** 2 - SIGMAS[i - 1] ** 2
    # 2011.13456, eq. 46 with G^2 = sigma_i^2 - sigma_(i-1)^2, and eq. 47
    torch.testing.assert_close(
        make_transition(ss.samplers.ReverseDiffusion(), model, x, t, s, noise), x + step * score + step.sqrt() * z
    )
    spread = SIGMAS[i - 1] / SIGMAS[i] * step.sqrt()
    torch.testing.assert_close(
        make_transition(ss.samplers.Ancestral(), model, x, t, s, noise), x + step * score + spread * z
    )


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_euler_maruyama(level):
    sde = ss.VP()
    model, x, t, s, noise, z, score = transition(sde, 30)
    beta, h = sde.beta(t), t - s
    drift = -0.5 * beta * x - 0.5 * (1 + level**2) * beta * score
    expected = x - h * drift + level * (beta * h).sqrt() * z
    torch.testing.assert_close(make_transition(ss.samplers.EulerMaruyama(level), model, x, t, s, noise), expected)


def test_ancestral_starts_where_no_signal_is_left():
    """At alpha = 0 the mean is alpha_s E[x_0] + ...: finite, though the score cannot give x_0."""
    sde = ss.ZeroTerminalSNR(ss.VP())
    mixture = ss.GaussianMixture(torch.full((1, 2), 0.4), torch.tensor([0.3]))
    t, s = (torch.tensor(v, dtype=torch.float64) for v in (1.0, 0.9))
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = make_transition(ss.samplers.Ancestral(), mixture.score_model(sde), x, t, s, Fixed(torch.zeros_like(x)))
    torch.testing.assert_close(out, sde.alpha(s).expand_as(x) * 0.4)


@pytest.mark.parametrize("i", [1, 10, 49])
def test_the_learned_variance(i):
    """2102.09672, eq. 15: log Sigma = nu log beta + (1 - nu) log beta-tilde, with nu = (v + 1)/2 of the output v."""
    bars = (1 - BETAS).cumprod(0)
    sde = ss.Tabulated.from_alphas_cumprod(bars)
    exact, x, t, s, noise, z, score = transition(sde, i)
    v = torch.tanh(normal(3, 2, seed=9))

    class Network(torch.nn.Module):
        def forward(self, x, label, cond=None):
            return torch.cat([-sde.sigma(t) * exact.score(x, t), v], dim=1)

    model = ss.ScoreModel(Network(), sde, "noise", learned_variance=True)
    beta, tilde = BETAS[i], (1 - bars[i - 1]) / (1 - bars[i]) * BETAS[i]
    spread = (0.5 * (v + 1) * beta.log() + 0.5 * (1 - v) * tilde.log()).exp().sqrt()
    expected = (x + beta * score) / (1 - beta).sqrt() + spread * z
    torch.testing.assert_close(make_transition(ss.samplers.Ancestral("learned"), model, x, t, s, noise), expected)


def test_a_learned_variance_needs_a_model_that_has_one():
    model, x, t, s, noise, _, _ = transition(ss.VP(), 10)
    with pytest.raises(ValueError, match="a model with a learned variance expected"):
        make_transition(ss.samplers.Ancestral("learned"), model, x, t, s, noise)


STD, DRAWS = 0.5, 10_000


@cache
def one_gaussian(sde):
    """Isotropic data of known variance, and the optimal variance estimated from draws of it."""
    mixture = ss.GaussianMixture(torch.full((1, 2), 1.5), f64(STD)[None])
    data = mixture.sample(DRAWS, generator=seeded(1))
    model = exact_model(mixture, sde, "noise")
    return model, ss.samplers.OptimalVariance(model, data, 128, generator=seeded(2))


@pytest.mark.parametrize("sde", some("vp", "ve", "rectified"))
def test_the_unexplained_noise_on_one_gaussian(sde):
    """Var(eps | x) = alpha^2 s^2 / (alpha^2 s^2 + sigma^2), and its estimate, a mean of squares, within its error.

    Relative to what is unexplained: at low SNR it is multiplied by sigma^2/alpha^2, the inverse of about as much.
    """
    _, optimal = one_gaussian(sde)
    t = sde.time(optimal.log_snr)
    data = (STD * sde.alpha(t)).square()
    expected = data / (data + sde.sigma(t).square())
    found = torch.tensor([optimal.unexplained(float(level)) for level in optimal.log_snr], dtype=torch.float64)
    assert (found / expected - 1).abs().max() < 4.5 * (2 / (2 * DRAWS)) ** 0.5
    assert optimal.unexplained(-1e3) == pytest.approx(float(found[0]))
    assert optimal.unexplained(1e3) == pytest.approx(float(found[-1]))


@pytest.mark.parametrize("steps", [2, 5, 40])
@pytest.mark.parametrize("sde", some("vp", "ve", "rectified"))
def test_the_optimal_variance_on_one_gaussian(sde, steps):
    """2201.06503, theorem 1: q(x_s | x_t) of one Gaussian is Gaussian, 1/variance = 1/v_s + r^2/v, v_s that of x_s.

    Steps of any length then keep the law, which neither the posterior's variance nor the forward one does.
    """
    model, optimal = one_gaussian(sde)
    times = ss.samplers.uniform_log_snr(sde, steps)
    t, s = times[steps // 2], times[steps // 2 + 1]
    ratio, forward = sde.transition(s, t)
    before, after = (float((STD * sde.alpha(u)).square() + sde.sigma(u).square()) for u in (t, s))
    expected = 1 / (1 / after + float(ratio.square() / forward))
    zero, one = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)

    def affine(variance):
        """The gain and the variance of a step, which is affine in x and z here."""
        step = ss.samplers.Ancestral(variance)
        still, moved, noisy = (
            make_transition(step, model, x, t, s, Fixed(z)) for x, z in ((zero, zero), (one, zero), (zero, one))
        )
        return float((moved - still)[0, 0]), float((noisy - still)[0, 0]) ** 2

    gain, variance = affine(optimal)
    assert variance == pytest.approx(expected, rel=0.05)
    assert gain**2 * before + variance == pytest.approx(after, rel=0.05)
    for other, sign in (("posterior", -1), ("forward", 1)):
        gain, variance = affine(other)
        assert sign * (gain**2 * before + variance - after) > 0


@pytest.mark.parametrize("make", [lambda: ss.samplers.Ancestral("beta"), lambda: ss.samplers.EulerMaruyama(-1.0)])
def test_bad_arguments(make):
    with pytest.raises(ValueError, match="expected"):
        make()


def test_the_optimal_variance_where_no_signal_is_left():
    """Data N(0, 1) under a path of constant size stay N(0, 1) at any number of steps."""
    sde = ss.Cosine(t_max=1.0)
    mixture = ss.GaussianMixture(torch.zeros(1, 2), torch.ones(1))
    model = mixture.score_model(sde)
    data = mixture.sample(4000, generator=torch.Generator().manual_seed(1))
    step = ss.samplers.Ancestral(ss.samplers.OptimalVariance(model, data, generator=torch.Generator().manual_seed(2)))
    make = ss.samplers.PredictorCorrector(step, steps=2, grid="angle")
    x = make(model, shape=(4000, 2), generator=torch.Generator().manual_seed(3)).x
    assert x.std() == pytest.approx(1.0, rel=0.04)


@pytest.mark.parametrize("kind", [ss.samplers.EulerMaruyama, ss.samplers.StochasticHeun])
def test_a_noisy_step_of_the_reverse_sde_goes_up_by_the_forward_kernel_and_the_flow_by_itself(kind):
    sde, (low, high) = ss.VP(), f64(0.3, 0.7)
    ratio, variance = sde.transition(low, high)
    (row,) = kind().plan(sde, [(low, high)])
    assert row.stages == ()
    assert row.kick == pytest.approx((float(ratio), float(variance.sqrt())))
    (row,) = kind(l=0.0).plan(sde, [(low, high)])
    assert row.kick is None
    assert len(row.stages) > 0
    assert all(stage.c == 0 for stage in row.stages)
