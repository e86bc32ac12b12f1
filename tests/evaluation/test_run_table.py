"""The table over the jobs of a sweep: groups of seeds, means and errors."""

import csv
import math
from pathlib import Path

import pytest

from scoresde.evaluation.run_table import (
    JobResult,
    common_directory,
    group_by_seed,
    results_of,
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
    last = {"step": 9, "loss": 1.5, "held_out_loss": 2, "held_out_loss_stderr": 0.5, "loss_by_log_snr": [1]}
    assert values_of({"last": last}) == {"loss": (1.5, None), "held out loss": (2.0, 0.5)}
    assert values_of({"rows": [{**likelihood, "mean": None}]}) == {}  # NaN in the JSON of another process


def test_compared_samplers_and_scales_are_results_of_their_own():
    row = {"kind": "comparison", "sampler": "ddim", "budget": 5, "metric": "kid", "space": "digits", "value": 0.5}
    rows = [{**row, "sampler": "test data", "budget": None, "value": 0.1}, row, {**row, "metric": "mmd", "value": 2.0}]
    record = {"run": "runs/a", "overrides": ["run=runs/a", "nfe=[5]", "n=9"], "rows": rows}
    floor, ddim = results_of(record, CONFIG, ["scoresde", "train", "sde=ve", "seed=4", "--config-dir", "mine"])
    assert floor.typed == {"sde": "ve", "n": "9", "sampler": "test data", "nfe": ""}
    assert ddim.typed == {**floor.typed, "sampler": "ddim", "nfe": "5"}
    assert ddim.values == {"kid (digits)": (0.5, None), "mmd (digits)": (2.0, None)}
    scale = {"kind": "guidance", "scale": 2.0, "metric": "recall", "value": 0.5, "error": 0.1, "error_kind": "interval"}
    (guided,) = results_of({"run": "runs/a", "rows": [scale]}, CONFIG)
    assert (guided.typed, guided.values) == ({"guidance.scale": "2"}, {"recall": (0.5, None)})


def many(n, sde, run="runs/a", **typed):
    """A job whose path has n settings of its own."""
    settings = {"sde": sde, **{f"sde.{sde}{i}": "1" for i in range(n)}}
    return JobResult(settings, {"loss": (1.0, None)}, typed, Path(run))


def test_groups_are_named_by_commands_or_settings_or_runs():
    def names(*jobs):
        return [group.settings for group in group_by_seed(jobs)]

    assert names(many(9, "vp"), many(9, "ve", experiment="b")) == [{"experiment": ""}, {"experiment": "b"}]
    assert names(many(0, "vp"), many(0, "ve")) == [{"sde": "vp"}, {"sde": "ve"}]
    jobs = [many(9, sde, f"runs/{sde}/{seed}", part=seed, steps="1") for sde in ("vp", "ve") for seed in "12"]
    assert names(*jobs) == [{"run": "vp/1, vp/2"}, {"run": "ve/1, ve/2"}]
    first, second = group_by_seed([*jobs[:2], many(9, "ve", "runs/ve/1", steps="2")])
    assert (first.label(), second.label("steps")) == ("steps=1", "the same settings")
    assert [len(group.runs) for group in (first, second)] == [2, 1]


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
    assert common_directory([Path("a/b"), Path("a/c")]) == Path("a")
    assert common_directory([Path("a"), Path("b")]) == Path()
    assert common_directory([Path("../a"), Path("b").absolute()]) == Path.cwd().parent
