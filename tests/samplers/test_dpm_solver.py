"""The DPM-Solvers: their weights against quadrature, and their algorithms as published."""

import math

import pytest
from scipy.integrate import quad

import scoresde as ss
from scoresde.samplers import DPMSolver, DPMSolverPP
from tests.conftest import close, f64, make_transition, normal, oracle
from tests.samplers.methods import EVERY_PATH, nodes, pairs, planned, polynomial

X, VIEWS = 0.7, (0.9, -0.4, 1.3)  # a state, and the views at its time and before


def combined(stage):
    """The state after a stage, without its noise."""
    return stage.a * X + sum(b * view for b, view in zip(stage.b, VIEWS, strict=False))


# Multistep


@EVERY_PATH
@pytest.mark.parametrize("level", [0.0, 0.6, 1.0])
def test_the_exact_form_is_the_integral_of_the_polynomial(level, sde):
    """2211.01095, eq. 8, and its stochastic form, with a polynomial through the last three values."""
    points, rate = nodes(sde), 1 + level**2
    for i, (stage, _) in enumerate(planned(DPMSolverPP(3, level), sde)):
        target, past = points[i + 1], [point.lam for point in reversed(points[: i + 1])][:3]
        start, end = past[0], target.lam
        assert stage.a == pytest.approx(target.sigma / points[i].sigma * math.exp(-(level**2) * (end - start)))
        assert stage.c == pytest.approx(
            target.sigma * math.sqrt(1 - math.exp(-2 * level**2 * (end - start))), abs=1e-12
        )
        for j, weight in enumerate(stage.b):

            def integrand(u, j=j, past=past, end=end):
                return rate * math.exp(-rate * (end - u)) * polynomial(past, j, u)

            assert weight == pytest.approx(target.alpha * quad(integrand, start, end)[0], rel=1e-8)


@EVERY_PATH
def test_2m_as_published(sde):
    """2211.01095, algorithm 2, and SDE-DPM-Solver++(2M), eq. 19."""
    _, earlier, here, target = nodes(sde)[:4]
    h, ratio = target.lam - here.lam, (here.lam - earlier.lam) / (target.lam - here.lam)
    blend = (1 + 1 / (2 * ratio)) * VIEWS[0] - 1 / (2 * ratio) * VIEWS[1]
    stage = planned(DPMSolverPP(2, form="published"), sde)[2][0]
    expected = target.sigma / here.sigma * X - target.alpha * (math.exp(-h) - 1) * blend
    assert combined(stage) == pytest.approx(expected)
    noisy = planned(DPMSolverPP(2, 1.0, "published"), sde)[2][0]
    expected = target.sigma / here.sigma * math.exp(-h) * X + target.alpha * (1 - math.exp(-2 * h)) * blend
    assert combined(noisy) == pytest.approx(expected)
    assert noisy.c == pytest.approx(target.sigma * math.sqrt(1 - math.exp(-2 * h)))


@EVERY_PATH
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_3m_as_published(level, sde):
    """DPM-Solver++(3M) as in its authors' code; its stochastic form has k h for h, k = 1 + l^2."""
    first, earlier, here, target = nodes(sde)[:4]
    h, rate = target.lam - here.lam, 1 + level**2
    r0, r1 = (here.lam - earlier.lam) / h, (earlier.lam - first.lam) / h
    d10, d11 = (VIEWS[0] - VIEWS[1]) / r0, (VIEWS[1] - VIEWS[2]) / r1
    d1, d2 = d10 + r0 / (r0 + r1) * (d10 - d11), (d10 - d11) / (r0 + r1)
    k, e = rate * h, math.exp(-rate * h)
    stage = planned(DPMSolverPP(3, level, "published"), sde)[2][0]
    expected = target.sigma / here.sigma * math.exp(-(level**2) * h) * X - target.alpha * (
        (e - 1) * VIEWS[0] - ((e - 1) / k + 1) * d1 + ((e - 1 + k) / k**2 - 0.5) * d2
    )
    assert combined(stage) == pytest.approx(expected)


# Single-step

T, S = f64(0.7), f64(0.45)


@pytest.fixture
def terms(sde):
    """(time, alpha, sigma) at a fraction of the way from T to S in lambda, and the step h."""
    lam, end = (0.5 * float(sde.log_snr(t)) for t in (T, S))

    def at(part):
        (point,) = nodes(sde, (lam + part * (end - lam),))
        return point.t, point.alpha, point.sigma

    return at, end - lam


def check_single_step(sde, order, view, expected):
    model, x = oracle((2,)).score_model(sde), float(sde.sigma(T)) * normal(3, 2)
    moved = make_transition(DPMSolver(order, view), model, x, T, S)
    close(moved, expected(x, model.noise if view == "noise" else model.denoise), 1e-8, 1e-9)


# With E[x_0 | x], alpha and sigma change places, and h changes its sign.
@EVERY_PATH
@pytest.mark.parametrize("view", ["noise", "denoised"])
def test_second_order_as_published(sde, view, terms):
    """2206.00927, algorithm 1, and 2211.01095, algorithm 1, with r = 1/2: the view at the middle for the whole step."""
    at, h = terms
    h = h if view == "noise" else -h
    (_, *here), (u, *half), (_, *end) = at(0.0), at(0.5), at(1.0)
    (a, _), (au, su), (b, s) = (pair if view == "noise" else pair[::-1] for pair in (here, half, end))

    def expected(x, predict):
        middle = predict(au / a * x - su * math.expm1(h / 2) * predict(x, T), u)
        return b / a * x - s * math.expm1(h) * middle

    check_single_step(sde, 2, view, expected)


@EVERY_PATH
@pytest.mark.parametrize("view", ["noise", "denoised"])
def test_third_order_as_published(sde, view, terms):
    """2206.00927, algorithm 2 with r1 = 1/3, r2 = 2/3."""
    at, h = terms
    h = h if view == "noise" else -h
    (_, *here), (u1, *one), (u2, *two), (_, *end) = (at(k / 3) for k in range(4))
    (a, _), (a1, s1), (a2, s2), (b, s) = (pair if view == "noise" else pair[::-1] for pair in (here, one, two, end))

    def expected(x, predict):
        first = predict(x, T)
        d1 = predict(a1 / a * x - s1 * math.expm1(h / 3) * first, u1) - first
        third = 2 * h / 3
        y2 = a2 / a * x - s2 * math.expm1(third) * first - s2 * 2 * (math.expm1(third) / third - 1) * d1
        d2 = predict(y2, u2) - first
        return b / a * x - s * math.expm1(h) * first - s * 1.5 * (math.expm1(h) / h - 1) * d2

    check_single_step(sde, 3, view, expected)


def test_the_single_step_methods_refuse_an_end_without_noise():
    with pytest.raises(ValueError, match=r"sigma\(0\) = 0: raise t_min"):
        DPMSolver(2).plan(ss.VP(t_min=0.0), pairs(0.5, 0.0))


def test_bad_arguments():
    with pytest.raises(ValueError, match="form must be 'exact' or 'published'; got '2M'"):
        DPMSolverPP(2, form="2M")
    with pytest.raises(ValueError, match="view must be 'denoised' or 'noise'; got 'score'"):
        DPMSolver(2, "score")
    with pytest.raises(ValueError, match="order must be an integer from 1 to 3; got 4"):
        DPMSolver(4)
