"""`scoresde report`: the page of a run, and the command that trains it again."""

import html
import json
import math
import re
import shlex
import sys

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from scoresde.cli import main
from scoresde.cli.common import config_directory
from scoresde.cli.report import data_of, training_of, written
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
    assert command[0] == "experiment=digits_ve"  # the nearest
    capsys.readouterr()
    assert main(["train", *command, "--cfg", "job", "--resolve"]) == 0
    again = yaml.safe_load(capsys.readouterr().out)
    assert {**again, "run": None} == {**config, "run": None}


OF_ONES_OWN = {
    "table": ["experiment=table", "data.path=my.csv", "data.shape=[3]"],
    "series": ["experiment=series", "data.path='my data.npy'", "data.shape=[2,8]"],
    "images": ["experiment=images", r"data.root=my\=pictures", "name=mine"],
    "toy2d": ["experiment=toy2d", "name=mine", "trainer.steps=5"],
}


@pytest.mark.parametrize("given", OF_ONES_OWN.values(), ids=OF_ONES_OWN)
def test_a_training_is_found_whatever_its_name_and_what_it_demands(given):
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        config = OmegaConf.to_container(compose("train", given), resolve=True)
        found = training_of(config)
        again = OmegaConf.to_container(compose("train", found), resolve=True)
    assert found[0] == given[0]
    assert {**again, "run": None} == {**config, "run": None}


VALUES = ["it's", "1", "true", "", math.inf, -math.inf, 1e-5, None, [], {}, [{"a": 1, "b": ["x y", {"c": None}]}]]
VALUES += [["1", True, 1], {"a b": "c,d"}, {1: "}"}]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_written_value_is_read_back(value):
    read = OverridesParser.create().parse_override(f"key={written(value)}").value()
    assert (read, type(read)) == (value, type(value))


def test_a_run_of_a_sweep_has_commands_that_are_read(tmp_path, capsys):
    run = new_run(tmp_path / "runs" / "experiment=toy2d,seed=1", (2,))
    assert main(["report", "run=runs/experiment\\=toy2d\\,seed\\=1", "film=false", "trust=[mine]"]) == 0
    commands = re.findall(r"scoresde (?:bpd|report) [^<]*", (run / "report.html").read_text())
    for command in commands:
        words = shlex.split(html.unescape(command))
        overrides = {word.key_or_group: word.value() for word in OverridesParser.create().parse_overrides(words[2:])}
        assert overrides["run"] == "runs/experiment=toy2d,seed=1"
        assert overrides["trust"] == ["mine"]
        assert main([words[1], *words[2:], "--cfg", "job"]) == 0
    assert len(commands) > 3


@pytest.mark.parametrize("note", ["${oc.env:HOME}", "a ${oc.env:HOME,x} b", "${${x}:HOME}", ["${oc.env:HOME}"]])
def test_the_environment_of_who_reports_stays_at_home(note, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", "/home/secret")
    run = new_run(tmp_path / "run", (2,), note=note, x="oc.env")
    assert main(["report", "run=run", "film=false"]) == 2
    error = capsys.readouterr().err
    assert "a configuration without resolvers expected in run/config.yaml; got note" in error
    assert "secret" not in error
    assert not (run / "report.html").exists()


def test_a_directory_of_configurations_stays_in_the_command(tmp_path):
    (tmp_path / "mine" / "sampler").mkdir(parents=True)
    run = new_run(tmp_path / "run", (2,))
    assert main(["sample", "--config-dir", "mine", "run=run", "n=2", "sampler=ddim", "sampler.steps=2"]) == 0
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert shlex.split(row["command"])[:4] == ["scoresde", "sample", "--config-dir", "mine"]


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
