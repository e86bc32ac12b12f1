"""Files that any number of processes write: each write is complete, or leaves the file as it was.

A file is replaced by renaming a temporary one, or grows by whole lines under a lock. The locks are those of the
operating system (flock), which releases them when a process ends, however it ends. A temporary file without a lock was
therefore left by a process that was killed: `remove_leftovers` removes it.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, a quota, a limit of the process
OLDER = r"(safetensors|jsonl?|yaml|np[yz]|png|csv|html)(\.\d+)?"  # how older versions ended these names, before .tmp
TEMPORARY = re.compile(rf"\..+\.([0-9a-f]{{8}}|{OLDER})\.tmp")
BLOCK = 65536  # bytes read at a time


def replace_atomically(path: Path, write: Callable[[Path], Any], size: int | None = None) -> None:
    """Let `write` fill a temporary file in the directory of `path`, then rename it to `path`.

    The file gets the mode that the umask gives to new files.

    Args:
        path: the file to write or replace.
        write: called with the path of an empty temporary file, which it fills and does not replace.
        size: number of bytes, for the message on a full disk; by default those written so far.

    Raises:
        OSError: the file cannot be written; the message has the path and, on a full disk, the bytes needed.
    """
    written = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, descriptor = _create_temporary(path)
        try:
            write(temporary)
            os.fsync(descriptor)
            os.replace(temporary, path)
        finally:
            written = os.fstat(descriptor).st_size
            temporary.unlink(missing_ok=True)
            os.close(descriptor)
    except OSError as error:
        _name_path(error, path, f"more than {written:,}" if size is None else f"{size:,}")
        raise


def append(path: Path, line: str) -> None:
    """Append a line as a whole: concurrent processes neither mix nor lose lines.

    A killed process may leave a last line without a line break. Such a line is kept if it is JSON, and gets its line
    break; otherwise it is removed.

    Raises:
        OSError: the line cannot be written; the message has the path and, on a full disk, the bytes needed.
    """
    content = f"{line}\n".encode()
    size = len(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with held(path, partial(os.open, path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)) as file:
            end = os.fstat(file).st_size
            unfinished = _last_line(file, end)
            if _is_json(unfinished):
                content = b"\n" + content
            else:
                end -= len(unfinished)
            try:
                os.ftruncate(file, end)
                while content:
                    content = content[os.write(file, content) :]
            except BaseException:
                os.ftruncate(file, end)
                raise
    except OSError as error:
        _name_path(error, path, f"{size:,}")
        raise


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files that killed processes left in a directory tree; those of living processes stay."""
    for path in Path(directory).rglob(".*.tmp"):
        if TEMPORARY.fullmatch(path.name) and path.is_file():
            with (
                suppress(OSError),  # a living process holds its lock, or has just renamed it
                held(path, partial(os.open, path, os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB, strict=True),
            ):
                path.unlink()


@contextmanager
def held(path: Path, opened: Callable[[], int], operation: int = fcntl.LOCK_EX, strict: bool = False) -> Iterator[int]:
    """Lock the file or directory at `path` for the duration of the block; yield its descriptor.

    Args:
        path: may be replaced or removed by other processes while this one waits for the lock.
        opened: opens `path` and returns the descriptor; called again if `path` was replaced meanwhile.
        operation: the operation of `fcntl.flock`.
        strict: if True, raise OSError where the file system has no locks; if False, go on without a lock.

    Raises:
        BlockingIOError: another process holds the lock, and the operation does not wait.
    """
    while True:
        descriptor = opened()
        try:
            try:
                fcntl.flock(descriptor, operation)
            except OSError as error:
                if strict or isinstance(error, BlockingIOError):
                    raise
            if _is_at(descriptor, path):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _create_temporary(path: Path) -> tuple[Path, int]:
    """Create a temporary file beside `path`, and lock it; return its path and its descriptor."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # on a file system without locks the file is never taken for a leftover
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_at(descriptor, temporary):  # else another process took it for a leftover before the lock was held
            return temporary, descriptor
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is still the one at `path`."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def _last_line(file: int, end: int) -> bytes:
    """Return what follows the last line break of an open file of `end` bytes."""
    tail = b""
    while end and b"\n" not in tail:
        start = max(end - BLOCK, 0)
        tail, end = os.pread(file, end - start, start) + tail, start
    return tail.rpartition(b"\n")[2]


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _name_path(error: OSError, path: Path, size: str) -> None:
    """Raise OSError with a clearer message for `error`, the failure of a write to `path`, in the two cases below.

    On a full disk, the new message has `path`, the bytes needed (`size`) and the bytes free. If `error` names a
    temporary file, the new message names `path` instead. In all other cases nothing is raised here, and the caller
    raises `error` itself.
    """
    if error.errno in DISK_ERRORS:
        place = next(parent for parent in path.absolute().parents if parent.exists())
        free = shutil.disk_usage(place).free
        reason = f"{os.strerror(error.errno)}: {path} needs {size} bytes, and {free:,} are free"
        raise OSError(error.errno, f"{reason}; free some space, and run the command again") from error
    if error.errno is not None and str(error.filename).endswith(".tmp"):
        raise OSError(error.errno, f"cannot write {path}: {os.strerror(error.errno)}") from error
