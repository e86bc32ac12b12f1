"""Heun's method, EDM's sampler and the DPM-Solvers against their algorithms as published."""

import math
from itertools import pairwise

import pytest
import torch

import scoresde as ss
from scoresde import samplers
from scoresde.random_stream import RandomStream
from scoresde.samplers.sampler import make_transition
from scoresde.sdes.points import points
from tests.conftest import close, f64, normal, oracle, seeded

PATHS = {"vp": ss.VP(), "ve": ss.VE(), "sub-vp": ss.SubVP(), "rectified": ss.Rectified()}
EVERY_PATH = pytest.mark.parametrize("sde", PATHS.values(), ids=PATHS)
T, S = f64(0.7), f64(0.45)


def setup(sde):
    """The exact model of a mixture and states at T."""
    return oracle((2,)).score_model(sde), float(sde.sigma(T)) * normal(3, 2)


def terms(sde, t):
    """alpha, sigma and lambda."""
    return sde.alpha(t), sde.sigma(t), 0.5 * sde.log_snr(t)


def pairs(times):
    return [(f64(a), f64(b)) for a, b in pairwise(times)]


@pytest.mark.parametrize("sde", [ss.VE(), ss.Karras()], ids=["ve", "karras"])
def test_heun_is_the_deterministic_sampler_of_edm(sde):
    """2206.00364, algorithm 1, with sigma(t) = t: d = (x - D)/t, and the mean of d at both ends."""
    model, (t, s) = oracle((2,)).score_model(sde), sde.time(-2 * f64(3.0, 1.2).log())
    x = 3 * normal(3, 2)
    d = (x - model.denoise(x, t)) / 3.0
    y = x + (1.2 - 3.0) * d
    again = (y - model.denoise(y, s)) / 1.2
    close(make_transition(samplers.Heun(), model, x, t, s, None), x + (1.2 - 3.0) * (d + again) / 2, 1e-9)


@EVERY_PATH
def test_heun_in_the_ratio(sde):
    """The trapezoidal rule for dy/dr = E[eps | x], y = x/alpha, after a step of Euler's."""
    model, x = setup(sde)
    (a, sigma, _), (b, sigma_s, _) = terms(sde, T), terms(sde, S)
    step = sigma_s / b - sigma / a
    first = model.noise(x, T)
    second = model.noise(b * (x / a + step * first), S)
    close(make_transition(samplers.Heun(), model, x, T, S, None), b * (x / a + step * (first + second) / 2), 1e-9)


@pytest.mark.parametrize("churn", [2.0, 40.0])
@pytest.mark.parametrize("size", [1.0, 1.007])
def test_edm_as_published(size, churn):
    """2206.00364, algorithm 2, on its own path: gamma = min(churn / N, 2^(1/2) - 1) where S_tmin <= t <= S_tmax."""
    sde, times = ss.Karras(), [40.0, 10.0, 3.0, 1.0, 0.2, 0.05]
    low, high = 0.5, 20.0
    model = oracle((2,)).score_model(sde)
    x = 40.0 * normal(3, 2)
    sampler = samplers.PredictorCorrector(samplers.EDM(churn, low, high, size), grid=times)
    found = sampler(model, x_T=x, generator=seeded(2)).x
    stream = RandomStream(seeded(2))
    for t, s in pairwise(times):
        gamma = min(churn / 5, math.sqrt(2) - 1) if low <= t <= high else 0.0
        raised = t * (1 + gamma)
        if gamma:
            x = x + math.sqrt(raised**2 - t**2) * size * stream.normal(x)
        d = (x - model.denoise(x, f64(raised))) / raised
        y = x + (s - raised) * d
        x = x + (s - raised) * (d + (y - model.denoise(y, f64(s))) / s) / 2
    close(found, x, 1e-9)


@EVERY_PATH
@pytest.mark.parametrize("churn", [0.5, 100.0])
def test_churn_raises_the_ratio_and_keeps_the_marginal(churn, sde):
    """p x + q z has the law at (1 + gamma) r: of the signal alpha-hat, and of the noise sigma-hat^2."""
    times = sde.time(2 * torch.linspace(-2, 1, 6, dtype=torch.float64))
    plan = samplers.EDM(churn).plan(sde, list(pairwise(times)))
    gamma = min(churn / 5, math.sqrt(2) - 1)
    for row, t in zip(plan, times[:-1], strict=True):
        here, raised = points(sde, [t, row.stages[0].t])
        p, q = row.kick
        assert raised.ratio == pytest.approx((1 + gamma) * here.ratio, rel=1e-9)
        assert p * here.alpha == pytest.approx(raised.alpha, rel=1e-9)
        assert p**2 * here.sigma**2 + q**2 == pytest.approx(raised.sigma**2, rel=1e-9)


def test_edm_adds_noise_between_its_bounds_alone_and_not_beyond_the_path():
    sde, times = ss.Karras(), [80.0, 70.0, 20.0, 5.0, 1.0, 0.1]
    plan = samplers.EDM(100.0, 1.0, 75.0).plan(sde, pairs(times))
    raised = [float(row.stages[0].t) / t for row, t in zip(plan, times, strict=False)]
    assert raised == pytest.approx([1.0, 80 / 70, math.sqrt(2), math.sqrt(2), math.sqrt(2)])
    assert [row.kick is None for row in plan] == [True, False, False, False, False]
    plan = samplers.EDM(100.0, 2.0, 10.0).plan(sde, pairs(times))
    assert [row.kick is None for row in plan] == [True, True, True, False, True]


@EVERY_PATH
def test_without_churn_edm_is_heun(sde):
    model, x = setup(sde)
    assert torch.equal(
        make_transition(samplers.EDM(0.0), model, x, T, S, None), make_transition(samplers.Heun(), model, x, T, S, None)
    )


def midway(sde, part):
    """The time at lambda_t + part h, and h."""
    lam, end = (0.5 * sde.log_snr(t) for t in (T, S))
    return sde.time(2 * (lam + part * (end - lam))), float(end - lam)


@EVERY_PATH
def test_first_order_is_ddim(sde):
    model, x = setup(sde)
    for view in ("denoised", "noise"):
        close(
            make_transition(samplers.DPMSolver(1, view), model, x, T, S, None),
            make_transition(samplers.DDIM(), model, x, T, S, None),
            1e-9,
            1e-9,
        )


@EVERY_PATH
def test_second_order_as_published(sde):
    """2206.00927, algorithm 1, and 2211.01095, algorithm 1, with r = 1/2: the view at the middle for the whole step."""
    model, x = setup(sde)
    u, h = midway(sde, 0.5)
    (a, sigma, _), (au, sigma_u, _), (b, sigma_s, _) = (terms(sde, t) for t in (T, u, S))
    middle = model.noise(au / a * x - sigma_u * math.expm1(h / 2) * model.noise(x, T), u)
    expected = b / a * x - sigma_s * math.expm1(h) * middle
    close(make_transition(samplers.DPMSolver(2, "noise"), model, x, T, S, None), expected, 1e-8, 1e-9)

    middle = model.denoise(sigma_u / sigma * x - au * math.expm1(-h / 2) * model.denoise(x, T), u)
    expected = sigma_s / sigma * x - b * math.expm1(-h) * middle
    close(make_transition(samplers.DPMSolver(2), model, x, T, S, None), expected, 1e-8, 1e-9)


@EVERY_PATH
def test_dpm_solver_3_as_published(sde):
    """2206.00927, algorithm 2 with r1 = 1/3, r2 = 2/3."""
    model, x = setup(sde)
    (u1, h), (u2, _) = midway(sde, 1 / 3), midway(sde, 2 / 3)
    (a, _, _), (a1, s1, _), (a2, s2, _), (b, s, _) = (terms(sde, t) for t in (T, u1, u2, S))
    first = model.noise(x, T)
    d1 = model.noise(a1 / a * x - s1 * math.expm1(h / 3) * first, u1) - first
    third = 2 * h / 3
    y2 = a2 / a * x - s2 * math.expm1(third) * first - s2 * 2 * (math.expm1(third) / third - 1) * d1
    d2 = model.noise(y2, u2) - first
    expected = b / a * x - s * math.expm1(h) * first - s * 1.5 * (math.expm1(h) / h - 1) * d2
    close(make_transition(samplers.DPMSolver(3, "noise"), model, x, T, S, None), expected, 1e-8, 1e-9)


@EVERY_PATH
def test_third_order_with_the_denoiser(sde):
    """The same with E[x_0 | x]: alpha and sigma change places, and h its sign."""
    model, x = setup(sde)
    (u1, h), (u2, _) = midway(sde, 1 / 3), midway(sde, 2 / 3)
    (_, sigma, _), (a1, s1, _), (a2, s2, _), (b, s, _) = (terms(sde, t) for t in (T, u1, u2, S))
    first = model.denoise(x, T)
    d1 = model.denoise(s1 / sigma * x - a1 * math.expm1(-h / 3) * first, u1) - first
    third = -2 * h / 3
    y2 = s2 / sigma * x - a2 * math.expm1(third) * first - a2 * 2 * (math.expm1(third) / third - 1) * d1
    d2 = model.denoise(y2, u2) - first
    expected = s / sigma * x - b * math.expm1(-h) * first - b * 1.5 * (math.expm1(-h) / -h - 1) * d2
    close(make_transition(samplers.DPMSolver(3), model, x, T, S, None), expected, 1e-8, 1e-9)


@EVERY_PATH
@pytest.mark.parametrize("order", [1, 2, 3])
def test_what_is_integrated_is_exact_where_constant(order, sde):
    """Data in one point for the denoised view; for the noise, states that are noise alone."""
    here, target = points(sde, [T, S])
    (row,) = samplers.DPMSolver(order).plan(sde, [(T, S)])
    assert row.stages[-1].a * here.alpha + sum(row.stages[-1].b) == pytest.approx(target.alpha)
    (row,) = samplers.DPMSolver(order, "noise").plan(sde, [(T, S)])
    assert row.stages[-1].a * here.sigma + sum(row.stages[-1].b) == pytest.approx(target.sigma)
    assert len(row.stages) == order


@pytest.mark.parametrize(
    "step", [samplers.Heun(), samplers.EDM(), samplers.DPMSolver(2), samplers.DPMSolver(3, "noise")]
)
def test_no_signal_is_refused(step):
    sde = ss.ZeroTerminalSNR(ss.VP())
    with pytest.raises(ValueError, match=r"ZeroTerminalSNR has none at t=1: lower t_max, or use DDIM"):
        step.plan(sde, [(f64(1.0), f64(0.5))])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: samplers.DPMSolver(0), "order from 1 to 3"),
        (lambda: samplers.DPMSolver(4), "order from 1 to 3"),
        (lambda: samplers.DPMSolver(2, "score"), "view 'denoised' or 'noise' expected; got 'score'"),
        (lambda: samplers.EDM(-1.0), "churn >= 0"),
        (lambda: samplers.EDM(math.nan), "churn >= 0"),
        (lambda: samplers.EDM(low=2.0, high=1.0), "low < high"),
        (lambda: samplers.EDM(low=-1.0), "0 <= low"),
        (lambda: samplers.EDM(noise=0.0), "noise > 0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
