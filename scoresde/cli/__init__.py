"""The command line: `scoresde VERB`, each verb a Hydra application in a module of its own.

Overrides follow the verb (`scoresde train experiment=digits trainer.steps=100`), `--multirun` sweeps, and `--help`
shows what can be set. Wrong input ends in one line on stderr and exit code 2; an interrupted training in exit code 130;
set HYDRA_FULL_ERROR=1 for the traceback.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from scoresde.cli.common import config_directory
from scoresde.cli.convert import convert
from scoresde.cli.likelihood import bpd, dequantize
from scoresde.cli.sample import compare, sample
from scoresde.cli.train import train
from scoresde.training import distributed
from scoresde.training.trainer import Interrupted

VERBS: dict[str, Callable[[DictConfig], None]] = {
    "train": train,
    "sample": sample,
    "bpd": bpd,
    "compare": compare,
    "dequantize": dequantize,
    "convert": convert,
}


SHARED = ("bpd",)  # among processes


EXPECTED = (ValueError, TypeError, OSError, RuntimeError, HydraException, OmegaConfBaseException)


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
    if distributed.started() > 1 and verb not in SHARED:
        print(f"scoresde {verb}: one process expected; torchrun shares {', '.join(SHARED)} alone", file=sys.stderr)
        return 2
    failures: list[Exception] = []

    @contextmanager
    def told() -> Iterator[None]:
        """Within the block what is expected to go wrong ends in a line on stderr, unless a traceback is wanted."""
        try:
            yield
        except EXPECTED as error:
            if wants_traceback:
                raise
            failures.append(error)
            print(f"scoresde {verb}: {one_line(error)}", file=sys.stderr)

    def job(config: DictConfig) -> None:
        """One run of the verb: a sweep has many. Its errors end here, for Hydra would add lines of its own."""
        with told():
            try:
                VERBS[verb](config)
            except (Interrupted, KeyboardInterrupt) as stop:
                print(f"scoresde {verb}: {one_line(stop)}", file=sys.stderr)
                raise SystemExit(130) from stop

    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    with told(), distributed.processes(), hydra_arguments([f"scoresde {verb}", *overrides]):
        try:
            hydra.main(version_base="1.3", config_path=str(config_directory()), config_name=verb)(job)()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 2 if failures else 0


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


def one_line(error: BaseException) -> str:
    """An exception's message, its first paragraph on one line."""
    text = " ".join(line.strip() for line in str(error).strip().splitlines() if line.strip())
    return text or type(error).__name__
