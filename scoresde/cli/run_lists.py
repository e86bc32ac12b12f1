"""Several runs in one command: `run=[a,b]`, `run=runs/seeds/*` and `--multirun run=a,b`.

For `bpd`, `evaluate`, `compare` and `report`, a list of runs is a sweep over `run`, with one job for each run. For
`bpd`, a list whose later runs were trained for super-resolution is a cascade instead.
"""

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override, Transformer

from scoresde import hub, run_config
from scoresde.cli.cascade import is_later_stage
from scoresde.cli.common import check_run
from scoresde.cli.overrides import literal, parse_override
from scoresde.evaluation.run_table import common_directory

SEVERAL = ("bpd", "evaluate", "compare", "report")  # the verbs that take a list of separate runs


def matching_runs(path: str) -> list[str]:
    """Return the run at a path or an address on the hub, or the runs that a pattern with * or ? matches, in order."""
    if hub.is_address(path) or (Path(path) / run_config.CONFIG).is_file():
        return [path]
    paths = glob.glob(path) if {"*", "?"} & set(path) else []
    runs = [str(Path(found)) for found in paths if (Path(found) / run_config.CONFIG).is_file()]
    return sorted(runs, key=lambda run: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", run)])


def quote_runs(text: str) -> str | None:
    """Return a list `[a,b]` or a sweep `a,b` with quotes for Hydra; None if it does not name two runs.

    The names of runs may contain "=" and ",", as in `sde=vp,seed=1`.
    """
    is_list = text.startswith("[") and text.endswith("]")
    paths: list[str] = []
    rest = ""
    for part in (text[1:-1] if is_list else text).split(","):
        rest = f"{rest},{part}" if rest else part
        if matching_runs(rest):
            paths, rest = [*paths, rest], ""
    paths += [rest] if rest else []
    quoted = ",".join(map(literal, paths))
    return None if len(paths) < 2 else f"[{quoted}]" if is_list else quoted


def separate_runs(verb: str, overrides: Sequence[str]) -> tuple[list[str], bool]:
    """Return the overrides of a verb with a list of runs as the sweep `run=a,b`, and whether there was such a list.

    A pattern such as `run=runs/seeds/*` is the list of the runs that it matches. A cascade stays a list.

    Raises:
        FileNotFoundError: a path of the list has no run.
        ValueError: the list has fewer than two runs, some of them were trained for super-resolution, or the reports of
            all runs would be one file.
    """
    separate, has_list = list(overrides), False
    for i, text in enumerate(overrides):
        runs = listed_runs(verb, text) if verb in SEVERAL and text.startswith("run=") else []
        if runs:
            separate[i] = f"run={','.join(map(literal, runs))}"
            has_list = has_list or len(runs) > 1
    if has_list and verb == "report" and any(text.startswith("out=") and "${" not in text for text in overrides):
        raise ValueError("out must be left out for several runs: each has its report in its own directory")
    return separate, has_list


def listed_runs(verb: str, text: str) -> list[str]:
    """Return the runs that `run=[a,b]` or `run=PATTERN` lists for separate jobs; [] for one path or a cascade."""
    override = parse_override(text)
    value = None if override is None or override.is_sweep_override() else override.value()
    given = value if isinstance(value, list) else [value]
    if not all(isinstance(path, (str, int)) for path in given):
        return []  # `cli.keys` says what is wrong with it
    runs = list(dict.fromkeys(run for path in map(str, given) for run in matching_runs(path) or [path]))
    if len(runs) < 2:
        if isinstance(value, list):
            advice = f"write run={runs[0]}" if runs else "name them"
            raise ValueError(f"run must be a directory or a list of two or more different runs; got {text}: {advice}")
        return [] if runs == given else runs
    stages = [run for run in runs if is_later_stage(run_config.read_config(check_run(run)))]
    if not stages or verb == "report":
        return runs
    if verb == "bpd" and set(runs[1:]) <= set(stages):
        return []
    raise ValueError(
        f"run must list runs that {verb} can measure one by one; got {', '.join(stages)}, trained for "
        "super-resolution: give sample or bpd a cascade, all its runs from the smallest images to the largest"
    )


def sweep_settings(overrides: Sequence[str]) -> list[str]:
    """Return Hydra's settings for a sweep with these overrides.

    They name the directories of new runs by the swept settings alone, and, if `run` is swept, put Hydra's own files
    into the directory that contains the runs.
    """
    parsed = [override for override in map(parse_override, overrides) if override is not None]
    swept = {override.key_or_group: override for override in parsed if override.is_sweep_override()}
    settings, runs = [], swept.pop("run", None)
    if runs is not None and runs.is_choice_sweep():
        settings.append(f"hydra.sweep.dir={literal(str(_sweep_directory(runs)))}")
    if swept:
        fixed = dict.fromkeys(["run", *(override.key_or_group for override in parsed)])
        excluded = ",".join(literal(key) for key in fixed if key not in swept)
        settings.append(f"hydra.job.config.override_dirname.exclude_keys=[{excluded}]")
    return settings


def _sweep_directory(runs: Override) -> Path:
    """Return the directory that contains the runs of a sweep, or the first directory above it that exists."""
    values: list[Any] = list(runs.sweep_iterator(transformer=Transformer.identity))
    parts = [part for value in values for part in (value if isinstance(value, list) else [value])]
    paths = [Path(str(getattr(part, "text", part))) for part in parts]
    if any(map(hub.is_address, paths)):
        return Path()
    directory = common_directory(paths)
    return next(path for path in (directory, *directory.parents) if path.is_dir())
