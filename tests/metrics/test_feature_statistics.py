"""Statistics on disk: in the formats of other projects, and back to the last bit."""

import numpy as np
import pytest
import torch

from scoresde.metrics import moments
from scoresde.metrics.feature_statistics import FeatureStatistics
from scoresde.metrics.features import Features
from tests.conftest import normal


def test_what_is_saved_is_what_others_read_and_what_comes_back(tmp_path):
    features = Features(normal(20, 3).float(), normal(20, 5, seed=1))
    found = FeatureStatistics.of(features, "pixels")
    found.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert np.allclose(file["mu"], features.values.double().numpy().mean(axis=0), rtol=1e-12)
        assert np.allclose(file["sigma"], np.cov(features.values.double().numpy(), rowvar=False), rtol=1e-12)
        assert file["mu"].dtype == np.float64
    again = FeatureStatistics.load(tmp_path / "a.npz")
    assert torch.equal(again.mean, found.mean)
    assert torch.equal(again.covariance, found.covariance)
    assert (again.count, again.space) == (20, "pixels")
    assert torch.equal(again.features.values, features.values)
    assert torch.equal(again.features.logits, features.logits)
    FeatureStatistics.of(features, keep=False).save(tmp_path / "b.npz")
    assert FeatureStatistics.load(tmp_path / "b.npz").features is None


def test_files_of_other_projects(tmp_path):
    values = normal(15, 4).numpy().astype(np.float32)
    np.savez_compressed(tmp_path / "fid.npz", mu=values.mean(axis=0), sigma=np.cov(values, rowvar=False))
    theirs = FeatureStatistics.load(tmp_path / "fid.npz")
    assert (theirs.count, theirs.space, theirs.features) == (None, "", None)
    assert theirs.mean.dtype == torch.float64
    assert np.allclose(theirs.mean, values.mean(axis=0))
    np.savez(tmp_path / "score_sde.npz", pool_3=values)
    pools = FeatureStatistics.load(tmp_path / "score_sde.npz")
    assert pools.count == 15
    assert torch.equal(pools.covariance, moments(torch.from_numpy(values))[1])
    assert torch.equal(pools.features.values, torch.from_numpy(values))


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no statistics at .*missing.npz"):
        FeatureStatistics.load(tmp_path / "missing.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"text.npz is no .npz file of arrays"):
        FeatureStatistics.load(tmp_path / "text.npz")
    np.savez(tmp_path / "others.npz", images=np.zeros(3))
    with pytest.raises(ValueError, match=r"others.npz: arrays mu and sigma, or pool_3, expected"):
        FeatureStatistics.load(tmp_path / "others.npz")
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"a covariance \(D, D\) expected; got \(3,\) and \(2, 2\)"):
        FeatureStatistics.load(tmp_path / "shapes.npz")
    np.savez(tmp_path / "nan.npz", mu=np.full(2, np.nan), sigma=np.eye(2))
    with pytest.raises(ValueError, match="finite moments"):
        FeatureStatistics.load(tmp_path / "nan.npz")


class Danger:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_pickled_is_read(tmp_path, capsys):
    np.savez(tmp_path / "pickled.npz", mu=np.array([Danger()], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match=r"is no .npz file of arrays"):
        FeatureStatistics.load(tmp_path / "pickled.npz")
    assert "executed" not in capsys.readouterr().out
