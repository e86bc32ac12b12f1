"""SciPy's solvers on a whole batch: accuracy, error control that includes the integrals, and failures."""

import math

import pytest
import torch

from scoresde.solvers import SciPy, Status
from tests.conftest import close, f64
from tests.solvers.problems import FAR_PAIR, ONES, Counted, broken, decay


@pytest.mark.parametrize("method", ["RK45", "DOP853", "LSODA"])
def test_tolerance_is_met_forward_and_backward(method):
    x, solver = f64([1.0], [2.0]), SciPy(method, rtol=1e-9, atol=1e-9)
    forward = solver(decay, x, 0.0, 1.0)
    close((forward.x, forward.integral), (x * math.exp(-1), ONES), atol=1e-7)
    close(solver(decay, forward.x, 1.0, 0.0).x, x, atol=3e-7)
    assert solver.variable == "time"


def test_the_integrals_are_in_the_error_norm_as_published():
    plain, wavy = Counted(decay), Counted(lambda s, x, rows: (-x, torch.cos(60 * s).expand(len(x), 1)))
    SciPy()(plain, ONES, 0.0, 1.0)
    solution = SciPy()(wavy, ONES, 0.0, 1.0)
    assert int(wavy.calls[0]) > 3 * int(plain.calls[0])
    assert float(solution.integral[0]) == pytest.approx(math.sin(60) / 60, abs=1e-4)


def test_failures_are_statuses():
    field = Counted(decay)
    stopped = SciPy(rtol=1e-8, atol=1e-8, max_evaluations=20)(field, ONES, 0.0, 50.0)
    assert stopped.status.tolist() == [Status.BUDGET] * 2
    assert 20 <= int(field.calls[0]) < 30
    assert 0 < float(stopped.position[0]) < 50
    close(stopped.x[:, 0], torch.exp(-stopped.position), atol=1e-6)
    nan = SciPy()(broken, FAR_PAIR, 0.0, 1.0)
    assert nan.status.tolist() == [Status.NONFINITE] * 2
    assert torch.isfinite(nan.x).all()
    assert float(nan.position[0]) <= 0.5 + 1e-9


@pytest.mark.parametrize("arguments", [{"method": "rk45"}, {"atol": 0.0}, {"max_evaluations": 0}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="must be"):
        SciPy(**arguments)
