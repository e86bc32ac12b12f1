"""Files of several processes: each write is complete, or leaves what was there."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import stat
import threading
import time
from pathlib import Path

import pytest

from scoresde import atomic_files
from scoresde.atomic_files import append, remove_leftovers, replace_atomically
from tests.processes import start

LIMIT = 4096  # bytes of a file, where the disk is full
ROW = json.dumps({"step": 1, "text": "x" * 300})


@pytest.fixture
def full_disk():
    """No file may grow beyond `LIMIT` bytes, as on a full disk: the operating system writes what fits."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def text(content):
    return lambda file: file.write_text(content)


# --- files that are replaced


def test_the_new_file_is_written_in_the_same_directory_and_renamed(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def write(file):
        file.write_text("new")
        assert (file.parent, path.read_text()) == (tmp_path, "old")

    replace_atomically(path, write)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_file_has_the_mode_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        replace_atomically(tmp_path / "a", text("x"))
        append(tmp_path / "b", "{}")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
@pytest.mark.parametrize("content", [None, "old"])
def test_a_failed_write_leaves_what_was_there(tmp_path, error, content):
    path = tmp_path / "a"
    if content is not None:
        path.write_text(content)

    def write(file):
        file.write_text("half")
        raise error("no")

    with pytest.raises(error, match="no"):
        replace_atomically(path, write)
    assert [path.read_text() for path in tmp_path.iterdir()] == ([] if content is None else [content])


@pytest.mark.parametrize(("size", "needed"), [(None, "more than 4,096"), (10_000, "10,000")])
def test_a_full_disk_is_named_with_the_path_and_the_bytes_needed(tmp_path, full_disk, size, needed):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(
        OSError, match=rf"File too large: {path} needs {needed} bytes, and [\d,]+ are free; free"
    ) as info:
        replace_atomically(path, text("x" * 10_000), size)
    assert info.value.errno == errno.EFBIG
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_directory_that_cannot_be_made_on_a_full_disk_is_named(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("pathlib.Path.mkdir", fail)
    with pytest.raises(OSError, match=rf"No space left on device: {tmp_path}/new/a needs 3 bytes"):
        replace_atomically(tmp_path / "new" / "a", text("x"), size=3)


def test_writers_at_the_same_time_do_not_disturb_each_other(tmp_path):
    """Each writes a file of its own, and the last one to finish wins."""
    path, barrier = tmp_path / "a", threading.Barrier(4)

    def write(number):
        def fill(file):
            barrier.wait(10)
            file.write_text(str(number) * 1000)
            barrier.wait(10)
            remove_leftovers(tmp_path)  # of others, which live
            barrier.wait(10)

        replace_atomically(path, fill)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in {str(number) * 1000 for number in range(4)}
    assert list(tmp_path.iterdir()) == [path]


def write_half(path, connection):
    """Start to write a file, and wait."""

    def write(file):
        file.write_text("half")
        connection.send("written")
        time.sleep(60)

    replace_atomically(path, write)


def test_what_a_killed_process_left_is_removed_and_that_of_a_living_one_is_not(tmp_path):
    path = tmp_path / "averages" / "a.npz"
    ours, theirs = multiprocessing.Pipe()
    process = start(write_half, path, theirs)
    assert ours.poll(60)
    (temporary,) = path.parent.iterdir()
    remove_leftovers(tmp_path)
    assert temporary.read_text() == "half"
    process.kill()
    process.join()
    others = [path.parent / name for name in (".a.npz.lock", "a.tmp", ".tmp", ".a.npz.notes.tmp")]
    for other in others:
        other.write_text("of another program")
    older = path.parent / ".a.npz.tmp"  # names without a lock, of older versions
    older.write_text("half")
    remove_leftovers(tmp_path)
    assert sorted(path.parent.iterdir()) == sorted(others)
    remove_leftovers(tmp_path / "nothing")


def test_a_temporary_file_that_was_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    """The moment between its creation and its lock."""
    create, names = os.open, []

    def open_and_lose(path, *arguments):
        descriptor = create(path, *arguments)
        names.append(Path(path))
        if len(names) == 1:
            os.unlink(path)
        return descriptor

    monkeypatch.setattr(atomic_files.os, "open", open_and_lose)
    replace_atomically(tmp_path / "a", text("x"))
    assert (tmp_path / "a").read_text() == "x"
    assert len(set(names)) == 2


# --- files that grow


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ('{"a": 1}\n', '{"a": 1}\n'),
        ('{"a": 1}', '{"a": 1}\n'),  # complete, as an editor leaves it
        ('{"a": 1}\n{"b": [1, 2', '{"a": 1}\n'),
        ('{"a"', ""),
        ('{"a": 1}\n{"b": "' + "x" * 2 * atomic_files.BLOCK, '{"a": 1}\n'),
    ],
    ids=["empty", "complete", "without a line break", "unfinished", "unfinished first", "unfinished and long"],
)
def test_a_line_is_not_glued_to_an_unfinished_one(tmp_path, before, after):
    (tmp_path / "a").write_text(before)
    append(tmp_path / "a", ROW)
    assert (tmp_path / "a").read_text() == f"{after}{ROW}\n"


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(tmp_path, full_disk):
    path = tmp_path / "new" / "a.jsonl"
    fitting = LIMIT // (len(ROW) + 1)
    for _ in range(fitting):
        append(path, ROW)
    assert path.stat().st_size > LIMIT - len(ROW)  # a part of the next line fits
    with pytest.raises(OSError, match=rf"File too large: {path} needs {len(ROW) + 1} bytes, and"):
        append(path, ROW)
    assert path.read_text() == f"{ROW}\n" * fitting


def test_a_short_write_is_completed(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(atomic_files.os, "write", lambda file, content: write(file, content[:7]))
    append(tmp_path / "a", ROW)
    assert (tmp_path / "a").read_text() == f"{ROW}\n"


def append_many(path, name, barrier):
    barrier.wait(30)
    for i in range(100):
        append(path, json.dumps({"name": name, "i": i, "text": "x" * 50 * name}))


def test_processes_lose_no_line_while_the_file_is_replaced(tmp_path):
    """Four append; this one rewrites the file, as the start of a training does, under its lock."""
    path, context = tmp_path / "a", multiprocessing.get_context("fork")
    barrier = context.Barrier(5)
    processes = [context.Process(target=append_many, args=(path, name, barrier)) for name in range(4)]
    for process in processes:
        process.start()
    barrier.wait(30)
    replaced = 0
    while any(process.is_alive() for process in processes) or replaced < 3:
        if path.exists():
            with atomic_files.held(path, lambda: os.open(path, os.O_RDWR)):
                content = path.read_text()
                replace_atomically(path, text(content))
            replaced += 1
        time.sleep(0.001)
    assert [process.exitcode for process in processes] == [0] * 4
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((row["name"], row["i"]) for row in rows) == [(name, i) for name in range(4) for i in range(100)]
    assert [row["i"] for row in rows if row["name"] == 2] == list(range(100))
