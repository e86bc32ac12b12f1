"""Images of a run: samples as stored levels, and statistics of the data that are computed once."""

import pytest
import torch

from scoresde.data import Digits
from scoresde.evaluation.image_data import data_statistics, is_of_images, shared_extract, span_of, to_levels
from scoresde.metrics import moments
from scoresde.metrics.features import Features, Pixels, extract
from tests.conftest import normal
from tests.evaluation.runs import digits, digits_run

SCALED = {"transform": {"_target_": "scoresde.data.Affine", "scale": 2 / 255, "shift": -1.0}, "dequantization": None}


def test_dequantised_samples_are_rounded_down_and_clipped(tmp_path):
    run = digits_run(tmp_path)
    assert span_of(run) == (0, 16)
    assert to_levels(run, torch.tensor([-0.5, 0.0, 0.99, 3.5, 16.99, 18.0])).tolist() == [0, 0, 0, 3, 16, 16]


def test_samples_of_a_network_trained_on_levels_are_rounded_to_the_nearest(tmp_path):
    run, levels = digits_run(tmp_path, 256, training=SCALED), torch.arange(256.0)
    for noise in (-0.4, 0.4):
        states = (levels + noise) * 2 / 255 - 1  # in model space
        assert torch.equal(to_levels(run, run.transform.inverse(states)), levels)


def test_integers_are_levels_and_continuous_data_is_unchanged(tmp_path):
    levels = torch.arange(256, dtype=torch.uint8)
    for training in (SCALED, None):
        assert torch.equal(to_levels(digits_run(tmp_path, 256, training=training), levels), levels.float())
    run, x = digits_run(tmp_path, dequantization=None), normal(3).float() * 30
    assert span_of(run) == (0, 17)
    assert torch.equal(to_levels(run, x), x)
    with pytest.raises(ValueError, match=r"set data.range=\[low, high\]"):
        span_of(digits_run(tmp_path, range=None))
    assert is_of_images(run)
    assert not is_of_images(digits_run(tmp_path, shape=[2]))


def test_shared_features_equal_those_of_one_process():
    x = normal(10, 1, 2, 2)
    assert torch.equal(shared_extract(Pixels(), x, (-3, 3), 3, "cpu").values, extract(Pixels(), x, (-3, 3)).values)


class Counted(Pixels):
    calls = 0

    def __call__(self, images, span):
        type(self).calls += 1
        return super().__call__(images, span)


def test_statistics_are_those_of_the_split_and_computed_once(tmp_path):
    run, space = digits_run(tmp_path), Counted()
    first = data_statistics(run, "test", space)
    calls = Counted.calls
    second = data_statistics(run, "test", space)
    assert Counted.calls == calls > 0
    images = torch.stack(list(Digits("test"))) / 8 - 1
    for statistics in (first, second):
        assert torch.equal(statistics.features.values, images.flatten(1))
        assert torch.equal(statistics.covariance, moments(images)[1])
    few = data_statistics(run, "test", space, tmp_path / "elsewhere", most=5)
    assert len(list((tmp_path / "elsewhere" / "test").iterdir())) == 1
    assert torch.equal(few.features.values, images[[0, 74, 148, 222, 296]].flatten(1))


def test_data_beyond_the_range_of_the_run_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"span=\(0, 1\); got values from 0 to 16, .* outside the span by more than its width"
    ):
        data_statistics(digits_run(tmp_path, range=[0, 2]), "test", Pixels())


def test_features_that_are_not_finite_are_refused_and_not_stored(tmp_path):
    class Broken(Pixels):
        def __call__(self, images, span):
            values = images.flatten(1)
            return Features(torch.where(values[:, 20:21] > 12, torch.nan, values))

    images = torch.stack(list(Digits("test")))
    count = int((images.flatten(1)[:, 20] > 12).sum())
    message = rf"the features of the test data in the space pixels in \[-1, 1\] must be .* in {count} of 297 samples"
    with pytest.raises(ValueError, match=message):
        data_statistics(digits_run(tmp_path), "test", Broken())
    assert not list((tmp_path / "statistics").rglob("*.npz"))


def test_another_space_or_dataset_has_another_file(tmp_path):
    class Twice(Pixels):
        name, digest = "twice", "abc"

        def __call__(self, images, span):
            return Features(2 * images.flatten(1))

    run = digits_run(tmp_path)
    data_statistics(run, "test", Pixels())
    assert float(data_statistics(run, "test", Twice()).mean.max()) > 16
    other = digits_run(tmp_path, test=digits("validation"))
    assert data_statistics(other, "test", Pixels()).count == 200
    assert len(list((tmp_path / "statistics" / "test").iterdir())) == 3


def test_training_images_that_occur_in_the_split_are_excluded(tmp_path):
    run = digits_run(tmp_path, train=digits("fit"))
    statistics = data_statistics(run, "train", Pixels(), most=1400, without="validation")
    assert statistics.count == 1300
    rows = {row.numpy().tobytes() for row in statistics.features.values}
    assert rows == {(image / 8 - 1).numpy().tobytes() for image in Digits("train")}
    same = digits_run(tmp_path, train=digits("test"))
    with pytest.raises(
        ValueError, match=r"at least 4 train images .* not also in the test data; got 0: set floors=\[halves\]"
    ):
        data_statistics(same, "train", Pixels(), most=50, without="test")
