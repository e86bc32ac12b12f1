"""The command line: `scoresde VERB`. Each verb (train, sample, ...) is a Hydra application in a module of its own.

Overrides of Hydra settings follow the verb (`scoresde train experiment=digits trainer.steps=100`). `--multirun` sweeps
over values, `--json` prints records instead of tables (`cli.output`), and `--help` shows all settings. Exit codes: 0
success; 2 wrong input or a failed job, with one line on stderr that names the fix (`cli.overrides`, `cli.suggestions`);
130 interrupted; 141 the reader of the output is gone (`| head`); 1 any other error, which is a bug, with its traceback.
HYDRA_FULL_ERROR=1 shows the traceback of any error. A launcher may run the jobs of a sweep in other processes, see
`cli.jobs`.
"""

import importlib.metadata
import inspect
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from scoresde import run_config
from scoresde.cli import completion
from scoresde.cli.bpd import bpd
from scoresde.cli.classify import classify
from scoresde.cli.common import config_directory
from scoresde.cli.compare import compare
from scoresde.cli.convert import convert
from scoresde.cli.data import data
from scoresde.cli.dequantize import dequantize
from scoresde.cli.distill import distill
from scoresde.cli.evaluate import evaluate
from scoresde.cli.help import usage, verb_help
from scoresde.cli.jobs import FINISHED, INTERRUPTED, WRONG, Job, Verb
from scoresde.cli.output import Output, using
from scoresde.cli.overrides import first_mistake, literal, parse_options, parse_override
from scoresde.cli.report import report
from scoresde.cli.restore import restore
from scoresde.cli.run_lists import quote_runs, separate_runs, sweep_settings
from scoresde.cli.sample import sample
from scoresde.cli.score import score
from scoresde.cli.suggestions import did_you_mean
from scoresde.cli.sweeps import print_sweep
from scoresde.cli.train import train
from scoresde.training import distributed

VERBS: dict[str, Verb] = {
    verb.__name__: verb
    for verb in (
        train,
        sample,
        bpd,
        score,
        evaluate,
        compare,
        restore,
        classify,
        dequantize,
        distill,
        convert,
        data,
        report,
    )
}
PATHS = ("run", "samples", "image", "measurement", "data.path", "out")  # settings that are paths


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; the entry point of the console script."""
    verb, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    commands: dict[str, object] = {**VERBS, "completion": complete}
    if verb in ("-h", "--help"):
        print(usage(commands))
    elif "--version" in (verb, *arguments):
        print(f"scoresde {importlib.metadata.version('scoresde')}")
    elif verb in VERBS:
        return run(verb, arguments)
    elif verb == "completion":
        return complete(" ".join(arguments))
    else:
        print(f"scoresde: no verb {verb!r}{did_you_mean(verb, [*commands], lists_all=True)}", file=sys.stderr)
        return WRONG
    return 0


def complete(shell: str) -> int:
    """Print the shell script that completes verbs, Hydra config groups, options, keys and runs.

    bash  scoresde completion bash > ~/.local/share/bash-completion/completions/scoresde
    zsh   scoresde completion zsh > ~/.scoresde.zsh; echo 'source ~/.scoresde.zsh' >> ~/.zshrc
    fish  scoresde completion fish > ~/.config/fish/completions/scoresde.fish

    In the open shell only: eval "$(scoresde completion bash)"; in fish, scoresde completion fish | source.
    """
    if shell in ("-h", "--help"):
        print(inspect.getdoc(complete))
    elif shell in completion.SHELLS:
        print(completion.script(shell, config_directory()))
    else:
        suggestion = did_you_mean(shell, completion.SHELLS, lists_all=True)
        print(f"scoresde completion: no shell {shell!r}{suggestion}", file=sys.stderr)
        return WRONG
    return 0


def run(verb: str, arguments: Sequence[str]) -> int:
    """Run a verb with the arguments after it; return the exit code."""
    job = Job(verb, VERBS[verb], as_json="--json" in arguments, raises=os.environ.get("HYDRA_FULL_ERROR") == "1")
    with job.reported_errors():
        job.check_processes()
        options = parse_options(arguments)
        overrides = [add_condition(verb, quote_path(text)) for text in options.overrides]
        hydra_options = [word for word in arguments if word not in (*options.overrides, "--json")]
        multirun = options.multirun
        try:
            if options.help:
                print(verb_help(verb, overrides, options.config_dir))
            elif options.cfg or options.info or options.hydra_help:
                completion.run_hydra(config_directory(), verb, [*hydra_options, *overrides], job)
            else:
                overrides, has_list = separate_runs(verb, overrides)
                hydra_options += ["--multirun"] * (has_list and not multirun)
                multirun = multirun or has_list
                run_jobs(job, hydra_options, overrides, multirun)
        except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
            mistake = first_mistake(verb, overrides, multirun, options.config_dir)
            if mistake is None:
                raise
            raise ValueError(mistake) from error
        except SystemExit as stop:
            return int(stop.code or 0)
        except KeyboardInterrupt:  # while the jobs of a sweep run in other processes
            print(f"scoresde {verb}: interrupted", file=sys.stderr)
            return INTERRUPTED
    return WRONG if job.has_failed else 0


def run_jobs(job: Job, hydra_options: Sequence[str], overrides: Sequence[str], multirun: bool) -> None:
    """Run the job or the jobs of a command; a sweep ends with the table of the jobs that finished."""
    FINISHED.clear()
    settings = sweep_settings(overrides) if multirun else []
    failure = None
    try:
        with distributed.processes():
            completion.run_hydra(config_directory(), job.name, [*hydra_options, *settings, *overrides], job)
    except RuntimeError as error:  # of a job in another process
        failure = error
    if multirun:
        with using(Output(tables=not job.as_json)):
            print_sweep(job.name, sorted(FINISHED, key=lambda finished: finished.number))
    if failure is not None:
        raise failure


def add_condition(verb: str, override: str) -> str:
    """Return `cond.NAME=value` as `+cond.NAME=value`: Hydra needs the "+" for a key that its configuration lacks.

    A value that Hydra cannot parse, such as the class name R&B, is quoted. Other overrides are returned unchanged.
    """
    if verb not in ("sample", "restore") or not re.match(r"cond\.[\w.]+=", override):
        return override
    key, _, value = override.partition("=")
    return f"+{override}" if parse_override(override) is not None else f"+{key}={literal(value)}"


def quote_path(override: str) -> str:
    """Quote the path in `run=DIRECTORY`, or in another of `PATHS`, for Hydra if necessary, or those of several runs.

    A run may be named `sde=vp,seed=1`, or `7`, and the files of results have the overrides in their names.
    """
    key, _, path = override.partition("=")
    if key not in PATHS:
        return override
    parsed = parse_override(override)
    if parsed is None and key == "run" and (several := quote_runs(path)) is not None:
        return f"{key}={several}"
    is_text = parsed is None or isinstance(parsed.value(), (int, float))
    is_text = is_text or Path(path).is_file() or (Path(path) / run_config.CONFIG).is_file()
    return f"{key}={literal(path)}" if path and is_text else override
