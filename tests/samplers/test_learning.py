"""Learned solvers: the optimum on a Gaussian, nearer to the flow than formulas on a mixture, clear errors."""

import dataclasses
import math

import pytest
import torch

import scoresde as ss
from scoresde import networks, samplers
from scoresde.samplers.learning import Learner
from scoresde.samplers.solver_fit import iterates
from tests.conftest import close, f64, oracle, some

VP = ss.VP()
FEW = samplers.Learning(steps=2, batch_size=4, pool=6, held_out=8, target_steps=12)
GAUSSIAN = ss.GaussianMixture(f64(0.5, -1.0, 0.2, 0.0)[None], f64(0.1, 0.3, 0.8, 1.5)[None]).score_model(VP)


def optimum(learner, features):
    """The root mean square distance to the flow, on the held-out starts, of the best coefficients of these features."""
    held_out = learner.held_out
    columns, target = torch.stack([x.flatten() for x in features], dim=1).double(), held_out.target.flatten().double()
    solution = torch.linalg.lstsq(columns, target[:, None]).solution[:, 0]
    return float((columns @ solution - target).square().mean().sqrt())


def test_one_step_on_a_gaussian_attains_the_least_squares_of_its_coefficients():
    """From x_T, an evaluation gives a x_T + b V(x_T): linear in a and b, so the optimum is a projection."""
    settings = samplers.Learning(
        steps=100, batch_size=64, pool=128, held_out=128, target_steps=30, rate=0.2, robust=math.inf
    )
    learner = Learner(GAUSSIAN, settings=settings)
    solver = learner.learn(1, start=samplers.DDIM())
    x = learner.held_out.x
    best, notes = optimum(learner, [x, GAUSSIAN.denoise(x, VP.t_max)]), solver.table.notes
    assert best < 0.8 * notes["formula_rms"]
    assert best * (1 - 1e-6) <= notes["rms"] <= 1.02 * best


def test_the_last_of_two_steps_attains_the_least_squares_of_its_coefficients():
    settings = samplers.Learning(
        steps=150, batch_size=64, pool=128, held_out=128, target_steps=30, rate=0.1, robust=math.inf
    )
    learner = Learner(GAUSSIAN, settings=settings)
    solver, x = learner.learn(2, start=samplers.DPMSolverPP(2), grid="quadratic"), learner.held_out.x
    table = solver.table
    first = GAUSSIAN.denoise(x, VP.t_max)
    y = table.a[0] * x + table.b[0, 0] * first
    best = optimum(learner, [y, GAUSSIAN.denoise(y, table.t[1]), first])
    assert best < 0.5 * table.notes["formula_rms"]
    assert best * (1 - 1e-4) <= table.notes["rms"] <= 1.1 * best


def test_a_learned_solver_is_nearer_to_the_flow_than_the_best_formula_on_other_starts():
    model = oracle((2, 2)).score_model(VP)
    settings = samplers.Learning(steps=50, batch_size=32, pool=128, held_out=64, target_steps=30, rate=0.1)
    solver = samplers.learn(model, 4, settings=settings)
    x = torch.randn(256, 2, 2, generator=torch.Generator().manual_seed(5))
    flow = samplers.ProbabilityFlow(ss.solvers.Adams(60))(model, x_T=x).x
    name, grid = solver.table.notes["formula"].rsplit(", ", 1)
    formula = samplers.learning.FORMULAS[name]()

    def distance(sampler):
        return float((sampler(model, x_T=x).x - flow).square().mean().sqrt())

    assert distance(solver) < 0.8 * distance(samplers.PredictorCorrector(formula, steps=4, grid=grid))


def test_the_formula_is_chosen_on_the_pool(monkeypatch):
    formulas = {"DDIM": samplers.DDIM, "DPMSolverPP(2)": lambda: samplers.DPMSolverPP(2)}
    monkeypatch.setattr(samplers.learning, "FORMULAS", formulas)
    model = ss.GaussianMixture(f64(-1.0, 1.0)[:, None], f64(0.1, 0.1)[:, None]).score_model(VP)
    monkeypatch.setattr(samplers.learning, "FEW", 4)
    learner, distances = Learner(model, (1,), settings=dataclasses.replace(FEW, pool=64)), {}
    learner.held_out.target.add_(3.0)  # these starts cannot tell
    for name, method in formulas.items():
        for grid in samplers.learning.FORMULA_GRIDS:
            table = learner.table(method(), samplers.grids.GRIDS[grid], 4)
            distances[f"{name}, {grid}"] = learner.distance(table, math.inf, learner.pool).rms
    assert learner.formula(4)[0] == min(distances, key=lambda name: distances[name])


def test_no_steps_leave_the_formula_bit_for_bit():
    model, x = oracle((2,)).score_model(VP), torch.randn(3, 2)
    none = samplers.Learning(steps=0, batch_size=4, pool=1, held_out=8, target_steps=12)
    solver = samplers.learn(model, 5, settings=none, start=samplers.DPMSolverPP(2), grid="quadratic")
    formula = samplers.PredictorCorrector(samplers.DPMSolverPP(2), steps=5, grid="quadratic")
    assert torch.equal(solver(model, x_T=x).x, formula(model, x_T=x).x)
    assert solver.table.notes["rms"] == solver.table.notes["formula_rms"]


@pytest.mark.parametrize("sde", some("sub-vp", "ve", "ddpm", "rectified", "zero-snr-vp"))
def test_a_solver_is_learned_on_other_paths(sde):
    model, method = oracle((2,)).score_model(sde), samplers.AngularAdams()
    solver = samplers.learn(model, 3, settings=FEW, start=method)
    assert 0 < solver.table.notes["rms"] < math.inf
    assert solver(model, shape=(2, 2), seeds=[0, 1]).nfe == 3


def test_what_is_learned_depends_on_the_seed():
    model, method, tables = oracle((2,)).score_model(VP), samplers.DDIM(), []
    settings = dataclasses.replace(FEW, pool=32, rate=1.0)
    for seed in (3, 3, 4):
        learner = Learner(model, settings=settings, seed=seed)
        tables += list(
            iterates(learner.model, learner.table(method, method.grid, 2), learner.pool, settings, 0.1, 1, False)
        )
    first, same, other = (table.b for table in tables[1::2])
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_starts_have_their_conditions_also_under_guidance():
    model, label = oracle((2,)).score_model(VP), torch.tensor([0, 1, 2])
    for teacher in (model, ss.guidance.ClassifierFree(model, scale=0.5)):
        learner = Learner(teacher, (2,), {"label": label}, FEW)
        held_out = learner.held_out
        assert held_out.cond["label"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
        flow = samplers.ProbabilityFlow(ss.solvers.Adams(12))
        close(held_out.target[1:2], flow(teacher.given(label[1:2]), x_T=held_out.x[1:2]).x, rtol=1e-4, atol=1e-5)
        solver = learner.learn(2, start=samplers.DDIM())
        assert solver(teacher.given(label), x_T=held_out.x[:3]).nfe == 2 * (1 if teacher is model else 2)


def test_moving_starts_denoising_and_recomputation_are_learned_with():
    model = oracle((2,)).score_model(VP)
    options = {"radius": 0.05, "denoise_final": True, "checkpointing": True}
    settings = samplers.Learning(steps=2, batch_size=4, pool=8, held_out=8, target_steps=12, **options)
    table = samplers.learn(model, 3, settings=settings, start=samplers.DPMSolverPP(2)).table
    assert table.t[-1] == VP.t_min
    assert table.notes["radius"] == 0.05


SHAPES = {
    "mlp": (networks.MLP([2, 2]), (2, 2)),
    "unet": (networks.UNet([8, 4], channels=2, width=8, multipliers=[1, 1], blocks=1), (2, 8, 4)),
    "dit": (networks.DiT(8, 3, width=8, depth=1, heads=2), (3, 8, 8)),
    "levels": (networks.LevelHead(networks.MLP([2, 3]), 3), (2, 3)),
}


@pytest.mark.parametrize(("network", "shape"), SHAPES.values(), ids=SHAPES)
def test_a_network_declares_the_shape_of_its_states(network, shape):
    assert tuple(network.shape) == shape


class Broken(torch.nn.Module):
    """A network whose output is NaN."""

    shape = (2,)

    def forward(self, x, label, cond=None):
        return x * math.nan


@pytest.mark.parametrize(
    ("nfe", "options", "error", "message"),
    [
        (0, {}, ValueError, "nfe must be an integer >= 1; got 0"),
        (2.0, {}, ValueError, "nfe must be an integer >= 1; got 2.0"),
        (1, {"denoise_final": True}, ValueError, r"nfe must be an integer >= 2 \(denoise_final takes one of them\)"),
    ],
)
def test_an_impossible_number_of_evaluations_is_refused(nfe, options, error, message):
    settings = samplers.Learning(steps=1, pool=2, held_out=2, batch_size=2, target_steps=4, **options)
    with pytest.raises(error, match=message):
        samplers.learn(GAUSSIAN, nfe, settings=settings)


def test_a_model_that_gives_nan_or_an_unknown_shape_is_refused():
    with pytest.raises(RuntimeError, match="NONFINITE"):
        samplers.learn(ss.ScoreModel(Broken(), VP), 2, settings=FEW)
    with pytest.raises(ValueError, match=r"shape must be given, as the network declares no shape; got None: give one"):
        samplers.learn(ss.ScoreModel(lambda x, label, cond=None: x, VP), 2, settings=FEW)
    with pytest.raises(ValueError, match="deterministic method with one evaluation a step; got Heun"):
        samplers.learn(GAUSSIAN, 2, settings=FEW, start=samplers.Heun())
    with pytest.raises(ValueError, match=r"grid must come with start, .*; got grid='quadratic'"):
        samplers.learn(GAUSSIAN, 2, settings=FEW, grid="quadratic")
