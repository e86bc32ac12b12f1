"""What samples are compared with: an exact mixture, or a run's data as its network saw them."""

import pytest
import torch
from omegaconf import OmegaConf

import scoresde as ss
from scoresde.build import Run
from scoresde.data import Levels
from scoresde.evaluation import Reference, mixture_of_three
from scoresde.evaluation.references import METRICS, check_metrics, data_states, describe, figures
from scoresde.metrics import frechet_distance, moments, sliced_wasserstein
from scoresde.samplers import DDIM, PredictorCorrector
from tests.conftest import close, normal, oracle, within

SDE = ss.VP()


@pytest.fixture(scope="module")
def mixture():
    return mixture_of_three()


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


def test_figures_are_those_of_the_metrics(mixture):
    reference = Reference.of_mixture(mixture, SDE, 300)
    x = normal(200, 3)
    found = {name: interval for name, _, interval in figures(x, reference, list(METRICS), resamples=10)}
    assert list(found) == list(METRICS)
    expected = sliced_wasserstein(x, reference.states, reference.directions)
    assert found["sliced_wasserstein"].value == pytest.approx(float(expected))
    expected = frechet_distance(*moments(x), *moments(reference.states))
    assert found["frechet_distance"].value == pytest.approx(float(expected))
    assert all(one.low < one.value < one.high for one in found.values())
    assert check_metrics(None, reference) == reference.metrics
    with pytest.raises(ValueError, match=r"metrics among sliced_wasserstein, .* expected; got 'fid'"):
        check_metrics(["fid"], reference)


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
    rough = PredictorCorrector(DDIM(), steps=3, grid="uniform_log_snr")
    drawn = rough(oracle((1, 8, 8)).score_model(SDE), shape=(100, 1, 8, 8), seeds=range(100)).x
    floor, found = (list(figures(x, reference, reference.metrics, 10)) for x in (reference.truth, drawn))
    assert [row[:2] for row in found] == [
        ("frechet_distance", "pca-32"),
        ("sliced_wasserstein", "state"),
        ("mmd", "state"),
    ]
    assert floor[0][2].high < found[0][2].low


def test_a_run_without_such_data(tmp_path):
    with pytest.raises(ValueError, match=r"names no validation data: set data.validation in its config.yaml"):
        Reference.of_run(a_run(tmp_path), 100, "validation")
    few = {"_target_": "scoresde.data.Toy2D", "n": 3}
    with pytest.raises(ValueError, match=r"4 samples or more of test data expected; .* has 3"):
        Reference.of_run(a_run(tmp_path, test=few), 100)
