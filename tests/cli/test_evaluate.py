"""`scoresde evaluate`: a table, and rows with their provenance."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from scoresde.cli import main
from scoresde.data import Digits, Toy2D
from scoresde.metrics.feature_statistics import FeatureStatistics
from scoresde.metrics.features import Pixels
from scoresde.metrics.image_quality import METRICS
from tests.cli.conftest import rows

QUICK = ["n=40", "sampler.steps=2", "batch_size=16"]
TINY = ["features.epochs=1", "features.width=4", "likelihood.solver.steps=8", "budget.samples=0", "budget.bound=null"]
PROVENANCE = {"date", "version", "commit", "python", "torch", "numpy", "device", "config", "checkpoint", "processes"}


def test_images_have_figures_in_a_named_space_and_bits(grey, capsys):
    assert main(["evaluate", f"run={grey}", "features=digits", *QUICK, *TINY]) == 0
    output = capsys.readouterr().out
    quality = rows(grey, "quality")
    columns = ("samples", "training data", "half of test data")
    assert [(row["of"], row["metric"]) for row in quality] == [(of, metric) for of in columns for metric in METRICS]
    first = quality[0]
    assert (first["n"], first["reference"], first["reference_n"], first["seed"]) == (40, "test data", 297, 0)
    assert (first["sampler"], first["nfe"], first["weights"]) == ("pc", 5, "ema")
    assert re.fullmatch(r"digits \([0-9a-f]{12}\)", first["features"])
    assert first["features_sha256"].startswith(first["features"][8:20])
    assert all(set(row["provenance"]) == PROVENANCE for row in quality)
    assert all({"seed", "n"} <= set(row) for row in quality)
    table = dict(re.findall(r"^(\w+) +(-?[\d.]+) \+- ", output, re.MULTILINE))
    assert list(table) == list(METRICS)
    assert float(table["frechet_distance"]) == pytest.approx(first["value"], rel=0.1)
    (bits,) = rows(grey, "likelihood")
    assert bits["unit"] == "bits/dim"
    assert re.search(r"^test bits/dim +\d", output, re.MULTILINE)
    assert Path("datasets/features/digits.safetensors").is_file()
    assert len(list((grey / "statistics").rglob("*.npz"))) == 2
    # The same samples from a file have the same figures.
    assert main(["sample", f"run={grey}", *QUICK]) == 0
    file = f"grey/samples/{rows(grey, 'samples')[-1]['file']}"
    command = ["evaluate", f"run={grey}", "features=digits", *TINY, f"samples='{file}'", "bpd=false"]
    assert main(command) == 0
    again = rows(grey, "quality")[len(quality) :]
    assert [row["value"] for row in again] == pytest.approx([row["value"] for row in quality], rel=1e-6)
    assert again[0]["samples"] == file
    assert len(rows(grey, "likelihood")) == 1


def test_statistics_and_samples_from_files(grey, capsys):
    images = torch.stack(list(Digits("validation")))
    np.save("real.npy", images.numpy().astype(np.uint8))
    FeatureStatistics.of(Pixels()(images, (0, 16)), Pixels.name, keep=False).save(Path("real.npz"))
    command = ["evaluate", f"run={grey}", "samples=real.npy", "reference=real.npz", "~likelihood", "floors=[]"]
    assert main(command) == 0
    (row,) = rows(grey)
    assert (row["metric"], row["reference"], row["reference_n"], row["n"]) == ("frechet_distance", "real.npz", 200, 200)
    assert row["value"] == 0
    output = capsys.readouterr().out
    assert "no kid" in output
    assert "the reference has moments only, no features" in output
    assert "bits/dim" not in output


def test_points_are_compared_as_they_are(toy, capsys):
    assert main(["evaluate", f"run={toy}", *QUICK, *TINY[2:4], "resamples=4"]) == 0
    drawn = rows(toy, "quality")
    assert {row["metric"] for row in drawn} == {"sliced_wasserstein", "mean_error", "covariance_error"}
    assert {row["features"] for row in drawn} == {"model space"}
    assert "test nats/dim" in capsys.readouterr().out
    np.save("real.npy", torch.stack(list(Toy2D(n=200, seed=9))).numpy())
    assert main(["evaluate", f"run={toy}", "samples=real.npy", "bpd=false", "resamples=4"]) == 0
    assert rows(toy, "quality")[len(drawn)]["value"] < 0.5 * drawn[0]["value"]


WRONG = {
    "split": ("split=all", "split must be one of train, validation, test; got 'all'"),
    "features": ("features=digits", "features is for images (C, H, W) only"),
    "reference": ("reference=a.npz", "reference is for images (C, H, W) only"),
    "metrics": ("metrics=[kid]", "got 'kid'"),
    "floors": ("floors=[noise]", "got 'noise'"),
    "no samples": ("samples=missing.npy", "No such file or directory: 'missing.npy'"),
    "shape": ("samples=real.npy", "(5, 3)"),
    "pickled": ("samples=objects.npy", "objects.npy must be a .npy file of numbers"),
    "n": ("n=0", "got 0"),
}


def test_wrong_input_is_answered_in_one_line(toy, refused):
    np.save("real.npy", np.zeros((5, 3)))
    np.save("objects.npy", np.array([print], dtype=object))
    for setting, message in WRONG.values():
        error = refused("evaluate", f"run={toy}", "bpd=false", "sampler.steps=2", setting)
        assert error.startswith("scoresde evaluate: ")
        assert message in error


def test_a_missing_network_is_named_with_its_digest_before_samples_are_drawn(grey, refused):
    error = refused("evaluate", f"run={grey}", "features=inception", *QUICK)
    assert "datasets/features/inception-2015-12-05.pt" in error
    assert "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4" in error
    assert not (grey / "drawing").exists()


CHEAP_FIRST = {
    "metrics": ("metrics=[kid]", "metric must be one of"),
    "resamples": ("resamples=1", "expected an integer resamples >= 2"),
    "level": ("level=1.5", "level must be a finite number > 0 and < 1; got 1.5"),
    "whole level": ("level=1", "level must be a finite number > 0 and < 1; got 1"),
    "n": ("n=3", "n must be an integer >= 4; got 3"),
    "start": ("likelihood.start=noise", "start must be 'data' or 'perturb'; got 'noise'"),
    "likelihood samples": (
        "likelihood.samples=0",
        "likelihood.samples must be an integer >= 1 and <= 1,000,000; got 0",
    ),
    "likelihood batch": ("likelihood.batch_size=0", "batch_size must be an integer >= 1; got 0"),
    "dequantization": ("dequantization=variational", "`scoresde dequantize run=grey` learns one"),
    "budget": ("budget.bound=tight", "budget.bound must be"),
}


@pytest.mark.parametrize("name", CHEAP_FIRST)
def test_every_setting_is_checked_before_samples_are_drawn(name, toy, grey, refused, monkeypatch):
    monkeypatch.setattr(sys.modules["scoresde.cli.evaluate"], "load_or_draw", None)
    setting, message = CHEAP_FIRST[name]
    run = toy if name in ("metrics", "resamples", "level", "whole level", "n") else grey
    overrides = [setting] if setting not in TINY else []
    assert message in refused("evaluate", f"run={run}", *overrides)
    assert not rows_or_none(run)


def rows_or_none(run):
    return rows(run) if (run / "metrics.jsonl").exists() else []


def test_samples_have_the_labels_of_the_data_and_a_class_accuracy(labelled, capsys):
    """An accuracy of the labels that the samples were drawn with, also if the samples come from a file."""
    trained = ["features=digits", "features.epochs=3", "features.width=8", "features.batch_size=16", "features.lr=0.01"]
    quick = [*trained, "bpd=false", "floors=[]", "metrics=[precision,class_accuracy]"]
    assert main(["evaluate", f"run={labelled}", *quick, *QUICK, "guidance=cfg", "guidance.scale=0.5"]) == 0
    precision, accuracy = rows(labelled, "quality")
    assert (precision["metric"], accuracy["metric"]) == ("precision", "class_accuracy")
    assert 0 <= accuracy["value"] <= 1
    assert accuracy["error"] > 0
    assert (accuracy["cond"], accuracy["guidance"]["scale"]) == ("those of the test data", 0.5)
    printed = capsys.readouterr().out
    assert re.search(r"^class_accuracy +0\.\d+ \+- ", printed, re.MULTILINE)
    assert re.search(r"^guidance +cfg, scale=0\.5", printed, re.MULTILINE)
    labels = torch.tensor([int(label) for _, label in Digits("test", labels=True)])
    np.save("real.npy", torch.stack([image for image, _ in Digits("test", labels=True)]).numpy() + 0.5)
    for name, given in (("real", labels), ("wrong", (labels + 1) % 10)):
        np.save(f"{name}.npy", np.load("real.npy"))
        np.savez(f"{name}.cond.npz", label=given.numpy())
        assert main(["evaluate", f"run={labelled}", *quick, f"samples={name}.npy"]) == 0
    right, wrong = (row["value"] for row in rows(labelled, "quality")[-1::-2][:2][::-1])
    assert right > 0.5 > wrong + 0.2
    assert main(["evaluate", f"run={labelled}", *quick, "samples=wrong.npy", "n=50"]) == 0
    Path("real.cond.npz").unlink()
    capsys.readouterr()
    assert main(["evaluate", f"run={labelled}", *quick, "samples=real.npy"]) == 0
    assert re.search(
        r"^no class_accuracy +the samples were drawn without labels", capsys.readouterr().out, re.MULTILINE
    )
