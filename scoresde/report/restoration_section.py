"""The section on restorations: the quality of each method of `scoresde restore`, and the last picture of each operator.

Lines of metrics.jsonl that differ only in the picture, its measurement and the seeds are one row of the table. The row
has means over the pictures, with their standard errors. Of the lines of a picture only the latest counts, also if their
seeds differ: restorations of one picture are not independent.
"""

import math
from collections.abc import Sequence
from typing import Any

from scoresde.report.pictures import Picture, png_uri
from scoresde.report.run_files import Line, RunFiles, file_of
from scoresde.report.wording import number, setting

MOST_PICTURES = 6
SETTINGS = (
    "operator",
    "method",
    "posterior",
    "sampler",
    "n",
    "particles",
    "cond",
    "weights",
    "tolerance",
    "coverage_level",
)
PICTURE = ("image", "split", "index", "measurement")
MEANS = ("psnr", "sample_psnr", "ssim", "residual", "noise_std", "coverage", "nfe", "backward")


def restoration_section(files: RunFiles) -> dict[str, Any]:
    """Return the rows of the table, and pictures; both are empty if nothing was restored."""
    groups: dict[str, dict[str, Line]] = {}
    last: dict[str, Line] = {}
    for line in files.lines("restoration"):
        settings, picture = (str([line.get(key) for key in keys]) for keys in (SETTINGS, PICTURE))
        groups.setdefault(settings, {})[picture] = line
        last[setting(line.get("operator"))] = line
    pictures = [shown for line in last.values() if (shown := picture_of(files, line)) is not None]
    return {
        "rows": [averaged(list(lines.values())) for lines in groups.values()],
        "pictures": pictures[-MOST_PICTURES:],
    }


def averaged(lines: Sequence[Line]) -> dict[str, Any]:
    """Return the settings of lines that share them, the means of their figures, and standard errors as NAME_error."""
    row: dict[str, Any] = {key: lines[-1].get(key) for key in (*SETTINGS, "log_evidence", "log_evidence_error")}
    row["operator"], row["images"] = setting(row["operator"]), len(lines)
    if len(lines) > 1:
        row["log_evidence"] = None
    for name in MEANS:
        values = [line[name] for line in lines if line.get(name) is not None]
        mean = sum(values) / len(values) if values else None
        squares = [(value - mean) ** 2 for value in values]
        row[name] = mean
        row[f"{name}_error"] = math.sqrt(sum(squares) / (len(squares) - 1) / len(squares)) if len(squares) > 1 else None
    return row


def picture_of(files: RunFiles, line: Line) -> Picture | None:
    """Return the picture that `scoresde restore` saved with a line; None if the file is missing."""
    path = (files.path / "figures" / file_of(line, "")).with_suffix(".png")
    if not line.get("file") or not path.is_file():
        return None
    caption = f"{setting(line.get('operator'))}, restored by {line.get('method')}"
    with_truth = "" if line.get("psnr") is None else f", at {number(line['psnr'], 3)} dB"
    alt = f"{caption}: the measurement, the posterior mean{with_truth}, the standard deviation and samples."
    return Picture(png_uri(path.read_bytes()), alt, caption)
