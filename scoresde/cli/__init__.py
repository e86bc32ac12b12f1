"""The command line: `scoresde VERB`, each verb a Hydra application in a module of its own.

Overrides follow the verb (`scoresde train experiment=digits trainer.steps=100`), `--multirun` sweeps, `--json` prints
records instead of tables (`cli.output`), and `--help` shows what can be set. Exit codes: 0; 2 for wrong input and for
failed jobs, with a line on stderr that names the fix (`cli.names`, `cli.overrides`); 130 for an interrupted one; 141
where nobody reads on (`| head`); whatever else goes wrong is an error of this program, and shows its traceback (1).
HYDRA_FULL_ERROR=1 shows that of any error. The jobs of a sweep may run elsewhere, see `cli.jobs`.
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import hydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from scoresde.cli import completion
from scoresde.cli.common import choice, config_directory
from scoresde.cli.convert import convert
from scoresde.cli.data import data
from scoresde.cli.evaluate import evaluate
from scoresde.cli.help import fitted, usage, version
from scoresde.cli.jobs import INTERRUPTED, WRONG, Job, Verb
from scoresde.cli.likelihood import bpd, dequantize
from scoresde.cli.names import of, one_line
from scoresde.cli.overrides import explain, parse_options
from scoresde.cli.report import report
from scoresde.cli.sample import compare, sample
from scoresde.cli.train import train
from scoresde.training import distributed

VERBS: dict[str, Verb] = {
    "train": train,
    "sample": sample,
    "bpd": bpd,
    "evaluate": evaluate,
    "compare": compare,
    "dequantize": dequantize,
    "convert": convert,
    "data": data,
    "report": report,
}


SHARED = ("train", "sample", "bpd", "evaluate")  # among processes
JSON, COMPLETION = "--json", "completion"


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: run a verb; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(VERBS))
    elif "--version" in arguments:
        print(version())
    elif arguments[0] == COMPLETION:
        return complete(" ".join(arguments[1:]))
    elif arguments[0] in VERBS:
        return run(arguments[0], [word for word in arguments[1:] if word != JSON], as_json=JSON in arguments)
    else:
        print(f"scoresde: no verb {arguments[0]!r}{of(arguments[0], [*VERBS, COMPLETION])}", file=sys.stderr)
        return WRONG
    return 0


def complete(shell: str) -> int:
    """Print the lines that make a shell complete names; the exit code."""
    if shell in ("-h", "--help"):
        print(completion.HELP)
        return 0
    try:
        print(completion.script(choice("a shell", shell, completion.SHELLS), config_directory()))
    except ValueError as error:
        print(f"scoresde {COMPLETION}: {one_line(error)}", file=sys.stderr)
        return WRONG
    return 0


def run(verb: str, arguments: Sequence[str], as_json: bool) -> int:
    """Run a verb with the arguments after it; the exit code."""
    job = Job(verb, VERBS[verb], SHARED, as_json, wants_traceback=os.environ.get("HYDRA_FULL_ERROR") == "1")
    with job.told():
        job.refuse_several()
        sorted_arguments = options_first(arguments)
        options = parse_options(sorted_arguments)
        with distributed.processes(), hydra_arguments([f"scoresde {verb}", *sorted_arguments]), fitted(options.help):
            try:
                hydra.main(version_base="1.3", config_path=str(config_directory()), config_name=verb)(job)()
            except (HydraException, OmegaConfBaseException, ValueError) as error:
                if type(error) is ValueError and job.begun:  # of a job, which says itself what is wrong
                    raise
                loader = completion.config_loader(config_directory(), options.config_dir)
                raise ValueError(explain(error, verb, options.overrides, loader)) from error
            except SystemExit as stop:
                return int(stop.code or 0)
            except KeyboardInterrupt:  # while the jobs of a sweep run elsewhere
                print(f"scoresde {verb}: interrupted", file=sys.stderr)
                return INTERRUPTED
    return WRONG if job.failed else 0


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
