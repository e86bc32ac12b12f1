"""One run of a verb: in this process, or in another one that a launcher of Hydra has started.

A sweep runs its jobs one after the other in the process of the command. The launchers `joblib` (processes of this
machine) and `submitit_local`, `submitit_slurm` (jobs of a cluster) send each job elsewhere instead. Whatever is
expected to go wrong ends in a line on stderr where it happened; from elsewhere it comes back as `Failed`, and the other
jobs go on. Tasks that submitit starts for one job (`hydra.launcher.tasks_per_node`) are the processes that share it, as
those of torchrun.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from scoresde import process
from scoresde.training import distributed
from scoresde.training.trainer import Interrupted

EXPECTED = (ValueError, TypeError, OSError, RuntimeError, HydraException, OmegaConfBaseException)
INTERRUPTED = 130


class Failed(RuntimeError):
    """A job that ran elsewhere failed, and has said why there."""


class Job:
    """A verb as Hydra calls it, as often as there are jobs.

    Args:
        name: of the verb.
        verb: a function of the configuration.
        shared: the verbs that processes may share.
        wants_traceback: leave exceptions as they are.
    """

    def __init__(self, name: str, verb: Callable[[DictConfig], None], shared: Sequence[str], wants_traceback: bool):
        self.name, self.verb, self.shared, self.wants_traceback = name, verb, shared, wants_traceback
        self.failed = False  # whether any run of it has
        self.sent = False  # whether this is a copy, in another process

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sent": True}

    def __call__(self, config: DictConfig) -> None:
        """Run the verb.

        Raises:
            SystemExit: it was interrupted.
            Failed: something expected went wrong, and this is another process than the command's.
        """
        with self.told(), self.processes():
            try:
                self.verb(config)
            except (Interrupted, KeyboardInterrupt) as stop:
                print(f"scoresde {self.name}: {one_line(stop)}", file=sys.stderr)
                raise SystemExit(INTERRUPTED) from stop

    @contextmanager
    def told(self) -> Iterator[None]:
        """Within the block what is expected to go wrong ends in a line on stderr, unless a traceback is wanted."""
        try:
            yield
        except EXPECTED as error:
            if self.wants_traceback:
                raise
            self.failed = True
            print(f"scoresde {self.name}: {one_line(error)}", file=sys.stderr, flush=True)
            if self.sent:
                raise Failed(f"a job failed: {one_line(error)}") from None

    @contextmanager
    def processes(self) -> Iterator[None]:
        """Within the block the processes of the job know each other; those of the command do already."""
        if not self.sent:
            yield
            return
        process.prepare()
        join_tasks()
        self.refuse_several()
        with distributed.processes():
            yield

    def refuse_several(self) -> None:
        """See that this verb may be shared, if there are several processes.

        Raises:
            ValueError: it may not.
        """
        if distributed.started() > 1 and self.name not in self.shared:
            raise ValueError(f"one process expected; torchrun shares {', '.join(self.shared)} alone")


def join_tasks() -> None:
    """Describe the tasks that submitit has started for this job, if it has, as torchrun does its processes."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    if JobEnvironment().num_tasks > 1:
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def one_line(error: BaseException) -> str:
    """An exception's message, its first paragraph on one line."""
    text = " ".join(line.strip() for line in str(error).strip().splitlines() if line.strip())
    return text or type(error).__name__
