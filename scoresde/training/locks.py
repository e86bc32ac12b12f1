"""Locks of run directories: two processes never train in the same one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from scoresde.training import distributed

LOCK = ".lock"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory during the block; of the processes that torchrun started, only the first holds it.

    The operating system releases the lock when the process ends, however it ends; the empty file stays. A process may
    hold the same lock several times.

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
