"""Quality of samples: real data has that of real data, worse samples are worse, and every figure says what it is."""

import pytest
import torch
from omegaconf import OmegaConf

import scoresde as ss
from scoresde.build import Run
from scoresde.data import Affine, Digits, Levels, Toy2D
from scoresde.evaluation.quality import QualitySettings, errors, quality_of_images, quality_of_states, table
from scoresde.metrics import frechet_distance, moments, sliced_wasserstein
from scoresde.metrics.feature_statistics import FeatureStatistics
from scoresde.metrics.features import Features, Pixels
from scoresde.metrics.image_quality import METRICS
from tests.conftest import normal


def images_run(path):
    digits = {split: {"_target_": "scoresde.data.Digits", "split": split} for split in ("train", "validation", "test")}
    config = OmegaConf.create({"data": {"shape": [1, 8, 8], "range": [0, 17], **digits}})
    return Run(None, Levels(17), config, path, ss.Uniform())


def points_run(path):
    data = {
        split: {"_target_": "scoresde.data.Toy2D", "n": n, "seed": n} for split, n in (("train", 400), ("test", 300))
    }
    return Run(None, Affine(0.5, 1.0), OmegaConf.create({"data": {"shape": [2], "dequantization": None, **data}}), path)


class Classes(Pixels):
    """Pixels with logits."""

    name, digest = "classes", "abc"

    def __call__(self, images, span):
        return Features(images.flatten(1), images.flatten(1)[:, 16:26])


@pytest.fixture(scope="module")
def real():
    return torch.stack(list(Digits("validation")))


def test_columns_are_the_samples_and_the_floors(tmp_path, real):
    found = quality_of_images(images_run(tmp_path), real + 0.5, Classes(), QualitySettings())
    assert [column.what for column in found.columns] == ["samples", "training data", "half of test data"]
    assert [(column.n, column.reference_n) for column in found.columns] == [(200, 297), (200, 297), (148, 149)]
    assert all(list(column.figures) == list(METRICS) for column in found.columns)
    test = torch.stack(list(Digits("test")))
    expected = frechet_distance(*moments(real), *moments(test))
    assert found.columns[0].figures["frechet_distance"].value == pytest.approx(float(expected))
    # Real images have the figures of real images, within four of their errors.
    for metric in ("kid", "precision", "recall", "frechet_distance"):
        first, second = (column.figures[metric] for column in found.columns[:2])
        assert abs(first.value - second.value) < 4 * (first.error**2 + second.error**2) ** 0.5
    assert (found.space, found.digest, found.left_out) == ("classes", "abc", {})
    title, numbers, *lines = table(found)
    assert title == ["", "samples", "training data", "half of test data"]
    assert numbers == ["numbers", "200 : 297", "200 : 297", "148 : 149"]
    assert [line[0] for line in lines] == list(METRICS)
    assert errors(found)["kid"] == "standard deviation over 100 subsets of 100"


def test_worse_samples_are_worse(tmp_path, real):
    run, settings = images_run(tmp_path), QualitySettings(floors=[])
    noisy = (real + 4 * normal(*real.shape).float()).clamp(0, 16.9)
    good, bad = (quality_of_images(run, x + 0.05, Pixels(), settings).columns[0].figures for x in (real, noisy))
    assert bad["frechet_distance"].value > 3 * good["frechet_distance"].value
    assert bad["kid"].value > good["kid"].value
    assert bad["precision"].value < 0.3 < 0.8 < good["precision"].value
    assert "inception_score" not in good


def test_given_statistics_have_what_moments_have(tmp_path, real):
    run, values = images_run(tmp_path), real.flatten(1)
    given = FeatureStatistics(*moments(values))
    found = quality_of_images(run, real + 0.5, Classes(), QualitySettings(), given)
    assert list(found.columns[0].figures) == ["frechet_distance", "inception_score"]
    assert found.columns[0].figures["frechet_distance"].value == 0
    assert set(found.left_out) == {"kid", "precision", "recall", "halves"}
    assert found.columns[0].reference_n is None
    assert table(found)[1][1] == "200 : ?"
    other = FeatureStatistics.of(Features(values), "another space")
    with pytest.raises(ValueError, match="feature space classes expected; these are of another space"):
        quality_of_images(run, real, Classes(), QualitySettings(), other)
    small = FeatureStatistics.of(Features(values[:, :10]))
    with pytest.raises(ValueError, match=r"statistics of 64 features \(classes\) expected; got 10"):
        quality_of_images(run, real, Classes(), QualitySettings(), small)


def test_states_are_compared_in_model_space(tmp_path):
    run = points_run(tmp_path)
    samples = torch.stack(list(Toy2D(n=300, seed=7)))
    found = quality_of_states(run, samples, QualitySettings(), resamples=20)
    assert [column.what for column in found.columns] == ["samples", "training data", "half of test data"]
    assert found.space == "model space"
    figure = found.columns[0].figures["sliced_wasserstein"]
    assert figure.kind == "half the width of the 95% interval"
    test = torch.stack(list(Toy2D(n=300, seed=300)))
    rough = float(sliced_wasserstein(run.transform(samples), run.transform(test)))
    assert figure.value == pytest.approx(rough, rel=0.1)  # other directions
    shifted = quality_of_states(run, samples + 3, QualitySettings(metrics=["mmd"], floors=["halves"]), resamples=20)
    assert [list(column.figures) for column in shifted.columns] == [["mmd"], ["mmd"]]
    assert shifted.columns[0].figures["mmd"].value > 20 * shifted.columns[1].figures["mmd"].value


def test_the_training_data_is_no_floor_of_itself(tmp_path):
    found = quality_of_states(
        points_run(tmp_path), torch.stack(list(Toy2D(n=50))), QualitySettings("train"), resamples=10
    )
    assert [column.what for column in found.columns] == ["samples", "half of train data"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run, x: QualitySettings(floors=["noise"]), "floors among train, halves expected; got 'noise'"),
        (
            lambda run, x: quality_of_images(run, x[:, :, :4], Pixels(), QualitySettings()),
            r"\(N, 1, 8, 8\), expected; got",
        ),
        (lambda run, x: quality_of_images(run, x[:3], Pixels(), QualitySettings()), "four samples or more"),
        (lambda run, x: quality_of_images(run, x / 0, Pixels(), QualitySettings()), "finite samples expected"),
        (lambda run, x: quality_of_images(run, x, Pixels(), QualitySettings(metrics=["fid"])), "expected; got 'fid'"),
        (lambda run, x: quality_of_images(run, x, Pixels(), QualitySettings("all")), "names no all data"),
    ],
)
def test_wrong_input(tmp_path, real, call, message):
    with pytest.raises(ValueError, match=message):
        call(images_run(tmp_path), real)
