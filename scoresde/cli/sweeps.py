"""The table over the jobs of a sweep, which `--multirun` of `train`, `bpd` and `evaluate` ends with."""

from collections.abc import Sequence
from pathlib import Path

from scoresde import run_config
from scoresde.cli.output import Record, print_rows, print_table
from scoresde.evaluation.run_table import (
    JobResult,
    common_directory,
    group_by_seed,
    settings_of,
    table,
    values_of,
    write_table,
)
from scoresde.quality_plots import save_groups


def print_sweep(verb: str, finished: Sequence[tuple[Record, Sequence[str]]]) -> None:
    """Print the results of the jobs of a sweep, with means over seeds; write them as `sweep_VERB.csv` and `.png`.

    The files are in the directory that contains the runs. Nothing happens for fewer than two jobs with results.

    Args:
        verb: the verb.
        finished: the records and the overrides of the jobs that ran in this process.
    """
    jobs, runs = [], []
    for record, overrides in finished:
        if (values := values_of(record)) and "run" in record:
            run = Path(record["run"])
            config = run_config.plain(run_config.read_config(run))
            jobs.append(JobResult(settings_of(run, config, overrides), values))
            runs.append(run)
    if len(jobs) < 2:
        return
    groups, directory = group_by_seed(jobs), common_directory(runs)
    print_table(table(groups))
    written = write_table(groups, directory / f"sweep_{verb}.csv")
    print_rows({"table": written, "plot": save_groups(groups, directory / f"sweep_{verb}.png")})
