"""One run of a verb: in the process of the command, or in a process that a launcher of Hydra started.

A sweep runs its jobs one after the other in the process of the command. The launchers `joblib` (processes of this
machine) and `submitit_local`, `submitit_slurm` (jobs of a cluster) send each job to another process. An expected error
is printed as one line on stderr where it happened; a job in another process then raises RuntimeError for the process of
the command, and the other jobs go on. Tasks that submitit starts for one job (`hydra.launcher.tasks_per_node`) share
it, as the processes of torchrun do.
"""

import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from scoresde.cli.keys import check_keys
from scoresde.cli.output import Output, PrintedOnArrival, Record, json_line, using
from scoresde.cli.suggestions import one_line
from scoresde.process_settings import tune_process
from scoresde.training import distributed
from scoresde.training.trainer import Interrupted

EXPECTED = (
    ValueError,
    TypeError,
    OSError,
    RuntimeError,
    MemoryError,
    HydraException,
    OmegaConfBaseException,
    YAMLError,
)
WRONG, INTERRUPTED, UNREAD = 2, 130, 141  # exit codes
SHARED = ("train", "sample", "bpd", "evaluate")  # verbs that the processes of torchrun can share
Verb = Callable[[DictConfig], Record | None]


class Job:
    """A verb as Hydra calls it: once for each job.

    Args:
        name: of the verb.
        verb: a function of the configuration, which returns its record.
        as_json: print records instead of tables.
        raises: raise expected errors with their traceback instead of printing one line.
    """

    def __init__(self, name: str, verb: Verb, as_json: bool = False, raises: bool = False):
        self.name, self.verb, self.as_json, self.raises = name, verb, as_json, raises
        self.has_failed = False  # any job so far
        self.is_remote = False  # whether this is a copy in another process than the command's

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "is_remote": True}

    def __call__(self, config: DictConfig) -> PrintedOnArrival | None:
        """Run the verb, and print its record if wanted.

        Raises:
            SystemExit: interrupted.
            RuntimeError: an expected error, which was printed, in another process than the command's.
        """
        with self.reported_errors():
            if self.is_remote:
                tune_process()
                join_tasks()
                self.check_processes()
            try:
                with distributed.processes(), using(Output(tables=not self.as_json, bars=not self.is_remote)):
                    check_keys(self.name, config, HydraConfig.get().runtime.choices)
                    record = self.verb(config)
                    is_first = distributed.rank() == 0
            except (Interrupted, KeyboardInterrupt) as stop:
                print(f"scoresde {self.name}: {str(stop) or 'interrupted'}", file=sys.stderr)
                raise SystemExit(INTERRUPTED) from stop
            if self.as_json and is_first:
                header = {"verb": self.name, "overrides": list(HydraConfig.get().overrides.task)}
                line = json_line({**header, **(record or {})})
                if self.is_remote:
                    return PrintedOnArrival(line)
                print(line, flush=True)
        return None

    @contextmanager
    def reported_errors(self) -> Iterator[None]:
        """Print an expected error of the block as one line on stderr, or raise it if tracebacks are wanted."""
        try:
            yield
        except EXPECTED as error:
            if isinstance(error, BrokenPipeError) and is_unread():
                raise SystemExit(UNREAD) from error
            if self.raises:
                raise
            self.has_failed = True
            print(f"scoresde {self.name}: {one_line(error)}", file=sys.stderr, flush=True)
            if self.is_remote:
                raise RuntimeError(f"a job failed: {one_line(error)}") from None

    def check_processes(self) -> None:
        """Raise ValueError if several processes run a verb that they cannot share."""
        if distributed.started() > 1 and self.name not in SHARED:
            raise ValueError(f"{self.name} runs in one process; torchrun can share {', '.join(SHARED)}")


def join_tasks() -> None:
    """Set the environment variables of torchrun for the tasks that submitit started for one job."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    if JobEnvironment().num_tasks > 1:
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def is_unread() -> bool:
    """Whether stdout is a pipe whose reader is gone, as after `| head`."""
    try:
        poll = select.poll()
        poll.register(1, select.POLLOUT)
        return any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))
    except (AttributeError, OSError):  # a platform without poll, or a closed stdout
        return False
