"""Adams methods: quadrature weights, measured order, per-sample steps, and samples that fail."""

import numpy as np
import pytest
import torch

from scoresde.solvers import Adams, AdaptiveAdams, Status
from scoresde.solvers.adams import integration_weights
from tests.conftest import close, f64
from tests.solvers.problems import FAR_PAIR, ONES, PAIR, Counted, broken, decay, nothing, rotation, turned

BOTH = pytest.mark.parametrize("solver", [Adams(20), AdaptiveAdams()], ids=str)


def weights(nodes, low, high, degree, used=None):
    nodes = f64(*nodes)[None]
    used = torch.ones_like(nodes, dtype=torch.bool) if used is None else torch.tensor([used])
    return integration_weights(nodes, used, f64(low)[None], f64(high)[None], degree)[0]


def test_weights_of_the_classical_methods():
    """Hairer, Norsett and Wanner, section III.1: Adams-Bashforth 3 and Adams-Moulton 3 at unit steps."""
    close(weights([0, -1, -2], 0, 1, 2), f64(23 / 12, -16 / 12, 5 / 12), 1e-9)
    close(weights([1, 0, -1], 0, 1, 2), f64(5 / 12, 8 / 12, -1 / 12), 1e-9)


@pytest.mark.parametrize("high", [0.7, -0.7])
def test_weights_integrate_polynomials_on_any_nodes_backward_as_well(high):
    nodes = [0.0, -0.3, -1.1, -1.3, -2.0]
    for power in range(3):
        integral = float(weights(nodes, 0.0, high, 2) @ f64(*nodes) ** power)
        assert integral == pytest.approx(high ** (power + 1) / (power + 1), abs=1e-12)


def test_weights_of_few_nodes_have_the_degree_that_these_determine():
    assert weights([0, 0, 0], 0, 2, 2, [True, False, False]).tolist() == pytest.approx([2, 0, 0])
    assert weights([0, -1, 0], 0, 1, 2, [True, True, False]).tolist() == pytest.approx([1.5, -0.5, 0])


def test_a_fit_through_more_velocities_amplifies_their_errors_less():
    norms = [float(weights(list(range(0, -3 - extra, -1)), 0, 1, 2).norm()) for extra in (0, 1, 2)]
    assert norms[0] == pytest.approx(np.sqrt(23**2 + 16**2 + 5**2) / 12)
    assert norms[0] > 1.3 * norms[1]
    assert norms[1] > 1.1 * norms[2]


@pytest.mark.parametrize(("order", "smoothing"), [(1, 0), (2, 0), (2, 1), (3, 0), (3, 2)])
def test_order_of_convergence(order, smoothing):
    solutions = [Adams(n, order, smoothing)(rotation, PAIR, 0.5, 2.0) for n in (32, 128)]
    errors = [float((solution.x - turned(PAIR, 0.5, 2.0)).abs().max()) for solution in solutions]
    # A predictor of order 1, corrected once by the trapezoidal rule at the predicted state, has order 1.
    assert np.log(errors[0] / errors[1]) / np.log(4) == pytest.approx(order, abs=0.35)


def test_integrals_are_those_of_the_corrector():
    solution = Adams(8)(rotation, PAIR, 0.5, 2.0)
    assert solution.integral[0].tolist() == pytest.approx([(2.0**2 - 0.5**2) / 2, 1.5], abs=1e-12)
    unit = Adams(100)(lambda s, x, rows: (0 * x, torch.ones(len(x), 1, dtype=torch.float64)), PAIR, 0.0, 1.0)
    assert float(unit.squared[0]) == pytest.approx(1 / 100, rel=0.02)  # 100 equal weights, except at the ends


def test_the_fixed_grid_costs_one_evaluation_more_than_its_steps():
    field = Counted(rotation)
    solution = Adams(7)(field, PAIR, 0.0, 1.0)
    assert field.calls.tolist() == [8, 8]
    assert solution.status.tolist() == [Status.OK] * 2
    assert solution.position.tolist() == [1.0] * 2


@pytest.mark.parametrize(("start", "end"), [(0.5, 2.0), (2.0, 0.5)])
def test_a_tighter_tolerance_is_a_smaller_error(start, end):
    fields = [Counted(rotation) for _ in range(3)]
    solutions = [
        AdaptiveAdams(rtol, max_step=1.0)(field, PAIR, start, end)
        for rtol, field in zip((1e-2, 1e-4, 1e-6), fields, strict=True)
    ]
    errors = [float((solution.x - turned(PAIR, start, end)).abs().max()) for solution in solutions]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 1e-5
    assert bool((fields[2].calls > fields[0].calls).all())
    assert solutions[0].integral[:, 0].tolist() == pytest.approx([(end**2 - start**2) / 2] * 2, abs=1e-9)
    assert solutions[0].position.tolist() == pytest.approx([end] * 2)


def frequencies(s, x, rows=None):
    """Oscillators, each at the frequency in its last component: the fast ones need small steps."""
    slope = x[:, 2:3] * torch.stack([-x[:, 1], x[:, 0]], dim=1)
    return torch.cat([slope, torch.zeros_like(x[:, :1])], dim=1), torch.ones(len(x), 1, dtype=torch.float64)


def test_steps_are_per_sample_and_no_result_depends_on_the_batch():
    x, field = f64([1.0, 0.0, 1.0], [1.0, 0.0, 30.0], [0.0, 1.0, 5.0]), Counted(frequencies)
    together = AdaptiveAdams(1e-4)(field, x, 0.0, 2.0)
    assert int(field.calls[1]) > 3 * int(field.calls[0])
    for i in range(3):
        single = Counted(frequencies)
        alone = AdaptiveAdams(1e-4)(single, x[i : i + 1], 0.0, 2.0)
        close((alone.x[0], alone.squared[0]), (together.x[i], together.squared[i]))
        assert int(single.calls[0]) == int(field.calls[i])


@BOTH
def test_a_nan_ends_the_sample_at_its_last_finite_state_and_leaves_the_others_alone(solver):
    solution = solver(broken, FAR_PAIR, 0.0, 1.0)
    assert solution.status.tolist() == [Status.OK, Status.NONFINITE]
    assert float(solution.position[1]) == pytest.approx(0.5, abs=1e-6)
    close(solution.x, f64([1.0, 1.0], [20.5, 0.5]), atol=1e-6)


@BOTH
def test_a_field_that_is_nan_from_the_start(solver):
    solution = solver(lambda s, x, rows: (x * torch.nan, nothing(x)), PAIR, 0.0, 1.0)
    assert solution.status.tolist() == [Status.NONFINITE] * 2
    assert torch.equal(solution.x, PAIR)
    assert solution.position.tolist() == [0.0] * 2


@pytest.mark.parametrize(
    ("solver", "status"), [(Adams(40), Status.FAILED), (AdaptiveAdams(max_evaluations=300), Status.BUDGET)]
)
def test_a_stiff_field_is_a_status(solver, status):
    """Relaxation to 1 within 1e-6."""
    solution = solver(lambda s, x, rows: (1e6 * (1 - x), nothing(x)), torch.zeros_like(PAIR), 0.0, 1.0)
    assert solution.status.tolist() == [status] * 2
    assert torch.isfinite(solution.x).all()
    assert (solution.position < 1).all()


def test_a_budget_that_is_too_small_is_a_status_at_the_state_reached():
    field = Counted(decay)
    solution = AdaptiveAdams(1e-5, max_evaluations=12)(field, ONES, 0.0, 3.0)
    assert solution.status.tolist() == [Status.BUDGET] * 2
    assert field.calls.tolist() == [12] * 2
    close(solution.x[:, 0], torch.exp(-solution.position), rtol=0, atol=1e-3)
    assert (solution.position > 0).all()


def test_gradients_pass_through_the_fixed_grid():
    rate, x = f64(0.7).requires_grad_(), f64([1.0], [2.0]).requires_grad_()
    solution = Adams(60)(lambda s, x, rows: (-rate * x, nothing(x)), x, 0.0, 1.0)
    by_rate, by_x = torch.autograd.grad(solution.x.sum(), [rate, x])
    assert float(by_rate) == pytest.approx(-3 * np.exp(-0.7), abs=1e-4)
    close(by_x, torch.full_like(x, np.exp(-0.7)), atol=1e-4)


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
    with pytest.raises(ValueError, match="must be"):
        make()
