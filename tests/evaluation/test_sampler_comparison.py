"""Comparison of samplers: better samplers have smaller errors on an exact score, and costs are counted."""

import csv
import math

import pytest
import torch

import scoresde as ss
from scoresde.evaluation import Reference, compare, mixture_of_three
from scoresde.evaluation.references import METRICS
from scoresde.evaluation.sampler_comparison import plus_minus, table, write_csv
from scoresde.metrics import frechet_distance, mean_error, moments, sliced_wasserstein
from scoresde.samplers import DDIM, Ancestral, DPMSolver, DPMSolverPP, Heun, Langevin, PredictorCorrector

QUICK = {"n": 1500, "batch_size": 1500, "repeats": 1, "resamples": 20, "progress": False}
TINY = {**QUICK, "n": 16, "batch_size": 16, "resamples": 4}


def of(*parts, **options):
    """A sampler as a function of its number of steps."""
    return lambda steps: PredictorCorrector(*parts, steps=steps, grid="uniform_log_snr", **options)


@pytest.fixture(scope="module")
def mixture():
    return mixture_of_three()


@pytest.fixture(scope="module")
def model(mixture):
    return mixture.score_model(ss.VP())


@pytest.fixture(scope="module")
def reference(mixture):
    return Reference.of_mixture(mixture, ss.VP(), QUICK["n"])


def figures(rows, metric):
    return {(row.sampler, row.nfe): row for row in rows if row.metric == metric}


def test_better_samplers_and_more_steps_have_smaller_errors(model, reference):
    samplers = {"ddim": of(DDIM()), "dpmpp3": of(DPMSolverPP(3)), "ancestral": of(Ancestral())}
    rows = compare(model, samplers, [10, 40], reference, **QUICK)
    distances = figures(rows, "sliced_wasserstein")
    for name in ("ddim", "ancestral"):
        assert distances[name, 40].high < distances[name, 10].low
    assert distances["dpmpp3", 10].high < distances["ddim", 10].low
    assert distances["ddim", 10].high < distances["ancestral", 10].low
    floor = distances["exact draws", 0]
    assert floor.low < distances["dpmpp3", 40].value < floor.high
    errors = figures(rows, "covariance_error")
    assert errors["dpmpp3", 40].value < 0.1 < errors["ddim", 10].value


class Gradient(ss.ModelWrapper):
    """A model with a backward pass through its network at every evaluation, as in posterior sampling."""

    def predict(self, x, t):
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            torch.autograd.grad(self.model.predict(y, t).denoised.square().sum(), y)
        return self.model.predict(x, t)


def test_evaluations_and_backward_passes_are_counted_and_within_the_budget(model, reference):
    samplers = {
        "ddim": of(DDIM()),
        "denoised": of(DDIM(), denoise_final=True),
        "heun": of(Heun()),
        "third": of(DPMSolver(3)),
        "pc": of(Ancestral(), Langevin(), denoise_final=True),
    }
    rows = compare(model, samplers, [7, 12], reference, ["mean_error"], **TINY)
    steps = {"ddim": (7, 12), "denoised": (6, 11), "heun": (3, 6), "third": (2, 4), "pc": (3, 5)}
    nfe = {"ddim": (7, 12), "denoised": (7, 12), "heun": (6, 12), "third": (6, 12), "pc": (7, 11)}
    assert [(row.sampler, row.budget, row.steps, row.nfe) for row in rows] == [
        ("exact draws", None, None, 0),
        *((name, budget, steps[name][i], nfe[name][i]) for name in samplers for i, budget in enumerate((7, 12))),
    ]
    assert all(row.seconds > 0 for row in rows[1:])
    assert {row.backward for row in rows} == {0}
    rows = compare(Gradient(model), {"ddim": of(DDIM())}, [8], reference, ["mean_error"], **TINY)
    assert [(row.nfe, row.steps, row.backward) for row in rows[1:]] == [(8, 4, 4)]
    assert table(rows)[2][:2] == ["ddim", "8 + 4 backward"]


def test_figures_are_those_of_the_samples_for_any_batches(mixture, model):
    build, metrics, reference = of(Ancestral()), list(METRICS), Reference.of_mixture(mixture, ss.VP(), 60)
    x = build(5)(model, shape=(16, 3), seeds=range(3, 19)).x
    whole = compare(model, {"a": build}, [5], reference, metrics, **TINY, seed=3)
    parts = compare(model, {"a": build}, [5], reference, metrics, **{**TINY, "batch_size": 5}, seed=3)
    assert [row.metric for row in whole] == metrics * 2
    assert [row.value for row in whole] == pytest.approx([row.value for row in parts], rel=1e-4)
    assert {row.batch for row in parts} == {5}
    assert all(row.low < row.value < row.high for row in whole)
    values = {row.metric: row.value for row in whole[6:]}
    for metric, expected in {
        "sliced_wasserstein": sliced_wasserstein(x, reference.states, reference.directions),
        "mean_error": mean_error(x, *reference.exact),
        "frechet_distance": frechet_distance(*moments(x), *moments(reference.states)),
    }.items():
        assert values[metric] == pytest.approx(float(expected), rel=1e-4)


def test_a_sampler_with_nan_samples_is_left_out_with_a_warning(model, reference):
    def broken(model, x, t_from, t_to, noise):
        return model.predict(x, t_from).denoised / (1 if len(x) == 1 else 0)

    samplers = {"broken": of(broken), "ddim": of(DDIM())}
    with pytest.warns(UserWarning, match="is left out") as caught:
        rows = compare(model, samplers, [5, 6], reference, **TINY)
    assert [str(one.message).split(": ")[0] for one in caught] == [f"broken at nfe={n} is left out" for n in (5, 6)]
    assert {row.sampler for row in rows} == {"exact draws", "ddim"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samplers": {}}, "samplers and budgets must have at least one entry"),
        ({"budgets": []}, "samplers and budgets must have at least one entry"),
        ({"budgets": [5, 0]}, r"nfe\[1\] must be an integer >= 1; got 0"),
        ({"budgets": [2.5]}, r"nfe\[0\] must be an integer >= 1; got 2.5"),
        ({"budgets": [1]}, "nfe must be at least 2, one step of heun; got 1"),
        ({"metrics": ["fid"]}, "metric must be one of sliced_wasserstein, "),
        ({"n": 3}, "n must be an integer >= 4; got 3"),
        ({"repeats": 0}, "repeats must be an integer >= 1"),
        (
            {"samplers": {"flow": lambda steps: ss.samplers.ProbabilityFlow(ss.solvers.Adams(6))}},
            r"the evaluations of flow must grow with the number of steps; got \d+ with 2 steps and \d+ with 3",
        ),
    ],
)
def test_wrong_input(model, reference, arguments, message):
    with pytest.raises(ValueError, match=message):
        compare(model, reference=reference, **{"samplers": {"heun": of(Heun())}, "budgets": [4], **TINY, **arguments})


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.23456, 0.0123, "1.235 +- 0.012"),
        (1234.5, 56.7, "1234 +- 57"),
        (-0.00032, 0.00011, "-0.00032 +- 0.00011"),
        (1.0, 1.2e-8, "1.000000 +- 1.2e-08"),
        (37207304207.0, 123456789.0, "3.721e+10 +- 1.2e+08"),
        (-2.5e-9, 1.1e-9, "-2.5e-09 +- 1.1e-09"),
        (0.0, 2e-12, "0.0e+00 +- 2.0e-12"),
        (0.25, 0.0, "0.2500"),
        (0.0, 0.0, "0.0000"),
        (0.25, None, "0.2500"),
        (0.25, math.nan, "0.2500"),
        (2.5e-9, None, "2.5e-09"),
        (math.nan, None, "nan"),
    ],
)
def test_numbers_are_printed_in_their_own_scale(value, error, text):
    """Small and large ones with exponents, and no error of 0."""
    assert plus_minus(value, error) == text


def test_the_table_and_the_csv_file_show_the_rows(model, reference, tmp_path):
    rows = compare(model, {"heun": of(Heun())}, [5, 9], reference, **TINY)
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
