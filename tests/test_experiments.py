"""The published experiments, from files on the disk to a checkpoint, by the command that users type."""

import json
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
SMALL_IMAGES = ["data.size=32", "++network.multipliers=[1,1,2]"]


@pytest.fixture(autouse=True)
def small_files_in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CIFAR10, "records", RECORDS)


def train(experiment, root, *overrides):
    """Run the command; it succeeds."""
    assert main(["train", f"experiment={experiment}", f"data.root={root}", *overrides]) == 0


def assert_trains(experiment, root, steps, overrides, capsys, **printed):
    """Train, and check the printed rows, the log, and a checkpoint of that step that loads with finite weights."""
    train(experiment, root, *overrides)
    output = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed.items() <= output.items()
    run = Path("runs", experiment)
    assert load(run / "checkpoint.safetensors")[1]["step"] == steps
    assert all(bool(p.isfinite().all()) for p in ss.load(run).model.parameters())
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [steps]
    assert 0 < rows[0]["loss"] < float("inf")
    assert 0 < rows[0]["gradient_norm"] < float("inf")


def test_every_published_experiment_is_here():
    assert len(CIFAR) >= 8
    scheduled = {path.stem for path in CONF.glob("*.yaml") if "override /trainer: published" in path.read_text()}
    assert {name for name in scheduled if not name.startswith("imagenet")} <= {*CIFAR, *FOLDERS}  # test_imagenet.py


@pytest.mark.parametrize("experiment", ["cifar10_ddpm", "cifar10_ddpmpp_subvp", "cifar10_ncsnpp_ve"])
def test_trains_on_the_archive_of_cifar10(experiment, tmp_path, monkeypatch, capsys):
    """The samples are each image and its mirror image."""
    write_archive(tmp_path / "files", monkeypatch, BINARY, contents())
    mirrored = f"{5 * RECORDS} of the samples"
    assert_trains(experiment, tmp_path / "files", 2, SMALL, capsys, samples=str(10 * RECORDS), mirrored=mirrored)


@pytest.mark.parametrize("experiment", FOLDERS)
def test_trains_on_a_folder_of_images(experiment, tmp_path, capsys):
    """The samples are nine tenths of the images, selected by their names, and their mirror images."""
    names = [f"{i:05d}.png" for i in range(PICTURES)]
    write_images(tmp_path / "faces", {name: levels(36, 40, seed=i) for i, name in enumerate(names)})
    count = sum(hundredth(name) >= 10 for name in names)
    assert 0 < count < PICTURES
    overrides, mirrored = [*SMALL, *SMALL_IMAGES], f"{count} of the samples"
    assert_trains(experiment, tmp_path / "faces", 2, overrides, capsys, samples=str(2 * count), mirrored=mirrored)


def test_the_result_depends_on_images_and_path_but_not_on_the_archive(tmp_path, monkeypatch):
    """Both versions of the archive give the same weights, as do a named experiment and its override."""
    write_archive(tmp_path / "binary", monkeypatch, BINARY, contents())
    write_archive(tmp_path / "python", monkeypatch, PYTHON, contents(python2))
    write_files(tmp_path / "other", {name: bytes(reversed(content)) for name, content in contents().items()})

    def weights(experiment, root, *overrides):
        run = tmp_path / f"{experiment}-{root}"
        train(experiment, root, *SMALL, "trainer.steps=1", *overrides, f"run={run}")
        return [x.numpy().tobytes() for x in load(run / "checkpoint.safetensors")[0]["model"].values()]

    expected = weights("cifar10_ddpmpp_subvp", "binary")
    assert weights("cifar10_ddpmpp", "python", "sde=subvp") == expected
    assert weights("cifar10_ddpmpp_subvp", "other") != expected
    assert weights("cifar10_ddpmpp", "binary") != expected


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    write_archive(tmp_path / "files", monkeypatch, BINARY, contents())
    for run, steps in (("whole", [2]), ("stopped", [1, 2])):
        for step in steps:
            train("cifar10_ddpmpp_subvp", "files", *SMALL, f"run={run}", f"trainer.steps={step}")
    whole, stopped = ((tmp_path / run / "checkpoint.safetensors").read_bytes() for run in ("whole", "stopped"))
    assert whole == stopped
