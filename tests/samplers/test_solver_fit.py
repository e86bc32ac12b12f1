"""The fit of a table: its parameters, the loss, the Gauss-Newton matrix, moving starts."""

import math

import pytest
import torch

import scoresde as ss
from scoresde import samplers
from scoresde.samplers.grids import quadratic
from scoresde.samplers.learned_solver import LearnedSolver, SolverTable
from scoresde.samplers.solver_fit import Learning, Parameters, Starts, _Fit, displaced, robust, squares
from tests.conftest import close, f64, normal, oracle, seeded
from tests.samplers.methods import EVERY_PATH

VP = ss.VP()
MODEL = oracle((2,)).score_model(VP)


def fit(nfe=3, count=6, scale=1.0, **settings):
    table = SolverTable.of(samplers.DPMSolverPP(2), VP, quadratic(VP, nfe))
    starts = Starts(normal(count, 2), normal(count, 2, seed=1))
    return _Fit(MODEL, starts, Learning(**settings), Parameters(table, VP), scale)


@EVERY_PATH
def test_no_change_gives_the_table_and_changes_stay_on_the_path(sde):
    table = SolverTable.of(samplers.DPMSolverPP(2), sde, samplers.angle(sde, 4), denoise_final=True)
    parameters = Parameters(table, sde)
    a, b, t = parameters.coefficients(torch.zeros(parameters.count, dtype=torch.float64))
    assert torch.equal(a, table.a)
    assert torch.equal(b, table.b)
    close(t, table.t, rtol=1e-9)
    assert t[0] == sde.t_max
    assert t[-1] == sde.t_min
    far = parameters.coefficients(torch.full((parameters.count,), 5.0, dtype=torch.float64))[2]
    assert bool(((far >= sde.t_min) & (far <= sde.t_max)).all())
    assert parameters.table(torch.full((parameters.count,), 5.0, dtype=torch.float64)) is None  # the times do not fall


def test_the_solve_is_the_sampler_and_its_gradient_is_that_of_finite_differences():
    problem, x = fit(), normal(2, 2)
    rows, theta = slice(0, 2), 0.05 * normal(fit().parameters.count, seed=2)
    sampler = LearnedSolver(problem.parameters.table(theta))
    close(problem.solve(theta, x, rows), sampler(MODEL, x_T=x).x, rtol=1e-10, atol=1e-10)
    leaf = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.solve(leaf, x, rows).sum(), leaf)
    unit = 1e-6 * torch.eye(len(theta), dtype=torch.float64)
    numeric = [
        float((problem.solve(theta + e, x, rows) - problem.solve(theta - e, x, rows)).sum()) / 2e-6 for e in unit
    ]
    close(gradient, f64(*numeric), rtol=1e-5, atol=1e-6)


def test_parameters_of_each_sample_and_recomputed_networks_give_the_same_samples():
    problem, x, rows = fit(), normal(2, 2), slice(0, 2)
    theta = 0.05 * normal(problem.parameters.count, seed=2)
    expected = problem.solve(theta, x, rows)
    close(problem.solve(theta.expand(2, -1), x, rows), expected, rtol=1e-10, atol=1e-10)
    close(fit(checkpointing=True).solve(theta, x, rows), expected)


def test_the_whitened_parameters_move_samples_by_unit_amounts():
    """L^T (E[J^T J] + ridge) L = 1, with J from automatic differentiation and c so large that no start counts less."""
    problem = fit(count=4, scale=math.inf, ridge=1e-6)
    count, x = problem.parameters.count, problem.starts.x
    whitening = torch.stack([problem.whitening(seeded(i)) for i in range(40)])
    inverse = torch.linalg.inv((whitening @ whitening.mT).double())  # the matrices from 40 times 2 probes
    j = torch.func.jacfwd(lambda theta: problem.solve(theta, x, slice(0, 4)))(torch.zeros(count).double())
    exact = j.reshape(-1, count).mT @ j.reshape(-1, count) / 8
    found, error = inverse.mean(dim=0), inverse.std(dim=0) / math.sqrt(40)
    assert bool(((found - exact).abs() <= 5 * error + 1e-4 * exact.diagonal().max()).all())


def test_the_loss_is_half_the_square_of_small_distances_and_linear_in_large_ones():
    q = f64(1e-8, 1.0, 1e8)
    close(robust(q, math.inf), q / 2)
    close(robust(q, 1.0)[0], q[0] / 2, rtol=1e-6)
    close(robust(q, 2.0)[2], 2 * q[2].sqrt(), rtol=1e-3)
    close(squares(torch.ones(2, 2, 2), torch.full((2, 2, 2), 3.0)), f64(4.0, 4.0))


def test_moved_starts_go_against_the_gradient_and_stay_in_their_ball():
    x, gradient = normal(3, 2, 2), normal(3, 2, 2, seed=1)
    moved = displaced(torch.zeros_like(x), gradient, x, 0.1)
    assert bool(((moved * gradient).flatten(1).sum(dim=1) < 0).all())
    for _ in range(9):
        moved = displaced(moved, gradient, x, 0.1)
    close(moved.flatten(1).norm(dim=1), 0.1 * x.flatten(1).norm(dim=1), rtol=1e-9)


def test_a_robustness_of_zero_is_refused():
    with pytest.raises(ValueError, match="robust must be positive; got 0"):
        Learning(robust=0.0)
    with pytest.raises(ValueError, match="rate must be a finite number > 0; got nan"):
        Learning(rate=math.nan)
