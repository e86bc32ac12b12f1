"""One job (a verb with one configuration), in the process of the command or in a process that a Hydra launcher started.

By default, a sweep runs its jobs one after the other in the process of the command. The launchers `joblib` (processes
of this machine) and `submitit_local`, `submitit_slurm` (jobs of a cluster) send each job to another process. An
expected error is printed as one line on stderr by the process in which it happened. A job in another process then
raises RuntimeError, which reaches the process of the command, and the other jobs go on. Tasks that submitit starts for
one job (`hydra.launcher.tasks_per_node`) share this job, as the processes of torchrun do. The records of all jobs reach
the process of the command, in `FINISHED`.
"""

import json
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from scoresde.cli.keys import check_keys
from scoresde.cli.output import Output, Record, json_line, typed_overrides, using
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
SHARED = ("train", "sample", "bpd", "evaluate", "score", "classify")  # verbs that the processes of torchrun can share
Verb = Callable[[DictConfig], Record | None]


@dataclass
class Finished:
    """A job that finished.

    number: its place in the sweep. line: its record as JSON. is_shown: whether to print the line.

    A job in another process returns this object, which is stored when it is unpickled in the process of the command.
    Hydra discards the results of the jobs of a sweep, but unpickles them first.
    """

    number: int
    line: str
    is_shown: bool

    def __reduce__(self) -> tuple[Any, ...]:
        return finish, astuple(self)

    @property
    def record(self) -> Record:
        """The record with the verb and the overrides, as numbers and text."""
        return json.loads(self.line)


FINISHED: list[Finished] = []  # jobs of the command that runs


def finish(*fields: Any) -> None:
    """Store a job that finished, and print its record if it is to be shown."""
    job = Finished(*fields)
    FINISHED.append(job)
    if job.is_shown:
        print(job.line, flush=True)


class Job:
    """The function of a verb that Hydra calls, once for each job.

    Args:
        name: name of the verb.
        verb: a function of the configuration that returns a record, see `cli.output`.
        as_json: if True, print records; if False, print tables.
        raises: if True, raise expected errors, with a traceback; if False, print one line.
    """

    def __init__(self, name: str, verb: Verb, as_json: bool = False, raises: bool = False):
        self.name, self.verb, self.as_json, self.raises = name, verb, as_json, raises
        self.has_failed = False  # whether a job has failed
        self.is_remote = False  # whether this copy is in another process than the command's

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "is_remote": True}

    def __call__(self, config: DictConfig) -> Finished | None:
        """Run the verb and store its record; print the record if `as_json`.

        Raises:
            SystemExit: the job was interrupted.
            RuntimeError: an expected error happened, and was printed, in another process than the command's.
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
            if is_first:
                header = {"verb": self.name, "overrides": typed_overrides()}
                line = json_line({**header, **(record or {})})
                settings = HydraConfig.get()
                number = settings.job.num if settings.mode == RunMode.MULTIRUN else 0
                job = Finished(number, line, self.as_json)
                if self.is_remote:
                    return job
                finish(*astuple(job))
        return None

    @contextmanager
    def reported_errors(self) -> Iterator[None]:
        """Print an expected error of the block as one line on stderr, or raise it if `raises` is True."""
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
            raise ValueError(
                f"{self.name} must run in one process; got {distributed.started()} processes of torchrun, which can "
                f"share only {', '.join(SHARED)}"
            )


def join_tasks() -> None:
    """Set the environment variables of torchrun for the tasks that submitit started for one job."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    if JobEnvironment().num_tasks > 1:
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def is_unread() -> bool:
    """Return whether stdout is a pipe whose reader is gone, as after `| head`."""
    try:
        poll = select.poll()
        poll.register(1, select.POLLOUT)
        return any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))
    except (AttributeError, OSError):  # a platform without poll, or a closed stdout
        return False
