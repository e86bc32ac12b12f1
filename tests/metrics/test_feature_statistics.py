"""Feature statistics on disk: exact round trips, and the formats of other projects."""

import numpy as np
import pytest
import torch

from scoresde.metrics import moments
from scoresde.metrics.feature_statistics import FeatureStatistics
from scoresde.metrics.features import Features
from tests.conftest import normal


def test_saved_statistics_load_exactly_and_hold_numpys_moments(tmp_path):
    features = Features(normal(20, 3).float(), normal(20, 5, seed=1))
    saved = FeatureStatistics.of(features, "pixels")
    saved.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert np.allclose(file["mu"], features.values.double().numpy().mean(axis=0), rtol=1e-12)
        assert np.allclose(file["sigma"], np.cov(features.values.double().numpy(), rowvar=False), rtol=1e-12)
    loaded = FeatureStatistics.load(tmp_path / "a.npz")
    for first, second in (
        (loaded.mean, saved.mean),
        (loaded.covariance, saved.covariance),
        (loaded.features.values, features.values),
        (loaded.features.logits, features.logits),
    ):
        assert torch.equal(first, second)
    assert (loaded.count, loaded.space) == (20, "pixels")
    FeatureStatistics.of(features, keep=False).save(tmp_path / "b.npz")
    assert FeatureStatistics.load(tmp_path / "b.npz").features is None


def test_files_of_other_projects(tmp_path):
    values = normal(15, 4).numpy().astype(np.float32)
    np.savez_compressed(tmp_path / "fid.npz", mu=values.mean(axis=0), sigma=np.cov(values, rowvar=False))
    pytorch_fid = FeatureStatistics.load(tmp_path / "fid.npz")
    assert (pytorch_fid.count, pytorch_fid.space, pytorch_fid.features) == (None, "", None)
    assert pytorch_fid.mean.dtype == torch.float64
    assert np.allclose(pytorch_fid.mean, values.mean(axis=0))
    np.savez(tmp_path / "score_sde.npz", pool_3=values)
    score_sde = FeatureStatistics.load(tmp_path / "score_sde.npz")
    assert score_sde.count == 15
    assert torch.equal(score_sde.covariance, moments(torch.from_numpy(values))[1])
    assert torch.equal(score_sde.features.values, torch.from_numpy(values))


def test_features_in_half_precision_are_saved_in_float32(tmp_path):
    values = normal(20, 3).bfloat16()
    FeatureStatistics.of(Features(values)).save(tmp_path / "a.npz")
    loaded = FeatureStatistics.load(tmp_path / "a.npz")
    assert torch.equal(loaded.features.values, values.float())
    assert torch.equal(loaded.mean, moments(values.double())[0])


class Danger:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros(3)}, "expected the arrays mu and sigma, or pool_3"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"a covariance \(D, D\); got shapes \(3,\) and \(2, 2\)"),
        (
            {"mu": np.full(2, np.nan), "sigma": np.eye(2)},
            "the mean must be finite; got NaN or infinity in 2 of 2 numbers",
        ),
        ({"mu": np.array([Danger()], dtype=object), "sigma": np.eye(1)}, "allow_pickle=False"),
        (None, ""),
    ],
    ids=["names", "shapes", "nan", "pickled", "text"],
)
def test_other_files_are_refused_and_pickles_never_executed(arrays, message, tmp_path, capsys):
    path = tmp_path / "other.npz"
    if arrays is None:
        path.write_text("text")
    else:
        np.savez(path, **arrays)
    with pytest.raises(ValueError, match=rf"other.npz does not hold feature statistics.*{message}"):
        FeatureStatistics.load(path)
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"no statistics at .*missing.npz"):
        FeatureStatistics.load(tmp_path / "missing.npz")


def test_a_failed_write_leaves_the_statistics_before(tmp_path, monkeypatch):
    path, statistics = tmp_path / "a.npz", FeatureStatistics.of(Features(torch.rand(5, 2)))
    statistics.save(path)
    before = path.read_bytes()

    def write_half(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.savez", write_half)
    with pytest.raises(OSError, match=rf"No space left on device: {path} needs \d+ bytes"):
        statistics.save(path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]
