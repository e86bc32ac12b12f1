"""Locks of directories: held by one process at a time or shared by several, and released when they end."""

import multiprocessing
import threading

import pytest

from scoresde.training import distributed
from scoresde.training.locks import locked, shared
from tests.processes import start
from tests.training.runs import hold


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a directory."""
    ours, theirs = multiprocessing.Pipe()
    process = start(hold, tmp_path / "run", theirs)
    assert ours.poll(60)
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


def test_a_shared_directory_is_removed_by_the_last_one_that_completes(tmp_path):
    directory = tmp_path / "new" / "parts"
    with shared(directory):
        with shared(directory):
            (directory / "part").write_text("1")
        assert (directory / "part").read_text() == "1"
    assert not directory.exists()


def test_an_error_leaves_a_shared_directory_to_the_next_one(tmp_path):
    def fail():
        (tmp_path / "parts" / "part").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), shared(tmp_path / "parts"):
        fail()
    (tmp_path / "parts" / ".part.json.0123abcd.tmp").write_text("left by a killed process")
    with shared(tmp_path / "parts"):
        assert [path.name for path in (tmp_path / "parts").iterdir()] == ["part"]
    assert not (tmp_path / "parts").exists()


def test_nobody_removes_a_directory_in_which_another_one_works(tmp_path):
    """Eight enter and leave at once, again and again; what one of them wrote is there until it leaves."""
    directory, lost, barrier = tmp_path / "parts", [], threading.Barrier(8)

    def work(number):
        barrier.wait(10)
        for i in range(20):
            with shared(directory):
                path = directory / f"{number}-{i}"
                path.write_text("x")
                if not path.exists():
                    lost.append(path)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lost == []
    assert not directory.exists()
