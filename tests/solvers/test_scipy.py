"""SciPy's solvers on a whole batch: accuracy, error control that sees the integrals, and failures that are reported."""

import math

import pytest
import torch

from scoresde.solvers import SciPy, Status
from tests.solvers.problems import FAR_PAIR, broken, decay


@pytest.mark.parametrize("method", ["RK45", "DOP853", "LSODA"])
def test_tolerance_is_met_forward_and_backward(method):
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    solver = SciPy(method, rtol=1e-9, atol=1e-9)
    forward = solver(decay, x, 0.0, 1.0)
    torch.testing.assert_close(forward.x, x * math.exp(-1), atol=1e-7, rtol=0)
    torch.testing.assert_close(forward.integral, torch.ones(2, 1, dtype=torch.float64), atol=1e-7, rtol=0)
    torch.testing.assert_close(solver(decay, forward.x, 1.0, 0.0).x, x, atol=3e-7, rtol=0)
    assert solver.variable == "time"


def test_the_integrals_are_in_the_error_norm_as_published():
    def wavy(s, x, rows):
        return -x, torch.cos(60 * s).expand(len(x), 1)

    x = torch.ones(2, 1, dtype=torch.float64)
    plain, beside = SciPy()(decay, x, 0.0, 1.0), SciPy()(wavy, x, 0.0, 1.0)
    assert int(beside.nfe[0]) > 3 * int(plain.nfe[0])
    assert float(beside.integral[0]) == pytest.approx(math.sin(60) / 60, abs=1e-4)


def test_failures_are_statuses():
    stopped = SciPy(rtol=1e-8, atol=1e-8, max_evaluations=20)(decay, torch.ones(2, 1, dtype=torch.float64), 0.0, 50.0)
    assert stopped.status.tolist() == [Status.BUDGET] * 2
    assert 20 <= int(stopped.nfe[0]) < 30
    assert 0 < float(stopped.position[0]) < 50
    torch.testing.assert_close(stopped.x[:, 0], torch.exp(-stopped.position), atol=1e-6, rtol=0)
    nan = SciPy()(broken, FAR_PAIR, 0.0, 1.0)
    assert nan.status.tolist() == [Status.NONFINITE] * 2
    assert torch.isfinite(nan.x).all()
    assert float(nan.position[0]) <= 0.5 + 1e-9


@pytest.mark.parametrize("arguments", [{"method": "rk45"}, {"atol": 0.0}, {"max_evaluations": 0}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="expected"):
        SciPy(**arguments)
