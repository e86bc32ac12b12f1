"""`scoresde compare`: samplers side by side, in a table, rows and a plot."""

import csv
import re
from pathlib import Path

import matplotlib.image
import pytest
import yaml

from scoresde.cli import main
from tests.cli.conftest import rows

SMALL = ["samplers=[ddim,heun]", "nfe=[5,10]", "n=16", "resamples=4"]


def table_of(output):
    """The table's titles, and its figures, value +- width, by (sampler, NFE)."""
    lines = [re.split(r"  +", line.strip()) for line in output.split("\n\n")[0].splitlines()]
    return lines[0], {(name, nfe): figures for name, nfe, _, *figures in lines[1:]}


def test_the_oracle_has_a_table_rows_and_a_plot(capsys):
    assert main(["compare", "run=oracle", *SMALL]) == 0
    run = Path("runs", "oracle")
    output = capsys.readouterr().out
    titles, table = table_of(output)
    assert titles == ["sampler", "NFE", "seconds", "sliced_wasserstein", "mean_error", "covariance_error"]
    assert list(table) == [("exact draws", "-"), ("ddim", "5"), ("ddim", "10"), ("heun", "4"), ("heun", "10")]
    assert "3 rotated Gaussians over (3,), weights 0.5, 0.3, 0.2" in output
    assert "under VP" in output
    written = rows(run)
    assert len(written) == 15
    assert {row["kind"] for row in written} == {"comparison"}
    with (run / written[0]["file"]).open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["sampler"], line["nfe"]) for line in lines] == [(row["sampler"], str(row["nfe"])) for row in written]
    for line, row in zip(lines, written, strict=True):
        assert float(line["low"]) == row["low"] <= row["value"] <= row["high"]
        figure = table[row["sampler"], str(row["nfe"]) if row["nfe"] else "-"][titles.index(row["metric"]) - 3]
        value, width = map(float, figure.split(" +- "))
        assert value == pytest.approx(row["value"], abs=0.1 * width)
    (picture,) = (run / "figures").iterdir()
    assert matplotlib.image.imread(picture).shape[:2] == (800, 1840)
    assert picture.stem == written[0]["file"].removesuffix(".csv")
    assert sorted(path.name for path in run.iterdir()) == [written[0]["file"], "figures", "metrics.jsonl"]
    assert main(["compare", "run=oracle", *SMALL, "seed=1"]) == 0
    assert len(list((run / "figures").iterdir())) == len(list(run.glob("*.csv"))) == 2


def test_the_oracle_takes_another_path_and_other_metrics(capsys):
    command = ["compare", "run=oracle", "sde=subvp", "samplers=[dpm_single3]", "nfe=[7]", "n=16", "resamples=4"]
    assert main([*command, "metrics=[energy_distance,mmd]"]) == 0
    titles, table = table_of(capsys.readouterr().out)
    assert titles[3:] == ["energy_distance", "mmd"]
    assert list(table) == [("exact draws", "-"), ("dpm_single3", "6")]
    assert rows("runs/oracle")[0]["model"].endswith("under SubVP")


def test_a_run_is_compared_with_its_test_data(toy, capsys):
    assert main(["compare", f"run={toy}", *SMALL, "samplers=[ddim]"]) == 0
    assert list(table_of(capsys.readouterr().out)[1]) == [("training data", "-"), ("ddim", "5"), ("ddim", "10")]
    assert {(row["reference"], row["n"], row["weights"]) for row in rows(toy)} == {("20 of test data", 16, "ema")}
    assert (toy / "figures" / rows(toy)[0]["file"]).with_suffix(".png").is_file()


def test_images_have_a_frechet_distance_on_named_features(grey, capsys):
    assert main(["compare", f"run={grey}", "samplers=[dpmpp2]", "nfe=[5]", "n=40", "resamples=4"]) == 0
    assert "frechet_distance (pca-32)" in capsys.readouterr().out
    spaces = {"frechet_distance": "pca-32", "sliced_wasserstein": "state", "mmd": "state"}
    assert {row["metric"]: row["space"] for row in rows(grey)} == spaces
    assert {row["reference"] for row in rows(grey)} == {"297 of test data"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["samplers=[ddim,nope]"], "annealed_langevin, ddim, ddim_eta1, deis3, "),
        (["samplers=ddim"], "samplers must be a list [...] (text), not empty, without repetitions; got 'ddim'"),
        (["samplers=[ode]"], "ode chooses the number of steps itself: leave it out"),
        (["nfe=[]"], "nfe must be a list [...] (an integer >= 1 and <= 1,000,000), not empty"),
        (["nfe=[10,0]"], "nfe[1] must be an integer >= 1 and <= 1,000,000; got 0"),
        (["nfe=[1]", "samplers=[heun]"], "nfe must be at least 2, one step of heun; got 1"),
        (["metrics=[fid]"], "sliced_wasserstein, mmd, "),
        (["n=2"], "got 2"),
        (["run=missing"], "no run at missing"),
    ],
    ids=str,
)
def test_wrong_input_is_answered_in_one_line(overrides, message, refused, tmp_path):
    assert message in refused("compare", "run=oracle", "samplers=[ddim]", "n=16", "resamples=2", *overrides)
    assert not list(tmp_path.iterdir())


def test_data_that_a_run_does_not_have(toy, refused):
    config = yaml.safe_load((toy / "config.yaml").read_text())
    config["data"]["validation"] = None
    (toy / "config.yaml").write_text(yaml.safe_dump(config))
    assert "no valid" in refused("compare", f"run={toy}", "split=validation", *SMALL)
    assert "split must be one of train" in refused("compare", f"run={toy}", "split=all", *SMALL)
