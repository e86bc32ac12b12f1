"""The report on several runs: means over seeds, settings that differ, samples with links, and its outline."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml

from scoresde.cli.sweeps import reported_run, write_page
from scoresde.evaluation.records import append_metrics
from scoresde.report import render_runs
from tests.report import runs
from tests.report.test_page import EVIL, Reader

MEANS = {("vp", 1): 1.0, ("vp", 2): 2.0, ("ve", 1): 5.0}


def several_runs(folder, shape):
    """Runs on two paths, of different commands, seeds and likelihoods; one is whole, one has only samples."""
    reported = {}
    for (sde, seed), mean in MEANS.items():
        path = folder / f"sde={sde},seed={seed}"
        runs.new_run(path, shape, seed=seed)
        config = yaml.safe_load((path / "config.yaml").read_text())
        config["sde"]["beta_max"] = 20.0 if sde == "vp" else 30.0
        command = f"# scoresde train sde={sde} seed={seed} run={folder}\n"
        (path / "config.yaml").write_text(command + yaml.safe_dump(config))
        runs.add_samples(path, shape)
        append_metrics(path, runs.likelihood_row(mean=mean, unit="nats/dim"))
        reported[str(path)] = reported_run({"run": str(path), "paths": {"report": str(path / "report.html")}})
    return reported


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    path = write_page(several_runs(folder, (2,)), ["run=a", "film=false"])
    assert path == folder / "report.html"
    return path.read_text()


def test_results_are_means_over_seeds(page):
    text = Reader(page).text
    assert "sde runs test nats/dim" in text
    assert "vp 2 1.50 ± 0.50" in text
    assert "ve 1 5.000 ± 0.050" in text
    assert "sde=ve,seed=1 1 434 60 " in text
    assert "sde.beta_max 20.0 20.0 30.0" in text
    assert "test nats/dim, in mean ± standard error: sde=vp 1.50 ± 0.50, sde=ve 5.000 ± 0.050." in text
    assert "earlier checkpoint" not in text


def test_the_page_links_to_the_report_of_each_run_and_loads_nothing(page):
    reader = Reader(page)
    links = [a["href"] for a in reader.all("a")]
    assert {link for link in links if not link.startswith("#")} == {
        f"sde%3D{sde}%2Cseed%3D{seed}/report.html" for sde, seed in MEANS
    }
    assert not reader.all("script")
    assert not re.search(r"https?:|url\((?!#)", page)
    identifiers = [a["id"] for _, a in reader.tags if "id" in a]
    assert len(set(identifiers)) == len(identifiers)
    assert {link[1:] for link in links if link.startswith("#")} <= set(identifiers)
    assert {part for a in reader.all("svg") for part in a.get("aria-labelledby", "").split()} <= set(identifiers)
    assert all(after <= before + 1 for before, after in pairwise(reader.headings))


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 16), (4,)], ids=str)
def test_samples_of_each_run_are_shown(shape, tmp_path):
    reader = Reader(render_runs([*several_runs(tmp_path, shape).values()], tmp_path / "report.html", "scoresde"))
    assert len(reader.all("figure")) >= 3
    alts = [a["alt"] for a in reader.all("img")]
    assert len(alts) == (3 if len(shape) == 3 else 0)
    assert all(alt.startswith("Samples by pc: 20 grey images") for alt in alts)


def test_runs_without_results_and_text_that_looks_like_html(tmp_path):
    """Settings from a run stay text; missing parts have the command that adds them."""
    paths = [
        runs.new_run(tmp_path / name, (2,), checkpoint=False, note=note) for name, note in (("a", EVIL), ("b", ""))
    ]
    (tmp_path / "a" / "figures").mkdir()
    reported = [reported_run({"run": str(p), "paths": {"report": str(p / "report.html")}}) for p in paths]
    reader = Reader(render_runs(reported, tmp_path / "report.html", "scoresde"))
    assert not reader.all("script")
    assert EVIL in reader.text
    assert "No likelihood and no quality of samples has been measured." in reader.text
    assert reader.text.count("No samples have been drawn. This adds it: scoresde sample run=") == 2


def test_results_of_an_earlier_checkpoint_are_named(tmp_path):
    reported = several_runs(tmp_path, (2,))
    old = {"checkpoint": "0" * 64}
    path = Path(next(iter(reported)))
    (path / "metrics.jsonl").unlink()
    append_metrics(path, runs.likelihood_row(unit="nats/dim", provenance=old))
    again = [reported_run({"run": str(p), "paths": {"report": f"{p}/report.html"}}) for p in reported]
    text = Reader(render_runs(again, tmp_path / "report.html", "scoresde")).text
    assert "Results of an earlier checkpoint than the present one: sde=vp,seed=1." in text
    assert np.isfinite(again[0].results[0].values["test nats/dim"][0])
