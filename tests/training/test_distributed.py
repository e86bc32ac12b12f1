"""Processes of one command: a single one, and two that gloo connects."""

import os
import signal
import time

import pytest
import torch

import scoresde as ss
from scoresde.losses import DenoisingScoreMatching, SlicedScoreMatching
from scoresde.training import checkpoint, distributed
from scoresde.training.interruption import Interrupted
from scoresde.training.state import CHECKPOINT
from tests.conftest import seeded
from tests.processes import fork_two, launch_two, start, start_two
from tests.training.runs import Points, fit, fit_shared, new_model, rows, saved_step

TRAININGS = {  # strategy, batch size of all processes together, loss, whether the network preserves magnitudes
    "ddp": ("ddp", 8, DenoisingScoreMatching("likelihood")),
    "ddp-uneven": ("ddp", 7, SlicedScoreMatching()),
    "fsdp": ("fsdp", 8, DenoisingScoreMatching("likelihood")),
    "fsdp-unet": ("fsdp", 8, DenoisingScoreMatching("likelihood", uncertainty=True), True),
    "fsdp-uneven": ("fsdp", 5, DenoisingScoreMatching("likelihood")),
}


def test_a_single_process_is_the_first_of_one():
    with distributed.processes():
        assert (distributed.rank(), distributed.size()) == (0, 1)
        assert distributed.gather("x") == ["x"]


def train_together(path):
    """Make all trainings in this process and another one."""
    with distributed.processes():
        gathered = distributed.gather({"rank": distributed.rank(), "uneven": list(range(distributed.rank()))})
        if distributed.rank() == 0:
            print(distributed.size(), gathered)
        for name, training in TRAININGS.items():
            fit_shared(path / name, *training)
        x, data = torch.ones(2, 2), torch.randn(40, 2, generator=seeded())
        options = {"batch_size": 8, "parallel": "fsdp", "validation": None, "progress": False}
        run = ss.fit(new_model(), data, run=path / "python", steps=2, **options)
        with torch.no_grad():
            torch.testing.assert_close(run.model.noise(x, 0.5), ss.load(path / "python").model.noise(x, 0.5))
    assert distributed.size() == 1


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The directory of all trainings by two processes."""
    path = tmp_path_factory.mktemp("shared")
    processes = start_two(path / "output", train_together, path)
    for process in processes:
        process.join(240)
    errors = [file.read_text() for file in path.glob("output/*.err")]
    assert [process.exitcode for process in processes] == [0, 0], errors
    printed = (path / "output" / "0.out").read_text()
    assert printed.strip() == "2 [{'rank': 0, 'uneven': []}, {'rank': 1, 'uneven': [0]}]"
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TRAININGS))
def test_two_processes_train_like_one(shared, tmp_path, name):
    """The same losses, gradients, weights, averages and moments, also after resuming, up to rounding."""
    fit_shared(tmp_path / name, *TRAININGS[name])
    for row, expected in zip(rows(shared / name), rows(tmp_path / name), strict=True):
        for key in ("loss", "gradient_norm", "learning_rate"):
            assert row[key] == pytest.approx(expected[key], rel=1e-5)
        levels, others = row["loss_by_log_snr"], expected["loss_by_log_snr"]
        assert [x is None for x in levels] == [x is None for x in others]
        assert [x for x in levels if x is not None] == pytest.approx([x for x in others if x is not None], rel=1e-4)
    (groups, info), (others, other) = (checkpoint.load(path / name / CHECKPOINT) for path in (shared, tmp_path))
    assert info["step"] == other["step"] == 6
    assert groups.keys() == others.keys()
    for group, members in groups.items():
        for key, value in members.items():
            torch.testing.assert_close(value, others[group][key], rtol=1e-4, atol=1e-5, msg=f"{group}/{key}")


@pytest.mark.parametrize("minutes", ["0", "-3", "soon", "", "nan"])
def test_the_patience_is_a_number_of_minutes(monkeypatch, minutes):
    monkeypatch.setenv("SCORESDE_PATIENCE", minutes)
    with pytest.raises(ValueError, match="SCORESDE_PATIENCE must be a positive number of minutes; got '"):
        distributed.patience()
    monkeypatch.setenv("SCORESDE_PATIENCE", "1.5")
    assert distributed.patience() == 1.5


def stand_still(point):
    time.sleep(300)


def train_until_one_stands_still(path):
    with distributed.processes():
        data = Points(3, act=stand_still) if distributed.rank() == 1 else Points()
        fit(path, data, steps=1000, batch_size=16, log_every=1, checkpoint_every=2)


@pytest.mark.slow
def test_a_process_that_stands_still_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setenv("SCORESDE_PATIENCE", "0.1")
    waiting, still = start_two(tmp_path / "output", train_until_one_stands_still, tmp_path)
    waiting.join(240)
    still.kill()
    assert waiting.exitcode == 1
    error = (tmp_path / "output" / "0.err").read_text()
    assert "another process did not answer within 0.1 minutes" in error
    assert "run the same command to resume" in error
    assert saved_step(tmp_path) >= 2


def train_without_a_parent(path):
    """The first process kills the parent of both, as if torchrun were killed."""

    def kill(point):
        if not (path / "killed").exists():
            (path / "killed").touch()
            os.kill(os.getppid(), signal.SIGKILL)
        return point

    with distributed.processes():
        data = Points(3, act=kill) if distributed.rank() == 0 else Points()
        try:
            fit(path, data, steps=1_000_000, batch_size=16, log_every=1, checkpoint_every=0)
        except Interrupted:
            (path / f"interrupted{distributed.rank()}").touch()


@pytest.mark.slow
def test_processes_stop_with_a_checkpoint_when_torchrun_is_gone(tmp_path):
    parent = start(fork_two, tmp_path / "output", train_without_a_parent, tmp_path)
    parent.join(240)
    assert parent.exitcode == -signal.SIGKILL
    limit = time.monotonic() + 60
    while len(list(tmp_path.glob("interrupted*"))) < 2 and time.monotonic() < limit:
        time.sleep(0.1)
    assert sorted(path.name for path in tmp_path.glob("interrupted*")) == ["interrupted0", "interrupted1"]
    assert 3 <= saved_step(tmp_path) < 1_000_000


def fail(point):
    raise MemoryError("rank 1 is out of memory")


def train_until_one_fails(path):
    with distributed.processes():
        data = Points(3, act=fail) if distributed.rank() == 1 else Points()
        fit(path, data, steps=1000, batch_size=16, log_every=1, checkpoint_every=2)


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_training(tmp_path):
    """The other process does not wait forever, and the checkpoint is there to continue from."""
    agent = start(launch_two, tmp_path / "agent", train_until_one_fails, tmp_path)
    agent.join(240)
    assert agent.exitcode == 1
    error = (tmp_path / "agent.err").read_text()  # of the process that ends first: it, or the one that it leaves alone
    assert "rank 1 is out of memory" in error or "Connection closed by peer" in error
    assert 2 <= saved_step(tmp_path) < 10
