"""The command line: `scoresde VERB`, each verb a Hydra application in a module of its own.

Overrides follow the verb (`scoresde train experiment=digits trainer.steps=100`), `--multirun` sweeps, and `--help`
shows what can be set. Wrong input ends in one line on stderr and exit code 2; an interrupted training in exit code 130;
set HYDRA_FULL_ERROR=1 for the traceback. The jobs of a sweep may run elsewhere, see `cli.jobs`.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import hydra
from omegaconf import DictConfig

from scoresde.cli.common import config_directory
from scoresde.cli.convert import convert
from scoresde.cli.data import data
from scoresde.cli.evaluate import evaluate
from scoresde.cli.jobs import INTERRUPTED, Job
from scoresde.cli.likelihood import bpd, dequantize
from scoresde.cli.sample import compare, sample
from scoresde.cli.train import train
from scoresde.training import distributed

VERBS: dict[str, Callable[[DictConfig], None]] = {
    "train": train,
    "sample": sample,
    "bpd": bpd,
    "evaluate": evaluate,
    "compare": compare,
    "dequantize": dequantize,
    "convert": convert,
    "data": data,
}


SHARED = ("train", "sample", "bpd", "evaluate")  # among processes


def usage() -> str:
    """The verbs, a line each."""
    lines = [f"  {name:<10} {verb.__doc__}" for name, verb in VERBS.items()]
    return "\n".join(["usage: scoresde VERB [key=value ...]; `scoresde VERB --help` shows what can be set", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: run a verb; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    verb, *overrides = arguments
    if verb not in VERBS:
        print(f"scoresde: unknown verb {verb!r}\n{usage()}", file=sys.stderr)
        return 2
    job = Job(verb, VERBS[verb], SHARED, wants_traceback=os.environ.get("HYDRA_FULL_ERROR") == "1")
    with job.told():
        job.refuse_several()
        with distributed.processes(), hydra_arguments([f"scoresde {verb}", *options_first(overrides)]):
            try:
                hydra.main(version_base="1.3", config_path=str(config_directory()), config_name=verb)(job)()
            except SystemExit as stop:
                return int(stop.code or 0)
            except KeyboardInterrupt:  # while the jobs of a sweep run elsewhere
                return INTERRUPTED
    return 2 if job.failed else 0


def options_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with options (`--multirun`, `--config-dir DIR`) before overrides, for argparse to read them all."""
    overrides = [x for x in arguments if not x.startswith("-") and ("=" in x or re.match("~[^/]", x))]
    return [*(x for x in arguments if x not in overrides), *overrides]


@contextmanager
def hydra_arguments(arguments: list[str]) -> Iterator[None]:
    """Within the block Hydra reads these arguments, and raises its errors instead of printing them and exiting."""
    before, setting = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = arguments, "1"
    try:
        yield
    finally:
        sys.argv = before
        os.environ.pop("HYDRA_FULL_ERROR")
        if setting is not None:
            os.environ["HYDRA_FULL_ERROR"] = setting
