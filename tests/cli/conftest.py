"""Every command runs in an empty directory, with the environment and the arguments of a fresh process."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from scoresde.cli import main

TOY = ["experiment=toy2d", "network.width=8", "network.depth=1", "data.train.n=200", "data.validation.n=20"]
TOY += ["data.test.n=20", "trainer.batch_size=16", "trainer.preview_every=0", "trainer.log_every=1", "sampler.steps=2"]
TOY += ["held_out.draws=0", "trainer.warmup=2"]
GREY = ["experiment=digits", "network=mlp", "network.shape=[1,8,8]", "network.width=16", "prediction=karras"]
GREY += ["trainer.preview_every=0", "trainer.evaluate_every=0", "trainer.steps=1"]
LABELLED = [*GREY, "data.labels=true", "+network.classes=10", "condition.dropout=0.1", "optimizer.lr=0.1"]
TABLE = ["experiment=table", "network.width=8", "network.depth=1", "data.shares=[0.2,0.2]", "trainer.steps=3"]
TABLE += ["trainer.batch_size=16", "trainer.preview_every=0", "trainer.warmup=2", "trainer.evaluate_every=0"]
CLASSIFIER = ["experiment=digits_classifier", "network.width=8", "trainer.steps=1", "trainer.evaluate_every=0"]
ENVIRONMENT = {"HYDRA_FULL_ERROR": "0", "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, quick_figures):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The directory of short runs: `toy` of points, 3 steps; `grey` of grey levels, 1 step.

    `labelled` is of grey levels with labels, 2 steps; `classifier` is a noise-conditional classifier of them, 1 step.
    """
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["pytest"])
        patch.setenv("HYDRA_FULL_ERROR", "0")
        assert main(["train", *TOY, "trainer.steps=3", "run=toy"]) == 0
        assert main(["train", *GREY, "run=grey"]) == 0
        assert main(["train", *LABELLED, "run=labelled", "trainer.steps=2", "trainer.warmup=1"]) == 0
        assert main(["train", *CLASSIFIER, "run=classifier"]) == 0
    return folder


@pytest.fixture
def toy(trained, tmp_path):
    """A copy of the run of points in `toy`."""
    return Path(shutil.copytree(trained / "toy", tmp_path / "toy").name)


@pytest.fixture
def grey(trained, tmp_path):
    """A copy of the run of grey levels in `grey`."""
    return Path(shutil.copytree(trained / "grey", tmp_path / "grey").name)


@pytest.fixture
def labelled(trained, tmp_path):
    """A copy of the run of grey levels with labels in `labelled`, beside one of a classifier in `classifier`."""
    shutil.copytree(trained / "classifier", tmp_path / "classifier")
    return Path(shutil.copytree(trained / "labelled", tmp_path / "labelled").name)


@pytest.fixture(scope="session")
def trained_table(tmp_path_factory):
    """A folder with a table of the columns a, b, kind and a run of it; kind has the classes x, y and z."""
    folder, random = tmp_path_factory.mktemp("table"), np.random.RandomState(0)
    lines = [f"{200 + 30 * u:.6f},{10 + 2 * v:.6f},{'xyz'[i % 3]}" for i, (u, v) in enumerate(random.randn(50, 2))]
    (folder / "train.csv").write_text("\n".join(["a,b,kind", *lines, ""]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HYDRA_FULL_ERROR", "0")
        assert main(["train", *TABLE, "data.path=train.csv", "data.labels=kind", "run=run"]) == 0
    return folder


@pytest.fixture
def run(trained_table, tmp_path):
    """The override of a run of a table, beside a copy of the table `train.csv`."""
    shutil.copytree(trained_table, tmp_path, dirs_exist_ok=True)
    return "run=run"


@pytest.fixture
def refused(capsys, caplog):
    """A function that runs a wrong command and returns its one line on stderr."""

    def run(*arguments, prints=False):
        capsys.readouterr()
        assert main(list(arguments)) == 2
        output = capsys.readouterr()
        assert prints or not output.out
        assert len(output.err.splitlines()) == 1, output.err
        assert not caplog.records  # in a process of its own they would be on stderr, too
        return output.err.strip()

    return run


def rows(run, kind=None, file="metrics.jsonl"):
    """The rows of a run, of one kind or all."""
    lines = [json.loads(line) for line in Path(run, file).read_text().splitlines()]
    return [row for row in lines if kind in (None, row.get("kind"))]


def contents(run):
    """The files of a training, by name."""
    return {name: Path(run, name).read_bytes() for name in ("checkpoint.safetensors", "log.jsonl", "config.yaml")}
