"""`scoresde report`: the page of a run, and the command that trains it again."""

import html
import json
import re
import shlex
import sys

import pytest
import yaml
from omegaconf import OmegaConf

from scoresde.cli import main
from scoresde.cli.report import data_of
from scoresde.evaluation.records import load_per_sample
from tests.report.runs import new_run

SMALL = ["experiment=toy2d", "network.width=8", "network.depth=1", "data.train.n=64", "data.test.n=12"]
SMALL += ["data.validation.n=12", "trainer.steps=3", "trainer.batch_size=16", "trainer.log_every=1", "trainer.warmup=2"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])


@pytest.mark.slow
def test_a_run_from_its_training_to_its_report(tmp_path, capsys):
    assert main(["train", *SMALL, "sde=subvp", "run=toy"]) == 0
    assert main(["bpd", "run=toy", "likelihood.solver.steps=6", "budget.samples=2"]) == 0
    row = json.loads((tmp_path / "toy" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["command"] == "scoresde bpd run=toy likelihood.solver.steps=6 budget.samples=2"
    values = load_per_sample(tmp_path / "toy", "test")
    assert len(values) == 12
    assert values.mean() == pytest.approx(row["mean"], rel=1e-12)
    capsys.readouterr()
    assert main(["report", "run=toy", "film_steps=4", "film_frames=3", "film_samples=9"]) == 0
    assert re.search(r"^report +toy/report\.html$", capsys.readouterr().out, re.MULTILINE)
    page = (tmp_path / "toy" / "report.html").read_text()
    assert row["command"] in page
    command = shlex.split(html.unescape(re.findall(r"scoresde train ([^<]*)", page)[-1]))
    assert sorted(command) == sorted([*SMALL, "sde=subvp", "run=toy"])


@pytest.mark.slow
def test_the_command_of_a_training_gives_its_configuration(tmp_path, capsys):
    changes = [
        "experiment=digits",
        "sde=ve",
        "sde.sigma_max=20",
        "network=mlp",
        "network.shape=[1,8,8]",
        "loss=variance",
    ]
    changes += ["prediction=karras", "optimizer=adamw", "trainer.steps=2", "~data.validation"]
    changes += ["data.dequantization=null", "+trainer.wandb={mode: offline}", "name=digits"]
    assert main(["train", *changes, "--cfg", "job", "--resolve"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    run = new_run(tmp_path / "run", (1, 8, 8), checkpoint=False)
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert main(["report", f"run={run}"]) == 0
    page = (run / "report.html").read_text()
    command = shlex.split(html.unescape(re.findall(r"scoresde train ([^<]*) run=", page)[-1]))
    assert "network=mlp" in command
    assert "sde=ve" in command
    capsys.readouterr()
    assert main(["train", *command, "--cfg", "job", "--resolve"]) == 0
    again = yaml.safe_load(capsys.readouterr().out)
    assert {**again, "run": None} == {**config, "run": None}


def test_a_run_that_is_not_there_is_named(capsys):
    assert main(["report", "run=nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_the_page_goes_where_it_is_wanted(tmp_path):
    run = new_run(tmp_path / "run", (2,))
    assert main(["report", f"run={run}", "out=pages/x.html", "film=false"]) == 0
    assert "The film was left out" in (tmp_path / "pages" / "x.html").read_text()
    assert not (run / "report.html").exists()


def test_nothing_is_downloaded_for_a_report(tmp_path):
    node = {"_target_": "scoresde.data.CIFAR10", "root": str(tmp_path / "cifar"), "split": "test"}
    config = OmegaConf.create({"data": {"test": node, "train": None}})
    reason = data_of(config, "test", ())
    assert reason.startswith("the test data is not to be had (")
    assert f"no CIFAR-10 in {tmp_path}" in reason
    assert not (tmp_path / "cifar").exists()
    assert data_of(config, "train", ()) == "the run's configuration names no train data"
    assert len(data_of(OmegaConf.create({"data": {"test": {"_target_": "scoresde.data.Toy2D"}}}), "test", ())) == 10_000
