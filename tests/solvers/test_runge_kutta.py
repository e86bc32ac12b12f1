"""Runge-Kutta methods: measured order, weights, count of evaluations, and what becomes of a sample that fails."""

import numpy as np
import pytest
import torch

from scoresde.solvers import RungeKutta, Status
from scoresde.solvers.runge_kutta import TABLEAUX
from tests.solvers.problems import FAR_PAIR, PAIR, broken, nothing, rotation, turned


@pytest.mark.parametrize("method", TABLEAUX)
def test_order_of_convergence(method):
    steps = np.array([16, 32, 64, 128])
    exact = turned(PAIR, 0.5, 2.0)
    errors = [float((RungeKutta(method, int(n))(rotation, PAIR, 0.5, 2.0).x - exact).abs().max()) for n in steps]
    slope = np.polyfit(np.log(1 / steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(TABLEAUX[method].order, abs=0.3)


@pytest.mark.parametrize("method", TABLEAUX)
def test_evaluations_and_their_weights(method):
    calls, weights = [], np.array(TABLEAUX[method].b) / 7

    def field(s, x, rows):
        calls.append(float(s))
        return rotation(s, x)

    solution = RungeKutta(method, 7)(field, torch.ones(3, 2, dtype=torch.float64), 0.0, 1.0)
    assert solution.nfe.tolist() == [len(calls)] * 3
    assert solution.status.tolist() == [Status.OK] * 3
    assert solution.position.tolist() == [1.0] * 3
    assert solution.integral[0].tolist() == pytest.approx([np.sum(np.tile(weights, 7) * calls), 1.0])
    assert solution.squared[0].tolist() == pytest.approx(
        [np.sum(np.tile(weights**2, 7) * calls), 7 * np.sum(weights**2)]
    )


def test_backward_undoes_forward():
    start = torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solver = RungeKutta("rk4", 200)
    there = solver(rotation, start, 0.0, 2.0).x
    torch.testing.assert_close(solver(rotation, there, 2.0, 0.0).x, start, atol=1e-9, rtol=0)


def test_a_sample_that_explodes_keeps_its_last_finite_state_and_leaves_the_others_alone():
    solution = RungeKutta("rk4", 10)(broken, FAR_PAIR, 0.0, 1.0)
    assert solution.status.tolist() == [Status.OK, Status.NONFINITE]
    torch.testing.assert_close(solution.x[0], torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(solution.x[1], torch.tensor([20.5, 0.5], dtype=torch.float64))
    assert solution.position.tolist() == pytest.approx([1.0, 0.5])
    assert int(solution.nfe[1]) < int(solution.nfe[0])


def test_an_integral_that_is_not_finite_is_no_result():
    solution = RungeKutta("heun2", 4)(lambda s, x, rows: (x, nothing(x).sum(1, keepdim=True) / 0.0), PAIR, 0.0, 1.0)
    assert solution.status.tolist() == [Status.NONFINITE] * 2


@pytest.mark.parametrize("arguments", [{"method": "rk5"}, {"steps": 0}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="expected"):
        RungeKutta(**arguments)
