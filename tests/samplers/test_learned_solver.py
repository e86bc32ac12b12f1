"""Tables of coefficients as samplers: equal to the formulas they hold, stored and loaded, refused on another path."""

import dataclasses
import math

import pytest
import safetensors.torch
import torch

import scoresde as ss
from scoresde import samplers
from scoresde.samplers.grids import quadratic
from scoresde.samplers.learned_solver import LearnedSolver, SolverTable, StoredSolver, solver_file
from tests.conftest import close, f64, normal, oracle
from tests.samplers.methods import EVERY_PATH

VP = ss.VP()
MODEL, X = oracle((2,)).score_model(VP), normal(3, 2)
# Methods without and with a corrector, of each view.
METHODS = {
    "ddim": (samplers.DDIM(), True),
    "dpm-solver++-2": (samplers.DPMSolverPP(2), True),
    "dpm-solver++-3": (samplers.DPMSolverPP(3, final=1), True),
    "deis": (samplers.DEIS(3), True),
    "ipndm": (samplers.IPNDM(3), True),
    "unipc-3": (samplers.UniPC(3), False),
    "angular-adams": (samplers.AngularAdams(3, 2), False),
}


def table(method=None, sde=VP, steps=4, denoise_final=False):
    return SolverTable.of(method or samplers.DPMSolverPP(2), sde, quadratic(sde, steps), denoise_final)


@pytest.mark.parametrize("denoise_final", [False, True], ids=["", "denoised"])
@pytest.mark.parametrize(("method", "is_exact"), METHODS.values(), ids=METHODS)
def test_a_table_is_the_formula_it_holds(method, is_exact, denoise_final):
    """Bit for bit; where a corrector, or the denoising from another view, is moved into the row, within rounding."""
    formula = samplers.PredictorCorrector(method, steps=4, grid="quadratic", denoise_final=denoise_final)
    expected, held = formula(MODEL, x_T=X), LearnedSolver(table(method, denoise_final=denoise_final))(MODEL, x_T=X)
    assert held.nfe == expected.nfe == 4 + denoise_final
    if is_exact and not (denoise_final and method.view != "denoised"):
        assert torch.equal(held.x, expected.x)
    close(held.x, expected.x, rtol=1e-12, atol=1e-12)


@EVERY_PATH
def test_a_table_holds_a_formula_on_every_path(sde):
    model = oracle((2,)).score_model(sde)
    formula = samplers.PredictorCorrector(samplers.AngularAdams(), steps=6, denoise_final=True)
    held = LearnedSolver(SolverTable.of(samplers.AngularAdams(), sde, samplers.angle(sde, 6), denoise_final=True))
    x = sde.prior_std * X
    expected = formula(model, x_T=x).x
    close(held(model, x_T=x).x, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_a_sample_depends_on_its_seed_and_not_on_its_batch():
    solver, model = LearnedSolver(table()), oracle((2, 2)).score_model(VP)
    together = solver(model, shape=(3, 2, 2), seeds=[3, 1, 4], trajectory=True)
    alone = torch.cat([solver(model, shape=(1, 2, 2), seeds=[seed]).x for seed in (3, 1, 4)])
    close(alone, together.x, rtol=1e-5, atol=1e-5)
    assert (together.x[1:] - together.x[0]).abs().amax(dim=(1, 2)).min() > 1e-2
    assert together.trajectory.shape == (5, 3, 2, 2)


def test_a_stored_solver_draws_the_same_samples(tmp_path):
    learned = dataclasses.replace(table(samplers.AngularAdams()), notes={"formula": "AngularAdams", "rms": 0.5})
    learned.save(solver_file(tmp_path, 4))
    solver = StoredSolver(str(tmp_path), 4)
    assert torch.equal(solver(MODEL, x_T=X).x, LearnedSolver(learned)(MODEL, x_T=X).x)
    assert (solver.nfe, solver.table.notes, solver.table.view) == (4, learned.notes, "v")


def test_a_file_that_holds_no_solver_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no learned solver at .*nfe3.safetensors: learn it by `scoresde disti"
    ):
        StoredSolver(str(tmp_path), 3)
    with pytest.raises(ValueError, match="nfe must be an integer >= 1"):
        StoredSolver(str(tmp_path), 0)
    path = tmp_path / "nfe4.safetensors"
    table().save(path)
    tensors = safetensors.torch.load_file(path)
    about = {"format": "scoresde solver 1", "view": "denoised", "notes": "{}"}
    wrong = {
        "must hold a learned solver": b"no safetensors",
        "format": safetensors.torch.save(tensors, {**about, "format": "other"}),
        "a of a table must be finite": safetensors.torch.save({**tensors, "a": tensors["a"] * math.nan}, about),
        "b of a table must be finite float64 numbers of shape": safetensors.torch.save(
            {**tensors, "b": tensors["b"][:2].contiguous()}, about
        ),
        "tensor b": safetensors.torch.save({name: x for name, x in tensors.items() if name != "b"}, about),
        "view must be one of": safetensors.torch.save(tensors, {**about, "view": "score"}),
    }
    for message, content in wrong.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            SolverTable.load(path)


@pytest.mark.parametrize(
    ("sde", "message"),
    [
        (ss.VP(t_min=1e-3), "must have the times of the model, from 0.001 to 1; got one learned for 1e-05 to 1"),
        (ss.VP(beta_max=19.9), "must be learned for the path of the model, VP; got one for another alpha or sigma"),
        (ss.SubVP(), "must be learned for the path of the model, SubVP"),
    ],
    ids=["times", "schedule", "kind"],
)
def test_a_model_on_another_path_is_refused(sde, message):
    with pytest.raises(ValueError, match=message):
        LearnedSolver(table())(oracle((2,)).score_model(sde), x_T=X)


@pytest.mark.parametrize(
    "method",
    [samplers.Heun(), samplers.Ancestral(), samplers.DPMSolverPP(2, l=0.5)],
    ids=["heun", "ancestral", "dpmpp2_sde"],
)
def test_a_method_that_is_no_table_is_refused(method):
    with pytest.raises(ValueError, match="deterministic method with one evaluation a step; got "):
        table(method)


def test_times_must_fall_from_the_prior():
    good = table()
    for times in (f64(1.0, 0.5, 0.6, 0.1), f64(0.9, 0.5, 0.3, 0.1), f64(1.0, 0.5, 0.3, 0.0)):
        with pytest.raises(ValueError, match="the times must fall from 1 to at least 1e-05; got"):
            dataclasses.replace(good, t=times)
