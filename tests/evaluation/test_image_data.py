"""Images of a run: levels that a file would hold, and features of the data that are computed once."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import scoresde as ss
from scoresde.build import Run
from scoresde.data import Digits, Levels
from scoresde.evaluation.image_data import data_statistics, is_of_images, span_of, to_levels
from scoresde.metrics import moments
from scoresde.metrics.features import Features, Pixels
from tests.conftest import normal

SCALED = {"transform": {"_target_": "scoresde.data.Affine", "scale": 2 / 255, "shift": -1.0}, "dequantization": None}


def a_run(path, levels=17, dequantization=ss.Uniform(), training=None, **data):  # noqa: B008
    digits = {split: {"_target_": "scoresde.data.Digits", "split": split} for split in ("train", "validation", "test")}
    config = OmegaConf.create(
        {"data": {"shape": [1, 8, 8], "range": [0, levels], "training": training, **digits, **data}}
    )
    return Run(None, Levels(levels), config, path, dequantization, training is not None)


def test_dequantised_samples_are_rounded_down_and_clipped(tmp_path):
    run = a_run(tmp_path)
    assert span_of(run) == (0, 16)
    assert to_levels(run, torch.tensor([-0.5, 0.0, 0.99, 3.5, 16.99, 18.0])).tolist() == [0, 0, 0, 3, 16, 16]
    images = torch.stack(list(Digits("test")))
    assert torch.equal(to_levels(run, images + torch.rand(images.shape)), images)


def test_samples_of_a_network_trained_on_levels_are_rounded_to_the_nearest(tmp_path):
    run = a_run(tmp_path, 256, training=SCALED)
    levels = torch.arange(256.0)
    for noise in (-0.4, 0.0, 0.4):
        states = (levels + noise) * 2 / 255 - 1  # in model space
        assert torch.equal(to_levels(run, run.transform.inverse(states)), levels)


def test_whole_numbers_are_levels_and_continuous_data_stays(tmp_path):
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_levels(a_run(tmp_path, 256, training=SCALED), levels), levels.float())
    run = a_run(tmp_path, dequantization=None)
    assert span_of(run) == (0, 17)
    x = normal(3).float() * 30
    assert torch.equal(to_levels(run, x), x)
    with pytest.raises(ValueError, match=r"set data.range=\[low, high\]"):
        span_of(a_run(tmp_path, range=None))
    assert is_of_images(run)
    assert not is_of_images(a_run(tmp_path, shape=[2]))


class Counted(Pixels):
    calls = 0

    def __call__(self, images, span):
        type(self).calls += 1
        return super().__call__(images, span)


def test_statistics_are_those_of_the_split_and_computed_once(tmp_path):
    run, space = a_run(tmp_path), Counted()
    first = data_statistics(run, "test", space)
    calls = Counted.calls
    again = data_statistics(run, "test", space)
    assert Counted.calls == calls > 0
    images = torch.stack(list(Digits("test")))
    assert torch.equal(first.features.values, images.flatten(1))
    assert torch.equal(again.covariance, moments(images)[1])
    assert torch.equal(again.features.values, first.features.values)
    (path,) = (tmp_path / "statistics" / "test").iterdir()
    with np.load(path, allow_pickle=False) as file:
        assert file["mu"].shape == (64,)
    few = data_statistics(run, "test", space, tmp_path / "elsewhere", most=5)
    assert (few.count, len(list((tmp_path / "elsewhere" / "test").iterdir()))) == (5, 1)
    spaced = [0, 74, 148, 222, 296]
    assert torch.equal(few.features.values, images[spaced].flatten(1))


def test_another_space_or_another_dataset_has_another_file(tmp_path):
    class Twice(Pixels):
        name, digest = "twice", "abc"

        def __call__(self, images, span):
            return Features(2 * images.flatten(1))

    run = a_run(tmp_path)
    data_statistics(run, "test", Pixels())
    assert float(data_statistics(run, "test", Twice()).mean.max()) > 16
    other = a_run(tmp_path, test={"_target_": "scoresde.data.Digits", "split": "validation"})
    assert data_statistics(other, "test", Pixels()).count == 200
    assert len(list((tmp_path / "statistics" / "test").iterdir())) == 3


def test_images_of_the_split_are_left_out_of_the_training_data(tmp_path):
    run = a_run(tmp_path, train={"_target_": "scoresde.data.Digits", "split": "fit"})
    found = data_statistics(run, "train", Pixels(), most=1400, without="validation")
    expected = {image.numpy().tobytes() for image in Digits("train")}
    assert found.count == 1300
    assert {row.numpy().tobytes() for row in found.features.values} == expected
    same = a_run(tmp_path, train={"_target_": "scoresde.data.Digits", "split": "test"})
    with pytest.raises(ValueError, match=r"all but 0 of its images are in that too \(floors=\[halves\] does without\)"):
        data_statistics(same, "train", Pixels(), most=50, without="test")
