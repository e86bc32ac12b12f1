"""The report on several runs: their results with means over seeds, samples side by side, and settings that differ."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from scoresde.atomic_files import replace_atomically
from scoresde.evaluation.records import provenance
from scoresde.evaluation.run_table import JobResult, SeedGroup, Value, group_by_seed, result_names
from scoresde.plots import metric_name
from scoresde.report import wording
from scoresde.report.charts import Bar, Chart, bar_chart
from scoresde.report.commands import command_line
from scoresde.report.page import environment
from scoresde.report.run_files import RunFiles
from scoresde.report.sample_section import sample_section
from scoresde.run_config import flatten

MOST_CHARTS = 8  # results drawn
MOST_SAMPLED = 24  # runs whose samples are shown
IMAGES = 25  # of each run
SMALL_CHARTS = 6  # of each run
LABEL = 32  # characters of the name of a group in a chart


@dataclass
class Reported:
    """A run with a report.

    files: the files of the run. page: the report of the run. results: the results, as in `evaluation.run_table`.
    overrides: the overrides that select the run in a command.
    """

    files: RunFiles
    page: Path
    results: Sequence[JobResult]
    overrides: Sequence[str]


def measured(files: RunFiles) -> dict[str, Any]:
    """Return the measured results of a run in the form of a record, see `evaluation.run_table.values_of`."""
    last = files.held_out[-1] if files.held_out else {}
    return {"rows": [*files.lines("likelihood"), *files.lines("quality")], "last": last}


def write_runs_report(reported: Sequence[Reported], path: Path, command: str) -> Path:
    """Write the page on several runs atomically, and return its path.

    Args:
        reported: the runs.
        path: HTML file to write.
        command: the command that writes the reports and the page.
    """
    text = render_runs(reported, path, command)
    replace_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
    return path


def render_runs(reported: Sequence[Reported], path: Path, command: str) -> str:
    """Return the HTML text of the page on several runs; the arguments are those of `write_runs_report`."""
    groups = group_by_seed([result for run in reported for result in run.results])
    runs, names = [run_variables(run, path.parent) for run in reported], result_names(groups)
    states = {wording.states(run.files) for run in reported}
    first = reported[0]
    return (
        environment()
        .get_template("runs.html")
        .render(
            runs=runs,
            directory=path.parent,
            states=states.pop() if len(states) == 1 else "",
            groups=groups,
            results={name: metric_name(name.replace(" ", "_"), "") for name in names},
            settings_shown=list(groups[0].settings) if groups else [],
            charts=[result_chart(name, groups) for name in names[:MOST_CHARTS]],
            stale=[run["name"] for run in runs if any(map(run["files"].is_stale, ("likelihood", "quality")))],
            shown=[samples_of(run, i) for i, run in enumerate(runs[:MOST_SAMPLED])],
            differing=differing_settings([run.files for run in reported]),
            command=command,
            adding={"bpd": command_line("scoresde", "bpd", *first.overrides)},
            made=provenance(first.files.path, "cpu"),
            with_error=wording.with_error,
        )
    )


def run_variables(run: Reported, folder: Path) -> dict[str, Any]:
    """Return the name of a run, the link to its report, and its results, as the template needs them."""
    values: dict[str, Value] = {name: value for result in run.results for name, value in result.values.items()}
    sample = command_line("scoresde", "sample", *run.overrides)
    link = quote(os.path.relpath(run.page, folder))
    return {"name": os.path.relpath(run.files.path, folder), "link": link, "files": run.files} | {
        "measured": values,
        "sample": sample,
    }


def result_chart(name: str, groups: Sequence[SeedGroup]) -> Chart:
    """Draw a result of all groups with standard errors."""
    bars = []
    for group in groups:
        if name in group.values:
            label, (value, error) = group.label(), group.values[name]
            short = label if len(label) <= LABEL else f"{label[: LABEL - 1]}…"
            bars.append(Bar(short, value, error, wording.with_error(value, error), 0))
    return bar_chart(metric_name(name.replace(" ", "_"), ""), bars, "mean ± standard error", lengths=False)


def samples_of(run: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return the pictures or charts of the latest samples of a run; `index` makes identifiers unique on the page."""
    files, drawn = run["files"], run["files"].samples()
    if drawn is not None and files.kind == "images":
        drawn = drawn[0], drawn[1][:IMAGES]
    section = sample_section(files, drawn, None)
    section["charts"] = [with_index(chart, index) for chart in section["charts"]]
    section["small"] = [with_index(chart, index) for chart in section["small"][:SMALL_CHARTS]]
    return {**section, "run": run}


def with_index(chart: Chart, index: int) -> Chart:
    """Return a chart with an index in the identifiers of its SVG, as two runs may have equal charts."""

    def numbered(svg: Markup) -> Markup:
        names = "|".join(re.escape(name) for name in re.findall(r'\bid="([^"]+)"', svg))
        return Markup(re.sub(rf"\b({names})\b", rf"r{index}-\1", svg)) if names else svg

    legend = {name: numbered(glyph) for name, glyph in chart.legend.items()}
    return replace(chart, svg=numbered(chart.svg), legend=legend)


def differing_settings(runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    """Return the settings, by path, that are not the same for all runs: their text for each run, "" if it has none."""
    free = {"run", "device", "class_names", "column_names", "hydra"}
    settings = [flatten({key: value for key, value in run.config.items() if key not in free}) for run in runs]
    keys = sorted({key for tree in settings for key in tree})
    texts = {key: [str(tree[key]) if key in tree else "" for tree in settings] for key in keys}
    return {key: values for key, values in texts.items() if len(set(values)) > 1}
