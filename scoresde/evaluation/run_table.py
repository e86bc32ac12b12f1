"""A table over the jobs of a sweep: each result with its mean and standard error over the seeds.

Jobs that differ only in the seed form a group. With n seeds, the error of the mean of a result is s / sqrt(n), where s
is the sample standard deviation over the seeds; it contains the randomness of training, and of the evaluation if the
seed of that was swept. A single job has the standard error that the evaluation itself reports, if there is one.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scoresde.result_table import plus_minus, write_columns
from scoresde.run_config import nodes
from scoresde.tensors import mean_and_error

Value = tuple[float, float | None]  # a result and its standard error
FREE = ("run", "device", "seed", "trust", "class_names", "column_names", "conditional", "hydra")  # of any job
SEEDS = ("trainer.seed",)  # further settings that follow the seed
UNTOLD = ("step", "gradient_norm", "learning_rate", "skipped", "images_per_second", "memory_gb")  # in the log


@dataclass(frozen=True)
class JobResult:
    """The settings of a job as text by their path, without those in `FREE`, and its results by name."""

    settings: Mapping[str, str]
    values: Mapping[str, Value]


@dataclass(frozen=True)
class SeedGroup:
    """Jobs that differ only in the seed: the settings in which they differ from other groups, and their results."""

    settings: dict[str, str]
    jobs: int
    values: dict[str, Value]


def settings_of(run: Path, config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, str]:
    """Return the settings of a job: the overrides of its command, and the other settings of its run.

    Args:
        run: the directory of the run; settings that contain it are left out, and so is the seed.
        config: the configuration of the run, as nested dicts and lists.
        overrides: the overrides of the command; an override of a group replaces the settings of that group.
    """
    own = {key: value for key, value in config.items() if key not in FREE}
    leaves = {path: str(value) for path, value in nodes(own) if not isinstance(value, (dict, list))}
    leaves = {p: text for p, text in leaves.items() if str(run) not in text and p not in SEEDS}
    typed = dict(text.lstrip("+~").partition("=")[::2] for text in overrides)
    typed = {key: text for key, text in typed.items() if key.partition(".")[0] not in FREE}
    return {p: text for p, text in leaves.items() if not any(f"{p}.".startswith(f"{key}.") for key in typed)} | typed


def values_of(record: Mapping[str, Any]) -> dict[str, Value]:
    """Return the results in the record of a job: likelihoods, metrics of samples, or the last line of a training."""
    values: dict[str, Value] = {}
    for row in record.get("rows", []):
        if row.get("kind") in ("likelihood", "cascade_likelihood"):
            values[f"{row['split']} {row['unit']}"] = row["mean"], row["stderr"]
        elif row.get("kind") == "quality" and row.get("of") == "samples":
            is_error = row.get("error_kind") == "standard error"
            values[row["metric"].replace("_", " ")] = row["value"], row["error"] if is_error else None
    for name, value in (record.get("last") or {}).items():
        if name not in UNTOLD and isinstance(value, (int, float)):
            values[name.replace("_", " ")] = float(value), None
    return values


def group_by_seed(jobs: Sequence[JobResult]) -> list[SeedGroup]:
    """Return the groups of jobs that differ only in the seed, in the order of their first job.

    The settings of a group are those that are not the same for all jobs. A result that a job of the group lacks is left
    out.
    """
    keys = dict.fromkeys(key for job in jobs for key in job.settings)
    differing = [key for key in keys if len({job.settings.get(key) for job in jobs}) > 1]
    groups: dict[tuple[str, ...], list[JobResult]] = {}
    for job in jobs:
        groups.setdefault(tuple(job.settings.get(key, "") for key in differing), []).append(job)
    return [
        SeedGroup(dict(zip(differing, texts, strict=True)), len(members), _means(members))
        for texts, members in groups.items()
    ]


def _means(jobs: Sequence[JobResult]) -> dict[str, Value]:
    if len(jobs) == 1:
        return dict(jobs[0].values)
    names = [name for name in jobs[0].values if all(name in job.values for job in jobs)]
    columns = {name: torch.tensor([job.values[name][0] for job in jobs], dtype=torch.float64) for name in names}
    return {name: mean_and_error(column) for name, column in columns.items()}


def common_directory(runs: Sequence[Path]) -> Path:
    """Return the directory that contains all runs; of a single run, the run itself."""
    return Path(os.path.commonpath([run.absolute() for run in runs]))


def table(groups: Sequence[SeedGroup]) -> list[list[str]]:
    """Return the cells of the table, with a line of titles: the settings that differ, the jobs, and the results."""
    names = result_names(groups)
    titles = [*groups[0].settings, "jobs", *names]
    cells = [
        [*group.settings.values(), str(group.jobs), *(_cell(group.values.get(name)) for name in names)]
        for group in groups
    ]
    return [titles, *cells]


def write_table(groups: Sequence[SeedGroup], path: Path) -> Path:
    """Write the table as CSV, with a column for each result and one for its error, and return the path."""
    columns: dict[str, list[Any]] = {key: [group.settings[key] for group in groups] for key in groups[0].settings}
    columns["jobs"] = [group.jobs for group in groups]
    for name in result_names(groups):
        values = [group.values.get(name, (None, None)) for group in groups]
        columns |= {name: [mean for mean, _ in values], f"{name} error": [error for _, error in values]}
    return write_columns(path, columns)


def result_names(groups: Sequence[SeedGroup]) -> list[str]:
    """Return the names of all results of the groups."""
    return list(dict.fromkeys(name for group in groups for name in group.values))


def _cell(value: Value | None) -> str:
    return "" if value is None else plus_minus(*value)
