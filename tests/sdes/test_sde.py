"""The identities of a Gaussian path: coefficients, inverse, transition kernel, prior and reverse family."""

import math

import pytest
import torch

import scoresde as ss
from scoresde.random_stream import RandomStream
from scoresde.sdes.points import points, posterior, transition
from tests.conftest import FINITE, PATHS, close, f64, gradient, normal, oracle, seeded, some, times

FUNCTIONS = ("alpha", "sigma", "alpha_dot", "sigma_dot", "drift", "diffusion", "log_snr", "size")


class TwoFunctions(ss.SDE):
    """VP from alpha and sigma alone; everything else is the base class's."""

    def __init__(self):
        super().__init__(1e-5, 1.0)

    def alpha(self, t):
        return torch.exp(-0.25 * t**2 * 19.9 - 0.05 * t)

    def sigma(self, t):
        return torch.sqrt(-torch.expm1(-0.5 * t**2 * 19.9 - 0.1 * t))


@pytest.mark.parametrize("sde", PATHS)
def test_coefficients_follow_from_alpha_and_sigma_by_reverse_mode_derivatives(sde):
    t = times(sde)
    alpha, sigma, alpha_dot, sigma_dot = sde.alpha(t), sde.sigma(t), gradient(sde.alpha, t), gradient(sde.sigma, t)
    close(sde.alpha_dot(t), alpha_dot, rtol=1e-12)
    close(sde.sigma_dot(t), sigma_dot, rtol=1e-11, atol=5e-15)  # autograd's expm1 loses four digits where alpha is 1e-2
    close(sde.drift(t), alpha_dot / alpha, rtol=1e-12)
    close(sde.diffusion(t).square(), 2 * sigma * sigma_dot - 2 * alpha_dot / alpha * sigma**2, rtol=1e-12)
    close(sde.diffusion(t).square(), -(sigma**2) * gradient(sde.log_snr, t), rtol=1e-12)
    close(sde.log_snr(t), torch.log(alpha**2 / sigma**2), rtol=1e-12, atol=1e-12)
    close(sde.size(t), (alpha**2 + sigma**2).sqrt())


@pytest.mark.parametrize("sde", PATHS)
def test_derivatives_agree_with_central_differences(sde):
    t = times(sde, n=57, margin=1e-4)  # 57 times: none within a step of a node of the tables
    step = 1e-5 * torch.minimum(t, torch.minimum(t - sde.t_min, sde.t_max - t))
    after, before = t + step, t - step
    for value, slope in ((sde.alpha, sde.alpha_dot), (sde.sigma, sde.sigma_dot), (sde.log_snr, None)):
        numerical = (value(after) - value(before)) / (after - before)
        exact = slope(t) if slope else -(sde.diffusion(t) / sde.sigma(t)).square()
        rounding = 1e-15 * (value(t).abs() + t * exact.abs()) / step  # of the value, and of the time
        error = (numerical - exact).abs()
        assert bool((error <= 1e-8 * exact.abs() + rounding).all()), float((error / exact.abs()).max())


@pytest.mark.parametrize("sde", PATHS)
def test_log_snr_decreases_and_time_inverts_it(sde):
    t = times(sde, n=401)
    log_snr = sde.log_snr(t)
    assert bool((log_snr.diff() < 0).all())
    slope = (sde.diffusion(t) / sde.sigma(t)).square()
    best = 2e-15 * (1 + log_snr.abs()) / slope + 2e-15 * t  # what the rounding of the log-SNR itself allows
    assert bool(((sde.time(log_snr) - t).abs() <= best).all())


@pytest.mark.parametrize("beyond", [100.0, 1e4, math.inf])
@pytest.mark.parametrize("sde", PATHS)
def test_time_is_clamped_to_the_ends(sde, beyond):
    close(sde.time(f64(beyond)), f64(sde.t_min), rtol=1e-14)
    close(sde.time(f64(-beyond)), f64(sde.t_max), rtol=1e-14)


@pytest.mark.parametrize("sde", PATHS)
def test_transitions_compose(sde):
    start, middle, end = (times(sde, n=90)[i::3] for i in range(3))
    (r01, v01), (r12, v12), (r02, v02) = (
        sde.transition(*pair) for pair in ((start, middle), (middle, end), (start, end))
    )
    assert bool((v01 > 0).all())
    close(r01 * r12, r02, rtol=1e-10)
    close(r12**2 * v01 + v12, v02, rtol=1e-10)
    close(r02**2 * sde.sigma(start) ** 2 + v02, sde.sigma(end) ** 2, rtol=1e-10)


@pytest.mark.parametrize("sde", PATHS)
def test_a_point_is_the_path_at_its_time(sde):
    t = times(sde, n=9)
    point, alpha, sigma = sde.at(t), sde.alpha(t), sde.sigma(t)
    assert torch.equal(point.t, t)
    close(point.alpha, alpha, rtol=0)
    close(point.sigma, sigma, rtol=0)
    close(point.lam, (alpha / sigma).log(), atol=1e-12)
    close(point.ratio, sigma / alpha, rtol=1e-10)
    close(point.size, sde.size(t), rtol=0)
    close(point.angle, (sigma / alpha).atan(), rtol=1e-12)
    for each, one in zip(t, points(sde, t.unbind()), strict=True):
        assert torch.equal(one.t, each)
        here = sde.at(each)
        for name in ("alpha", "sigma", "lam", "ratio", "size", "angle"):
            assert type(getattr(one, name)) is float
            assert getattr(one, name) == pytest.approx(float(getattr(here, name)), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("sde", PATHS)
def test_the_posterior_of_a_cleaner_state_is_the_conditional_of_a_joint_normal(sde):
    """Of (x_s, x_t) given x_0, with covariance r sigma_s^2: by the formula of conditioning, for s < t."""
    s, t = times(sde, n=60)[::2], times(sde, n=60)[1::2]
    (a, b, variance), (r, v) = sde.posterior(t, s), sde.transition(s, t)
    assert a.dtype == b.dtype == variance.dtype == torch.float64
    assert a.shape == b.shape == variance.shape == t.shape
    gain = r * sde.sigma(s) ** 2 / sde.sigma(t) ** 2  # E[x_s | x_t, x_0] = alpha_s x_0 + gain (x_t - alpha_t x_0)
    close(a, gain, rtol=1e-11)
    left = (sde.alpha(s) - gain * sde.alpha(t)).abs()
    assert bool(((b - sde.alpha(s) + gain * sde.alpha(t)).abs() <= 1e-14 * (sde.alpha(s) + left)).all())
    schur = sde.sigma(s) ** 2 - gain * r * sde.sigma(s) ** 2
    assert bool(((variance - schur).abs() <= 1e-14 * sde.sigma(s) ** 2).all())
    assert bool((variance > 0).all())
    # x_t of the kernel r x_s + v^(1/2) eps, put in: mean and variance of x_s again
    close(a * r * sde.alpha(s) + b, sde.alpha(s), rtol=1e-10)
    close(a**2 * (r**2 * sde.sigma(s) ** 2 + v) + variance, sde.sigma(s) ** 2, rtol=1e-10)


@pytest.mark.parametrize("sde", FINITE)
def test_the_floats_of_a_kernel_are_those_of_its_tensors(sde):
    t = times(sde, n=6)
    for clean, noisy, s, u in zip(points(sde, t[:-1]), points(sde, t[1:]), t[:-1], t[1:], strict=True):
        ratio, variance = transition(clean, noisy)
        assert (ratio, variance) == pytest.approx([float(part) for part in sde.transition(s, u)], rel=1e-12)
        assert posterior(clean, noisy) == pytest.approx([float(part) for part in sde.posterior(u, s)], rel=1e-12)


@pytest.mark.parametrize("sde", FINITE)
def test_transition_solves_the_moment_equations(sde):
    """dm/dt = f m and dV/dt = 2 f V + g^2, by the classical Runge-Kutta method."""
    steps = 2000
    grid = sde.time(torch.linspace(*sde.log_snr(f64(sde.t_min, sde.t_max)).tolist(), 4, dtype=torch.float64))[1:3]
    t = torch.linspace(*grid.tolist(), 2 * steps + 1, dtype=torch.float64)
    drift, squared = sde.drift(t).tolist(), sde.diffusion(t).square().tolist()
    h, state = float(t[2] - t[0]), (1.0, 0.0)

    def slope(i, mean, variance):
        return drift[i] * mean, 2 * drift[i] * variance + squared[i]

    def moved(k, factor):
        return [s + factor * h * d for s, d in zip(state, k, strict=True)]

    for i in range(0, 2 * steps, 2):
        k1 = slope(i, *state)
        k2 = slope(i + 1, *moved(k1, 0.5))
        k3 = slope(i + 1, *moved(k2, 0.5))
        k4 = slope(i + 2, *moved(k3, 1.0))
        state = [s + h / 6 * (a + 2 * b + 2 * c + d) for s, a, b, c, d in zip(state, k1, k2, k3, k4, strict=True)]
    ratio, variance = sde.transition(*grid)
    close(f64(*state), torch.stack((ratio, variance)), rtol=1e-7)


@pytest.mark.parametrize("sde", some("vp", "sub-vp", "ve", "rectified", "ddpm", "zero-snr-vp"))
def test_transition_agrees_with_a_simulation_of_the_forward_sde(sde):
    n, steps, t0, t1 = 20_000, 800, 0.2, 0.8
    t = torch.linspace(t0, t1, steps + 1, dtype=torch.float64)
    middle, h = (t[:-1] + t[1:]) / 2, (t1 - t0) / steps
    drift, diffusion, generator = sde.drift(middle).tolist(), sde.diffusion(middle).tolist(), seeded()
    x = torch.full((n,), 3.0)
    for f, g in zip(drift, diffusion, strict=True):
        x = x + f * x * h + g * math.sqrt(h) * torch.randn(n, generator=generator)
    ratio, variance = (float(v) for v in sde.transition(f64(t0), f64(t1)))
    bias = 0.01  # of first order in the step
    assert abs(float(x.mean()) - 3 * ratio) < 4 * math.sqrt(variance / n) + bias * 3 * ratio
    assert abs(float(x.var()) / variance - 1) < 4 * math.sqrt(2 / n) + bias


@pytest.mark.parametrize("shape", [(4, 3), (2, 2), (2, 1, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_perturb_scales_each_sample_by_its_own_time(shape, dtype):
    sde, x0, eps = ss.VP(), normal(*shape).to(dtype), normal(*shape, seed=1).to(dtype)
    t = torch.linspace(0.1, 0.9, shape[0], dtype=torch.float64)
    xt = sde.perturb(x0, t, eps)
    for i, each in enumerate(t):
        close(xt[i], sde.alpha(each).to(dtype) * x0[i] + sde.sigma(each).to(dtype) * eps[i], rtol=1e-6, atol=1e-7)
    close(sde.perturb(x0, t[0], eps)[:1], xt[:1], rtol=1e-6)


@pytest.mark.parametrize("name", [*FUNCTIONS, "time"])
@pytest.mark.parametrize("sde", PATHS)
def test_functions_keep_shape_and_dtype(sde, name):
    t = times(sde, n=5, margin=0.1)
    t = sde.log_snr(t) if name == "time" else t
    for dtype in (torch.float32, torch.float64):
        values = getattr(sde, name)(t.to(dtype))
        assert values.shape == t.shape
        assert values.dtype == dtype
        close(getattr(sde, name)(t[2].to(dtype)), values[2], rtol=2e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("sde", PATHS)
def test_float32_times_lose_no_more_than_float32_digits(sde, name):
    t = times(sde, margin=1e-5).float()
    if float(sde.alpha(f64(sde.t_max))) == 0:
        t = t[: len(t) // 2]  # towards alpha = 0, a difference of the path's own values at t and t_max
    exact = getattr(sde, name)(t.double())
    # Two terms of the slope of zero-snr-ve leave 1/50 of themselves: fifty times some roundings of 6e-8.
    close(getattr(sde, name)(t), exact.float(), rtol=4e-5, atol=1e-6 if name == "log_snr" else 0)


@pytest.mark.parametrize("sde", PATHS)
def test_derivatives_are_available_without_gradients(sde):
    t = times(sde, n=7)
    expected = sde.sigma_dot(t), sde.diffusion(t)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            close((sde.sigma_dot(t), sde.diffusion(t)), expected)


def test_an_sde_of_two_functions_has_the_rest_right():
    sde, vp = TwoFunctions(), ss.VP()
    t = times(vp)
    for name in FUNCTIONS:
        close(getattr(sde, name)(t), getattr(vp, name)(t), rtol=1e-10, atol=1e-12)
    close(sde.time(vp.log_snr(t)), t, rtol=1e-12)
    close(sde.transition(t[:-1], t[1:]), vp.transition(t[:-1], t[1:]), rtol=1e-9)
    close(sde.prior_std, float(vp.sigma(f64(1.0))))


def test_an_sde_without_its_functions_says_so():
    sde = ss.SDE(0.0, 1.0)
    for name in ("alpha", "sigma"):
        with pytest.raises(NotImplementedError, match=f"must define {name}"):
            getattr(sde, name)(f64(0.5))


@pytest.mark.parametrize(("t_min", "t_max"), [(0.5, 0.5), (1.0, 0.5), (-0.1, 1.0), (0.0, math.nan)])
@pytest.mark.parametrize("kind", [ss.SDE, ss.VP, ss.SubVP, ss.VE, ss.Cosine, ss.Karras, ss.Rectified])
def test_time_ranges_are_checked(kind, t_min, t_max):
    with pytest.raises(ValueError, match="t_min"):
        kind(t_min=t_min, t_max=t_max)


# --- prior


@pytest.mark.parametrize("sde", PATHS)
def test_prior_log_prob_is_the_normal_density_of_the_prior(sde):
    z = 3 * normal(5, 2, 3)
    expected = torch.distributions.Normal(f64(0.0), f64(sde.prior_std)).log_prob(z).sum(dim=(1, 2))
    close(sde.prior_log_prob(z), expected, rtol=1e-10)
    assert sde.prior_log_prob(z.float()).dtype == torch.float64


@pytest.mark.parametrize("sde", PATHS)
def test_prior_is_the_marginal_at_t_max(sde):
    assert sde.prior_std == pytest.approx(float(sde.sigma(f64(sde.t_max))), rel=5e-5)  # VP and sub-VP: 1 for 1 - 4e-5
    draws = sde.prior_sample((4000, 5), generator=seeded(), dtype=torch.float64)
    assert float(draws.std()) == pytest.approx(sde.prior_std, rel=0.02)
    assert abs(float(draws.mean())) < 0.03 * sde.prior_std
    own = sde.prior_sample((4000, 5), seeds=range(4000), dtype=torch.float64)
    assert torch.equal(own, sde.prior_std * RandomStream(seeds=range(4000)).normal(draws))


def test_prior_samples_of_a_seed_do_not_depend_on_the_batch():
    sde, shape = ss.VE(), (2, 3)
    batch = sde.prior_sample((4, *shape), seeds=[7, 3, 11, 5])
    assert torch.equal(sde.prior_sample((1, *shape), seeds=[11])[0], batch[2])
    assert torch.equal(sde.prior_sample((2, *shape), seeds=[5, 7]), batch[[3, 0]])
    assert len(batch.flatten().unique()) == batch.numel()


def test_prior_samples_repeat_with_the_generator_and_have_the_dtype_asked_for():
    sde = ss.Cosine()
    first, second = (sde.prior_sample((3, 2), generator=seeded(4), dtype=torch.float64) for _ in range(2))
    assert torch.equal(first, second)
    assert first.dtype == torch.float64
    assert sde.prior_sample((3, 2)).dtype == torch.float32


def test_prior_sample_refuses_ambiguous_randomness():
    with pytest.raises(ValueError, match="expected one seed per sample, 3"):
        ss.VP().prior_sample((3, 2), seeds=[1, 2])
    with pytest.raises(ValueError, match="both were given"):
        ss.VP().prior_sample((3, 2), seeds=[1, 2, 3], generator=seeded())


# --- reverse family


@pytest.mark.parametrize("shape", [(4, 3), (2, 2), (2, 1, 2, 2)])
@pytest.mark.parametrize("sde", PATHS)
def test_reverse_drift_and_diffusion(sde, shape):
    mixture = oracle(shape[1:])
    model = mixture.score_model(sde)
    t = times(sde, n=shape[0], margin=0.05)
    x = mixture.sample(shape[0], sde, t, generator=seeded())
    column = (-1,) + (1,) * (len(shape) - 1)
    f, g2 = sde.drift(t).reshape(column), sde.diffusion(t).square().reshape(column)
    score = mixture.score(x, sde, t)
    scale = float((f * x).abs().max() + (g2 * score).abs().max())
    close(ss.ReverseSDE(model, 0).drift(x, t), model.velocity(x, t), rtol=1e-12)
    for l in (0.0, 0.5, 1.0, 2.0):  # noqa: E741
        reverse = ss.ReverseSDE(model, l)
        close(reverse.drift(x, t), f * x - 0.5 * (1 + l**2) * g2 * score, atol=1e-11 * scale)
        close(reverse.diffusion(t), l * sde.diffusion(t))


@pytest.mark.parametrize("l", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("sde", PATHS)
def test_every_noise_level_keeps_the_marginals_of_one_gaussian(sde, l):  # noqa: E741
    """Backward in time, a drift a x and a diffusion b change the variance by dV/dt = 2 a V - b^2."""
    std, t = 0.7, times(sde, n=9, margin=0.02)
    reverse = ss.ReverseSDE(ss.GaussianMixture(torch.zeros(1, 1), f64(std)[None]).score_model(sde), l)

    def variance(t):
        return (sde.alpha(t) * std) ** 2 + sde.sigma(t) ** 2

    slope = reverse.drift(torch.ones(len(t), 1, dtype=torch.float64), t)[:, 0]
    terms = 2 * slope * variance(t), reverse.diffusion(t) ** 2
    scale = float(sum(term.abs().max() for term in terms))
    close(terms[0] - terms[1], gradient(variance, t), rtol=1e-10, atol=1e-12 * scale)


def test_reverse_sde_uses_one_evaluation_and_refuses_negative_noise():
    calls = []

    def network(x, label, cond):
        calls.append(cond)
        return x

    model = ss.ScoreModel(network, ss.VP())
    ss.ReverseSDE(model.given(torch.tensor([1, 2])), 1).drift(normal(2, 3), f64(0.3))
    assert [c.tolist() for c in calls] == [[1, 2]]
    with pytest.raises(ValueError, match=r"l >= 0 expected; got -0\.5"):
        ss.ReverseSDE(model, -0.5)
