"""The section on classification: the latest result of each split, label and method of `scoresde classify`."""

from scoresde.report.run_files import Line, RunFiles

FIELDS = ["split", "condition", "method", "temperature", "n", "accuracy", "accuracy_low", "accuracy_high", "log_score"]
FIELDS += ["log_score_error", "baseline_log_score", "brier", "brier_error", "ece", "ece_if_calibrated_high", "nfe"]


def classification_section(files: RunFiles) -> list[Line]:
    """Return the latest result for each split, label and method, separately with and without a temperature.

    Every result has all fields that the template shows; a field that its line of metrics.jsonl lacks is None.
    """
    lines: dict[tuple[object, ...], Line] = {}
    for line in files.lines("classification"):
        is_calibrated = line.get("temperature") not in (None, 1.0)
        lines[line.get("split"), line.get("condition"), line.get("method"), is_calibrated] = line
    return [{field: line.get(field) for field in FIELDS} for line in lines.values()]
