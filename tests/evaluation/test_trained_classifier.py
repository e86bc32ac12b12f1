"""A classifier that is trained at its first use, and read from its file afterwards."""

import pytest
import torch

from scoresde.evaluation.trained_classifier import TrainedClassifier, shared_extract
from scoresde.metrics.features import Pixels, extract, file_sha256
from scoresde.training.checkpoint import load, save
from tests.conftest import normal
from tests.metrics.test_classifier import bars

QUICK = {"epochs": 2, "batch_size": 20, "lr": 1e-2, "width": 4, "features": 6}


def space(path, **settings):
    return TrainedClassifier(path, bars(60, 0), bars(40, 1), [0, 16], **{**QUICK, **settings})


def test_it_is_trained_once_and_the_file_is_what_counts(tmp_path):
    path, x = tmp_path / "features" / "bars.safetensors", 16 * torch.rand(5, 1, 4, 4)
    first = space(path)
    assert not path.exists()
    found = first(x, (0, 16))
    before = path.read_bytes()
    assert "trained just now" in first.description
    again = space(path)
    features = again(x, (0, 16))
    assert torch.equal(features.values, found.values)
    assert torch.equal(features.logits, found.logits)
    assert path.read_bytes() == before
    assert (again.digest, again.name) == (file_sha256(path), f"bars ({file_sha256(path)[:12]})")
    accuracy = load(path)[1]["accuracy"]
    assert again.description == f"a classifier, {100 * accuracy:.1f}% of 40 test images right; {path}"


def test_a_file_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "bars.safetensors"
    _ = space(path).name
    with pytest.raises(ValueError, match=r"holds a classifier trained with .*'epochs': 2.*'epochs': 3.* expected"):
        _ = space(path, epochs=3).name
    save(path, {"model": {"a": torch.zeros(1)}}, {"step": 1})
    with pytest.raises(ValueError, match="is no classifier of this library"):
        _ = space(path).name
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        _ = space(path).name


def test_shared_features_are_those_of_one(tmp_path):
    x = normal(10, 1, 2, 2)
    assert torch.equal(shared_extract(Pixels(), x, (0, 1), 3, "cpu").values, extract(Pixels(), x, (0, 1)).values)
