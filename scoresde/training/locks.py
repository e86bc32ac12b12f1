"""Locks of directories.

`locked` lets only one process at a time train a run, or convert a checkpoint into a run. Other commands need no lock to
read a run: its files are replaced atomically. `shared` lets processes use a directory of intermediate results together.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from scoresde.atomic_files import held, remove_leftovers
from scoresde.training import distributed

LOCK = ".lock"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory during the block; of the processes that torchrun started, only the first holds it.

    The operating system releases the lock when the process ends, however it ends; the empty lock file stays. A process
    may hold the same lock several times.

    Raises:
        ValueError: another process holds the lock.
    """
    if distributed.rank() > 0:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / LOCK, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"{directory} is in use: another process writes this run; wait until it ends, or choose another run=..."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def shared(directory: Path) -> Iterator[None]:
    """Use a directory of intermediate results during the block, together with other processes.

    The last process that ends its block without an error removes the directory. After an error it stays, and the next
    process continues from its results. All processes of torchrun must call this function; only the first one locks and
    removes the directory.
    """
    if distributed.rank() > 0:
        distributed.gather(None)
        yield
        return
    with held(directory, partial(_open_directory, directory), fcntl.LOCK_SH):
        remove_leftovers(directory)
        distributed.gather(None)  # the others start when the directory is locked
        yield
    opened = partial(os.open, directory, os.O_RDONLY)
    with suppress(BlockingIOError, FileNotFoundError), held(directory, opened, fcntl.LOCK_EX | fcntl.LOCK_NB):
        shutil.rmtree(directory, ignore_errors=True)


def _open_directory(directory: Path) -> int:
    """Return the descriptor of a directory, made if it does not exist."""
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            return os.open(directory, os.O_RDONLY)
        except FileNotFoundError:
            pass  # another process has just removed it
        except FileExistsError:  # the same, between two lines of `mkdir`; or it is a file
            if directory.is_file():
                raise
