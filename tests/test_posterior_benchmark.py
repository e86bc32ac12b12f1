"""The benchmark of posterior samplers: its measures, its design, the cost that it counts, its peers, and its store."""

import argparse
import math
import sys
from collections import Counter
from itertools import product
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
import posterior_errors  # noqa: E402
import posterior_methods  # noqa: E402
import posterior_peers  # noqa: E402
import sampler_peers  # noqa: E402
from posterior_methods import OURS, PEER, Method, Problem, exact  # noqa: E402

PROBLEM = Problem("2-D", "averages", 0.2, "VP")


def method(draw):
    return Method(OURS, "a method", {"": draw})


def measured(draw, target, samples, budget=20):
    return posterior_errors.measured(target, method(draw), "", samples, budget, 0)


def test_the_coverage_is_the_fraction_of_exact_draws_in_the_interval():
    """Components with rotated axes: the samples' quantiles, and draws of the posterior between them."""
    problem = Problem("16-D", "inpainting", 0.2, "VP")
    (y,) = problem.measurements(1, 0)
    law = problem.oracle.posterior(problem.operator, y)
    x = 0.5 * law.sample(400, generator=torch.Generator().manual_seed(0)) + 0.2
    low, high = torch.quantile(x.flatten(1), f64(0.05, 0.95), dim=0)
    draws = law.sample(20_000, generator=torch.Generator().manual_seed(1)).flatten(1)
    inside = ((low < draws) & (draws < high)).double().mean()
    assert posterior_errors.coverage(x, law) == pytest.approx(float(inside), abs=0.01)


def test_exact_draws_have_no_error_and_narrow_or_misplaced_ones_have():
    target = posterior_errors.target_of(PROBLEM, 2, 1000, 0)
    errors, passes = measured(exact, target, 1000)
    energy, sliced, weights, coverage = errors.mean(axis=0)
    assert passes == 0
    assert abs(energy) < 0.01
    assert weights < 0.05
    assert coverage == pytest.approx(0.9, abs=0.02)
    centre = torch.stack([law.mean() for law in target.posteriors])[:, None]
    narrow = measured(lambda *a: 0.5 * (exact(*a) + centre), target, 1000)[0].mean(axis=0)
    assert narrow[0] > 0.02
    assert narrow[1] > 1.5 * sliced
    assert narrow[3] < 0.85
    failed = measured(lambda *a: math.nan * exact(*a), target, 10)[0]
    assert bool((failed == math.inf).all())


def test_the_energy_distances_of_several_measurements_are_those_of_the_library():
    target = posterior_errors.target_of(PROBLEM, 3, 8, 0)
    x = exact(PROBLEM, target.y, 8, 20, 1) + 0.3
    singles = [ss.metrics.energy_distance(*pair) for pair in zip(x, target.truth, strict=True)]
    close(posterior_errors.energies(x, target), torch.stack(singles), rtol=0, atol=1e-7)


def test_every_method_makes_as_many_passes_as_the_budget_allows():
    """More than half of it, MMPS up to 5 passes a step."""
    target = posterior_errors.target_of(Problem("16-D", "averages", 0.2, "VP"), 2, 4, 0)
    for one in posterior_methods.methods():
        for name in list(one.settings)[::4]:  # the passes do not depend on the grid
            x, passes = posterior_errors.sampled(target, one, name, 4, 12, 0)
            assert x.shape == (2, 4, 1, 4, 4)
            assert one.library == posterior_methods.EXACT or 6 < passes <= 12, (one.name, name, passes)


def test_a_method_over_budget_is_refused():
    draw = posterior_methods.spectral(ss.inverse.DDRM)["uniform_time"]
    with pytest.raises(RuntimeError, match="at most 9 passes; a method,  made 20"):
        measured(lambda *a: draw(*a[:3], 20, a[4]), posterior_errors.target_of(PROBLEM, 1, 4, 0), 4, 9)


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


def options(**changes):
    return argparse.Namespace(
        **{
            "states": ("2-D", "16-D", "64-D"), "operators": posterior_methods.OPERATORS, "noises": posterior.NOISES,
            "sdes": ("VP", "VE"), "budgets": posterior.BUDGETS, "measurements": 1, "samples": 4, "pilot": 1,
            "pilot_operator": "random", "all_problems": False, **changes,
        }
    )  # fmt: skip


def test_the_fractions_of_the_design_are_balanced():
    chosen, factors = options(), ("states", "operators", "noises", "sdes")
    problems = [Problem(*names) for names in product(*(getattr(chosen, factor) for factor in factors))]
    for budget, fraction in ((20, 1), (100, 2), (500, 4)):
        kept = [one for one in problems if posterior.in_design(one, budget, chosen)]
        assert len(kept) == len(problems) / fraction == 72 / fraction
        for name, slack in (("states", 0), ("noise", 0), ("sde_name", 0), ("operator_name", 2)):
            counts = Counter(getattr(one, name) for one in kept)
            assert max(counts.values()) - min(counts.values()) <= slack
    assert all(posterior.in_design(one, 500, options(all_problems=True)) for one in problems)


def test_settings_are_chosen_on_the_pilot_and_kept_above_100_passes(tmp_path, monkeypatch):
    """Two settings: exact draws, and shifted ones. Results are made once, and read again from the file."""
    settings = {"shifted": lambda *a: exact(*a) + 1, "exact": exact}
    monkeypatch.setattr(posterior, "methods", lambda: [Method(OURS, "a", settings), Method(PEER, "b", settings)])
    chosen = options(states=("2-D",), operators=("averages", "random"), noises=(0.2,), sdes=("VP",), all_problems=True)
    path = tmp_path / "results.jsonl"
    rows = list(posterior.cells(chosen, posterior.Store(path)))
    assert [one.budget for one in rows] == [20] * 4 + [100] * 4 + [500] * 4
    assert {one.setting for one in rows} == {"exact"}
    assert len(path.read_text().splitlines()) == 12 + 4
    assert list(posterior.cells(chosen, posterior.Store(path, frozen=True))) == rows
    assert not list(posterior.cells(chosen, posterior.Store(None, frozen=True)))


def test_the_best_method_is_chosen_on_the_pilot_for_each_problem():
    other = Problem("2-D", "random", 0.2, "VP")
    rows = [
        posterior.Cell(problem, 20, library, name, "", energy, 20, ())
        for problem, library, name, energy in (
            (PROBLEM, "a", "1", 1), (other, "a", "1", 4), (PROBLEM, "a", "2", 2), (other, "a", "2", 3),
            (PROBLEM, "b", "3", 0),
        )
    ]  # fmt: skip
    assert {p: one.method for p, one in posterior.best(rows, "a").items()} == {PROBLEM: "1", other: "2"}
    assert {p: one.method for p, one in posterior.best(rows, "a", without=("2",)).items()} == {PROBLEM: "1", other: "1"}
    chosen = posterior.one_method([*rows, posterior.Cell(PROBLEM, 20, "a", "3", "", 2.4, 20, ())], "a")
    assert {one.method for one in chosen.values()} == {"3"}
