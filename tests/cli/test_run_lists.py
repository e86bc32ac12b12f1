"""Lists of runs: patterns, quotes, sweeps and cascades; tables and a page over several runs."""

import csv
import html
import json
import re
import shutil
from pathlib import Path

import pytest

from scoresde.cli import main
from scoresde.cli.run_lists import matching_runs, quote_runs, separate_runs, sweep_settings
from tests.cli.conftest import rows

NAMES = ("x/seed=10", "x/seed=2", "x/sde=ve,seed=1", "y")
QUICK = ["likelihood.solver.steps=2", "budget.samples=2", "budget.bound=null"]


@pytest.fixture
def folder():
    for name in NAMES:
        Path(name).mkdir(parents=True)
        Path(name, "config.yaml").write_text("loss: {_target_: scoresde.losses.DenoisingScoreMatching}\n")
    for name in ("fine", "finer"):
        Path(name).mkdir()
        Path(name, "config.yaml").write_text("loss: {_target_: scoresde.losses.SuperResolution, resolutions: null}\n")
    Path("x", "multirun.yaml").touch()


@pytest.fixture
def pair(toy):
    """Two runs, `both/a` and `both/b=2`, that differ in the seed and the steps of their sampler."""
    for name, seed in (("a", 0), ("b=2", 1)):
        shutil.copytree(toy, f"both/{name}")
        config = Path("both", name, "config.yaml")
        config.write_text(config.read_text().replace("\nseed: 0\n", f"\nseed: {seed}\n"))


def test_patterns_match_runs_in_the_order_of_their_numbers(folder):
    assert matching_runs("x/*") == ["x/sde=ve,seed=1", "x/seed=2", "x/seed=10"]
    assert matching_runs("x/seed=?") == ["x/seed=2"]
    assert matching_runs("y") == ["y"]
    assert matching_runs("z") == matching_runs("z*") == []


def test_names_with_equals_signs_and_commas_are_quoted(folder):
    assert quote_runs("[x/seed=2,x/sde=ve,seed=1,y]") == '["x/seed=2","x/sde=ve,seed=1",y]'
    assert quote_runs("x/sde=ve,seed=1,x/seed=2") == '"x/sde=ve,seed=1","x/seed=2"'
    assert quote_runs("x/sde=ve,seed=1") is None
    assert quote_runs("x/seed=3,y/seed=3") is None


def test_a_list_is_a_sweep_unless_its_later_runs_are_of_super_resolution(folder):
    assert separate_runs("bpd", ["run=[y,y/../y]", "seed=1"])[0] == ["run=y,y/../y", "seed=1"]
    assert separate_runs("evaluate", ["run=x/*"]) == (['run="x/sde=ve,seed=1","x/seed=2","x/seed=10"'], True)
    assert separate_runs("compare", ["run=x/seed=1*"]) == (["run=x/seed=1*"], False)  # Hydra could not parse it
    assert separate_runs("compare", ["run='x/seed=1*'"]) == (['run="x/seed=10"'], False)
    for untouched in (["run=y"], ["run=[y,fine]"], ["run=[fine,finer]"], ["run=[{a:1},y]"], ["run=y,fine"]):
        assert separate_runs("bpd", untouched) == (untouched, False)
    assert separate_runs("sample", ["run=[y,x]"]) == (["run=[y,x]"], False)
    assert separate_runs("report", ["run=[y,fine]"]) == (["run=y,fine"], True)


def test_wrong_lists_are_answered_with_the_fix(folder, refused):
    assert refused("evaluate", "run=[y]").endswith("two or more different runs; got run=[y]: write run=y")
    assert "two or more different runs" in refused("bpd", "run=[y,y]")
    assert "no run at x/seed=3 (no config.yaml in it)" in refused("compare", 'run=[y,"x/seed=3"]')
    assert "no run at x/none*" in refused("compare", "run=x/none*")
    mixed = "run must list runs that bpd can measure one by one; got fine, trained for super-resolution: give sample or"
    assert mixed in refused("bpd", "run=[fine,y]")
    assert "got fine, trained for super-resolution" in refused("evaluate", "run=[y,fine]")
    assert "out must be left out for several runs" in refused("report", "run=[y,fine]", "out=page.html")


def test_hydra_is_told_the_swept_settings_and_the_directory_of_the_runs(folder):
    names, directory = "hydra.job.config.override_dirname.exclude_keys=", "hydra.sweep.dir="
    assert sweep_settings(["sde=vp", "seed=1,2", "+text=bert", "run=new"]) == [f"{names}[run,sde,text]"]
    assert sweep_settings(["seed=1", "run=new"]) == []
    assert sweep_settings(['run="x/seed=2","x/seed=10"']) == [f"{directory}x"]
    assert sweep_settings(["run=x/nope/a,x/nope/b", "seed=1,2"]) == [f"{directory}x", f"{names}[run]"]
    assert sweep_settings(["run=[y,fine],[y,finer]"]) == [f"{directory}."]


def test_the_likelihood_and_the_comparison_of_several_runs_have_tables(pair, capsys):
    assert main(["bpd", "run=[both/a,both/b=2]", *QUICK, "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["run"] for record in records] == ["both/a", "both/b=2"]
    (line,) = csv.DictReader(Path("both/sweep_bpd.csv").read_text().splitlines())
    means = [record["rows"][0]["mean"] for record in records]
    assert (line["jobs"], float(line["test nats/dim"])) == ("2", pytest.approx(sum(means) / 2))
    assert Path("both/multirun.yaml").is_file()
    assert main(["compare", "--multirun", "run=both/a,both/b=2", "samplers=[ddim]", "nfe=[3,6]", "n=8"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in shown if line.startswith("ddim")][-2:] == [["ddim", n, "2"] for n in "36"]
    floor, three, _ = csv.DictReader(Path("both/sweep_compare.csv").read_text().splitlines())
    assert (floor["sampler"], floor["nfe"]) == ("training data", "")
    compared = [row for run in ("both/a", "both/b=2") for row in rows(run, "comparison") if row["budget"] == 3]
    distances = [row["value"] for row in compared if row["metric"] == "sliced_wasserstein"]
    assert float(three["sliced wasserstein"]) == pytest.approx(sum(distances) / 2)
    assert Path("both/sweep_compare.png").is_file()


def test_the_reports_of_several_runs_have_a_page_in_their_directory(pair, capsys):
    assert main(["report", "run=both/*", "film=false"]) == 0
    page = Path("both/report.html").read_text()
    assert all(f'href="{link}/report.html"' in page for link in ("a", "b%3D2"))
    assert """scoresde report 'run=[both/a,"both/b=2"]' film=False""" in html.unescape(page)
    assert Path("both/a/report.html").is_file()
    assert re.search(r"^report +both/report.html$", capsys.readouterr().out, re.MULTILINE)
    (line,) = csv.DictReader(Path("both/sweep_report.csv").read_text().splitlines())
    assert float(line["validation loss"]) == pytest.approx(rows("both/a", file="log.jsonl")[-1]["validation_loss"])
