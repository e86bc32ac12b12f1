"""Locks of directories: held by one process at a time, and released when it ends."""

import multiprocessing

import pytest

from scoresde.training import distributed
from scoresde.training.locks import locked


def hold(directory, connection):
    with locked(directory):
        connection.send("locked")
        connection.recv()


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a directory."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path / "run", theirs))
    process.start()
    assert ours.recv() == "locked"
    yield process
    process.kill()


def test_a_lock_ends_with_its_process(holder, tmp_path, monkeypatch):
    message = r"run is in use: another process writes this run; wait until it ends, or choose another run=\.\.\."
    with pytest.raises(ValueError, match=message), locked(tmp_path / "run"):
        pytest.fail("two processes hold the lock")
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    with locked(tmp_path / "run"):  # only the first process of torchrun writes
        pass
    monkeypatch.undo()
    holder.kill()
    holder.join()
    with locked(tmp_path / "run"), locked(tmp_path / "run"):
        pass
