"""One run of a verb: in this process, or in another one that a launcher of Hydra has started.

A sweep runs its jobs one after the other in the process of the command. The launchers `joblib` (processes of this
machine) and `submitit_local`, `submitit_slurm` (jobs of a cluster) send each job elsewhere instead. Whatever is
expected to go wrong ends in a line on stderr where it happened; from elsewhere it comes back as `Failed`, and the other
jobs go on. Tasks that submitit starts for one job (`hydra.launcher.tasks_per_node`) are the processes that share it, as
those of torchrun.
"""

import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from scoresde.cli.names import one_line
from scoresde.cli.output import Arriving, Output, Record, line, talking
from scoresde.process_settings import tune_process
from scoresde.training import distributed
from scoresde.training.trainer import Interrupted

EXPECTED = (ValueError, TypeError, OSError, RuntimeError, HydraException, OmegaConfBaseException)
WRONG, INTERRUPTED, UNREAD = 2, 130, 141  # exit codes
Verb = Callable[[DictConfig], Record | None]


class Failed(RuntimeError):
    """A job that ran elsewhere failed, and has said why there."""


class Job:
    """A verb as Hydra calls it, as often as there are jobs.

    Args:
        name: of the verb.
        verb: a function of the configuration, which returns its record.
        shared: the verbs that processes may share.
        as_json: print the records, and no tables.
        wants_traceback: leave exceptions as they are.
    """

    def __init__(
        self, name: str, verb: Verb, shared: Sequence[str], as_json: bool = False, wants_traceback: bool = False
    ):
        self.name, self.verb, self.shared = name, verb, shared
        self.as_json, self.wants_traceback = as_json, wants_traceback
        self.begun = False  # whether any run of it has
        self.failed = False  # whether any has failed
        self.sent = False  # whether this is a copy, in another process

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sent": True}

    def __call__(self, config: DictConfig) -> Arriving | None:
        """Run the verb; from another process, what is to be printed in the command's.

        Raises:
            SystemExit: it was interrupted.
            Failed: something expected went wrong, and this is another process than the command's.
        """
        self.begun = True
        with self.told(), self.processes():
            try:
                with talking(Output(tables=not self.as_json, bars=not self.sent)):
                    record = self.verb(config)
            except (Interrupted, KeyboardInterrupt) as stop:
                reason = one_line(stop) if str(stop) else "interrupted"
                print(f"scoresde {self.name}: {reason}", file=sys.stderr)
                raise SystemExit(INTERRUPTED) from stop
            if self.as_json and distributed.rank() == 0:
                return self.handed_over(record or {})
        return None

    def handed_over(self, record: Record) -> Arriving | None:
        """The record printed, or on its way to where it is."""
        about = {"verb": self.name, "overrides": list(HydraConfig.get().overrides.task)}
        text = line({**about, **record})
        if self.sent:
            return Arriving(text)
        print(text, flush=True)
        return None

    @contextmanager
    def told(self) -> Iterator[None]:
        """Within the block what is expected to go wrong ends in a line on stderr, unless a traceback is wanted."""
        try:
            yield
        except EXPECTED as error:
            if isinstance(error, BrokenPipeError) and is_unread():
                raise SystemExit(UNREAD) from error
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
        tune_process()
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


def is_unread() -> bool:
    """Whether stdout is a pipe that nobody reads any more, as before `| head`: no fault of a job."""
    try:
        poll = select.poll()
        poll.register(1, select.POLLOUT)
        return any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))
    except (AttributeError, OSError):  # no such function here, or no such file
        return False
