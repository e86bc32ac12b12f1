"""SA-Solver: its corrector against quadrature, and the range of its noise."""

import math

import pytest
from scipy.integrate import quad

import scoresde as ss
from scoresde.samplers import DPMSolverPP, SASolver
from tests.samplers.methods import EVERY_PATH, LAMBDAS, nodes, planned, polynomial


@EVERY_PATH
@pytest.mark.parametrize("corrector", [1, 4])
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_the_corrector_interpolates_the_view_at_the_end_too(level, corrector, sde):
    """2309.05019, algorithm 1: the same integral with the polynomial through the value at the end and the last ones."""
    points, rate = nodes(sde), 1 + level**2
    correct = planned(SASolver(1, corrector, level), sde)[3][1]
    known = [point.lam for point in (points[3], points[2], points[1], points[0])][: corrector + 1]
    start, end = points[2].lam, points[3].lam
    assert len(correct) == len(known)
    for j, weight in enumerate(correct):
        integral = quad(lambda u, j=j: rate * math.exp(-rate * (end - u)) * polynomial(known, j, u), start, end)[0]
        assert weight == pytest.approx(points[3].alpha * integral, rel=1e-8)


@EVERY_PATH
@pytest.mark.parametrize("level", [0.0, 0.6, 1.0])
def test_without_a_corrector_it_is_dpm_solver_pp(level, sde):
    assert planned(SASolver(3, 0, level), sde) == planned(DPMSolverPP(3, level), sde)


def test_the_noise_is_between_two_ratios():
    ratios = [math.exp(-lam) for lam in LAMBDAS]
    plan = planned(SASolver(2, 2, low=ratios[3], high=ratios[1]), ss.VP())
    assert [stage.c > 0 for stage, _ in plan] == [False, True, True, True]
    plan = planned(SASolver(2, 2, low=1.0, high=2.5), ss.VP())
    assert [stage.c > 0 for stage, _ in plan] == [False, True, True, False]
    plain, noisy = planned(SASolver(2, 2, 0.0), ss.VP()), planned(SASolver(2, 2, 1.0), ss.VP())
    assert [plan[0][0], plan[1][0], plan[3][0]] == [plain[0][0], noisy[1][0], plain[3][0]]
    assert [plan[1][1], plan[2][1]] == [plain[1][1], noisy[2][1]]  # of the transition before


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.5), (-1.0, 1.0)])
def test_bad_arguments(low, high):
    with pytest.raises(ValueError, match="0 <= low < high"):
        SASolver(low=low, high=high)
