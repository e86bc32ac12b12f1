"""`scoresde bpd`: a figure with its errors and its conventions."""

from pathlib import Path

import numpy as np
import pytest
import torch

import scoresde as ss
from scoresde import build
from scoresde.cli import main
from scoresde.evaluation.batch_likelihood import four_decimals
from tests.cli.conftest import rows

QUICK = ["likelihood.solver.steps=8", "budget.samples=4", "budget.bound_draws=2", "budget.nodes=30"]


@pytest.mark.parametrize("split", ["test", "validation"])
def test_points_have_nats_with_a_standard_error(toy, split, capsys):
    assert main(["bpd", f"run={toy}", "likelihood.solver.steps=12", f"split={split}"]) == 0
    (row,) = rows(toy)
    assert (row["kind"], row["split"], row["n"], row["unit"]) == ("likelihood", split, 20, "nats/dim")
    assert 0.5 < row["mean"] < 5
    assert 0 < row["stderr"] < 0.5
    assert row["conventions"]["solver"] == "Adams(steps=12, order=3, smoothing=1, data_scale=None)"
    assert (row["nfe"], row["bound"]) == (
        4 + 2 + 13,
        None,
    )  # four for the scale, two for a check
    assert row["population"] ** 2 + row["monte_carlo"] ** 2 == pytest.approx(row["stderr"] ** 2)
    assert 0 < abs(row["discretisation"]["mean"]) < 0.5
    table = capsys.readouterr().out
    assert f"{row['mean']:.4f} +- {row['stderr']:.4f} (standard error over 20 samples)" in table
    assert f"+- {row['population']:.4f} population, +- {row['monte_carlo']:.4f} probes and dequantisation" in table
    assert f"{row['discretisation']['mean']:+.4f} +- {four_decimals(row['discretisation']['stderr'])}" in table
    assert not list((toy / "likelihood").iterdir())


def test_grey_levels_have_bits_and_a_bound(grey):
    assert main(["bpd", f"run={grey}", *QUICK, "likelihood.solver.steps=12"]) == 0
    (row,) = rows(grey)
    assert (row["unit"], row["n"]) == ("bits/dim", 297)
    assert row["conventions"]["dequantization"] == "uniform, 1 per image"
    # Without training, a Gaussian: worse than the digits deserve, and than log2 of their 17 levels by a bit or so.
    assert 2.5 < row["mean"] < 6
    assert row["bound"]["mean"] > row["mean"] - 1
    assert "of the reverse SDE's model" in row["bound_conventions"]["quantity"]


def test_another_dequantisation_warns_and_starts_where_its_noise_ends(grey, capsys, refused):
    command = ["bpd", f"run={grey}", *QUICK, "budget.samples=0"]
    assert main([*command, "dequantization=truncated_normal"]) == 0
    (row,) = rows(grey)
    assert row["conventions"]["dequantization"].startswith("truncated normal")
    assert "where sigma/alpha is the noise of the dequantisation" in row["conventions"]["start"]
    assert row["bound_conventions"]["chain"].startswith("30 nodes")
    assert "scoresde bpd: warning: the network was trained with uniform dequant" in capsys.readouterr().err
    assert "one of uniform, truncated_normal, variational; got 'gaus" in refused(*command, "dequantization=gaussian")
    assert "scoresde dequantize" in refused(*command, "dequantization=variational")


def test_wrong_input_is_answered_in_one_line(toy, refused):
    assert "split must be one of train, validation, test or null; got 'all'" in refused(
        "bpd", f"run={toy}", "split=all"
    )
    failing = refused("bpd", f"run={toy}", "likelihood=dopri5", "+likelihood.solver.max_steps=2")
    assert "solver failed" in failing
    config = Path(toy, "config.yaml")
    config.write_text(config.read_text().replace("validation:", "other:"))
    assert "toy has no validation data: set data.validation" in refused("bpd", f"run={toy}", "split=validation")


def test_failed_samples_are_named_and_the_others_kept(toy, refused, monkeypatch):
    """The network gives NaN for two of the samples: no mean, no row of a likelihood, but the values of the others."""
    command = ["bpd", f"run={toy}", "likelihood.solver.steps=12"]
    assert main(command) == 0
    (whole,) = rows(toy)
    values = np.load(toy / "per_sample" / whole["file"])["values"]
    data = ss.load(toy).transform(torch.stack([*build.instantiate(ss.load(toy).config.data.test)]))
    largest = data[:, 0].sort().values
    limit = float(largest[-3:-1].mean())

    def breaks(module, arguments):
        x, label = arguments[:2]
        broken = (x[:, :1] > limit) & (label[:, None] < 1e-4)
        return (torch.where(broken, torch.nan, x), *arguments[1:])

    load = build.load

    def broken(*arguments, **options):
        run = load(*arguments, **options)
        run.model.network.register_forward_pre_hook(breaks)
        return run

    monkeypatch.setattr(build, "load", broken)
    failed = (data[:, 0] > limit).nonzero().flatten().tolist()
    message = refused(*command)
    assert f"failed for 2 of 20 samples, at {failed} (NONFINITE)" in message
    assert "The other 18 have a mean of " in message
    assert "stored in toy/per_sample, with NaN for these" in message
    row = rows(toy)[-1]
    assert (row["kind"], row["failed"]) == ("incomplete_likelihood", failed)
    kept = np.load(toy / "per_sample" / row["file"])["values"]
    assert np.isnan(kept).nonzero()[0].tolist() == failed
    others = [i for i in range(20) if i not in failed]
    np.testing.assert_allclose(kept[others], values[others], rtol=1e-5)
    assert not list((toy / "likelihood").iterdir())


def test_the_density_of_a_guided_flow_is_said_to_be_that(labelled):
    command = ["bpd", f"run={labelled}", "likelihood.solver.steps=4", "budget.samples=0", "budget.bound=null"]
    for scale in (0, 1):
        assert main([*command, "guidance=cfg", f"guidance.scale={scale}"]) == 0
    plain, guided = rows(labelled, "likelihood")
    assert "ClassifierFree(ScoreModel, scale=1)" in str(guided["conventions"])
    assert guided["guidance"]["scale"] == 1
    assert guided["nfe"] != plain["nfe"] or guided["value"] != plain["value"]


@pytest.mark.filterwarnings("ignore:the last level")
def test_a_multilevel_estimate_prints_its_error_budget(grey, capsys, refused):
    command = ["bpd", f"run={grey}", "likelihood=multilevel", "budget.bound=null", "likelihood.levels=[4,8,16]"]
    assert main([*command, "likelihood.tolerance=0.03"]) == 0
    (row,) = rows(grey)
    assert (row["unit"], row["n"]) == ("bits/dim", 297)
    assert row["population"] ** 2 + row["beyond"] ** 2 == pytest.approx(row["stderr"] ** 2)
    assert [term["name"] for term in row["terms"]] == ["4 steps", "4 to 8 steps", "8 to 16 steps"]
    assert sum(term["mean"] for term in row["terms"]) == pytest.approx(row["mean"])
    stored = np.load(grey / "per_sample" / row["file"])["values"]
    assert stored.mean() == pytest.approx(row["mean"])
    table = capsys.readouterr().out
    assert f"+- {row['population']:.4f} population, +- {four_decimals(row['beyond'])} this estimate" in table
    for term in row["terms"]:
        assert f"{term['mean']:+.4f} +- {four_decimals(term['stderr'])} ({term['samples']} samples" in table
    assert "likelihood.tolerance must be" in refused(*command, "likelihood.tolerance=0")
    assert "two increasing numbers of steps" in refused(*command, "likelihood.levels=[8,4]")
    assert "levels need a tolerance" in refused("bpd", f"run={grey}", "+likelihood.levels=[8,16]")
