"""`scoresde evaluate`: a table, rows with their provenance, and the same from any number of processes."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from scoresde.cli import main
from scoresde.data import Digits, Toy2D
from scoresde.metrics.feature_statistics import FeatureStatistics
from scoresde.metrics.features import Features
from scoresde.metrics.image_quality import METRICS

GREY = ["train", "experiment=digits", "network=mlp", "network.shape=[1,8,8]", "network.width=16", "prediction=karras"]
GREY += ["trainer.steps=1", "trainer.preview_every=0"]
TOY = ["train", "experiment=toy2d", "network.width=16", "network.depth=1", "data.train.n=300", "data.test.n=40"]
TOY += ["trainer.steps=5", "trainer.batch_size=64", "trainer.preview_every=0", "data.validation.n=20"]
QUICK = ["n=40", "sampler.steps=3", "batch_size=16"]
TINY = ["features.epochs=1", "features.width=4", "likelihood.solver.steps=8", "budget.samples=0", "budget.bound=null"]
PROVENANCE = {"date", "version", "commit", "python", "torch", "numpy", "device", "config", "checkpoint", "processes"}


def rows(path, kind="quality"):
    return [row for row in map(json.loads, (path / "metrics.jsonl").read_text().splitlines()) if row["kind"] == kind]


def test_images_have_their_figures_in_a_named_space_and_their_bits(tmp_path, capsys):
    assert main([*GREY, "run=grey"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "run=grey", "features=digits", *QUICK, *TINY]) == 0
    said = capsys.readouterr().out
    found = rows(tmp_path / "grey")
    assert [(row["of"], row["metric"]) for row in found] == [
        (of, metric) for of in ("samples", "training data", "half of test data") for metric in METRICS
    ]
    first = found[0]
    assert (first["n"], first["reference"], first["reference_n"], first["seed"]) == (40, "test data", 297, 0)
    assert (first["sampler"], first["nfe"], first["weights"]) == ("pc", 7, "ema")
    assert re.fullmatch(r"digits \([0-9a-f]{12}\)", first["features"])
    assert first["features_sha256"].startswith(first["features"][8:20])
    assert all(set(row["provenance"]) == PROVENANCE for row in found)
    assert all({"seed", "n"} <= set(row) for row in found)
    shown = dict(re.findall(r"^(\w+) +(-?[\d.]+) \+- ", said, re.MULTILINE))
    assert list(shown) == list(METRICS)
    assert float(shown["frechet_distance"]) == pytest.approx(first["value"], rel=0.1)
    (bits,) = rows(tmp_path / "grey", "likelihood")
    assert bits["unit"] == "bits/dim"
    assert re.search(r"^test bits/dim +\d", said, re.MULTILINE)
    assert "trained just now" in said
    assert (tmp_path / "datasets" / "features" / "digits.safetensors").is_file()
    assert len(list((tmp_path / "grey" / "statistics").rglob("*.npz"))) == 2
    # The same once more, of a file: the same figures.
    assert main(["sample", "run=grey", *QUICK]) == 0
    command = ["evaluate", "run=grey", "features=digits", *TINY, "samples=grey/samples/pc.npy", "bpd=false"]
    assert main(command) == 0
    again = rows(tmp_path / "grey")[len(found) :]
    assert [row["value"] for row in again] == pytest.approx([row["value"] for row in found], rel=1e-6)
    assert again[0]["samples"] == "grey/samples/pc.npy"
    assert len(rows(tmp_path / "grey", "likelihood")) == 1


def test_given_statistics_and_samples(tmp_path, capsys):
    assert main([*GREY, "run=grey"]) == 0
    images = torch.stack(list(Digits("validation")))
    np.save(tmp_path / "real.npy", images.numpy().astype(np.uint8))
    FeatureStatistics.of(Features(images.flatten(1)), "pixels", keep=False).save(tmp_path / "real.npz")
    command = ["evaluate", "run=grey", "samples=real.npy", "reference=real.npz", "~likelihood", "floors=[]"]
    capsys.readouterr()
    assert main(command) == 0
    (row,) = rows(tmp_path / "grey")
    assert (row["metric"], row["reference"], row["reference_n"], row["n"]) == ("frechet_distance", "real.npz", 200, 200)
    assert row["value"] == 0
    said = capsys.readouterr().out
    assert "no kid" in said
    assert "the reference has moments only, no features" in said
    assert "bits/dim" not in said


def test_points_are_compared_as_they_are_in_nats(tmp_path, capsys):
    assert main([*TOY, "run=toy"]) == 0
    assert main(["evaluate", "run=toy", *QUICK, "likelihood.solver.steps=8", "budget.samples=0", "resamples=10"]) == 0
    found = rows(tmp_path / "toy")
    assert {row["metric"] for row in found} == {"sliced_wasserstein", "mean_error", "covariance_error"}
    assert {row["features"] for row in found} == {"model space"}
    assert "test nats/dim" in capsys.readouterr().out
    np.save(tmp_path / "real.npy", torch.stack(list(Toy2D(n=200, seed=9))).numpy())
    assert main(["evaluate", "run=toy", "samples=real.npy", "bpd=false", "resamples=10"]) == 0
    again = rows(tmp_path / "toy")[len(found) :]
    assert again[0]["value"] < 0.5 * found[0]["value"]


WRONG = {
    "split": (["split=all"], "split among train, validation, test expected; got 'all'"),
    "features": (["features=digits"], "features for images (C, H, W) alone"),
    "reference": (["reference=a.npz"], "reference for images (C, H, W) alone"),
    "metrics": (["metrics=[kid]"], "unknown metric 'kid'"),
    "floors": (["floors=[noise]"], "unknown noise floor 'noise': expected train, halves"),
    "no samples": (["samples=missing.npy"], "no samples at missing.npy"),
    "shape": (["samples=real.npy"], "expected samples (N, 2) with N >= 4; got (5, 3)"),
    "pickled": (["samples=objects.npy"], "is no array in NumPy's format"),
    "n": (["n=0"], "n must be an integer >= 1; got 0"),
}


def test_wrong_input_is_answered_in_one_line(tmp_path, capsys):
    assert main([*TOY, "run=toy"]) == 0
    np.save(tmp_path / "real.npy", np.zeros((5, 3)))
    np.save(tmp_path / "objects.npy", np.array([print], dtype=object))
    capsys.readouterr()
    for arguments, message in WRONG.values():
        assert main(["evaluate", "run=toy", "bpd=false", "sampler.steps=2", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert error.startswith("scoresde evaluate: ")
        assert "\n" not in error


def test_a_missing_network_is_named_with_its_digest_before_anything_is_drawn(tmp_path, capsys):
    assert main([*GREY, "run=grey"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "run=grey", "features=inception", *QUICK]) == 2
    error = capsys.readouterr().err
    assert "no Inception network at datasets/features/inception-2015-12-05.pt: download https://" in error
    assert "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4" in error
    assert not (tmp_path / "grey" / "drawing").exists()


TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "scoresde"]


def in_two(*command):
    done = subprocess.run([*TWO, *command], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    """Three batches of samples, uneven shares; a classifier to train, statistics to share, and bits."""
    assert main([*GREY, "run=grey"]) == 0
    quality = ["evaluate", "features=digits", *QUICK, *TINY]
    said = in_two(*quality, "run=grey", "batch_size=16")
    assert said.count("compared with") == 1
    two = rows(tmp_path / "grey")
    assert {row["provenance"]["processes"] for row in two} == {2}
    assert len(two) == 3 * len(METRICS)
    samples = in_two("sample", "run=grey", *QUICK)
    assert samples.count("sampler") == 1
    array = np.load(tmp_path / "grey" / "samples" / "pc.npy")
    assert main([*quality, "run=grey", "statistics=anew"]) == 0
    one = rows(tmp_path / "grey")[len(two) :]
    assert [row["value"] for row in two] == pytest.approx([row["value"] for row in one], rel=1e-9)
    assert main(["sample", "run=grey", *QUICK]) == 0
    assert np.array_equal(np.load(tmp_path / "grey" / "samples" / "pc.npy"), array)
    first, second = rows(tmp_path / "grey", "likelihood")
    assert first["mean"] == pytest.approx(second["mean"], rel=1e-9)
