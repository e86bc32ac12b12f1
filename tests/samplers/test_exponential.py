"""Exponential integrators: their weights against quadrature, and against the formulas of the papers."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad

import scoresde as ss
from scoresde import samplers
from scoresde.samplers.exponential import lagrange, weights
from scoresde.sdes.points import points as path_points
from tests.conftest import f64

PATHS = {"vp": ss.VP(), "ve": ss.VE(), "sub-vp": ss.SubVP(), "rectified": ss.Rectified()}
EVERY_PATH = pytest.mark.parametrize("sde", PATHS.values(), ids=PATHS)
LAMBDAS = (-1.3, -0.9, -0.2, 0.1, 0.8)  # unequal steps


def points(sde, lams=LAMBDAS):
    return path_points(sde, [sde.time(f64(2 * lam)) for lam in lams])


def planned(step, sde, lams=LAMBDAS):
    """The stage of every transition between these lambda, and its correction."""
    times = [point.t for point in points(sde, lams)]
    plan = step.plan(sde, list(pairwise(times)))
    return [(row.stages[0], row.correct) for row in plan]


def polynomial(nodes, j, at):
    """The Lagrange polynomial of node j."""
    return math.prod((at - other) / (nodes[j] - other) for k, other in enumerate(nodes) if k != j)


@pytest.mark.parametrize("rate", [1.0, 1.25, 2.0])
@pytest.mark.parametrize("nodes", [(0.3,), (0.3, -0.5), (0.3, -0.5, -0.6), (0.3, -0.5, -0.6, -1.7), (1.1, 0.3, -0.2)])
def test_weights_are_integrals(nodes, rate):
    start, end = 0.3, 1.1
    found = weights(nodes, start, end, rate)
    for j, weight in enumerate(found):
        exact = quad(lambda u, j=j: rate * math.exp(-rate * (end - u)) * polynomial(nodes, j, u), start, end)[0]
        assert weight == pytest.approx(exact, rel=1e-10)
    assert sum(found) == pytest.approx(1 - math.exp(-rate * (end - start)))


def test_weights_over_a_very_long_step():
    """What is left of the start after 40 is 1e-18: the weights are those of the end, extrapolated."""
    assert weights((0.0,), 0.0, 40.0, 1.0) == [1.0]
    exact = [quad(lambda u, j=j: math.exp(u - 20) * polynomial((0, -1), j, u), 0, 20, epsabs=0)[0] for j in (0, 1)]
    assert weights((0.0, -1.0), 0.0, 20.0, 1.0) == pytest.approx(exact, rel=1e-8)


def test_lagrange_polynomials_are_one_at_their_node_and_zero_at_the_others():
    nodes = (0.4, -1.0, 2.5)
    np.testing.assert_allclose(lagrange(nodes, np.array(nodes)), np.eye(3), atol=1e-14)


EXACT = [
    *(samplers.DPMSolverPP(p, l, form) for p in (1, 2, 3) for l in (0.0, 0.5, 1.0) for form in ("exact", "published")),  # noqa: E741
    *(samplers.UniPC(p, form) for p in (1, 2, 3) for form in ("bh1", "bh2")),
    *(samplers.SASolver(p, p, l) for p in (1, 2, 3, 4) for l in (0.0, 0.5, 1.0)),  # noqa: E741
    *(samplers.DDIM(eta) for eta in (0.0, 0.5, 1.0)),
]


@EVERY_PATH
@pytest.mark.parametrize("step", EXACT, ids=lambda step: type(step).__name__)
def test_data_of_one_point_is_exact_at_any_step(step, sde):
    """With E[x_0 | x] = m, x_s ~ N(alpha_s m, sigma_s^2) from x_t ~ N(alpha_t m, sigma_t^2)."""
    nodes = points(sde)
    for (stage, correct), here, target in zip(planned(step, sde), nodes[:-1], nodes[1:], strict=True):
        assert stage.a * here.alpha + sum(stage.b) == pytest.approx(target.alpha, rel=1e-9)
        assert stage.a**2 * here.sigma**2 + stage.c**2 == pytest.approx(target.sigma**2, rel=1e-9)
        if correct and here is not nodes[0]:
            before = planned(step, sde)[nodes.index(here) - 1][0]
            assert sum(correct) == pytest.approx(sum(before.b), rel=1e-9)


@EVERY_PATH
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_as_published(eta, sde):
    """2010.02502, eq. 12 and 16, for alpha, sigma of any path: its alpha_t is alpha^2/(alpha^2 + sigma^2) here."""
    here, target = points(sde, (-0.5, 0.2))
    ((stage, _),) = planned(samplers.DDIM(eta), sde, (-0.5, 0.2))
    scale_t, scale_s = math.hypot(here.alpha, here.sigma), math.hypot(target.alpha, target.sigma)
    bar_t, bar_s = (here.alpha / scale_t) ** 2, (target.alpha / scale_s) ** 2
    c = eta * math.sqrt((1 - bar_s) / (1 - bar_t)) * math.sqrt(1 - bar_t / bar_s)
    x, denoised = 0.7, -0.3
    eps = (x - math.sqrt(bar_t) * denoised) / math.sqrt(1 - bar_t)
    mean = math.sqrt(bar_s) * denoised + math.sqrt(1 - bar_s - c * c) * eps
    assert stage.a * scale_t * x + stage.b[0] * denoised == pytest.approx(scale_s * mean)
    assert stage.c == pytest.approx(scale_s * c, rel=1e-13, abs=1e-15)


@EVERY_PATH
def test_first_orders_are_ddim_and_an_ancestral_step(sde):
    def coefficients(step):
        return [(stage.a, *stage.b, stage.c) for stage, _ in planned(step, sde)]

    plain, noisy = coefficients(samplers.DDIM()), coefficients(samplers.DDIM(1.0))
    for step in (samplers.DPMSolverPP(1), samplers.SASolver(1, 0, 0.0), samplers.DPMSolverPP(1, form="published")):
        np.testing.assert_allclose(coefficients(step), plain, rtol=1e-9, atol=1e-12)
    for step in (samplers.DPMSolverPP(1, 1.0), samplers.SASolver(1, 0, 1.0), samplers.Ancestral()):
        np.testing.assert_allclose(coefficients(step), noisy, rtol=1e-9, atol=1e-12)


@EVERY_PATH
@pytest.mark.parametrize("p", [2, 3])
@pytest.mark.parametrize("level", [0.0, 0.6, 1.0])
def test_the_exact_form_is_the_integral_of_the_polynomial(level, p, sde):
    """2211.01095, eq. 8, and its stochastic form, with a polynomial through the last p values; as in SA-Solver."""
    nodes, rate = points(sde), 1 + level**2
    exact, same = (planned(step, sde) for step in (samplers.DPMSolverPP(p, level), samplers.SASolver(p, 0, level)))
    for i, target in enumerate(nodes[1:]):
        stage, past = exact[i][0], [node.lam for node in reversed(nodes[: i + 1])][:p]
        h = target.lam - past[0]
        assert stage.a == pytest.approx(target.sigma / nodes[i].sigma * math.exp(-(level**2) * h))
        assert stage.c == pytest.approx(target.sigma * math.sqrt(1 - math.exp(-2 * level**2 * h)), abs=1e-12)
        for j, weight in enumerate(stage.b):
            integral = quad(
                lambda u, j=j, past=past, end=target.lam: rate * math.exp(-rate * (end - u)) * polynomial(past, j, u),
                past[0],
                target.lam,
            )[0]
            assert weight == pytest.approx(target.alpha * integral, rel=1e-8)
        assert stage.b == pytest.approx(same[i][0].b)


def combined(stage, x, views):
    """The state of a stage without its noise, from views newest first."""
    return stage.a * x + sum(b * view for b, view in zip(stage.b, views, strict=False))


X, VIEWS = 0.7, (0.9, -0.4, 1.3)  # a state, and the views at its time and before


@EVERY_PATH
def test_2m_as_published(sde):
    """2211.01095, algorithm 2, and SDE-DPM-Solver++(2M), eq. 19."""
    _, earlier, here, target = points(sde)[:4]
    h, ratio = target.lam - here.lam, (here.lam - earlier.lam) / (target.lam - here.lam)
    blend = (1 + 1 / (2 * ratio)) * VIEWS[0] - 1 / (2 * ratio) * VIEWS[1]
    stage = planned(samplers.DPMSolverPP(2, form="published"), sde)[2][0]
    expected = target.sigma / here.sigma * X - target.alpha * (math.exp(-h) - 1) * blend
    assert combined(stage, X, VIEWS) == pytest.approx(expected)
    noisy = planned(samplers.DPMSolverPP(2, 1.0, "published"), sde)[2][0]
    expected = target.sigma / here.sigma * math.exp(-h) * X + target.alpha * (1 - math.exp(-2 * h)) * blend
    assert combined(noisy, X, VIEWS) == pytest.approx(expected)
    assert noisy.c == pytest.approx(target.sigma * math.sqrt(1 - math.exp(-2 * h)))


@EVERY_PATH
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_3m_as_published(level, sde):
    """DPM-Solver++(3M) as its authors' code has it, and with k h for h, k = 1 + l^2, its stochastic form."""
    first, earlier, here, target = points(sde)[:4]
    h, rate = target.lam - here.lam, 1 + level**2
    r0, r1 = (here.lam - earlier.lam) / h, (earlier.lam - first.lam) / h
    d10, d11 = (VIEWS[0] - VIEWS[1]) / r0, (VIEWS[1] - VIEWS[2]) / r1
    d1, d2 = d10 + r0 / (r0 + r1) * (d10 - d11), (d10 - d11) / (r0 + r1)
    k, e = rate * h, math.exp(-rate * h)
    stage = planned(samplers.DPMSolverPP(3, level, "published"), sde)[2][0]
    expected = target.sigma / here.sigma * math.exp(-(level**2) * h) * X - target.alpha * (
        (e - 1) * VIEWS[0] - ((e - 1) / k + 1) * d1 + ((e - 1 + k) / k**2 - 0.5) * d2
    )
    assert combined(stage, X, VIEWS) == pytest.approx(expected)


@EVERY_PATH
def test_the_published_third_order_has_half_of_the_second_derivative(sde):
    """The weights of what is quadratic in lambda: the exact ones take all of it, the published ones half."""
    lams = [point.lam for point in points(sde)[:4]]
    target = points(sde)[3]
    # (lambda - lambda_t)^2 and its slope are 0 at lambda_t: what the weights make of it is of the second derivative
    square = [(lam - lams[2]) ** 2 for lam in reversed(lams[:3])]
    exact, half = (
        sum(
            b * value for b, value in zip(planned(samplers.DPMSolverPP(3, form=form), sde)[2][0].b, square, strict=True)
        )
        for form in ("exact", "published")
    )
    integral = quad(lambda u: math.exp(u - target.lam) * (u - lams[2]) ** 2, lams[2], target.lam)[0]
    assert exact == pytest.approx(target.alpha * integral)
    assert half == pytest.approx(target.alpha * integral / 2)


def unipc(nodes, target, views, form, ahead=None):
    """2302.04867, algorithms 5 to 8, with data prediction; with the view ahead, the corrector.

    x_s = sigma_s/sigma_t x - alpha_s (e^-h - 1) m_0 - alpha_s B sum_m a_m D_m / r_m, where R a = b / B (eq. 9).
    This is what follows x; b_n = n! h' phi_(n+1)(h') with h' = -h, phi_(n+1)(z) = int_0^1 e^((1-u) z) u^n / n! du.
    """
    h = target.lam - nodes[0].lam
    ratios = [(node.lam - nodes[0].lam) / h for node in nodes[1:]]
    differences = [view - views[0] for view in views[1:]]
    if ahead is not None:
        ratios, differences = [*ratios, 1.0], [*differences, ahead - views[0]]
    scale = {"bh1": -h, "bh2": math.expm1(-h)}[form]
    count = len(ratios)
    right = [-h * quad(lambda u, n=n: math.exp((u - 1) * h) * u**n, 0, 1)[0] for n in range(1, count + 1)]
    matrix = np.vander(ratios, count, increasing=True).T
    shares = np.linalg.solve(matrix, np.array(right) / scale) if count > 1 else np.full(count, 0.5)
    residual = sum(a * d / r for a, d, r in zip(shares, differences, ratios, strict=True))
    return -target.alpha * (math.expm1(-h) * views[0] + scale * residual)


@EVERY_PATH
@pytest.mark.parametrize("form", ["bh1", "bh2"])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_unipc_as_published(p, form, sde):
    nodes, plan = points(sde), planned(samplers.UniPC(p, form, final=0), sde)
    past, target, ahead = [nodes[2], nodes[1], nodes[0]][:p], nodes[3], 0.2
    stage, _ = plan[2]
    found = combined(stage, 0.0, VIEWS)
    assert found == pytest.approx(unipc(past, target, VIEWS[:p], form))
    assert stage.a == pytest.approx(target.sigma / nodes[2].sigma)
    corrected = sum(b * view for b, view in zip(plan[3][1], (ahead, *VIEWS), strict=False))
    assert len(plan[3][1]) == p + 1
    assert corrected == pytest.approx(unipc(past, target, VIEWS[:p], form, ahead))


@EVERY_PATH
@pytest.mark.parametrize("corrector", [1, 2, 3, 4])
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_the_corrector_of_sa_interpolates_the_view_ahead_too(level, corrector, sde):
    """2309.05019, algorithm 1: the same integral with the polynomial through the value ahead and the last ones."""
    nodes, rate = points(sde), 1 + level**2
    correct = planned(samplers.SASolver(1, corrector, level), sde)[3][1]
    known = [node.lam for node in (nodes[3], nodes[2], nodes[1], nodes[0])][: corrector + 1]
    assert len(correct) == len(known)
    for j, weight in enumerate(correct):
        integral = quad(
            lambda u, j=j: rate * math.exp(-rate * (nodes[3].lam - u)) * polynomial(known, j, u),
            nodes[2].lam,
            nodes[3].lam,
        )[0]
        assert weight == pytest.approx(nodes[3].alpha * integral, rel=1e-8)


def test_no_corrector_and_no_correction():
    assert all(correct == () for _, correct in planned(samplers.SASolver(3, 0), ss.VP()))


def test_the_noise_of_sa_is_between_two_ratios():
    ratios = [math.exp(-lam) for lam in LAMBDAS]
    plan = planned(samplers.SASolver(2, 2, low=ratios[3], high=ratios[1]), ss.VP())
    assert [stage.c > 0 for stage, _ in plan] == [False, True, True, True]
    plan = planned(samplers.SASolver(2, 2, low=1.0, high=2.5), ss.VP())
    assert [stage.c > 0 for stage, _ in plan] == [False, True, True, False]
    plain, noisy = planned(samplers.SASolver(2, 2, 0.0), ss.VP()), planned(samplers.SASolver(2, 2, 1.0), ss.VP())
    assert [plan[0][0], plan[1][0], plan[3][0]] == [plain[0][0], noisy[1][0], plain[3][0]]
    assert [plan[1][1], plan[2][1]] == [plain[1][1], noisy[2][1]]  # of the transition before


@pytest.mark.parametrize(
    ("step", "orders"),
    [(samplers.DPMSolverPP(3, final=1), [1, 2, 2, 1]), (samplers.DPMSolverPP(3, final=2), [1, 2, 3, 2])],
)
def test_orders_are_lowered_towards_the_end(step, orders):
    assert [len(stage.b) for stage, _ in planned(step, ss.VP())] == orders


def test_orders_of_unipc_and_its_corrections_are_lowered_towards_the_end():
    plan = planned(samplers.UniPC(3), ss.VP())
    assert [len(stage.b) for stage, _ in plan] == [1, 2, 2, 1]
    assert [len(correct) for _, correct in plan] == [0, 2, 3, 3]
    plan = planned(samplers.UniPC(3, final=0), ss.VP())
    assert [len(stage.b) for stage, _ in plan] == [1, 2, 3, 3]
    assert [len(correct) for _, correct in plan] == [0, 2, 3, 4]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: samplers.DDIM(-0.1), r"eta in \[0, 1\]"),
        (lambda: samplers.DDIM(1.1), r"eta in \[0, 1\]"),
        (lambda: samplers.DPMSolverPP(0), "order from 1 to 3"),
        (lambda: samplers.DPMSolverPP(4), "order from 1 to 3"),
        (lambda: samplers.DPMSolverPP(2, -1.0), "noise level"),
        (lambda: samplers.DPMSolverPP(2, math.nan), "noise level"),
        (lambda: samplers.DPMSolverPP(2, form="2M"), "form 'exact' or 'published'"),
        (lambda: samplers.DPMSolverPP(2, final=-1), "final >= 0"),
        (lambda: samplers.UniPC(4), "order from 1 to 3"),
        (lambda: samplers.UniPC(2, final=-1), "final >= 0"),
        (lambda: samplers.UniPC(2, "bh3"), "form 'bh1' or 'bh2'"),
        (lambda: samplers.SASolver(5), "order from 1 to 4"),
        (lambda: samplers.SASolver(2, 5), "corrector from 0 to 4"),
        (lambda: samplers.SASolver(2, -1), "corrector from 0 to 4"),
        (lambda: samplers.SASolver(l=-1.0), "noise level"),
        (lambda: samplers.SASolver(low=1.0, high=0.5), "low < high"),
        (lambda: samplers.SASolver(low=-1.0), "low < high"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_samples_of_a_point_are_that_point():
    """The whole loop, corrections and noise included: data in one point, and samples sigma(t_min) from it."""

    class Point(torch.nn.Module):
        def forward(self, x, c_noise, cond=None):
            return torch.full_like(x, 0.3)

    model = ss.ScoreModel(Point(), ss.VP(), "data")
    for step in (samplers.SASolver(), samplers.UniPC(3), samplers.DPMSolverPP(3, 1.0, "published")):
        sampler = samplers.PredictorCorrector(step, steps=4, grid="uniform_log_snr")
        x = sampler(model, shape=(500, 4), seeds=range(500), dtype=torch.float64).x
        noise = (x - model.sde.alpha(f64(1e-5)) * 0.3) / model.sde.sigma(f64(1e-5))
        assert abs(float(noise.mean())) < 0.1
        assert float(noise.std()) == pytest.approx(1, abs=0.1)
