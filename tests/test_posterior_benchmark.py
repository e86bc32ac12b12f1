"""The benchmark of posterior samplers: its measures, the cost that it counts, its peers, and its store of cells."""

import math
import sys
from pathlib import Path

import pytest
import torch

import scoresde as ss
from tests.conftest import close, f64

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of this distribution", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
import posterior  # noqa: E402
import posterior_methods  # noqa: E402
import posterior_peers  # noqa: E402
import sampler_peers  # noqa: E402
from posterior_methods import Problem, exact  # noqa: E402

PROBLEM = Problem("2-D", "averages", 0.2, "VP")


def test_the_coverage_is_the_fraction_of_exact_draws_in_the_interval():
    """Components with rotated axes: the samples' quantiles, and draws of the posterior between them."""
    problem = Problem("16-D", "inpainting", 0.2, "VP")
    (y,) = problem.measurements(1, 0)
    law = problem.oracle.posterior(problem.operator, y)
    x = 0.5 * law.sample(400, generator=torch.Generator().manual_seed(0)) + 0.2
    low, high = torch.quantile(x.flatten(1), f64(0.05, 0.95), dim=0)
    draws = law.sample(20_000, generator=torch.Generator().manual_seed(1)).flatten(1)
    inside = ((low < draws) & (draws < high)).double().mean()
    assert posterior.coverage(x, law) == pytest.approx(float(inside), abs=0.01)


def test_exact_draws_have_no_error_and_narrow_or_misplaced_ones_have():
    y = PROBLEM.measurements(2, 0)
    found, passes = posterior.measured(PROBLEM, exact, y, 1000, 20, 0)
    energy, sliced, weights, coverage = found.mean(axis=0)
    assert passes == 0
    assert abs(energy) < 0.01
    assert weights < 0.05
    assert coverage == pytest.approx(0.9, abs=0.02)
    centre = torch.stack([PROBLEM.oracle.posterior(PROBLEM.operator, one).mean() for one in y])[:, None]
    narrow = posterior.measured(PROBLEM, lambda *a: 0.5 * (exact(*a) + centre), y, 1000, 20, 0)[0].mean(axis=0)
    assert narrow[0] > 0.02
    assert narrow[1] > 1.5 * sliced
    assert narrow[3] < 0.85
    failed = posterior.measured(PROBLEM, lambda *a: math.nan * exact(*a), y, 10, 20, 0)[0]
    assert bool((failed == math.inf).all())


def test_every_method_makes_as_many_passes_as_the_budget_allows():
    """More than half of it: the particle sampler with Heun's step makes 3 passes a step, MMPS up to 5."""
    problem = Problem("16-D", "averages", 0.2, "VP")
    y = problem.measurements(2, 0)
    for method in posterior_methods.methods():
        for name, draw in method.settings.items():
            batches = 2 if method.one_batch_each else 1
            found, passes = posterior.measured(problem, draw, y, 4, 12, 0, batches)
            assert found.shape == (2, 4)
            assert method.library == posterior_methods.EXACT or 6 < passes <= 12, (method.name, name, passes)


def test_a_method_over_budget_is_refused():
    draw = posterior_methods.spectral(ss.inverse.DDRM)["uniform_time"]
    with pytest.raises(RuntimeError, match="at most 9 passes; it made 20"):
        posterior.measured(PROBLEM, lambda *a: draw(*a[:3], 20, a[4]), PROBLEM.measurements(1, 0), 4, 9, 0)


@pytest.mark.parametrize("states", ["2-D", "16-D"])
def test_mmps_of_azula_is_that_of_this_library_where_its_solver_is_exact(states):
    """As many iterations as measurements; the same start, sampler and times."""
    if sampler_peers.missing("azula"):
        pytest.skip("azula is not installed")
    problem = Problem(states, "averages", 0.2, "VP")
    y, count = problem.measurements(3, 0), problem.operator(torch.zeros(1, *posterior_methods.SHAPES[states])).numel()
    x = torch.randn(3, *posterior_methods.SHAPES[states], generator=torch.Generator().manual_seed(0)).double()
    grid = posterior_methods.GRIDS["quadratic"]
    run = posterior_peers.azula_mmps(grid, "DDIM", count)
    sampler = ss.samplers.PredictorCorrector(ss.samplers.DDIM(), steps=4, grid=grid)
    ours = sampler(ss.inverse.MMPS(problem.model, problem.operator, y, iterations=count), x_T=x).x
    close(run(problem.model, problem.operator, y, x, 4 * (2 + count)), ours, rtol=0, atol=1e-6)


def test_cells_are_made_once_and_read_again(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"pilot": 0.5}

    path = tmp_path / "cells.jsonl"
    store = posterior.Store(path)
    assert store.get(("2-D", 0.2), make) == store.get(("2-D", 0.2), make) == {"pilot": 0.5}
    store.get(("2-D", 0.8), make)
    assert posterior.Store(path).get(("2-D", 0.2), make) == {"pilot": 0.5}
    assert len(made) == 2


def test_the_best_method_is_chosen_on_the_pilot_for_each_problem():
    cells = {("a", "1"): [{"pilot": 1}, {"pilot": 4}], ("a", "2"): [{"pilot": 2}, {"pilot": 3}], ("b", "1"): [{}, {}]}
    assert [one["pilot"] for one in posterior.best(cells, "a")] == [1, 3]
