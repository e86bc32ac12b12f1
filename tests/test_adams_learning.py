"""Learned solvers of a likelihood: nearer to the closed form than Adams on new data, the derivatives, clear errors."""

import math

import pytest
import torch

import scoresde as ss
from scoresde.adams_learning import FAILED, AdamsLearner, _errors, _gauss_newton, _modes
from scoresde.solvers import Adams, AdamsTable
from tests.conftest import close, f64, normal, oracle, seeded

VP = ss.VP()
MIXTURE = oracle((2, 2))
MODEL = MIXTURE.score_model(VP)
EXACT = ss.ExactTrace()
SETTINGS = ss.AdamsLearning(iterations=3, modes=3, reference_steps=60)


@pytest.fixture(scope="module")
def learner():
    return AdamsLearner(MODEL, MIXTURE.sample(96, generator=seeded()), trace=EXACT, settings=SETTINGS)


@pytest.fixture(scope="module")
def solver(learner):
    return learner.learn(8)


def test_a_learned_solver_is_nearer_to_the_closed_form_on_other_data(solver):
    x = MIXTURE.sample(200, VP, VP.t_min, generator=seeded(5))
    errors, costs = [], []
    for chosen in (solver, Adams(8, data_scale=solver.data_scale)):
        found = ss.log_prob(MODEL, x, trace=EXACT, solver=chosen)
        prior = VP.prior_log_prob(found.latent)
        ours = found.value - prior + MIXTURE.log_prob(found.latent, VP, VP.t_max)
        errors.append((ours - MIXTURE.log_prob(x, VP, VP.t_min)).square().mean().sqrt())
        costs.append(found.nfe)
    assert torch.equal(*costs)
    assert float(errors[0]) < 0.7 * float(errors[1])


def test_the_notes_have_the_errors_on_held_out_data(learner, solver):
    notes, x = solver.table.notes, learner.x[learner.learned_from :]
    values, target = (
        ss.log_prob(MODEL, x, trace=EXACT, solver=chosen).value / 4
        for chosen in (solver, Adams(60, data_scale=solver.data_scale))
    )
    assert float((values - target).square().mean().sqrt()) == pytest.approx(notes["rms"], rel=1e-6)
    assert notes["rms"] < notes["adams_rms"]
    assert (len(x), notes["samples"], notes["modes"]) == (32, 96, 3)


def test_derivatives_in_the_factors_are_the_terms_of_the_integral(learner):
    first = AdamsTable.uniform(5, learner.interval, learner.data_scale)
    theta = 0.1 * normal(3 + 6)
    r, terms = learner._residuals(learner._table(first, theta), 0, 6)
    for i in (0, 3, 5):
        moved = theta.clone()
        moved[3 + i] += 0.5
        close(learner._residuals(learner._table(first, moved), 0, 6)[0] - r, 0.5 * terms[:, i], rtol=1e-6, atol=1e-9)


def test_a_probe_and_its_reference_are_the_same_in_every_batch():
    x, targets = MIXTURE.sample(6, generator=seeded()), []
    for size in (2, 6):
        settings = ss.AdamsLearning(reference_steps=20, batch_size=size)
        targets.append(AdamsLearner(MODEL, x, settings=settings, seed=3).target)
    close(*targets, rtol=1e-10)
    value = ss.log_prob(
        MODEL,
        x,
        trace=ss.Hutchinson(resample=False),
        seeds=range(3, 9),
        solver=Adams(20, data_scale=float(x.square().mean().sqrt())),
    ).value
    close(targets[0], value / 4, rtol=1e-10)


def test_the_step_solves_a_linear_problem_and_leaves_out_failures():
    jacobian, truth = normal(40, 3), f64(0.3, -0.2, 0.1)
    r = jacobian @ -truth
    r[0] = math.nan
    step = _gauss_newton(r, jacobian, torch.zeros(3).double(), torch.full((3,), 1e6).double(), 1.0)
    close(step, truth, rtol=1e-6)
    assert _errors(f64(math.nan, 0.0), 1.0).rms == pytest.approx(FAILED / math.sqrt(2))


def test_modes_are_orthogonal_and_without_mean():
    modes = _modes(8, 5)
    close(modes.T @ modes, 4 * torch.eye(5).double(), rtol=1e-9, atol=1e-12)
    close(modes.sum(dim=0), torch.zeros(5).double(), rtol=0, atol=1e-12)


def test_a_learned_solver_belongs_to_its_model(solver):
    with pytest.raises(ValueError, match="must go from the data to the noise of the model that it was learned for"):
        ss.log_prob(MIXTURE.score_model(ss.VP(t_min=1e-2)), torch.zeros(1, 2, 2), solver=solver)
    levels = torch.zeros(16, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="solver must have a number of steps for a multilevel estimate"):
        ss.bits_per_dim(MODEL, levels, ss.data.Levels(2), solver=solver, tolerance=0.1)


def test_too_few_data_and_a_failing_reference_are_refused():
    with pytest.raises(ValueError, match="x must have at least 2 samples to learn from and 2 held out; got 3 samples"):
        AdamsLearner(MODEL, torch.zeros(3, 2, 2))
    for value in (0.0, math.nan):
        with pytest.raises(ValueError, match="x must hold finite numbers that are not all 0; got a root mean square"):
            AdamsLearner(MODEL, torch.full((8, 2), value))
    broken = ss.ScoreModel(lambda x, label, cond=None: x * math.nan, VP)
    with pytest.raises(ValueError, match="reference_steps must resolve the flow of the data; got 4"):
        AdamsLearner(broken, torch.ones(8, 2), settings=ss.AdamsLearning(reference_steps=4))
