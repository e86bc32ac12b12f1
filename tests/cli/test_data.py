"""`scoresde data`: what it says of a dataset, and the picture it draws."""

import re
import sys

import matplotlib.image
import numpy as np
import pytest

from scoresde.cli import data, main
from scoresde.data import Digits
from tests.data.files import png, stacked, write_images, write_parquet


def said(capsys, *arguments):
    """The lines of the command, by their label: the cells of each."""
    code = main(["data", *arguments])
    output = capsys.readouterr()
    assert code == 0, output.err
    lines = [re.split(r"  +", line.strip()) for line in output.out.splitlines() if line]
    return {line[0]: line[1:] for line in lines}


def test_digits_by_their_experiment(capsys, tmp_path):
    rows = said(capsys, "experiment=digits")
    assert rows["items"] == ["1,500", "200", "297"]
    assert rows["whole numbers"] == ["17 levels"] * 3
    assert rows["duplicates"] == ["0"] * 3
    assert rows["also in train"] == ["200", "0"]  # the experiment trains on both
    assert rows["shape"] == ["[1, 8, 8]"]
    images = stacked(Digits("fit"))
    assert float(rows["mean"][0]) == pytest.approx(float(images.mean()), rel=1e-3)
    assert float(rows["standard deviation"][0]) == pytest.approx(float(images.std()), rel=1e-3)
    spread = float(re.search(r"standard deviation ([\d.]+)", rows["model space"][0])[1])
    assert spread == pytest.approx(float((2 * images / 17).std()), rel=1e-3)
    picture = matplotlib.image.imread(tmp_path / "datasets" / "figures" / "digits.png")
    assert picture.shape[0] == picture.shape[1] == 8 * (8 * 8 + 8) + 8  # 64 digits, a pixel as 8, a gap of one
    assert picture.min() == 0
    assert picture.max() == 1


def test_table_tells_its_shape_and_its_columns(capsys, tmp_path):
    rows = np.random.RandomState(0).normal(size=(400, 3)) * [1, 10, 0.1] + [0, 50, 0]
    np.savetxt("x.csv", np.r_[rows, rows[:1]], delimiter=",", header="a,b,c", comments="")
    found = said(capsys, "data=table", "data.path=x.csv", "data.shares=[0.1,0.1]", "out=deep/x.png")
    assert found["items"] == ["321", "40", "40"]
    assert found["shape"] == ["[3]"]
    assert found["whole numbers"] == ["no"] * 3
    assert found["train"] == ["mean", "standard deviation"]
    assert float(found["b"][0]) == pytest.approx(50, abs=2)
    assert float(found["c"][1]) == pytest.approx(0.1, rel=0.15)
    assert "standard deviation 1" in found["model space"][0]  # it is standardised
    assert (tmp_path / "deep" / "x.png").stat().st_size > 5000


def test_series_of_an_array(capsys, tmp_path):
    np.save("x.npy", np.random.RandomState(0).normal(size=(60, 2, 16)).cumsum(axis=-1))
    found = said(capsys, "experiment=series", "data.path=x.npy", "limit=10")
    assert found["items"] == ["54", "3", "3"]
    assert found["examined"][0] == "10"
    assert found["shape"] == ["[2, 16]"]
    assert (tmp_path / "datasets" / "figures" / "series.png").stat().st_size > 5000


@pytest.mark.parametrize("option", ["parquet", "image_folder"])
def test_images_of_ones_own(option, capsys, tmp_path):
    pictures = {f"{i}.png": np.full((8, 8, 3), i, np.uint8) for i in range(200)}
    write_images(tmp_path / "images", pictures)
    write_parquet(tmp_path / "images" / "train-0.parquet", list(map(png, pictures.values())))
    write_parquet(tmp_path / "images" / "test-0.parquet", list(map(png, pictures.values())))
    found = said(capsys, f"data={option}", "data.root=images", "data.size=8", "n=4", f"out={option}.png")
    assert found["shape"] == ["[3, 8, 8]"]
    assert found["whole numbers"][0].endswith(" levels")
    if option == "parquet":
        assert found["items"] == ["380", "10", "200"]  # with mirror images, which these equal
        assert found["duplicates"] == ["190", "0", "0"]
        assert found["also in train"] == ["0", "190"]
        assert found["also in validation"] == ["10"]
    assert matplotlib.image.imread(tmp_path / f"{option}.png").shape[:2] == (152, 152)  # 2 x 2 of 64, with gaps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=table"], "a value of data.path, which has no default, expected: data.path=..."),
        (["data=table", "data.path=none.csv"], "cannot build scoresde.data.Table: there is no file none.csv"),
        (["data=digits", "split=fit"], "split among train, validation, test expected; got 'fit'"),
        (["data=digits", "limit=0"], "limit=0"),
        (["data=digits", "n=-1"], "n of 1 or more expected; got -1"),
        (["~data"], "a dataset, data=... or experiment=..., expected; got none"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, message, capsys, tmp_path):
    assert main(["data", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_help_shows_what_can_be_set(capsys):
    assert main(["data", "--help"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("scoresde data: ")
    assert [
        text for text in ("data: arrays, cifar10, ", "limit: null", "experiment=digits") if text not in output
    ] == []


def pages(figure):
    """The panels of a figure that show something."""
    return [axes for axes in figure.axes if axes.axison]


@pytest.mark.parametrize(("dimensions", "panels"), [(1, 1), (2, 3), (4, 10), (6, 21), (7, 7), (30, 16)])
def test_vectors_are_drawn_in_pairs_or_as_histograms(dimensions, panels):
    points = np.random.RandomState(0).normal(size=(50, dimensions))
    figure = sys.modules["scoresde.cli.data"].vectors(points, [f"x{i}" for i in range(dimensions)])
    assert len(pages(figure)) == panels
    bars = [patch.get_height() for patch in pages(figure)[0].patches]
    assert sum(bars) == 50
    if 1 < dimensions <= 6:
        offsets = next(axes for axes in pages(figure) if axes.collections).collections[0].get_offsets()
        assert np.array_equal(offsets, points[:, :2])


def test_series_are_drawn_as_lines_of_each_channel():
    lines = np.random.RandomState(0).normal(size=(64, 3, 20))
    figure = sys.modules["scoresde.cli.data"].series(lines)
    assert len(figure.axes) == 3
    assert np.array_equal(figure.axes[2].lines[1].get_ydata(), lines[6, 2])


def test_its_docstring_is_its_line_of_usage():
    assert data.__doc__ == "What a dataset holds: its statistics, and a picture of its samples."
