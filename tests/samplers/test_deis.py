"""DEIS, iPNDM and Adams's methods in the angle: their weights against quadrature and the classical tables."""

import math
from itertools import pairwise

import pytest
import torch
from scipy.integrate import quad

import scoresde as ss
from scoresde import samplers
from scoresde.samplers.sampler import make_transition
from tests.conftest import f64

PATHS = {"vp": ss.VP(), "ve": ss.VE(), "sub-vp": ss.SubVP(), "rectified": ss.Rectified(), "cosine": ss.Cosine()}
EVERY_PATH = pytest.mark.parametrize("sde", PATHS.values(), ids=PATHS)
TIMES = (0.9, 0.75, 0.62, 0.5, 0.31)  # unequal steps
CLASSICAL = {1: [1], 2: [3, -1], 3: [23, -16, 5], 4: [55, -59, 37, -9]}  # over 1, 2, 12, 24
DENOMINATORS = {1: 1, 2: 2, 3: 12, 4: 24}


def ratio(sde, t):
    return math.exp(-0.5 * float(sde.log_snr(f64(t))))


def alpha(sde, t):
    return float(sde.alpha(f64(t)))


def planned(step, sde, times=TIMES):
    return step.plan(sde, [(f64(a), f64(b)) for a, b in pairwise(times)])


def stages(step, sde, times=TIMES):
    rows = planned(step, sde, times)
    assert all(row.kick is None and row.correct == () and len(row.stages) == 1 for row in rows)
    return [row.stages[0] for row in rows]


def polynomial(nodes, j, at):
    """The Lagrange polynomial of node j."""
    return math.prod((at - other) / (nodes[j] - other) for k, other in enumerate(nodes) if k != j)


@EVERY_PATH
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_rho_ab_integrates_the_polynomial_in_the_ratio(order, sde):
    """2204.13902, eq. 15, in r = sigma/alpha: x_s = alpha_s (x_t/alpha_t + sum_j int L_j dr V_j)."""
    for i, stage in enumerate(stages(samplers.DEIS(order, "ratio"), sde)):
        nodes, end = [ratio(sde, t) for t in reversed(TIMES[: i + 1])][:order], ratio(sde, TIMES[i + 1])
        assert stage.a == pytest.approx(alpha(sde, TIMES[i + 1]) / alpha(sde, TIMES[i]))
        assert len(stage.b) == len(nodes)
        for j, weight in enumerate(stage.b):
            integral = quad(lambda r, j=j, nodes=nodes: polynomial(nodes, j, r), nodes[0], end)[0]
            assert weight == pytest.approx(alpha(sde, TIMES[i + 1]) * integral, rel=1e-9)


@EVERY_PATH
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_t_ab_integrates_the_polynomial_in_time(order, sde):
    """The same with polynomials in t: int L_j(t) dr/dt dt, by parts so that r alone is evaluated."""
    for i, stage in enumerate(stages(samplers.DEIS(order, "time"), sde)):
        nodes, end = list(reversed(TIMES[: i + 1]))[:order], TIMES[i + 1]
        for j, weight in enumerate(stage.b):

            def slope(t, j=j, nodes=nodes):
                """dL_j/dt, of Lagrange polynomials by the product rule."""
                others = [node for k, node in enumerate(nodes) if k != j]
                return sum(
                    math.prod(t - other for m, other in enumerate(others) if m != k) for k in range(len(others))
                ) / math.prod(nodes[j] - other for other in others)

            inside = quad(lambda t, slope=slope: slope(t) * ratio(sde, t), nodes[0], end)[0]
            ends = polynomial(nodes, j, end) * ratio(sde, end) - polynomial(nodes, j, nodes[0]) * ratio(sde, nodes[0])
            assert weight == pytest.approx(alpha(sde, end) * (ends - inside), rel=1e-7)


@EVERY_PATH
@pytest.mark.parametrize(
    "step", [*(samplers.DEIS(p, v) for p in (2, 4) for v in ("ratio", "time")), samplers.IPNDM(3), samplers.IPNDM(4)]
)
def test_a_constant_noise_is_exact(step, sde):
    """The weights add up to alpha_s (r_s - r_t), over a step of any length."""
    for times in (TIMES, (0.9, 0.85, 0.1), (0.99, 0.98, 0.01)):
        for stage, (t, s) in zip(stages(step, sde, times), pairwise(times), strict=True):
            exact = alpha(sde, s) * (ratio(sde, s) - ratio(sde, t))
            assert sum(stage.b) == pytest.approx(exact, rel=1e-9)


@EVERY_PATH
def test_first_orders_are_ddim(sde):
    model, x = ss.GaussianMixture(f64([0.5, -1.0])[None], f64([0.6])).score_model(sde), f64(0.3, -0.8)[None]
    expected = make_transition(samplers.DDIM(), model, x, f64(0.7), f64(0.4), None)
    for step in (samplers.DEIS(1, "ratio"), samplers.DEIS(1, "time"), samplers.IPNDM(1)):
        found = make_transition(step, model, x, f64(0.7), f64(0.4), None)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@EVERY_PATH
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_has_the_classical_weights(order, sde):
    """Those of Adams and Bashforth, of lower order while it begins (2202.09778, eq. 12)."""
    for i, stage in enumerate(stages(samplers.IPNDM(order), sde)):
        known = min(order, i + 1)
        step = alpha(sde, TIMES[i + 1]) * (ratio(sde, TIMES[i + 1]) - ratio(sde, TIMES[i]))
        expected = [step * weight / DENOMINATORS[known] for weight in CLASSICAL[known]]
        assert list(stage.b) == pytest.approx(expected)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_with_equal_steps_in_the_ratio_ipndm_is_deis(order):
    sde = ss.Karras()
    times = (10.0, 8.5, 7.0, 5.5, 4.0)
    for one, other in zip(
        stages(samplers.IPNDM(order), sde, times), stages(samplers.DEIS(order, "ratio"), sde, times), strict=True
    ):
        assert one.b == pytest.approx(other.b)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_where_time_is_the_ratio_both_variables_are_one(order):
    in_time, in_ratio = (stages(samplers.DEIS(order, v), ss.Karras(), (9.0, 6.0, 5.0, 2.0)) for v in ("time", "ratio"))
    for one, other in zip(in_time, in_ratio, strict=True):
        assert one.b == pytest.approx(other.b)


def angle(sde, t):
    return math.atan(ratio(sde, t))


def size(sde, t):
    return math.hypot(alpha(sde, t), float(sde.sigma(f64(t))))


@EVERY_PATH
@pytest.mark.parametrize(("order", "corrector"), [(1, 1), (2, 3), (3, 2), (4, 4)])
def test_angular_adams_integrates_the_polynomial_in_the_angle(order, corrector, sde):
    """w_s = w_t + sum_j int L_j dphi V_j with w = x/size; the correction has the node ahead before the others."""
    step = samplers.AngularAdams(order, corrector, final=0)
    assert step.past == max(order, corrector)
    for i, row in enumerate(planned(step, sde)):
        past = [angle(sde, t) for t in reversed(TIMES[: i + 1])]
        scale, (stage,) = size(sde, TIMES[i + 1]), row.stages
        assert stage.a == pytest.approx(scale / size(sde, TIMES[i]))
        sets = [(stage.b, past[:order], past[0], angle(sde, TIMES[i + 1]), scale)]
        if i:  # the transition before, once more
            sets.append((row.correct, past[: corrector + 1], past[1], past[0], size(sde, TIMES[i])))
        for weights, nodes, start, end, scale in sets:
            assert len(weights) == len(nodes)
            for j, weight in enumerate(weights):
                integral = quad(lambda phi, j=j, nodes=nodes: polynomial(nodes, j, phi), start, end)[0]
                assert weight == pytest.approx(scale * integral, rel=1e-9)


def test_angular_adams_keeps_a_standard_normal_as_it_is():
    """Data N(0, I) have E[v | x] = 0: on a path with alpha^2 + sigma^2 = 1 the flow stands still, at any step."""
    model, x = ss.GaussianMixture(f64([0.0, 0.0])[None], f64([1.0])).score_model(ss.VP()), f64([0.3, -0.8])[None]
    found = samplers.PredictorCorrector(samplers.AngularAdams(), steps=3, grid="angle")(model, x_T=x).x
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-12)


def test_angular_adams_lowers_its_order_towards_the_end():
    for final, orders in ((0, [1, 2, 3, 3]), (1, [1, 2, 2, 1]), (2, [1, 2, 3, 2])):
        assert [len(row.stages[0].b) for row in planned(samplers.AngularAdams(final=final), ss.VP())] == orders


@pytest.mark.parametrize("step", [samplers.DEIS(3, "time"), samplers.DEIS(3, "ratio"), samplers.IPNDM()])
def test_no_signal_is_refused(step):
    sde = ss.ZeroTerminalSNR(ss.VP())
    with pytest.raises(ValueError, match=r"ZeroTerminalSNR has none at t=1: lower t_max, or use DDIM"):
        step.plan(sde, [(f64(1.0), f64(0.5))])
    assert math.isfinite(stages(step, sde, (0.99, 0.5))[0].b[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: samplers.DEIS(0), "order from 1 to 4"),
        (lambda: samplers.DEIS(5), "order from 1 to 4"),
        (lambda: samplers.DEIS(2.5), "order from 1 to 4"),
        (lambda: samplers.DEIS(2, "rho"), "variable 'ratio' or 'time' expected; got 'rho'"),
        (lambda: samplers.IPNDM(5), "order from 1 to 4"),
        (lambda: samplers.AngularAdams(5), "order from 1 to 4"),
        (lambda: samplers.AngularAdams(3, 5), "corrector from 0 to 4"),
        (lambda: samplers.AngularAdams(final=-1), "final >= 0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
