"""The identities of a Gaussian path: coefficients, inverse, transition kernel, prior and reverse family."""

import math
import re

import pytest
import torch

import scoresde as ss
from scoresde import losses
from scoresde.random_stream import RandomStream
from scoresde.sdes import checked_times
from tests.conftest import PATHS, close, f64, gradient, normal, oracle, paths_with, seeded, times

FUNCTIONS = ("alpha", "sigma", "alpha_dot", "sigma_dot", "drift", "diffusion", "log_snr", "size")
EVERY_PATH = pytest.mark.parametrize("sde", PATHS)


@EVERY_PATH
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


@EVERY_PATH
def test_log_snr_decreases_and_time_inverts_it_and_is_clamped_to_the_ends(sde):
    t = times(sde, n=401)
    log_snr = sde.log_snr(t)
    assert bool((log_snr.diff() < 0).all())
    slope = (sde.diffusion(t) / sde.sigma(t)).square()
    best = 2e-15 * (1 + log_snr.abs()) / slope + 2e-15 * t  # the effect of rounding of the log-SNR itself
    assert bool(((sde.time(log_snr) - t).abs() <= best).all())
    for beyond in (100.0, 1e4, math.inf):
        close(sde.time(f64(beyond)), f64(sde.t_min), rtol=1e-14)
        close(sde.time(f64(-beyond)), f64(sde.t_max), rtol=1e-14)


@EVERY_PATH
def test_transitions_compose_and_solve_the_moment_equations(sde):
    """dr/dt = f r and dv/dt = 2 f v + g^2 at the end of a transition."""
    start, middle, end = (times(sde, n=90)[i::3] for i in range(3))
    (r01, v01), (r12, v12), (r02, v02) = (
        sde.transition(*ends) for ends in ((start, middle), (middle, end), (start, end))
    )
    assert bool((v01 > 0).all())
    close(r01 * r12, r02, rtol=1e-10)
    close(r12**2 * v01 + v12, v02, rtol=1e-10)
    close(r02**2 * sde.sigma(start) ** 2 + v02, sde.sigma(end) ** 2, rtol=1e-10)
    slopes = [gradient(lambda t, i=i: sde.transition(start, t)[i], end) for i in range(2)]
    f, g2 = sde.drift(end), sde.diffusion(end).square()
    close(slopes[0], f * r02, rtol=1e-10)
    close(slopes[1], 2 * f * v02 + g2, rtol=1e-9, atol=1e-12 * float((2 * f * v02).abs().max() + g2.max()))


@pytest.mark.parametrize("shape", [(4, 3), (2, 2), (2, 1, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_perturb_scales_each_sample_by_its_own_time(shape, dtype):
    sde, x0, eps = ss.VP(), normal(*shape).to(dtype), normal(*shape, seed=1).to(dtype)
    t = torch.linspace(0.1, 0.9, shape[0], dtype=torch.float64)
    xt = sde.perturb(x0, t, eps)
    for i, each in enumerate(t):
        close(xt[i], sde.alpha(each).to(dtype) * x0[i] + sde.sigma(each).to(dtype) * eps[i], rtol=1e-6, atol=1e-7)
    close(sde.perturb(x0, t[0], eps)[:1], xt[:1], rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, 1), (1, 3), (3,), (4, 3, 1), ()])
def test_perturb_refuses_noise_that_would_broadcast(shape):
    with pytest.raises(
        ValueError, match=r"noise must have the shape of the states, \(4, 3\); got " + re.escape(str(shape))
    ):
        ss.VP().perturb(normal(4, 3), f64(0.5), normal(*shape))


@pytest.mark.parametrize("shapes", [((4, 1), (4,)), ((), (1, 4)), ((4,), (3,))], ids=repr)
def test_transitions_refuse_times_that_would_broadcast(shapes):
    early, late = (torch.full(shape, t, dtype=torch.float64) for shape, t in zip(shapes, (0.2, 0.6), strict=True))
    for method, pair in ((ss.VP().transition, (early, late)), (ss.VP().posterior, (late, early))):
        with pytest.raises(ValueError, match=r"must have shape \(\) or \(B,\), with the same B; got shapes \("):
            method(*pair)
    close(ss.VP().transition(early.flatten()[0], f64(0.6, 0.6))[0], ss.VP().transition(f64(0.2, 0.2), f64(0.6, 0.6))[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_perturb_rounds_states_in_half_precision_once(dtype):
    """alpha(0.02) = 0.997 would be 1 in bfloat16."""
    sde, x0, eps = ss.VP(), normal(4, 3).to(dtype), normal(4, 3, seed=1).to(dtype)
    t = f64(0.02, 0.1, 0.4, 1.0)
    xt = sde.perturb(x0, t, eps)
    assert xt.dtype == dtype
    close(xt, sde.perturb(x0.float(), t, eps.float()).to(dtype), rtol=0)


@EVERY_PATH
def test_functions_keep_shape_and_dtype_and_lose_only_float32_digits(sde):
    t = times(sde, margin=1e-5).float()
    if float(sde.alpha(f64(sde.t_max))) == 0:
        t = t[: len(t) // 2]  # towards alpha = 0, the path is a difference of values at t and t_max
    for name in FUNCTIONS:
        function = getattr(sde, name)
        exact = function(t.double())
        assert exact.dtype == torch.float64
        # Two terms of the slope of zero-snr-ve cancel to 1/50 of themselves: fifty times the rounding of 6e-8.
        close(function(t), exact.float(), rtol=4e-5, atol=1e-6 if name == "log_snr" else 0)
        close(function(t[2]), function(t)[2], rtol=2e-5)
    log_snr = sde.log_snr(t.double()).float()  # its rounding is an error of the time
    assert sde.time(log_snr.double()).dtype == torch.float64
    close(sde.time(log_snr[2]), sde.time(log_snr)[2], rtol=2e-5)


@EVERY_PATH
def test_derivatives_are_available_without_gradients(sde):
    t = times(sde, n=7)
    expected = sde.sigma_dot(t), sde.diffusion(t)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            close((sde.sigma_dot(t), sde.diffusion(t)), expected)


class TwoFunctions(ss.SDE):
    """VP from alpha and sigma alone; everything else comes from the base class."""

    def alpha(self, t):
        return torch.exp(-0.25 * t**2 * 19.9 - 0.05 * t)

    def sigma(self, t):
        return torch.sqrt(-torch.expm1(-0.5 * t**2 * 19.9 - 0.1 * t))


def test_an_sde_of_two_functions_has_all_others():
    sde, vp = TwoFunctions(1e-5, 1.0), ss.VP()
    t = times(vp)
    for name in FUNCTIONS:
        close(getattr(sde, name)(t), getattr(vp, name)(t), rtol=1e-10, atol=1e-12)
    close(sde.time(vp.log_snr(t)), t, rtol=1e-12)
    close(sde.transition(t[:-1], t[1:]), vp.transition(t[:-1], t[1:]), rtol=1e-9)
    close(sde.prior_std, float(vp.sigma(f64(1.0))))
    for name in ("alpha", "sigma"):
        with pytest.raises(NotImplementedError, match=f"must define {name}"):
            getattr(ss.SDE(0.0, 1.0), name)(f64(0.5))


@pytest.mark.parametrize(("t_min", "t_max"), [(0.5, 0.5), (-0.1, 1.0)])
@pytest.mark.parametrize("kind", [ss.SDE, ss.VP, ss.SubVP, ss.VE, ss.Cosine, ss.Karras, ss.Rectified])
def test_time_ranges_are_checked(kind, t_min, t_max):
    with pytest.raises(ValueError, match=r"0 <= t_min < t_max; got t_min="):
        kind(t_min=t_min, t_max=t_max)


# The prior


@EVERY_PATH
def test_the_prior_is_the_marginal_at_t_max(sde):
    assert sde.prior_std == pytest.approx(float(sde.sigma(f64(sde.t_max))), rel=5e-5)  # VP and sub-VP: 1 for 1 - 4e-5
    z = 3 * normal(5, 2, 3)
    expected = torch.distributions.Normal(f64(0.0), f64(sde.prior_std)).log_prob(z).sum(dim=(1, 2))
    close(sde.prior_log_prob(z), expected, rtol=1e-10)
    assert sde.prior_log_prob(z.float()).dtype == torch.float64
    seeds = {"seeds": [7, 3, 11, 5, 2]}
    close(sde.prior_sample(z.shape, dtype=z.dtype, **seeds), sde.prior_std * RandomStream(**seeds).normal(z), rtol=0)
    draws = sde.prior_sample(z.shape, generator=seeded())
    close(draws, sde.prior_std * RandomStream(seeded()).normal(z.float()), rtol=0)
    with pytest.raises(ValueError, match="one seed per sample"):
        sde.prior_sample((3, 2), seeds=[1, 2])


@EVERY_PATH
def test_the_divergence_from_the_prior_is_that_of_two_normals(sde):
    x, t = normal(4, 2, 3), f64(sde.t_max)
    marginal = torch.distributions.Normal(sde.alpha(t) * x, sde.sigma(t))
    kl = torch.distributions.kl_divergence(marginal, torch.distributions.Normal(f64(0.0), f64(sde.prior_std)))
    close(sde.prior_divergence(x), kl.sum(dim=(1, 2)), rtol=1e-9, atol=1e-13)


# The reverse family


@paths_with("shape", [(4, 3), (2, 2), (2, 1, 2, 2)])
def test_reverse_drift_and_diffusion(sde, shape):
    model, t = oracle(shape[1:]).score_model(sde), times(sde, n=shape[0], margin=0.05)
    x = oracle(shape[1:]).sample(shape[0], sde, t, generator=seeded())
    column = (-1,) + (1,) * (len(shape) - 1)
    f, g2 = sde.drift(t).reshape(column), sde.diffusion(t).square().reshape(column)
    score = oracle(shape[1:]).score(x, sde, t)
    scale = float((f * x).abs().max() + (g2 * score).abs().max())
    for level in (0.0, 0.5, 2.0):
        reverse = ss.ReverseSDE(model, level)
        close(reverse.drift(x, t), f * x - 0.5 * (1 + level**2) * g2 * score, atol=1e-11 * scale)
        close(reverse.diffusion(t), level * sde.diffusion(t))


@paths_with("level", [0.0, 0.5, 1.0, 2.0])
def test_every_noise_level_keeps_the_marginals_of_one_gaussian(sde, level):
    """Backward in time, a drift a x and a diffusion b change the variance by dV/dt = 2 a V - b^2."""
    std, t = 0.7, times(sde, n=9, margin=0.02)
    reverse = ss.ReverseSDE(ss.GaussianMixture(torch.zeros(1, 1), f64(std)[None]).score_model(sde), level)

    def variance(t):
        return (sde.alpha(t) * std) ** 2 + sde.sigma(t) ** 2

    slope = reverse.drift(torch.ones(len(t), 1, dtype=torch.float64), t)[:, 0]
    terms = 2 * slope * variance(t), reverse.diffusion(t) ** 2
    scale = float(sum(term.abs().max() for term in terms))
    close(terms[0] - terms[1], gradient(variance, t), rtol=1e-10, atol=1e-12 * scale)


def test_the_reverse_drift_takes_one_evaluation_under_the_condition():
    conditions = []

    def network(x, label, cond):
        conditions.append(cond)
        return x

    model = ss.ScoreModel(network, ss.VP())
    ss.ReverseSDE(model.given(torch.tensor([1, 2])), 1).drift(normal(2, 3), f64(0.3))
    assert [cond.tolist() for cond in conditions] == [[1, 2]]
    with pytest.raises(ValueError, match=r"noise level l must be >= 0; got -0\.5"):
        ss.ReverseSDE(model, -0.5)


OUTSIDE = [500, 1.5, -0.01, math.nan, math.inf, f64(0.2, 0.5, 2.0), f64(0.2, math.nan, 0.5), torch.tensor([0, 1, 7])]
DOORS = {
    "perturb": lambda sde, x, t: sde.perturb(x, t, x),
    "at": lambda sde, x, t: sde.at(t),
    "transition": lambda sde, x, t: sde.transition(torch.full((), sde.t_min), t),
    "posterior": lambda sde, x, t: sde.posterior(torch.full((), sde.t_max), t),
    "reverse drift": lambda sde, x, t: ss.ReverseSDE(oracle((2,)).score_model(sde)).drift(x, t),
    "reverse diffusion": lambda sde, x, t: ss.ReverseSDE(oracle((2,)).score_model(sde)).diffusion(t),
    "predict": lambda sde, x, t: oracle((2,)).score_model(sde).predict(x, t),
    "score": lambda sde, x, t: oracle((2,)).score_model(sde).score(x, t),
    "wrapper": lambda sde, x, t: ss.ModelWrapper(oracle((2,)).score_model(sde)).noise(x, t),
    "loss": lambda sde, x, t: losses.DenoisingScoreMatching()(oracle((2,)).score_model(sde), x, t=t),
    "implicit loss": lambda sde, x, t: losses.ImplicitScoreMatching()(oracle((2,)).score_model(sde), x, t=t),
    "oracle score": lambda sde, x, t: oracle((2,)).score(x, sde, t),
    "oracle density": lambda sde, x, t: oracle((2,)).log_prob(x, sde, t),
    "oracle posterior": lambda sde, x, t: oracle((2,)).denoising_posterior(x, sde, t),
    "oracle sample": lambda sde, x, t: oracle((2,)).sample(3, sde, t),
}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_times_outside_the_range_are_refused_everywhere(door):
    for sde in (ss.VP(), ss.DDPM(), ss.Rectified()):
        message = rf"t must lie in \[{sde.t_min:g}, {sde.t_max:g}\], the time range of {type(sde).__name__}; got t="
        for t in OUTSIDE:
            with pytest.raises(ValueError, match=message):
                door(sde, normal(3, 2), t)


@EVERY_PATH
def test_times_at_the_ends_are_inside_in_float32_too(sde):
    ends = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
    for t in (ends, ends.float(), ends.float().double(), ends[:0]):
        x = normal(len(t), 3)
        close(sde.perturb(x, t, 0 * x), sde.alpha(t.double())[:, None] * x)


@EVERY_PATH
def test_kernels_in_the_wrong_direction_are_refused(sde):
    """VP().transition(0.9, 0.5) had the variance -273. Equal times are a step of no length: r = 1, v = 0."""
    early, late = times(sde, n=4)[:2], times(sde, n=4)[2:]
    for method, pair, sign in ((sde.transition, (late, early), "<="), (sde.posterior, (early, late), ">=")):
        first, second = (f"{float(t[0]):g}" for t in pair)
        message = f"times must satisfy t_from {sign} t_to; got t_from={first} and t_to={second}: exchange them"
        with pytest.raises(ValueError, match=re.escape(message)):
            method(*pair)
        with pytest.raises(ValueError, match=f"t_from {sign} t_to"):
            method(pair[0], pair[1][0])
        assert bool((method(*pair[::-1])[-1] > 0).all())
    close(sde.transition(late[:1], late[:1]), (torch.ones(1, dtype=late.dtype), torch.zeros(1, dtype=late.dtype)))


def test_a_time_outside_the_range_is_nan_where_reading_it_would_synchronise():
    """An accelerator, for which the meta device stands: it has no values to read, so an attempt would raise."""
    assert checked_times(ss.VP(), torch.full((3,), 500.0, device="meta")).shape == (3,)
    assert ss.Rectified().transition(*torch.rand(2, 3, device="meta"))[1].shape == (3,)
