"""References: an exact mixture, or the data of a run as its network saw it."""

import pytest
import torch

import scoresde as ss
from scoresde.data import Levels
from scoresde.evaluation import Reference, mixture_of_three
from scoresde.evaluation.references import data_states, describe, metric_values
from scoresde.metrics import frechet_distance, moments
from scoresde.samplers import DDIM, PredictorCorrector
from tests.conftest import close, f64, normal, oracle, within
from tests.evaluation.runs import digits_run

SDE = ss.VP()


def test_the_oracle_has_three_rotated_anisotropic_gaussians():
    mixture = mixture_of_three()
    assert describe(mixture) == "3 rotated Gaussians over (3,), weights 0.5, 0.3, 0.2, standard deviations 0.1 to 0.6"
    close(torch.linalg.det(mixture.rotation), f64(1.0, 1.0, 1.0))
    assert float((mixture.rotation - torch.eye(3)).abs().amax(dim=(1, 2)).min()) > 0.3
    assert 0.5 < float(mixture.covariance().trace()) / 3 < 1


def test_the_reference_has_the_moments_of_the_marginal_and_an_independent_floor():
    mixture = mixture_of_three()
    reference = Reference.of_mixture(mixture, ss.VP(t_min=0.1), 20_000)
    mean, covariance = reference.exact
    within(reference.states, mean)
    within((reference.states - mean)[:, :, None] * (reference.states - mean)[:, None], covariance)
    assert not torch.equal(covariance, mixture.covariance())
    assert abs(float((reference.states * reference.truth).mean() - mean.square().mean())) < 0.02


# --- the data of a run


def test_states_are_dequantised_and_transformed_as_in_training(tmp_path):
    test = torch.stack(list(ss.data.Digits("test")))
    run = digits_run(tmp_path)
    states = data_states(run, "test", 5000)
    assert torch.equal(Levels(17).quantise(states), test.double())
    within((Levels(17).inverse(states) - test).reshape(-1, 1), torch.tensor([0.5]))
    assert torch.equal(data_states(run, "test", 5000), states)
    assert not torch.equal(data_states(run, "test", 5000, seed=1), states)
    assert torch.equal(Levels(17).quantise(data_states(run, "test", 3)), test[[0, 148, 296]].double())
    scaled = {"transform": {"_target_": "scoresde.data.Affine", "scale": 0.125}, "dequantization": None}
    close(data_states(digits_run(tmp_path, training=scaled), "test", 5000), test.double() / 8)


def test_images_are_compared_in_principal_components_of_the_training_data(tmp_path):
    reference = Reference.of_run(digits_run(tmp_path), 100)
    assert (str(reference.features), reference.name) == ("pca-32", "297 of test data")
    assert (reference.floor, len(reference.truth)) == ("training data", 100)
    covariance = moments(reference.features(data_states(digits_run(tmp_path), "train", 5000, seed=297)))[1]
    assert float((covariance - covariance.diagonal().diag()).abs().max()) < 1e-9
    rough = PredictorCorrector(DDIM(), steps=3, grid="uniform_log_snr")
    samples = rough(oracle((1, 8, 8)).score_model(SDE), shape=(100, 1, 8, 8), seeds=range(100)).x
    floor, rows = (list(metric_values(x, reference, resamples=10)) for x in (reference.truth, samples))
    assert [row[:2] for row in rows] == [
        ("frechet_distance", "pca-32"),
        ("sliced_wasserstein", "state"),
        ("mmd", "state"),
    ]
    expected = frechet_distance(*moments(reference.features(samples)), *moments(reference.features(reference.states)))
    assert rows[0][2].value == pytest.approx(float(expected))
    assert floor[0][2].high < rows[0][2].low


def test_data_that_is_not_finite_is_named_with_its_number(tmp_path):
    run = digits_run(tmp_path, test={"_target_": "tests.evaluation.runs.broken"}, dequantization=None)
    with pytest.raises(ValueError, match=r"the test data of .* must be finite; got NaN or infinity in 3 of 20 samples"):
        Reference.of_run(run, 100, trust=["tests"])
    x = normal(8, 2)
    for states, truth, name in (
        (x / 0, x, "the states of the reference"),
        (x, x / 0, r"the noise floor \(exact draws\)"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be finite; got NaN or infinity in 8 of 8 samples"):
            Reference(states, truth, "test")


def test_missing_or_too_little_data_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no validation data: set data.validation in its config.yaml"):
        Reference.of_run(digits_run(tmp_path, validation=None), 100, "validation")
    few = {"_target_": "scoresde.data.Toy2D", "n": 3}
    with pytest.raises(ValueError, match=r"the test data of .* must have at least 4 samples; got 3"):
        Reference.of_run(digits_run(tmp_path, test=few), 100)
