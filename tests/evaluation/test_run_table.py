"""The table over the jobs of a sweep: groups of seeds, means and errors."""

import csv
import math
from pathlib import Path

import pytest

from scoresde.evaluation.run_table import (
    JobResult,
    common_directory,
    group_by_seed,
    settings_of,
    table,
    values_of,
    write_table,
)

CONFIG = {
    "run": "runs/a",
    "seed": 3,
    "sde": {"_target_": "scoresde.sdes.VP"},
    "trainer": {"seed": 3},
    "text": {"file": "runs/a/tokens.json"},
}


def job(sde, value, error=None, **settings):
    return JobResult({"sde": sde, "steps": "10", **settings}, {"bits/dim": (value, error)})


def test_settings_are_those_of_the_run_and_of_the_command_without_seeds_and_paths():
    assert settings_of(Path("runs/a"), CONFIG, ["seed=1", "run=runs/a", "+n=4", "sde=ve"]) == {
        "sde": "ve",
        "n": "4",
    }


def test_results_of_records():
    likelihood = {"kind": "likelihood", "split": "test", "unit": "bits/dim", "mean": 2.5, "stderr": 0.1}
    quality = {"kind": "quality", "metric": "energy_distance", "value": 0.3, "error": 0.2, "error_kind": "half"}
    rows = [likelihood, {**quality, "of": "samples"}, {**quality, "of": "noise floor"}]
    assert values_of({"rows": rows}) == {"test bits/dim": (2.5, 0.1), "energy distance": (0.3, None)}
    last = {"step": 9, "loss": 1.5, "held_out_loss": 2, "loss_by_log_snr": [1], "skipped": 0}
    assert values_of({"last": last}) == {"loss": (1.5, None), "held out loss": (2.0, None)}


def test_jobs_that_differ_only_in_the_seed_have_a_mean_with_its_error(tmp_path):
    groups = group_by_seed([job("vp", 3.0), job("ve", 7.0, 0.25), job("vp", 5.0), job("vp", 4.0)])
    assert [(group.settings, group.jobs) for group in groups] == [({"sde": "vp"}, 3), ({"sde": "ve"}, 1)]
    assert groups[0].values["bits/dim"] == pytest.approx((4.0, 1 / math.sqrt(3)))
    assert table(groups) == [["sde", "jobs", "bits/dim"], ["vp", "3", "4.00 +- 0.58"], ["ve", "1", "7.00 +- 0.25"]]
    with open(write_table(groups, tmp_path / "x.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["bits/dim"] for row in rows] == ["4.0", "7.0"]
    assert float(rows[0]["bits/dim error"]) == pytest.approx(1 / math.sqrt(3))


def test_the_directory_of_several_runs_is_the_one_that_contains_them(tmp_path):
    assert common_directory([tmp_path / "a/b", tmp_path / "a/c"]) == tmp_path / "a"
    assert common_directory([tmp_path / "a"] * 2) == tmp_path / "a"
