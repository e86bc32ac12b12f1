"""The torchdiffeq adapter: accuracy, error control on the state alone, and failures that are reported."""

import math

import pytest
import torch

from scoresde.solvers import Status, TorchDiffEq
from tests.solvers.problems import decay, nothing


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
def test_tolerance_is_met_forward_and_backward(method):
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    solver = TorchDiffEq(method, rtol=1e-8, atol=1e-8)
    forward = solver(decay, x, 0.0, 1.0)
    torch.testing.assert_close(forward.x, x * math.exp(-1), atol=1e-7, rtol=0)
    torch.testing.assert_close(forward.integral, torch.ones(2, 1, dtype=torch.float64), atol=1e-7, rtol=0)
    torch.testing.assert_close(solver(decay, forward.x, 1.0, 0.0).x, x, atol=3e-7, rtol=0)


def test_a_noisy_integral_does_not_cost_evaluations():
    generator = torch.Generator().manual_seed(0)

    def noisy(s, x, rows):
        return -x, torch.randn(len(x), 1, generator=generator, dtype=torch.float64)

    x = torch.ones(4, 1, dtype=torch.float64)
    alone, beside = TorchDiffEq()(decay, x, 0.0, 1.0), TorchDiffEq()(noisy, x, 0.0, 1.0)
    assert torch.equal(alone.nfe, beside.nfe)
    torch.testing.assert_close(alone.x, beside.x)


def test_evaluations_are_counted():
    calls = []

    def field(s, x, rows):
        calls.append(1)
        return decay(s, x)

    solution = TorchDiffEq()(field, torch.ones(2, 1, dtype=torch.float64), 0.0, 1.0)
    assert solution.nfe.tolist() == [len(calls)] * 2


@pytest.mark.parametrize("reason", ["nan", "max_steps"])
def test_giving_up_is_a_status_not_an_exception(reason):
    def field(s, x, rows):
        slope = torch.full_like(x, torch.nan) if reason == "nan" and s > 0.5 else 100 * torch.cos(100 * s) + 0 * x
        return slope, nothing(x)

    solver = TorchDiffEq(max_steps=5) if reason == "max_steps" else TorchDiffEq()
    solution = solver(field, torch.zeros(2, 1, dtype=torch.float64), 0.0, 1.0)
    assert solution.status.tolist() == [Status.FAILED] * 2
    assert torch.isfinite(solution.x).all()
    assert (solution.position < 1).all()


@pytest.mark.parametrize("arguments", [{"method": "euler"}, {"rtol": 0.0}, {"max_steps": 0}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="expected"):
        TorchDiffEq(**arguments)
