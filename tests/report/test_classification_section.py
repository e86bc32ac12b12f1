"""The section on classification: the latest line of each split, label and method, and nothing without lines."""

from scoresde.evaluation.records import append_metrics
from scoresde.report.classification_section import classification_section
from scoresde.report.run_files import RunFiles
from tests.report.runs import classification_row, configuration, new_run, page_of

SHAPE = (2,)


def test_a_page_without_classifications_has_no_section(tmp_path):
    assert "Classification by likelihood" not in page_of(new_run(tmp_path / "run", SHAPE))


def test_the_latest_classification_of_each_kind_is_shown(tmp_path):
    path = new_run(tmp_path / "run", SHAPE)
    for changes in ({}, {"method": "bound"}, {"temperature": 2.5, "log_score": 0.0611}, {"accuracy": 0.9625}):
        append_metrics(path, classification_row(**changes))
    lines = classification_section(RunFiles(path, configuration(SHAPE)))
    assert [(line["method"], line["temperature"]) for line in lines] == [("flow", 1.0), ("bound", 1.0), ("flow", 2.5)]
    assert lines[0]["accuracy"] == 0.9625
    page = page_of(path)
    assert "96.2% (95.0 to 99.0)" in page
    assert "0.073 ± 0.012" in page
    assert "at temperature 2.5" in page


def test_a_line_without_optional_fields_is_shown(tmp_path):
    path = new_run(tmp_path / "run", SHAPE)
    row = classification_row(log_score_error=None, brier_error=None)
    append_metrics(path, {key: value for key, value in row.items() if key not in ("nfe", "temperature")})
    assert "test, label, flow" in page_of(path)
