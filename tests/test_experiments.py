"""The published experiments, from files on the disk to a checkpoint, by the command that their users type."""

import json
import shutil
from pathlib import Path

import pytest

import scoresde as ss
from scoresde.cli import config_directory, main
from scoresde.data import CIFAR10
from scoresde.data.image_files import hundredth
from scoresde.training.checkpoint import load
from tests.data.files import RECORDS, contents, levels, write_files, write_images
from tests.data.test_cifar import BINARY, PYTHON, python2, write_archive

CONF = config_directory() / "experiment"
CIFAR = sorted(path.stem for path in CONF.glob("cifar10_*.yaml"))
FOLDERS = ["celebahq256_ncsnpp_ve", "ffhq1024_ncsnpp_ve"]
PICTURES = 40
QUIET = ["trainer.workers=0", "trainer.preview_every=0", "trainer.evaluate_every=0"]
SMALL = ["++network.width=8", "++network.blocks=1", "trainer.batch_size=4", "trainer.steps=2", *QUIET]
SMALL_IMAGES = ["data.size=32", "network.image_size=32", "++network.multipliers=[1,1,2]"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty directory, and files of few records."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CIFAR10, "records", RECORDS)


def train(experiment, root, *overrides):
    """The command; it succeeds."""
    assert main(["train", f"experiment={experiment}", f"data.root={root}", *overrides]) == 0


def said(capsys):
    """What it said, by the names of the rows."""
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


def rows(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_trained(run, step):
    """A checkpoint of that step that loads with finite weights, and lines of the log with a loss."""
    _, info = load(run / "checkpoint.safetensors")
    assert info["step"] == step
    assert all(bool(p.isfinite().all()) for p in ss.load(run).model.parameters())
    assert rows(run)[-1]["step"] == step
    for row in rows(run):
        assert 0 < row["loss"] < float("inf")
        assert 0 < row["gradient_norm"] < float("inf")


def assert_trains_and_resumes(experiment, root, samples, overrides, capsys):
    run = Path("runs", experiment)
    train(experiment, root, *overrides)
    assert said(capsys)["samples"] == str(samples)
    assert_trained(run, 2)
    train(experiment, root, *overrides, "trainer.steps=3")
    assert_trained(run, 3)
    assert [row["step"] for row in rows(run)] == [2, 3]


def test_every_published_experiment_is_here():
    assert len(CIFAR) >= 8
    scheduled = {path.stem for path in CONF.glob("*.yaml") if "override /trainer: published" in path.read_text()}
    assert scheduled <= {*CIFAR, *FOLDERS}


@pytest.mark.parametrize("experiment", CIFAR)
def test_trains_on_the_archive_of_cifar10(experiment, tmp_path, monkeypatch, capsys):
    """Each image and its mirror image."""
    write_archive(tmp_path / "files", monkeypatch, BINARY, contents())
    assert_trains_and_resumes(experiment, tmp_path / "files", 2 * 5 * RECORDS, SMALL, capsys)


@pytest.mark.parametrize("experiment", FOLDERS)
def test_trains_on_a_folder_of_images(experiment, tmp_path, capsys):
    """Nine tenths of them, by their names, and the mirror images."""
    names = [f"{i:05d}.png" for i in range(PICTURES)]
    write_images(tmp_path / "faces", {name: levels(36, 40, seed=i) for i, name in enumerate(names)})
    count = sum(hundredth(name) >= 10 for name in names)
    assert 0 < count < PICTURES
    assert_trains_and_resumes(experiment, tmp_path / "faces", 2 * count, [*SMALL, *SMALL_IMAGES], capsys)


def test_what_is_trained_depends_on_the_images_alone(tmp_path, monkeypatch):
    """Both versions of the archive, the experiment by its name and by an override: the same; other images: another."""
    write_archive(tmp_path / "binary", monkeypatch, BINARY, contents())
    write_archive(tmp_path / "python", monkeypatch, PYTHON, contents(python2))
    other = {name: bytes(reversed(content)) for name, content in contents().items()}
    write_files(tmp_path / "other", other)
    train("cifar10_ddpmpp_subvp", "binary", *SMALL, "run=binary_run")
    train("cifar10_ddpmpp", "python", *SMALL, "sde=subvp", "run=python_run")
    train("cifar10_ddpmpp_subvp", "other", *SMALL, "run=other_run")
    train("cifar10_ddpmpp", "binary", *SMALL, "run=vp_run")
    one, same, other, path = (
        (tmp_path / f"{run}_run" / "checkpoint.safetensors").read_bytes() for run in ("binary", "python", "other", "vp")
    )
    assert one == same
    assert one != other
    assert one != path


def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path, monkeypatch):
    write_archive(tmp_path / "files", monkeypatch, BINARY, contents())
    for run, steps in (("whole", [3]), ("stopped", [1, 2, 3])):
        for step in steps:
            train("cifar10_ddpmpp_subvp", "files", *SMALL, f"run={run}", f"trainer.steps={step}")
    whole, stopped = ((tmp_path / run / "checkpoint.safetensors").read_bytes() for run in ("whole", "stopped"))
    assert whole == stopped


@pytest.mark.slow
def test_the_published_network_makes_a_step(tmp_path, monkeypatch, capsys):
    """Nothing is smaller than published but the batch."""
    write_archive(tmp_path / "files", monkeypatch, BINARY, contents())
    train("cifar10_ddpmpp_subvp", "files", *QUIET, "trainer.batch_size=1", "trainer.steps=1")
    run = Path("runs", "cifar10_ddpmpp_subvp")
    assert said(capsys)["parameters"] == "61,804,419"
    assert_trained(run, 1)
    shutil.rmtree(run)  # a gigabyte
