"""`scoresde report`: the page of a run, with the command that trained it."""

import html
import re
import shlex
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from scoresde import run_config
from scoresde.cli import main
from scoresde.cli.overrides import literal
from scoresde.cli.report import data_of, refuse_resolvers
from tests.report.runs import new_run

SMALL = ["experiment=toy2d", "network.width=8", "network.depth=1", "data.train.n=64", "data.test.n=12"]
SMALL += ["data.validation.n=12", "trainer.steps=2", "trainer.batch_size=16", "trainer.log_every=1", "trainer.warmup=1"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])


def commands_of(page, verb):
    """The words of each command of a verb on a page."""
    return [shlex.split(html.unescape(line)) for line in re.findall(rf"scoresde {verb} [^<]*", page.read_text())]


@pytest.mark.slow
def test_a_run_of_a_sweep_from_its_training_to_its_report(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    words = ["train", "--config-dir", "mine", *SMALL, r"name=a\ b"]
    assert main([*words, "run=toy", "seed=2", "--multirun"]) == 0
    (run,) = (path for path in Path("toy").iterdir() if path.is_dir())
    assert sorted(run_config.read_command(run)) == sorted(["scoresde", *words, "run=toy", "seed=2"])
    override = f"run={literal(str(run))}"
    assert main(["bpd", override, "likelihood.solver.steps=6", "budget.samples=2"]) == 0
    capsys.readouterr()
    assert main(["report", override, "film_steps=4", "film_frames=3", "film_samples=9", "trust=[mine]"]) == 0
    page = run / "report.html"
    assert re.search(rf"^report +{re.escape(str(page))}$", capsys.readouterr().out, re.MULTILINE)
    assert sorted(commands_of(page, "train")[-1]) == sorted(["scoresde", *words, "seed=2", override, "trust=[mine]"])
    bpd = ["scoresde", "bpd", override, "likelihood.solver.steps=6", "budget.samples=2"]
    assert commands_of(page, "bpd")[-1] == bpd


def test_commands_of_a_run_of_a_sweep_can_be_read(tmp_path, capsys):
    run = new_run(tmp_path / "runs" / "experiment=toy2d,seed=1", (2,), checkpoint=False)
    assert main(["report", "run=runs/experiment\\=toy2d\\,seed\\=1", "film=false", "trust=[mine]"]) == 0
    for verb in ("bpd", "report"):
        words = commands_of(run / "report.html", verb)[0]
        overrides = {word.key_or_group: word.value() for word in OverridesParser.create().parse_overrides(words[2:])}
        assert (overrides["run"], overrides["trust"]) == ("runs/experiment=toy2d,seed=1", ["mine"])
        assert main([*words[1:], "--cfg", "job"]) == 0


@pytest.mark.parametrize("note", ["a ${oc.env:HOME,x} b", "${${x}:HOME}", ["${oc.env:HOME}"]])
def test_resolvers_are_refused(note):
    with pytest.raises(ValueError, match=r"config\.yaml must have no resolver; got note"):
        refuse_resolvers(OmegaConf.create({"note": note, "x": "oc.env"}), Path("run"))


def test_environment_variables_are_not_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", "/home/secret")
    run = new_run(tmp_path / "run", (2,), checkpoint=False, note="${oc.env:HOME}")
    assert main(["report", "run=run", "film=false"]) == 2
    error = capsys.readouterr().err
    assert "run/config.yaml must have no resolver; got note" in error
    assert "secret" not in error
    assert not (run / "report.html").exists()


def test_a_missing_run_is_named(capsys):
    assert main(["report", "run=nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_the_page_can_be_written_elsewhere(tmp_path):
    run = new_run(tmp_path / "run", (2,), checkpoint=False)
    assert main(["report", f"run={run}", "out=pages/x.html", "film=false"]) == 0
    assert "The film was left out" in (tmp_path / "pages" / "x.html").read_text()
    assert not (run / "report.html").exists()


def test_nothing_is_downloaded_for_a_report(tmp_path):
    node = {"_target_": "scoresde.data.CIFAR10", "root": str(tmp_path / "cifar"), "split": "test"}
    config = OmegaConf.create({"data": {"test": node, "train": None}})
    reason = data_of(config, "test", ())
    assert reason.startswith("the test data is not available (")
    assert f"no CIFAR-10 in {tmp_path}" in reason
    assert not (tmp_path / "cifar").exists()
    assert data_of(config, "train", ()) == "the run's configuration names no train data"
    assert len(data_of(OmegaConf.create({"data": {"test": {"_target_": "scoresde.data.Toy2D"}}}), "test", ())) == 10_000
