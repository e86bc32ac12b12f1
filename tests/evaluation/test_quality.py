"""Quality of samples: real data has the figures of real data, worse samples are worse, figures name their errors."""

import pytest
import torch
from omegaconf import OmegaConf

from scoresde.build import Run
from scoresde.data import Affine, Digits, Toy2D
from scoresde.evaluation.quality import QualitySettings, errors, quality_of_images, quality_of_states, table
from scoresde.metrics import frechet_distance, moments, sliced_wasserstein
from scoresde.metrics.feature_statistics import FeatureStatistics
from scoresde.metrics.features import Features, Pixels
from scoresde.metrics.image_quality import METRICS
from tests.evaluation.runs import digits, digits_run


def points_run(path):
    toy = {
        split: {"_target_": "scoresde.data.Toy2D", "n": n, "seed": n} for split, n in (("train", 400), ("test", 300))
    }
    return Run(None, Affine(0.5, 1.0), OmegaConf.create({"data": {"shape": [2], "dequantization": None, **toy}}), path)


class Classes(Pixels):
    """Pixels with logits."""

    name, digest = "classes", "abc"

    def __call__(self, images, span):
        return Features(images.flatten(1), images.flatten(1)[:, 16:26])


@pytest.fixture(scope="module")
def real():
    return torch.stack(list(Digits("validation")))


def test_real_images_have_the_figures_of_the_noise_floors(tmp_path, real):
    quality = quality_of_images(digits_run(tmp_path), real + 0.5, Classes(), QualitySettings())
    assert [(column.what, column.n, column.reference_n) for column in quality.columns] == [
        ("samples", 200, 297),
        ("training data", 200, 297),
        ("half of test data", 148, 149),
    ]
    assert all(list(column.values) == list(METRICS) for column in quality.columns)
    expected = frechet_distance(*moments(real), *moments(torch.stack(list(Digits("test")))))
    assert quality.columns[0].values["frechet_distance"].value == pytest.approx(float(expected))
    for metric in ("kid", "precision", "recall", "frechet_distance"):
        first, second = (column.values[metric] for column in quality.columns[:2])
        assert abs(first.value - second.value) < 4 * (first.error**2 + second.error**2) ** 0.5
    assert (quality.space, quality.digest, quality.left_out) == ("classes", "abc", {})
    titles, numbers, *lines = table(quality)
    assert titles == ["", "samples", "training data", "half of test data"]
    assert numbers == ["numbers", "200 : 297", "200 : 297", "148 : 149"]
    assert [line[0] for line in lines] == list(METRICS)
    assert errors(quality)["kid"] == "standard deviation over 100 subsets of 100"


def test_given_statistics_without_features_have_the_metrics_of_moments(tmp_path, real):
    run, values = digits_run(tmp_path), real.flatten(1)
    statistics = FeatureStatistics(*moments(values))
    quality = quality_of_images(run, real + 0.5, Classes(), QualitySettings(), statistics)
    samples = quality.columns[0]
    assert list(samples.values) == ["frechet_distance", "inception_score"]
    assert (samples.values["frechet_distance"].value, samples.reference_n) == (0, None)
    assert set(quality.left_out) == {"kid", "precision", "recall", "halves"}
    assert table(quality)[1][1] == "200 : ?"
    for features, space, message in (
        (values, "another space", "must be of the feature space classes; got one of another space"),
        (values[:, :10], "", "the reference must have the 64 features of classes; got 10"),
    ):
        with pytest.raises(ValueError, match=message):
            quality_of_images(run, real, Classes(), QualitySettings(), FeatureStatistics.of(Features(features), space))


def test_samples_in_another_unit_than_the_data_are_warned_about(tmp_path, real):
    with pytest.warns(UserWarning, match=r"values from 0 to 1 fill only 6.2% of the span \(0, 16\)"):
        quality_of_images(digits_run(tmp_path), real / 16, Pixels(), QualitySettings(metrics=["frechet_distance"]))


def test_states_are_compared_in_model_space(tmp_path):
    run, samples = points_run(tmp_path), torch.stack(list(Toy2D(n=300, seed=7)))
    quality = quality_of_states(run, samples, QualitySettings(), resamples=20)
    assert [column.what for column in quality.columns] == ["samples", "training data", "half of test data"]
    assert quality.space == "model space"
    figure = quality.columns[0].values["sliced_wasserstein"]
    assert figure.kind == "half the width of the 95% interval"
    test = torch.stack(list(Toy2D(n=300, seed=300)))
    expected = float(sliced_wasserstein(run.transform(samples), run.transform(test)))
    assert figure.value == pytest.approx(expected, rel=0.1)  # other directions
    shifted = quality_of_states(run, samples + 3, QualitySettings(metrics=["mmd"], floors=["halves"]), resamples=20)
    assert [list(column.values) for column in shifted.columns] == [["mmd"], ["mmd"]]
    assert shifted.columns[0].values["mmd"].value > 20 * shifted.columns[1].values["mmd"].value
    of_training = quality_of_states(run, samples[:50], QualitySettings("train"), resamples=10)
    assert [column.what for column in of_training.columns] == ["samples", "half of train data"]  # no training floor


@pytest.mark.parametrize(
    ("samples", "settings", "message"),
    [
        (lambda x: x, {"floors": ["noise"]}, "noise floor must be one of train, halves; got 'noise'"),
        (lambda x: x[:, :, :4], {}, r"must have shape \(N, 1, 8, 8\) with N >= 4; got \(200, 1, 4, 8\)"),
        (lambda x: x[:3], {}, "with N >= 4; got"),
        (lambda x: x / 0, {}, "the samples must be finite; got NaN or infinity in 200 of 200 samples"),
        (lambda x: x, {"metrics": ["fid"]}, "metric must be one of .*; got 'fid'"),
        (lambda x: x, {"split": "all"}, "has no all data"),
        (lambda x: x, {"split": "copy"}, "train images that are not also in the copy data; got 0"),
    ],
)
def test_wrong_input(tmp_path, real, samples, settings, message):
    run = digits_run(tmp_path, copy=digits("train"))
    with pytest.raises(ValueError, match=message):
        quality_of_images(run, samples(real), Pixels(), QualitySettings(**settings))


class Digit(Classes):
    """Logits of the digits that are always those of the digit 3."""

    def __init__(self, classes=10, names=None):
        self.classes, self.train = classes, OmegaConf.create({"class_names": names}) if names else None

    def __call__(self, images, span):
        return Features(images.flatten(1), torch.eye(self.classes)[3].expand(len(images), -1))


def test_samples_with_labels_have_a_class_accuracy(tmp_path, real):
    run, labels = digits_run(tmp_path), torch.arange(200) % 10
    run.config.class_names = {"label": [str(digit) for digit in range(10)]}
    run.model = torch.nn.Identity()

    def quality(space, labels=labels, **settings):
        return quality_of_images(run, real + 0.5, space, QualitySettings(floors=(), **settings), labels=labels)

    full = quality(Digit())
    assert list(full.columns[0].values) == [*METRICS, "class_accuracy"]
    assert full.columns[0].values["class_accuracy"].value == 0.1
    only = quality(Digit(names={"label": [str(digit) for digit in range(10)]}), metrics=["class_accuracy"])
    assert list(only.columns[0].values) == ["class_accuracy"]
    for space, labels_of, reason in (
        (Digit(), None, "the samples were drawn without labels"),
        (Pixels(), labels, "the feature space has no classes"),
        (Digit(7), labels, "the feature space has 7 classes, the run has 10"),
        (Digit(names={"label": list("abcdefghij")}), labels, "the feature space has the classes a, b, c, d, e"),
    ):
        result = quality(space, labels_of, metrics=["precision", "class_accuracy"])
        assert list(result.columns[0].values) == ["precision"]
        assert result.left_out["class_accuracy"].startswith(reason)
