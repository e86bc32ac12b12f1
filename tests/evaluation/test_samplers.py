"""Samplers side by side: on an exact score, what is known to be better is, and every figure is what it says."""

import csv
import warnings

import pytest
import torch
from omegaconf import OmegaConf

import scoresde as ss
from scoresde.build import Run
from scoresde.data import Levels
from scoresde.evaluation import Reference, compare, mixture_of_three
from scoresde.evaluation.samplers import METRICS, data_states, describe, table, write_csv
from scoresde.metrics import frechet_distance, mean_error, moments, sliced_wasserstein
from scoresde.samplers import DDIM, Ancestral, DPMSolver, DPMSolverPP, Heun, Langevin, PredictorCorrector
from tests.conftest import close, oracle, within

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


def test_the_oracle_is_three_rotated_anisotropic_gaussians(mixture):
    assert mixture.means.shape == (3, 3)
    assert describe(mixture) == ("3 rotated Gaussians over (3,), weights 0.5, 0.3, 0.2, standard deviations 0.1 to 0.6")
    rotation = mixture.rotation
    close(torch.linalg.det(rotation), torch.ones(3, dtype=torch.float64))
    assert float((rotation - torch.eye(3)).abs().amax(dim=(1, 2)).min()) > 0.3
    assert 0.5 < float(mixture.covariance().trace()) / 3 < 1


def test_the_reference_has_the_moments_of_the_marginal(mixture):
    rough = ss.VP(t_min=0.1)
    reference = Reference.of_mixture(mixture, rough, 20_000)
    mean, covariance = reference.exact
    within(reference.states, mean)
    within((reference.states - mean)[:, :, None] * (reference.states - mean)[:, None], covariance)
    assert not torch.equal(covariance, mixture.covariance())
    assert abs(float((reference.states * reference.truth).mean() - mean.square().mean())) < 0.02  # other draws


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
    assert rows[0].seconds is None


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
    def broken(model, x, t_from, t_to, noise, cond):
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


# --- a run's data


def a_run(tmp_path, **data):
    digits = {split: {"_target_": "scoresde.data.Digits", "split": split} for split in ("train", "test")}
    config = OmegaConf.create({"data": {**digits, "validation": None, **data}})
    model = oracle((1, 8, 8)).score_model(SDE)
    return Run(model, Levels(17), config, tmp_path, ss.Uniform())


def test_data_are_as_the_network_saw_them(tmp_path):
    test = torch.stack(list(ss.data.Digits("test")))
    run = a_run(tmp_path)
    states = data_states(run, "test", 5000)
    assert states.shape == (297, 1, 8, 8)
    assert torch.equal(Levels(17).quantise(states), test.double())
    inside = Levels(17).inverse(states) - test
    within(inside.reshape(-1, 1), torch.tensor([0.5]))
    assert torch.equal(data_states(run, "test", 5000), states)
    assert not torch.equal(data_states(run, "test", 5000, seed=1), states)
    assert torch.equal(Levels(17).quantise(data_states(run, "test", 3)), test[[0, 148, 296]].double())
    scaled = {"transform": {"_target_": "scoresde.data.Affine", "scale": 0.125}, "dequantization": None}
    close(data_states(a_run(tmp_path, training=scaled), "test", 5000), test.double() / 8)


def test_images_are_compared_in_features_fitted_to_the_training_data(tmp_path):
    reference = Reference.of_run(a_run(tmp_path), 100)
    assert str(reference.features) == "pca-32"
    assert reference.name == "297 of test data"
    assert (reference.floor, len(reference.truth)) == ("training data", 100)
    training = reference.features(data_states(a_run(tmp_path), "train", 5000, seed=297))
    off_diagonal = moments(training)[1]
    assert float((off_diagonal - off_diagonal.diagonal().diag()).abs().max()) < 1e-9
    rows = compare(oracle((1, 8, 8)).score_model(SDE), {"ddim": of(DDIM())}, [3], reference, **{**TINY, "n": 100})
    space = {row.metric: row.space for row in rows}
    assert space == {"frechet_distance": "pca-32", "sliced_wasserstein": "state", "mmd": "state"}
    found = figures(rows, "frechet_distance")
    assert found["training data", 0].high < found["ddim", 3].low


def test_a_run_without_such_data(tmp_path):
    with pytest.raises(ValueError, match=r"names no validation data: set data.validation in its config.yaml"):
        Reference.of_run(a_run(tmp_path), 100, "validation")
    few = {"_target_": "scoresde.data.Toy2D", "n": 3}
    with pytest.raises(ValueError, match=r"4 samples or more of test data expected; .* has 3"):
        Reference.of_run(a_run(tmp_path, test=few), 100)


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
