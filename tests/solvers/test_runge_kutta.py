"""Runge-Kutta methods: measured order, count of evaluations, and what becomes of a sample that fails."""

import numpy as np
import pytest
import torch

from scoresde.solvers import RungeKutta, Status
from scoresde.solvers.runge_kutta import TABLEAUX


def rotation(s, state):
    """A non-autonomous rotation with a known solution: angle s^2/2."""
    (x,) = state
    return (s * torch.stack([-x[:, 1], x[:, 0]], dim=1),)


@pytest.mark.parametrize("method", TABLEAUX)
def test_order_of_convergence(method):
    start = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    angle = torch.tensor((2.0**2 - 0.5**2) / 2, dtype=torch.float64)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    steps = np.array([16, 32, 64, 128])
    errors = [
        float((RungeKutta(method, int(n))(rotation, (start,), 0.5, 2.0).state[0] - start @ turn.T).abs().max())
        for n in steps
    ]
    slope = np.polyfit(np.log(1 / steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(TABLEAUX[method].order, abs=0.3)


@pytest.mark.parametrize("method", TABLEAUX)
def test_evaluations_are_counted(method):
    calls = []

    def field(s, state):
        calls.append(float(s))
        return rotation(s, state)

    solution = RungeKutta(method, 7)(field, (torch.ones(3, 2, dtype=torch.float64),), 0.0, 1.0)
    assert solution.nfe.tolist() == [len(calls)] * 3
    assert solution.status.tolist() == [Status.OK] * 3
    assert solution.position.tolist() == [1.0] * 3


def test_backward_undoes_forward():
    start = torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solver = RungeKutta("rk4", 200)
    there = solver(rotation, (start,), 0.0, 2.0).state
    torch.testing.assert_close(solver(rotation, there, 2.0, 0.0).state[0], start, atol=1e-9, rtol=0)


def test_a_sample_that_explodes_keeps_its_last_finite_state_and_leaves_the_others_alone():
    def field(s, state):
        (x,) = state
        broken = torch.where((s > 0.5) & (x[:, :1] > 10), torch.nan, 0.0)
        return (torch.ones_like(x) + broken,)

    start = torch.tensor([[0.0, 0.0], [20.0, 0.0]], dtype=torch.float64)
    solution = RungeKutta("rk4", 10)(field, (start,), 0.0, 1.0)
    assert solution.status.tolist() == [Status.OK, Status.NONFINITE]
    torch.testing.assert_close(solution.state[0][0], torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(solution.state[0][1], torch.tensor([20.5, 0.5], dtype=torch.float64))
    assert solution.position.tolist() == pytest.approx([1.0, 0.5])
    assert int(solution.nfe[1]) < int(solution.nfe[0])


@pytest.mark.parametrize("arguments", [{"method": "rk5"}, {"steps": 0}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="expected"):
        RungeKutta(**arguments)
