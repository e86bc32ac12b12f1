"""The base of multistep methods: weights against quadrature, exactness, and the orders near the end of a run."""

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.integrate import quad

import scoresde as ss
from scoresde.samplers import DDIM, AngularAdams, DPMSolverPP, PredictorCorrector, SASolver, UniPC
from scoresde.samplers.multistep import exponential_weights, lagrange
from tests.conftest import f64, paths_with
from tests.samplers.methods import PATHS, nodes, pairs, planned, polynomial


@pytest.mark.parametrize("rate", [1.0, 1.25, 2.0])
@pytest.mark.parametrize("known", [(0.3,), (0.3, -0.5), (0.3, -0.5, -0.6, -1.7), (1.1, 0.3, -0.2)])
def test_weights_are_integrals(known, rate):
    start, end = 0.3, 1.1
    weights = exponential_weights(known, start, end, rate)
    for j, weight in enumerate(weights):
        exact = quad(lambda u, j=j: rate * math.exp(-rate * (end - u)) * polynomial(known, j, u), start, end)[0]
        assert weight == pytest.approx(exact, rel=1e-10)
    assert sum(weights) == pytest.approx(1 - math.exp(-rate * (end - start)))


def test_weights_over_a_very_long_step():
    """After 40, 1e-18 of the start is left: the weights are those of the end, extrapolated."""
    assert exponential_weights((0.0,), 0.0, 40.0, 1.0) == [1.0]
    exact = [quad(lambda u, j=j: math.exp(u - 20) * polynomial((0, -1), j, u), 0, 20, epsabs=0)[0] for j in (0, 1)]
    assert exponential_weights((0.0, -1.0), 0.0, 20.0, 1.0) == pytest.approx(exact, rel=1e-8)


def test_lagrange_polynomials_are_one_at_their_node_and_zero_at_the_others():
    known = (0.4, -1.0, 2.5)
    np.testing.assert_allclose(lagrange(known, np.array(known)), np.eye(3), atol=1e-14)


EXACT = [
    *(DPMSolverPP(3, l, form) for l in (0.0, 0.5) for form in ("exact", "published")),  # noqa: E741
    *(UniPC(3, form) for form in ("bh1", "bh2")),
    *(SASolver(p, p, l) for p in (2, 4) for l in (0.0, 0.5, 1.0)),  # noqa: E741
    *(DDIM(eta) for eta in (0.0, 0.5, 1.0)),
]


@paths_with("step", EXACT, lambda step: type(step).__name__, [pytest.param(PATHS[name], id=name) for name in PATHS])
def test_data_of_one_point_are_exact_at_any_step(step, sde):
    """With E[x_0 | x] = m, x_s ~ N(alpha_s m, sigma_s^2) from x_t ~ N(alpha_t m, sigma_t^2)."""
    plan, points = planned(step, sde), nodes(sde)
    for (stage, _), here, target in zip(plan, points[:-1], points[1:], strict=True):
        assert stage.a * here.alpha + sum(stage.b) == pytest.approx(target.alpha, rel=1e-9)
        assert stage.a**2 * here.sigma**2 + stage.c**2 == pytest.approx(target.sigma**2, rel=1e-9)
    for (before, _), (_, correct) in pairwise(plan):
        assert not correct or sum(correct) == pytest.approx(sum(before.b), rel=1e-9)


@pytest.mark.parametrize(
    ("step", "orders", "corrections"),
    [
        (DPMSolverPP(3, final=1), [1, 2, 2, 1], [0, 0, 0, 0]),
        (DPMSolverPP(3, final=2), [1, 2, 3, 2], [0, 0, 0, 0]),
        (UniPC(3, final=0), [1, 2, 3, 3], [0, 2, 3, 4]),
        (UniPC(3), [1, 2, 2, 1], [0, 2, 3, 3]),
        (AngularAdams(final=0), [1, 2, 3, 3], [0, 2, 3, 3]),
        (AngularAdams(), [1, 2, 2, 1], [0, 2, 3, 3]),
        (SASolver(3, 0), [1, 2, 3, 3], [0, 0, 0, 0]),
    ],
)
def test_orders_grow_at_the_start_and_fall_towards_the_end(step, orders, corrections):
    plan = planned(step, ss.VP())
    assert [len(stage.b) for stage, _ in plan] == orders
    assert [len(correct) for _, correct in plan] == corrections


@pytest.mark.parametrize(("step", "corrects"), [(AngularAdams(), True), (UniPC(), False), (SASolver(), False)])
def test_a_step_from_pure_noise_is_corrected_where_its_variable_is_finite(step, corrects):
    plan = step.plan(ss.ZeroTerminalSNR(ss.VP()), pairs(1.0, 0.8, 0.6))
    assert bool(plan[1].correct) == corrects


def test_samples_of_a_point_are_that_point_with_the_noise_of_the_end():
    """A complete run, with corrections and noise."""
    model, end = ss.ScoreModel(lambda x, c_noise, cond: 0 * x + 0.3, ss.VP(), "data"), f64(1e-5)
    for step in (SASolver(), UniPC(3), DPMSolverPP(3, 1.0, "published")):
        sampler = PredictorCorrector(step, steps=4, grid="uniform_log_snr")
        x = sampler(model, shape=(500, 4), seeds=range(500), dtype=end.dtype).x
        noise = (x - model.sde.alpha(end) * 0.3) / model.sde.sigma(end)
        assert abs(float(noise.mean())) < 4.5 / math.sqrt(2000)
        assert float(noise.var()) == pytest.approx(1, abs=4.5 * math.sqrt(2 / 2000))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniPC(0), "order must be an integer from 1 to 3; got 0"),
        (lambda: DPMSolverPP(4), "order must be an integer from 1 to 3; got 4"),
        (lambda: SASolver(5), "order must be an integer from 1 to 4; got 5"),
        (lambda: SASolver(2, 5), "corrector must be from 0 to 4"),
        (lambda: AngularAdams(3, -1), "corrector must be from 0 to 4"),
        (lambda: DPMSolverPP(2, final=-1), "final >= 0; got corrector=0, final=-1"),
        (lambda: SASolver(l=math.nan), "l must be a finite number; got nan"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
