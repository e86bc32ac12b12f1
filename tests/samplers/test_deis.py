"""DEIS, iPNDM and the Adams methods in the angle: their weights against quadrature and the classical tables."""

import math
from itertools import pairwise

import pytest
import torch
from scipy.integrate import quad

import scoresde as ss
from scoresde.samplers import DEIS, IPNDM, AngularAdams, PredictorCorrector
from scoresde.sdes.transitions import points
from tests.conftest import f64
from tests.samplers.methods import EVERY_PATH, pairs, polynomial

TIMES = (0.9, 0.75, 0.62, 0.5, 0.31)  # unequal steps
EVERY_ORDER = pytest.mark.parametrize("order", [1, 2, 3, 4])
CLASSICAL = {1: [1], 2: [3, -1], 3: [23, -16, 5], 4: [55, -59, 37, -9]}  # over 1, 2, 12, 24
DENOMINATORS = {1: 1, 2: 2, 3: 12, 4: 24}


def along(sde, times=TIMES):
    return points(sde, [f64(t) for t in times])


def stages(step, sde, times=TIMES):
    rows = step.plan(sde, pairs(*times))
    assert all(row.kick is None and row.correct == () and len(row.stages) == 1 for row in rows)
    return [row.stages[0] for row in rows]


@EVERY_PATH
@EVERY_ORDER
def test_rho_ab_integrates_the_polynomial_in_the_ratio(order, sde):
    """2204.13902, eq. 15, in r = sigma/alpha: x_s = alpha_s (x_t/alpha_t + sum_j int L_j dr V_j)."""
    path = along(sde)
    for i, stage in enumerate(stages(DEIS(order, "ratio"), sde)):
        known, target = [point.ratio for point in reversed(path[: i + 1])][:order], path[i + 1]
        assert stage.a == pytest.approx(target.alpha / path[i].alpha)
        assert len(stage.b) == len(known)
        for j, weight in enumerate(stage.b):
            integral = quad(lambda r, j=j, known=known: polynomial(known, j, r), known[0], target.ratio)[0]
            assert weight == pytest.approx(target.alpha * integral, rel=1e-9)


@EVERY_PATH
@EVERY_ORDER
def test_t_ab_integrates_the_polynomial_in_time(order, sde):
    """The same with polynomials in t: int L_j(t) dr/dt dt, by parts, so that only r is evaluated."""
    path = along(sde)
    for i, stage in enumerate(stages(DEIS(order, "time"), sde)):
        known, end, target = list(reversed(TIMES[: i + 1]))[:order], TIMES[i + 1], path[i + 1]
        for j, weight in enumerate(stage.b):

            def integrand(t, j=j, known=known):
                """dL_j/dt r(t), with Lagrange polynomials by the product rule."""
                others = [node for k, node in enumerate(known) if k != j]
                slope = sum(
                    math.prod(t - other for m, other in enumerate(others) if m != k) for k in range(len(others))
                )
                return slope / math.prod(known[j] - other for other in others) * along(sde, [t])[0].ratio

            inside = quad(integrand, known[0], end)[0]
            ends = polynomial(known, j, end) * target.ratio - polynomial(known, j, known[0]) * path[i].ratio
            assert weight == pytest.approx(target.alpha * (ends - inside), rel=1e-7)


@EVERY_PATH
@pytest.mark.parametrize("step", [DEIS(4, "ratio"), DEIS(4, "time"), IPNDM(4)])
def test_a_constant_noise_is_exact(step, sde):
    """The weights add up to alpha_s (r_s - r_t), over a step of any length."""
    for times in ((0.9, 0.85, 0.1), (0.99, 0.98, 0.01)):
        for stage, (here, target) in zip(stages(step, sde, times), pairwise(along(sde, times)), strict=True):
            assert sum(stage.b) == pytest.approx(target.alpha * (target.ratio - here.ratio), rel=1e-9)


@EVERY_PATH
def test_ipndm_has_the_classical_weights(sde):
    """Those of Adams and Bashforth, of lower order at the start (2202.09778, eq. 12)."""
    for i, (stage, (here, target)) in enumerate(zip(stages(IPNDM(), sde), pairwise(along(sde)), strict=True)):
        known = min(4, i + 1)
        scale = target.alpha * (target.ratio - here.ratio) / DENOMINATORS[known]
        assert list(stage.b) == pytest.approx([scale * weight for weight in CLASSICAL[known]])


@EVERY_PATH
@pytest.mark.parametrize(("order", "corrector"), [(1, 1), (2, 3), (3, 2), (4, 4)])
def test_angular_adams_integrates_the_polynomial_in_the_angle(order, corrector, sde):
    """w_s = w_t + sum_j int L_j dphi V_j with w = x/size; the correction has the node at the end before the others."""
    step, path = AngularAdams(order, corrector, final=0), along(sde)
    assert step.past == max(order, corrector)
    for i, row in enumerate(step.plan(sde, pairs(*TIMES))):
        past, here, target = [point.angle for point in reversed(path[: i + 1])], path[i], path[i + 1]
        assert row.stages[0].a == pytest.approx(target.size / here.size)
        integrals = [(row.stages[0].b, past[:order], past[0], target)]
        if i:  # the transition before, repeated
            integrals.append((row.correct, past[: corrector + 1], past[1], here))
        for weights, known, start, end in integrals:
            assert len(weights) == len(known)
            for j, weight in enumerate(weights):
                integral = quad(lambda phi, j=j, known=known: polynomial(known, j, phi), start, end.angle)[0]
                assert weight == pytest.approx(end.size * integral, rel=1e-9)


def test_angular_adams_keeps_a_standard_normal_as_it_is():
    """Data N(0, I) have E[v | x] = 0: on a path with alpha^2 + sigma^2 = 1 the flow is constant, at any step."""
    model, x = ss.GaussianMixture(f64([0.0, 0.0])[None], f64([1.0])).score_model(ss.VP()), f64([0.3, -0.8])[None]
    moved = PredictorCorrector(AngularAdams(), steps=3, grid="angle")(model, x_T=x).x
    torch.testing.assert_close(moved, x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", [0, 5])
@pytest.mark.parametrize("kind", [DEIS, IPNDM, AngularAdams])
def test_bad_orders(kind, order):
    with pytest.raises(ValueError, match="order must be an integer from 1 to 4"):
        kind(order)


def test_a_bad_variable():
    with pytest.raises(ValueError, match="variable must be 'ratio' or 'time'; got 'rho'"):
        DEIS(2, "rho")
