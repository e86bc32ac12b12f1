"""A table over the jobs of a sweep: each result with its mean and standard error over the seeds.

Jobs that differ only in the seed form a group. With n seeds, the error of the mean of a result is s / sqrt(n), where s
is the sample standard deviation over the seeds; it contains the randomness of training, and of the evaluation if the
seed of that was swept. A single job has the standard error that the evaluation itself reports, if there is one.

The table names the groups by the settings in which their commands differ, such as `sde=vp`. If commands do not tell all
groups apart, the table has the settings of the configurations that differ, or the runs if these are many settings.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scoresde.result_table import plus_minus, write_columns
from scoresde.run_config import nodes
from scoresde.tensors import mean_and_error

Value = tuple[float, float | None]  # a result and its standard error
FREE = ("run", "name", "device", "seed", "trust", "class_names", "column_names", "conditional", "hydra")  # of any job
SEEDS = ("trainer.seed",)  # further settings that follow the seed
UNTOLD = ("step", "gradient_norm", "learning_rate", "skipped", "images_per_second", "memory_gb")  # in the log
MOST_SETTINGS = 6  # of configurations, as columns


@dataclass(frozen=True)
class JobResult:
    """Results of a job.

    settings: the settings as text by their path, without those in `FREE`. values: the results by name. typed: the
    settings that the commands of the training and of the job name. run: the directory of the run.
    """

    settings: Mapping[str, str]
    values: Mapping[str, Value]
    typed: Mapping[str, str] = field(default_factory=dict)
    run: Path = Path()


@dataclass(frozen=True)
class SeedGroup:
    """Jobs that differ only in the seed: the settings in which they differ from other groups, and their results."""

    settings: dict[str, str]
    jobs: int
    values: dict[str, Value]
    runs: tuple[Path, ...] = ()

    def label(self, *left_out: str) -> str:
        """Return the settings on one line, each by the last part of its path."""
        parts = [f"{k.rpartition('.')[2]}={text}" for k, text in self.settings.items() if text and k not in left_out]
        return ", ".join(parts) or "the same settings"


def results_of(record: Mapping[str, Any], config: Mapping[str, Any], command: Sequence[str] = ()) -> list[JobResult]:
    """Return the results of a job: one entry, or one for each sampler and budget or guidance scale that it compared.

    Args:
        record: the record of the job, with its `overrides`.
        config: the configuration of the run, as nested dicts and lists.
        command: the words of the command that trained the run.
    """
    run, overrides = Path(record["run"]), record.get("overrides", [])
    settings = settings_of(run, config, overrides)
    typed = _typed([word for word in command if "=" in word and not word.startswith("-")]) | _typed(overrides)
    return [
        JobResult(settings | compared, values, {k: typed[k] for k in typed if k not in compared} | compared, run)
        for compared, values in [({}, values_of(record)), *compared_values(record.get("rows", []))]
        if values
    ]


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
    typed = _typed(overrides)
    return {p: text for p, text in leaves.items() if not any(f"{p}.".startswith(f"{key}.") for key in typed)} | typed


def _typed(overrides: Sequence[str]) -> dict[str, str]:
    typed = dict(text.lstrip("+~").partition("=")[::2] for text in overrides)
    return {key: text for key, text in typed.items() if key.partition(".")[0] not in FREE and key not in SEEDS}


def values_of(record: Mapping[str, Any]) -> dict[str, Value]:
    """Return the results in the record of a job: likelihoods, metrics of samples, or the last line of a training."""
    values: dict[str, Value] = {}
    for row in record.get("rows", []):
        if row.get("kind") in ("likelihood", "cascade_likelihood"):
            values[f"{row['split']} {row['unit']}"] = row["mean"], row["stderr"]
        elif row.get("kind") == "quality" and row.get("of") == "samples":
            is_error = row.get("error_kind") == "standard error"
            values[row["metric"].replace("_", " ")] = row["value"], row["error"] if is_error else None
    last = record.get("last") or {}
    for name, value in last.items():
        if name not in UNTOLD and not name.endswith("_stderr"):
            values[name.replace("_", " ")] = value, last.get(f"{name}_stderr")
    return {name: (float(value), error) for name, (value, error) in values.items() if _is_finite(value)}


def compared_values(rows: Sequence[Mapping[str, Any]]) -> list[tuple[dict[str, str], dict[str, Value]]]:
    """Return the samplers and budgets, or the guidance scales, that rows of a record compare, with their metrics."""
    found: dict[tuple[tuple[str, str], ...], dict[str, Value]] = {}
    for row in rows:
        if row.get("kind") == "comparison":
            budget = "" if row["budget"] is None else str(row["budget"])
            compared, space = {"sampler": row["sampler"], "nfe": budget}, row["space"]
            name, error = row["metric"] if space == "state" else f"{row['metric']} ({space})", None
        elif row.get("kind") == "guidance":
            compared, name = {"guidance.scale": f"{row['scale']:g}"}, row["metric"]
            error = row["error"] if row.get("error_kind") == "standard error" else None
        else:
            continue
        if _is_finite(row["value"]):
            found.setdefault(tuple(compared.items()), {})[name.replace("_", " ")] = row["value"], error
    return [(dict(compared), values) for compared, values in found.items()]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def group_by_seed(jobs: Sequence[JobResult]) -> list[SeedGroup]:
    """Return the groups of jobs that differ only in the seed, in the order of their first job.

    The settings of a group are those that tell the groups apart. A result that a job of the group lacks is left out.
    """
    keys = dict.fromkeys(key for job in jobs for key in job.settings)
    differing = [key for key in keys if len({job.settings.get(key) for job in jobs}) > 1]
    groups: dict[tuple[str, ...], list[JobResult]] = {}
    for job in jobs:
        groups.setdefault(tuple(job.settings.get(key, "") for key in differing), []).append(job)
    names = _typed_names(list(groups.values()))
    if len({tuple(name.values()) for name in names}) < len(groups):
        if len(differing) <= MOST_SETTINGS:
            names = [dict(zip(differing, texts, strict=True)) for texts in groups]
        else:
            top = common_directory([job.run for job in jobs])
            listed = [dict.fromkeys(os.path.relpath(job.run, top) for job in members) for members in groups.values()]
            names = [{"run": ", ".join(runs), **name} for runs, name in zip(listed, names, strict=True)]
    return [
        SeedGroup(name, len(members), _means(members), tuple(dict.fromkeys(job.run for job in members)))
        for name, members in zip(names, groups.values(), strict=True)
    ]


def _typed_names(groups: Sequence[Sequence[JobResult]]) -> list[dict[str, str]]:
    """Return for each group the settings in commands that are the same within all groups, but not in all of them."""
    names: list[dict[str, str]] = [{} for _ in groups]
    for key in dict.fromkeys(key for members in groups for job in members for key in job.typed):
        texts = [{job.typed.get(key, "") for job in members} for members in groups]
        if all(len(own) == 1 for own in texts) and len(set().union(*texts)) > 1:
            for name, (text,) in zip(names, texts, strict=True):
                name[key] = text
    return names


def _means(jobs: Sequence[JobResult]) -> dict[str, Value]:
    if len(jobs) == 1:
        return dict(jobs[0].values)
    names = [name for name in jobs[0].values if all(name in job.values for job in jobs)]
    columns = {name: torch.tensor([job.values[name][0] for job in jobs], dtype=torch.float64) for name in names}
    return {name: mean_and_error(column) for name, column in columns.items()}


def common_directory(runs: Sequence[Path]) -> Path:
    """Return the directory that contains all runs; of a single run, the run itself."""
    is_mixed = any(run.is_absolute() or ".." in run.parts for run in runs)
    return Path(os.path.commonpath([os.path.abspath(run) if is_mixed else run for run in runs]))


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
