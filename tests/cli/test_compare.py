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


SCALES = ["guidance=cfg", "guidance.scale=[0,1,8]", "n=40"]
TINY = ["features=digits", "features.epochs=1", "features.width=4"]


def test_scales_are_compared_in_a_table_rows_and_a_plot(labelled, capsys):
    assert main(["compare", f"run={labelled}", *SCALES, *TINY, "nfe=[6]", "samplers=[ddim]"]) == 0
    lines = [re.split(r"  +", line) for line in capsys.readouterr().out.split("\n\n")[0].splitlines()]
    metrics = ["precision", "recall", "frechet_distance", "class_accuracy"]
    assert lines[0] == ["scale", "NFE", *metrics]
    assert [line[:2] for line in lines[1:]] == [["0", "3"], ["1", "6"], ["8", "6"]]
    written = rows(labelled, "guidance")
    assert [(row["scale"], row["metric"]) for row in written] == [(s, m) for s in (0.0, 1.0, 8.0) for m in metrics]
    assert {(row["n"], row["steps"], row["sampler"], row["cond"]) for row in written} == {
        (40, 3, "ddim", "those of the test data")
    }
    with (labelled / written[0]["file"]).open() as file:
        assert [float(line["value"]) for line in csv.DictReader(file)] == [row["value"] for row in written]
    picture = (labelled / "figures" / written[0]["file"]).with_suffix(".png")
    assert matplotlib.image.imread(picture).shape[:2] == (760, 1840)
    assert written[0]["guidance"]["scale"] == [0, 1, 8]


def test_scales_alone_have_short_names_of_files(labelled):
    """The sampler and the budget then are the defaults, 40 evaluations of dpmpp2."""
    assert main(["compare", f"run={labelled}", "guidance=cfg", "guidance.scale=[2]", "split=validation"]) == 0
    assert (labelled / "guidance,split=validation.csv").is_file()
    row, *_ = rows(labelled, "guidance")
    assert (row["sampler"], row["budget"], row["nfe"], row["n"]) == ("dpmpp2", 40, 40, 200)


def test_samplers_are_compared_with_the_labels_of_the_data(labelled):
    command = ["compare", f"run={labelled}", "samplers=[ddim]", "nfe=[4]", "n=30", "resamples=2"]
    for settings in ([], ["guidance=cfg", "guidance.scale=30"]):
        assert main([*command, *settings]) == 0
    plain, guided = [[row for row in rows(labelled) if bool(row["guidance"]) == is_guided] for is_guided in (0, 1)]
    assert {(row["nfe"], row["steps"], row["cond"]) for row in plain[3:]} == {(4, 4, "those of the test data")}
    assert {(row["nfe"], row["steps"]) for row in guided[3:]} == {(4, 2)}
    assert plain[-1]["value"] != guided[-1]["value"]
