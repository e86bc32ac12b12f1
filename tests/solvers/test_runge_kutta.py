"""Runge-Kutta methods: measured order, weights, number of evaluations, and a sample that fails."""

import numpy as np
import pytest
import torch

from scoresde.solvers import RungeKutta, Status
from scoresde.solvers.runge_kutta import TABLEAUX
from tests.conftest import close, f64
from tests.solvers.problems import FAR_PAIR, PAIR, broken, nothing, rotation, turned


@pytest.mark.parametrize("method", TABLEAUX)
def test_order_of_convergence_forward_and_backward(method):
    for start, end in ((0.5, 2.0), (2.0, 0.5)):
        exact = turned(PAIR, start, end)
        errors = [float((RungeKutta(method, n)(rotation, PAIR, start, end).x - exact).abs().max()) for n in (16, 64)]
        assert np.log(errors[0] / errors[1]) / np.log(4) == pytest.approx(TABLEAUX[method].order, abs=0.3)


@pytest.mark.parametrize("method", TABLEAUX)
def test_evaluations_and_their_weights(method):
    calls, weights = [], np.array(TABLEAUX[method].b) / 7

    def field(s, x, rows):
        calls.append(float(s))
        return rotation(s, x)

    solution = RungeKutta(method, 7)(field, torch.ones(3, 2, dtype=torch.float64), 0.0, 1.0)
    assert len(calls) == 7 * len(weights)
    assert solution.status.tolist() == [Status.OK] * 3
    assert solution.position.tolist() == [1.0] * 3
    for power, total in ((1, solution.integral), (2, solution.squared)):
        expected = [np.sum(np.tile(weights**power, 7) * calls), 7 * np.sum(weights**power)]
        assert total[0].tolist() == pytest.approx(expected)


def test_a_sample_that_turns_nan_keeps_its_last_finite_state_and_leaves_the_others_alone():
    solution = RungeKutta("rk4", 10)(broken, FAR_PAIR, 0.0, 1.0)
    assert solution.status.tolist() == [Status.OK, Status.NONFINITE]
    close(solution.x, f64([1.0, 1.0], [20.5, 0.5]))
    assert solution.position.tolist() == pytest.approx([1.0, 0.5])


def test_an_integral_that_is_not_finite_is_a_status():
    solution = RungeKutta("heun2", 4)(lambda s, x, rows: (x, nothing(x).sum(1, keepdim=True) / 0.0), PAIR, 0.0, 1.0)
    assert solution.status.tolist() == [Status.NONFINITE] * 2


@pytest.mark.parametrize("arguments", [{"method": "rk5"}, {"steps": 0}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="must be"):
        RungeKutta(**arguments)
