"""Adams methods: quadrature weights, measured order, per-sample steps, and what becomes of samples that fail."""

import numpy as np
import pytest
import torch

from scoresde.solvers import Adams, AdaptiveAdams, Status
from scoresde.solvers.adams import integration_weights
from tests.conftest import f64
from tests.solvers.problems import FAR_PAIR, PAIR, broken, decay, nothing, rotation, turned

SMOOTHED = [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]


def weights(nodes, low, high, degree, used=None):
    nodes = torch.as_tensor(nodes, dtype=torch.float64)[None]
    used = torch.ones_like(nodes, dtype=torch.bool) if used is None else torch.tensor([used])
    return integration_weights(nodes, used, f64(low)[None], f64(high)[None], degree)[0]


def test_weights_of_the_classical_methods():
    """Hairer, Norsett and Wanner, section III.1: Adams-Bashforth 3 and Adams-Moulton 3 at unit steps."""
    torch.testing.assert_close(weights([0, -1, -2], 0, 1, 2), f64(23 / 12, -16 / 12, 5 / 12))
    torch.testing.assert_close(weights([1, 0, -1], 0, 1, 2), f64(5 / 12, 8 / 12, -1 / 12))


def test_weights_integrate_polynomials_on_any_nodes_backward_as_well():
    nodes = [0.0, -0.3, -1.1, -1.3, -2.0]
    for low, high in ((0.0, 0.7), (0.0, -0.7)):
        found = weights(nodes, low, high, 2)
        for power in range(3):
            exact = (high ** (power + 1) - low ** (power + 1)) / (power + 1)
            assert float(found @ torch.tensor(nodes, dtype=torch.float64) ** power) == pytest.approx(exact, abs=1e-12)


def test_weights_of_few_nodes_have_the_degree_these_determine():
    assert weights([0, 0, 0], 0, 2, 2, [True, False, False]).tolist() == pytest.approx([2, 0, 0])
    assert weights([0, -1, 0], 0, 1, 2, [True, True, False]).tolist() == pytest.approx([1.5, -0.5, 0])


def test_a_fit_through_more_velocities_amplifies_their_errors_less():
    norms = [float(weights(list(range(0, -3 - extra, -1)), 0, 1, 2).norm()) for extra in (0, 1, 2)]
    assert norms[0] == pytest.approx(np.sqrt(23**2 + 16**2 + 5**2) / 12)
    assert norms[0] > 1.3 * norms[1]
    assert norms[1] > 1.1 * norms[2]


@pytest.mark.parametrize(("order", "smoothing"), SMOOTHED)
def test_order_of_convergence(order, smoothing):
    steps = np.array([32, 64, 128, 256])
    solutions = [Adams(int(n), order, smoothing)(rotation, PAIR, 0.5, 2.0) for n in steps]
    errors = [float((solution.x - turned(PAIR, 0.5, 2.0)).abs().max()) for solution in solutions]
    # A predictor of order 1 is corrected once by the trapezoidal rule, evaluated at it: order 1 all the same.
    assert np.polyfit(np.log(1 / steps), np.log(errors), 1)[0] == pytest.approx(order, abs=0.35)


def test_integrals_are_those_of_the_corrector():
    solution = Adams(8)(rotation, PAIR, 0.5, 2.0)
    assert solution.integral[0].tolist() == pytest.approx([(2.0**2 - 0.5**2) / 2, 1.5], abs=1e-12)
    unit = Adams(400)(lambda s, x, rows: (0 * x, torch.ones(len(x), 1, dtype=torch.float64)), PAIR, 0.0, 1.0)
    assert float(unit.squared[0]) == pytest.approx(1 / 400, rel=0.01)  # 400 equal weights, but at the ends


@pytest.mark.parametrize("solver", [Adams(7), AdaptiveAdams()], ids=str)
def test_evaluations_are_counted(solver):
    calls = torch.zeros(2, dtype=torch.int64)

    def field(s, x, rows):
        calls[slice(None) if rows is None else rows] += 1
        return rotation(s, x)

    solution = solver(field, PAIR, 0.0, 1.0)
    assert torch.equal(solution.nfe, calls)
    assert solution.status.tolist() == [Status.OK] * 2
    assert solution.position.tolist() == pytest.approx([1.0] * 2)


@pytest.mark.parametrize("start_end", [(0.5, 2.0), (2.0, 0.5)])
def test_a_tighter_tolerance_is_a_smaller_error(start_end):
    found = [AdaptiveAdams(rtol, max_step=1.0)(rotation, PAIR, *start_end) for rtol in (1e-2, 1e-4, 1e-6)]
    errors = [float((solution.x - turned(PAIR, *start_end)).abs().max()) for solution in found]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 1e-5
    assert int(found[2].nfe[0]) > int(found[0].nfe[0])
    expected = (start_end[1] ** 2 - start_end[0] ** 2) / 2
    assert found[0].integral[:, 0].tolist() == pytest.approx([expected] * 2, abs=1e-9)


def frequencies(s, x, rows=None):
    """Oscillators, each at the frequency in its last component: the fast ones need small steps."""
    slope = x[:, 2:3] * torch.stack([-x[:, 1], x[:, 0]], dim=1)
    return torch.cat([slope, torch.zeros_like(x[:, :1])], dim=1), torch.ones(len(x), 1, dtype=torch.float64)


def test_steps_are_per_sample_and_no_result_depends_on_the_batch():
    x = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 30.0], [0.0, 1.0, 5.0]], dtype=torch.float64)
    together = AdaptiveAdams(1e-4)(frequencies, x, 0.0, 2.0)
    assert int(together.nfe[1]) > 3 * int(together.nfe[0])
    for i in range(3):
        alone = AdaptiveAdams(1e-4)(frequencies, x[i : i + 1], 0.0, 2.0)
        torch.testing.assert_close(alone.x[0], together.x[i], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(alone.squared[0], together.squared[i], rtol=1e-12, atol=0)
        assert int(alone.nfe[0]) == int(together.nfe[i])


@pytest.mark.parametrize("solver", [Adams(20), AdaptiveAdams()], ids=str)
def test_a_nan_ends_the_sample_at_its_last_finite_state_and_leaves_the_others_alone(solver):
    solution = solver(broken, FAR_PAIR, 0.0, 1.0)
    assert solution.status.tolist() == [Status.OK, Status.NONFINITE]
    torch.testing.assert_close(solution.x[0], torch.ones(2, dtype=torch.float64))
    assert float(solution.position[1]) == pytest.approx(0.5, abs=1e-6)
    torch.testing.assert_close(solution.x[1], torch.tensor([20.5, 0.5], dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("solver", [Adams(20), AdaptiveAdams()], ids=str)
def test_a_field_that_is_nan_from_the_start(solver):
    solution = solver(lambda s, x, rows: (x * torch.nan, nothing(x)), PAIR, 0.0, 1.0)
    assert solution.status.tolist() == [Status.NONFINITE] * 2
    assert torch.equal(solution.x, PAIR)
    assert solution.position.tolist() == [0.0] * 2


def stiff(s, x, rows=None):
    """Relaxation to 1 within 1e-6."""
    return 1e6 * (1 - x), nothing(x)


def test_a_stiff_field_is_a_status_whatever_the_solver():
    x = torch.zeros(2, 3, dtype=torch.float64)
    fixed = Adams(40)(stiff, x, 0.0, 1.0)
    assert fixed.status.tolist() == [Status.FAILED] * 2
    adaptive = AdaptiveAdams(max_evaluations=300)(stiff, x, 0.0, 1.0)
    assert adaptive.status.tolist() == [Status.BUDGET] * 2
    for solution in (fixed, adaptive):
        assert torch.isfinite(solution.x).all()
        assert (solution.position < 1).all()


def test_a_budget_that_is_too_small_is_a_status_at_the_state_reached():
    solution = AdaptiveAdams(1e-5, max_evaluations=12)(decay, torch.ones(2, 1, dtype=torch.float64), 0.0, 3.0)
    assert solution.status.tolist() == [Status.BUDGET] * 2
    assert solution.nfe.tolist() == [12] * 2
    torch.testing.assert_close(solution.x[:, 0], torch.exp(-solution.position), rtol=0, atol=1e-3)
    assert (solution.position > 0).all()


def test_gradients_pass_through_the_fixed_grid():
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    solution = Adams(60)(lambda s, x, rows: (-rate * x, nothing(x)), x, 0.0, 1.0)
    by_rate, by_x = torch.autograd.grad(solution.x.sum(), [rate, x])
    assert float(by_rate) == pytest.approx(-3 * np.exp(-0.7), abs=1e-4)
    torch.testing.assert_close(by_x, torch.full_like(x, np.exp(-0.7)), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Adams(0),
        lambda: Adams(order=4),
        lambda: Adams(smoothing=-1),
        lambda: AdaptiveAdams(rtol=0),
        lambda: AdaptiveAdams(max_step=2),
        lambda: AdaptiveAdams(max_evaluations=1),
        lambda: AdaptiveAdams(order=0),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(ValueError, match="expected"):
        make()
