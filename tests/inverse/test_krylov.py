"""Krylov methods: exact solutions, a stop for each system, and bounded steps where the matrix is not symmetric."""

from itertools import pairwise

import torch

from scoresde.inverse.krylov import conjugate_gradients, minimal_residuals
from tests.conftest import f64, normal

STD = f64(0.5)


def product(matrices):
    """The function of the solvers, with B = 3."""
    return lambda u: (3 * u, torch.einsum("bij,bj->bi", matrices, u))


def test_each_system_of_conjugate_gradients_stops_by_itself():
    """One is solved after a step, one has a negative curvature and stops, one needs all steps, one is zero."""
    matrices = torch.stack([f64(2.0, 2.0, 2.0), f64(-1.0, -1.0, -2.0), f64(1.0, 2.0, 4.0), f64(1.0, 1.0, 1.0)])
    right = f64(1.0, 1.0, 1.0).repeat(4, 1) * f64(1.0, 1.0, 1.0, 0.0)[:, None]

    solution = conjugate_gradients(product(matrices.diag_embed()), right, STD, 10, 1e-12)
    expected = 3 * right / (matrices + 0.25)
    expected[1] = 0
    torch.testing.assert_close(solution, expected, rtol=1e-12, atol=1e-12)
    for i in range(4):
        alone = conjugate_gradients(product(matrices[i : i + 1].diag_embed()), right[i : i + 1], STD, 10, 1e-12)
        assert torch.equal(alone[0], solution[i])


def test_minimal_residuals_solve_any_system_and_each_stops_by_itself():
    matrices, right = normal(4, 5, 5, seed=1), normal(4, 5, seed=2)
    matrices[2], right[3] = torch.eye(5), 0.0
    solution = minimal_residuals(product(matrices), right, STD, 5, 1e-12)
    expected = 3 * torch.linalg.solve(matrices + 0.25 * torch.eye(5), right)
    torch.testing.assert_close(solution, expected, rtol=1e-8, atol=1e-8)
    for i in range(4):
        alone = minimal_residuals(product(matrices[i : i + 1]), right[i : i + 1], STD, 5, 1e-12)
        torch.testing.assert_close(alone[0], solution[i], rtol=1e-12, atol=1e-12)


def test_both_solvers_are_exact_after_as_many_iterations_as_there_are_eigenvalues():
    axes = torch.linalg.qr(normal(6, 6, seed=3)).Q
    matrix, right = (axes * f64(1, 1, 1, 4, 4, 9)) @ axes.mT, normal(1, 6, seed=4)
    expected = 3 * torch.linalg.solve(matrix + 0.25 * torch.eye(6), right.mT).mT
    for solver in (conjugate_gradients, minimal_residuals):
        few, enough = (solver(product(matrix[None]), right, STD, k, 0.0) for k in (2, 3))
        assert float((few - expected).norm()) > 1e-3
        torch.testing.assert_close(enough, expected, rtol=1e-10, atol=1e-10)


def test_the_minimal_residual_never_grows_where_conjugate_gradients_take_huge_steps():
    """The matrix is a rotation by about 90 degrees, so that the curvature p^T M p is small beside |M p|."""
    matrix, right = f64([0.01, 1.0], [-1.0, 0.01])[None], f64([1.0, 0.0], [1.0, 0.0])[:1]
    assert float(conjugate_gradients(product(matrix), right, f64(0.0), 1, 0.0).norm()) > 100
    matrices, right, sizes = normal(20, 8, 8, seed=5), normal(20, 8, seed=6), []
    for iterations in range(1, 9):
        u = minimal_residuals(product(matrices), right, STD, iterations, 0.0) / 3
        sizes.append((torch.einsum("bij,bj->bi", matrices, u) + 0.25 * u - right).norm(dim=1))
    assert (sizes[0] <= right.norm(dim=1)).all()
    assert all((after <= before * (1 + 1e-9) + 1e-9).all() for before, after in pairwise(sizes))
