"""The torchdiffeq adapter: accuracy, error control on the state alone, and failures."""

import math

import pytest
import torch

from scoresde.solvers import Status, TorchDiffEq
from tests.conftest import close, f64
from tests.solvers.problems import ONES, Counted, decay, nothing


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
def test_tolerance_is_met_forward_and_backward(method):
    x, solver = f64([1.0], [2.0]), TorchDiffEq(method, rtol=1e-8, atol=1e-8)
    forward = solver(decay, x, 0.0, 1.0)
    close((forward.x, forward.integral), (x * math.exp(-1), ONES), atol=1e-7)
    close(solver(decay, forward.x, 1.0, 0.0).x, x, atol=3e-7)


def test_a_noisy_integral_costs_no_evaluations():
    generator = torch.Generator().manual_seed(0)
    plain = Counted(decay)
    noisy = Counted(lambda s, x, rows: (-x, torch.randn(len(x), 1, generator=generator, dtype=torch.float64)))
    close(TorchDiffEq()(noisy, ONES, 0.0, 1.0).x, TorchDiffEq()(plain, ONES, 0.0, 1.0).x)
    assert torch.equal(noisy.calls, plain.calls)


@pytest.mark.parametrize("reason", ["nan", "max_steps"])
def test_giving_up_is_a_status_not_an_exception(reason):
    def field(s, x, rows):
        slope = torch.full_like(x, torch.nan) if reason == "nan" and s > 0.5 else 100 * torch.cos(100 * s) + 0 * x
        return slope, nothing(x)

    solver = TorchDiffEq(max_steps=5) if reason == "max_steps" else TorchDiffEq()
    solution = solver(field, 0 * ONES, 0.0, 1.0)
    assert solution.status.tolist() == [Status.FAILED] * 2
    assert torch.isfinite(solution.x).all()
    assert (solution.position < 1).all()


@pytest.mark.parametrize("arguments", [{"method": "euler"}, {"rtol": 0.0}, {"max_steps": 0}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="must be"):
        TorchDiffEq(**arguments)
