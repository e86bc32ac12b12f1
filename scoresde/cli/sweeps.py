"""The table over the jobs of a sweep of `train`, `bpd`, `evaluate`, `compare` or `report`."""

from collections.abc import Sequence
from pathlib import Path

from scoresde import run_config
from scoresde.cli.jobs import Finished
from scoresde.cli.output import print_rows, print_table
from scoresde.evaluation.run_table import common_directory, group_by_seed, results_of, table, write_table
from scoresde.quality_plots import save_compared_groups, save_groups


def print_sweep(verb: str, finished: Sequence[Finished]) -> None:
    """Print the results of the jobs of a sweep, with means over seeds; write them as `sweep_VERB.csv` and `.png`.

    The files are in the directory that contains the runs. Nothing happens for fewer than two jobs with results.

    Args:
        verb: the verb.
        finished: the jobs that finished.
    """
    jobs, runs = [], []
    for record in (job.record for job in finished):
        run = Path(record.get("run", ""))
        if (run / run_config.CONFIG).is_file():
            config = run_config.plain(run_config.read_config(run))
            if results := results_of(record, config, run_config.read_command(run) or ()):
                jobs += results
                runs.append(run)
    if len(runs) < 2:
        return
    groups, directory = group_by_seed(jobs), common_directory(runs)
    print_table(table(groups))
    written = write_table(groups, directory / f"sweep_{verb}.csv")
    draw = save_compared_groups if "sampler" in groups[0].settings else save_groups
    print_rows({"table": written, "plot": draw(groups, directory / f"sweep_{verb}.png")})
