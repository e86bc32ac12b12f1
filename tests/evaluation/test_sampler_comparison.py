"""Samplers side by side: on an exact score, what is known to be better is, and every figure is what it says."""

import csv
import warnings

import pytest
import torch

import scoresde as ss
from scoresde.evaluation import Reference, compare, mixture_of_three
from scoresde.evaluation.references import METRICS
from scoresde.evaluation.sampler_comparison import table, write_csv
from scoresde.metrics import frechet_distance, mean_error, moments, sliced_wasserstein
from scoresde.samplers import DDIM, Ancestral, DPMSolver, DPMSolverPP, Heun, Langevin, PredictorCorrector

SDE = ss.VP()
QUICK = {"n": 1500, "batch_size": 1500, "repeats": 1, "resamples": 20, "progress": False}
TINY = {**QUICK, "n": 16, "batch_size": 16, "resamples": 4}


def of(*parts, **options):
    """A sampler of any number of steps."""
    return lambda steps: PredictorCorrector(*parts, steps=steps, grid="uniform_log_snr", **options)


@pytest.fixture(scope="module")
def mixture():
    return mixture_of_three()


@pytest.fixture(scope="module")
def reference(mixture):
    return Reference.of_mixture(mixture, SDE, QUICK["n"])


def figures(rows, metric):
    return {(row.sampler, row.nfe): row for row in rows if row.metric == metric}


def test_a_better_sampler_and_more_steps_have_a_smaller_error(mixture, reference):
    samplers = {"ddim": of(DDIM()), "dpmpp3": of(DPMSolverPP(3)), "ancestral": of(Ancestral())}
    rows = compare(mixture.score_model(SDE), samplers, [10, 40], reference, **QUICK)
    found = figures(rows, "sliced_wasserstein")
    for name in ("ddim", "ancestral"):
        assert found[name, 40].high < found[name, 10].low
    assert found["dpmpp3", 10].high < found["ddim", 10].low
    assert found["ddim", 10].high < found["ancestral", 10].low
    floor = found["exact draws", 0]
    assert floor.low < found["dpmpp3", 40].value < floor.high
    moments_of = figures(rows, "covariance_error")
    assert moments_of["dpmpp3", 40].value < 0.1 < moments_of["ddim", 10].value


def test_evaluations_are_counted_and_within_the_budget(mixture, reference):
    samplers = {
        "ddim": of(DDIM()),
        "denoised": of(DDIM(), denoise_final=True),
        "heun": of(Heun()),
        "third": of(DPMSolver(3)),
        "pc": of(Ancestral(), Langevin(), denoise_final=True),
    }
    rows = compare(mixture.score_model(SDE), samplers, [7, 12], reference, ["mean_error"], **TINY)
    assert [(row.sampler, row.budget, row.steps, row.nfe) for row in rows] == [
        ("exact draws", None, None, 0),
        ("ddim", 7, 7, 7),
        ("ddim", 12, 12, 12),
        ("denoised", 7, 6, 7),
        ("denoised", 12, 11, 12),
        ("heun", 7, 3, 6),
        ("heun", 12, 6, 12),
        ("third", 7, 2, 6),
        ("third", 12, 4, 12),
        ("pc", 7, 3, 7),
        ("pc", 12, 5, 11),
    ]
    assert all(row.seconds > 0 for row in rows[1:])
    assert {row.backward for row in rows} == {0}
    assert rows[0].seconds is None


class Gradient(ss.ModelWrapper):
    """A model that asks for a gradient through its network at every evaluation, as posterior sampling does."""

    def predict(self, x, t):
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            torch.autograd.grad(self.model.predict(y, t).denoised.square().sum(), y)
        return self.model.predict(x, t)


def test_backward_passes_are_counted_beside_evaluations_and_shown(mixture, reference):
    model = Gradient(mixture.score_model(SDE))
    rows = compare(model, {"ddim": of(DDIM())}, [8], reference, ["mean_error"], **TINY)
    assert [(row.nfe, row.steps, row.backward) for row in rows[1:]] == [(8, 4, 4)]
    assert table(rows)[2][:2] == ["ddim", "8 + 4 backward"]


def test_figures_are_those_of_the_samples_whatever_their_batches(mixture, reference):
    build, model = of(Ancestral()), mixture.score_model(SDE)
    x = build(5)(model, shape=(16, 3), seeds=range(3, 19)).x
    every = list(METRICS)
    whole = compare(model, {"a": build}, [5], reference, every, **TINY, seed=3)
    parts = compare(model, {"a": build}, [5], reference, every, **{**TINY, "batch_size": 5}, seed=3)
    assert [row.metric for row in whole] == every * 2
    assert [row.value for row in whole] == pytest.approx([row.value for row in parts], rel=1e-4)
    assert {row.batch for row in parts} == {5}
    found = {row.metric: row.value for row in whole[6:]}
    assert found["sliced_wasserstein"] == pytest.approx(
        float(sliced_wasserstein(x, reference.states, reference.directions)), rel=1e-4
    )
    assert found["mean_error"] == pytest.approx(float(mean_error(x, *reference.exact)), rel=1e-4)
    frechet = frechet_distance(*moments(x), *moments(reference.states))
    assert found["frechet_distance"] == pytest.approx(float(frechet), rel=1e-4)


def test_a_sampler_that_gives_nan_is_left_out_with_a_warning(mixture, reference):
    def broken(model, x, t_from, t_to, noise):
        return model.predict(x, t_from).denoised / (1 if len(x) == 1 else 0)

    samplers = {"broken": of(broken), "ddim": of(DDIM())}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = compare(mixture.score_model(SDE), samplers, [5, 6], reference, **TINY)
    assert [str(one.message).split(": ")[0] for one in caught] == [f"broken at nfe={n} is left out" for n in (5, 6)]
    assert {row.sampler for row in rows} == {"exact draws", "ddim"}


def test_a_sampler_whose_cost_no_steps_change_has_no_budget(mixture, reference):
    flow = lambda steps: ss.samplers.ProbabilityFlow(ss.solvers.Adams(6))  # noqa: E731
    with pytest.raises(ValueError, match=r"whose evaluations grow with its steps expected; flow has \d+ and \d+"):
        compare(mixture.score_model(SDE), {"flow": flow}, [5], reference, **TINY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samplers": {}}, "one sampler or more, and one budget or more, expected"),
        ({"budgets": []}, "one sampler or more, and one budget or more, expected"),
        ({"budgets": [5, 0]}, r"nfe\[1\] as a whole number of 1 or more expected; got 0"),
        ({"budgets": [2.5]}, r"nfe\[0\] as a whole number of 1 or more expected; got 2.5"),
        ({"budgets": [1]}, "nfe=2 or more, one step of heun, expected; got nfe=1"),
        ({"metrics": ["fid"]}, "metrics among sliced_wasserstein, .* expected; got 'fid'"),
        ({"n": 3}, "n as a whole number of 4 or more expected; got 3"),
        ({"repeats": 0}, "repeats as a whole number of 1 or more"),
    ],
    ids=str,
)
def test_wrong_input(mixture, reference, arguments, message):
    given = {"samplers": {"heun": of(Heun())}, "budgets": [4], **TINY, **arguments}
    with pytest.raises(ValueError, match=message):
        compare(mixture.score_model(SDE), reference=reference, **given)


# --- what is shown


def test_the_table_and_the_csv(mixture, reference, tmp_path):
    rows = compare(mixture.score_model(SDE), {"heun": of(Heun())}, [5, 9], reference, **TINY)
    titles, *lines = table(rows)
    assert titles == ["sampler", "NFE", "seconds", "sliced_wasserstein", "mean_error", "covariance_error"]
    assert [line[:2] for line in lines] == [["exact draws", "-"], ["heun", "4"], ["heun", "8"]]
    value, width = map(float, lines[2][4].split(" +- "))
    row = figures(rows, "mean_error")["heun", 8]
    assert width == pytest.approx((row.high - row.low) / 2, rel=0.06)
    assert value == pytest.approx(row.value, abs=0.1 * width)
    path = write_csv(rows, tmp_path / "new" / "comparison.csv")
    with path.open() as file:
        first, *others = csv.DictReader(file)
    assert (first["sampler"], first["budget"], first["seconds"]) == ("exact draws", "", "")
    assert [float(line["value"]) for line in others] == [row.value for row in rows[1:]]
    assert [file.name for file in path.parent.iterdir()] == ["comparison.csv"]
