"""Signals that stop a training run after its current step, with a checkpoint."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from scoresde.training import distributed

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


class Interrupted(RuntimeError):
    """Ctrl-C or a termination signal stopped the run after a complete step; the checkpoint is written."""


@contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether a signal asked to stop; a second signal of the same kind acts as usual.

    The signals are SIGINT, SIGTERM and, if the platform has them, SIGUSR1 (schedulers send it before a time limit) and
    SIGHUP (unless it is ignored, as under `nohup`). A process of torchrun also stops when torchrun is gone.
    """
    received, parent = [], os.getppid()
    is_main = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
    numbers = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)] if is_main else []
    previous = {int(number): signal.getsignal(number) for number in numbers}
    hangup = int(getattr(signal, "SIGHUP", 0))
    if previous.get(hangup) is signal.SIG_IGN:
        del previous[hangup]

    def record(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in previous:
        signal.signal(number, record)
    try:
        yield lambda: bool(received) or (distributed.size() > 1 and os.getppid() != parent)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
