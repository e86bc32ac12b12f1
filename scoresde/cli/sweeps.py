"""The end of a sweep of `train`, `bpd`, `evaluate`, `compare` or `report`: a table over the jobs, a page on runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scoresde import run_config
from scoresde.cli.jobs import Finished
from scoresde.cli.output import Record, print_rows, print_table
from scoresde.cli.overrides import literal
from scoresde.evaluation.run_table import (
    JobResult,
    common_directory,
    group_by_seed,
    results_of,
    table,
    write_table,
)
from scoresde.quality_plots import save_compared_groups, save_groups
from scoresde.report import REPORT, Reported, RunFiles, measured, write_runs_report
from scoresde.report.commands import command_line


def print_sweep(verb: str, finished: Sequence[Finished]) -> None:
    """Print the results of the jobs of a sweep, with means over seeds; write them as `sweep_VERB.csv` and `.png`.

    A sweep of `report` also writes a page on its runs. The files are in the directory that contains the runs. There is
    no table of fewer than two jobs with results, and no page on a single run.

    Args:
        verb: the verb.
        finished: the jobs that finished.
    """
    records = [job.record for job in finished if has_run(job.record)]
    paths: dict[str, Path] = {}
    if verb == "report":
        reported = {record["run"]: reported_run(record) for record in records}
        results = [list(run.results) for run in reported.values()]
        if len(reported) > 1:
            paths["report"] = write_page(reported, records[0]["overrides"])
    else:
        results = [results_of(record, *trained(Path(record["run"]))) for record in records]
    results = [part for part in results if part]
    if len(results) > 1:
        groups = group_by_seed([result for part in results for result in part])
        file = common_directory([part[0].run for part in results]) / f"sweep_{verb}.csv"
        draw = save_compared_groups if "sampler" in groups[0].settings else save_groups
        print_table(table(groups))
        paths = {"table": write_table(groups, file), "plot": draw(groups, file.with_suffix(".png")), **paths}
    print_rows(paths)


def has_run(record: Record) -> bool:
    """Return whether the record of a job names a run, unlike that of `scoresde compare run=oracle`."""
    return "run" in record and (Path(record["run"]) / run_config.CONFIG).is_file()


def trained(run: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the configuration of a run, and the words of the command that trained it, [] if it is not recorded."""
    return run_config.plain(run_config.read_config(run)), run_config.read_command(run) or []


def reported_run(record: Record) -> Reported:
    """Return a run with a report, with the results that were measured of it before."""
    run = Path(record["run"])
    config, command = trained(run)
    files = RunFiles(run, config)
    results: list[JobResult] = results_of({"run": run, **measured(files)}, config, command)
    return Reported(files, Path(record["paths"]["report"]), results, [f"run={literal(str(run))}"])


def write_page(reported: Mapping[str, Reported], overrides: Sequence[str]) -> Path:
    """Write the page on several runs in the directory that contains them, which is not one of them; return its path."""
    directory = common_directory([run.files.path for run in reported.values()])
    if (directory / run_config.CONFIG).is_file():
        directory = directory.parent
    listed = f"run=[{','.join(map(literal, reported))}]"
    others = [text for text in overrides if not text.startswith("run=")]
    return write_runs_report(
        [*reported.values()], directory / REPORT, command_line("scoresde", "report", listed, *others)
    )
