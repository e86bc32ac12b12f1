"""Every command runs in an empty directory, with the environment and the arguments of a fresh process."""

import sys

import pytest

from scoresde.cli import main

TOY = ["experiment=toy2d", "network.width=8", "network.depth=1", "data.train.n=200", "data.validation.n=20"]
TOY += ["data.test.n=20", "trainer.batch_size=16", "trainer.preview_every=0", "trainer.log_every=1", "sampler.steps=2"]
TOY += ["held_out.draws=0"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A run of three steps, in a directory `runs`."""
    run = tmp_path_factory.mktemp("session") / "runs" / "toy"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.parents[1].parent)
        patch.setattr(sys, "argv", ["pytest"])
        patch.setenv("HYDRA_FULL_ERROR", "0")
        assert main(["train", *TOY, "trainer.steps=3", f"run={run}"]) == 0
    return run


def refused(capsys, *arguments):
    """The line that a wrong command leaves on stderr."""
    assert main(list(arguments)) == 2
    output = capsys.readouterr()
    assert not output.out
    assert len(output.err.splitlines()) == 1, output.err
    return output.err.strip()
