"""The section on the quality of samples: a table for each feature space that `scoresde evaluate` measured in."""

from typing import Any

from scoresde.report.run_files import Line, RunFiles


def quality_section(files: RunFiles) -> list[dict[str, Any]]:
    """Return a table for each feature space; each cell is the line of metrics.jsonl for one column and metric."""
    spaces: dict[str, dict[tuple[str, str], Line]] = {}
    for line in files.lines("quality"):  # a later line replaces an earlier one
        spaces.setdefault(str(line.get("features")), {})[column(line), str(line.get("metric"))] = line
    return [
        {
            "name": "the states themselves" if space == "model space" else f"the features “{space}”",
            "columns": {column: line for (column, _), line in lines.items()},
            "metrics": list(dict.fromkeys(metric for _, metric in lines)),
            "lines": lines,
        }
        for space, lines in spaces.items()
    ]


def column(line: Line) -> str:
    """Return the column title of a result: "samples by SAMPLER", "samples of FILE", or the name of the real data."""
    if line.get("of") != "samples":
        return str(line.get("of"))
    return f"samples by {line['sampler']}" if line.get("sampler") else f"samples of {line.get('samples', 'a file')}"
