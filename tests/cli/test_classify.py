"""`scoresde classify`: scores, rows, posteriors and pictures of a small network with labels."""

import json
import math
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

import scoresde as ss
from scoresde.cli import main
from tests.cli.conftest import GREY, rows

QUICK = ["likelihood.solver.steps=4", "likelihood.trace.probes=2"]
BOUND = ["method=bound", "bound.draws=2", "bound.rounds=1"]


@pytest.fixture(scope="module")
def trained_labels(tmp_path_factory):
    """The directory of a run of digits with labels, trained for a few steps with condition dropout."""
    folder = tmp_path_factory.mktemp("labels")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HYDRA_FULL_ERROR", "0")
        words = [
            *GREY,
            "data.labels=true",
            "+network.classes=10",
            "condition.dropout=0.1",
            "trainer.steps=300",
            "network.width=48",
        ]
        assert main(["train", *words, "trainer.ema=0", "run=labels"]) == 0
    return folder / "labels"


@pytest.fixture
def labels(trained_labels, tmp_path):
    return Path(shutil.copytree(trained_labels, tmp_path / "labels").name)


def test_a_split_is_classified_with_scores_rows_and_pictures(labels, capsys):
    assert main(["classify", f"run={labels}", *QUICK]) == 0
    (row,) = rows(labels)
    assert (row["kind"], row["split"], row["n"], row["method"]) == ("classification", "test", 297, "flow")
    assert row["classes"] == [str(i) for i in range(10)]
    test = ss.data.Digits("test", labels=True).labels
    stored = np.load(labels / "per_sample" / row["file"])
    posterior, truth = torch.from_numpy(stored["values"]), torch.from_numpy(stored["labels"])
    assert torch.equal(truth, test)
    assert row["accuracy"] == float((posterior.argmax(dim=1) == test).double().mean())
    assert row["log_score"] == pytest.approx(float(-posterior.gather(1, test[:, None]).mean()))
    assert np.array(row["confusion"]).sum() == 297
    assert sum(b["count"] for b in row["reliability"]) == 297
    frequencies = torch.bincount(ss.data.Digits("fit", labels=True).labels).double() / 1500
    assert row["baseline_log_score"] == pytest.approx(float(-frequencies.log()[test].mean()))
    # a chance of one in ten, and a network that has learned something
    assert row["accuracy"] > 0.3
    assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"]
    pictures = [matplotlib.image.imread(path) for path in (labels / "figures").glob("test_classification*.png")]
    assert [picture.ndim for picture in pictures] == [3, 3]
    table = capsys.readouterr().out
    assert f"{100 * row['accuracy']:.1f}% ({round(297 * row['accuracy'])} of 297; 95% interval " in table
    assert f"{row['log_score']:.4f} +- {row['log_score_error']:.4f} nats; {row['baseline_log_score']:.4f}" in table
    assert not list((labels / "classification").iterdir())


def test_a_temperature_is_fitted_on_another_split(labels, capsys):
    assert main(["classify", f"run={labels}", *BOUND, "split=validation", "calibrate=test", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    plain, calibrated = record["rows"]
    assert plain["temperature"] == 1.0
    assert calibrated["temperature"] > 0
    assert calibrated["log_score"] < plain["log_score"]
    assert calibrated["accuracy"] == plain["accuracy"]
    assert plain["baseline_log_score"] == calibrated["baseline_log_score"] == pytest.approx(math.log(10), abs=0.05)
    assert set(record["paths"]) == {"metrics", "per_sample", "confusion", "calibration"}


def test_a_uniform_prior_and_the_frequencies_differ_by_their_ratio(labels):
    values = []
    for prior in ("uniform", "frequencies"):
        assert main(["classify", f"run={labels}", *BOUND, f"prior={prior}", "bound.confidence=1000"]) == 0
        values.append(torch.from_numpy(np.load(labels / "per_sample" / rows(labels)[-1]["file"])["values"]))
    frequencies = torch.bincount(ss.data.Digits("fit", labels=True).labels).double() / 1500
    torch.testing.assert_close(values[1], (values[0] + frequencies.log()).log_softmax(dim=1), rtol=1e-8, atol=1e-8)


def test_bits_are_given_the_label_or_without(labels, capsys):
    command = ["bpd", f"run={labels}", "likelihood.solver.steps=4", "budget.samples=0", "budget.bound=null"]
    assert main(command) == 0
    assert main([*command, "conditional=false"]) == 0
    given, without = rows(labels)
    assert given["conventions"]["condition"] == "given label"
    assert without["conventions"]["condition"].startswith("none")
    assert given["mean"] < without["mean"]
    assert given["label"]["mean"] == pytest.approx(math.log2(10) / 64, abs=1e-3)
    assert given["joint"]["mean"] == pytest.approx(given["mean"] + given["label"]["mean"])
    assert without["label"] is None
    assert f"  of the label  {given['label']['mean']:.4f} +- " in capsys.readouterr().out


def test_wrong_settings_are_refused_in_one_line(labels, toy, refused):
    assert "needs a network with class labels; this run has none" in refused("classify", f"run={toy}")
    command = ["classify", f"run={labels}"]
    assert "condition must be one of label; got 'tone'" in refused(*command, "condition=tone")
    assert "method must be one of flow, bound; got 'elbo'" in refused(*command, "method=elbo")
    assert "prior must be one of frequencies, uniform" in refused(*command, "prior=flat")
    assert "likelihood.start must be data for a classification; got perturb" in refused(
        *command, "likelihood.start=perturb"
    )
    assert "draws must be a multiple of 2^rounds = 16" in refused(*command, "method=bound", "bound.draws=24")
