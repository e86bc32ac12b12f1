"""`scoresde data`: the statistics of a dataset, and a picture of its samples."""

import json
import re
import warnings

import matplotlib.image
import numpy as np
import pytest
import torch

from scoresde.cli import main
from scoresde.data import Digits
from tests.data.files import png, stacked, write_images, write_parquet


def table_of(capsys, *arguments):
    """What the command prints: the cells of each line, by its label."""
    code = main(["data", *arguments])
    output = capsys.readouterr()
    assert code == 0, output.err
    lines = [re.split(r"  +", line.strip()) for line in output.out.splitlines() if line]
    return {line[0]: line[1:] for line in lines}


def test_digits_by_their_experiment(capsys, tmp_path):
    rows = table_of(capsys, "experiment=digits")
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
    flat = 2 * images.double().flatten(1) / 17
    largest = float(re.search(r"largest distance ([\d.]+)", rows["model space"][0])[1])
    assert largest == pytest.approx(float(torch.cdist(flat, flat).max()), rel=1e-3)  # of all 1,500, fewer than 2,000
    picture = matplotlib.image.imread(tmp_path / "datasets" / "figures" / "digits.png")
    assert picture.shape[0] == picture.shape[1] == 8 * (8 * 8 + 8) + 8  # 64 digits, a pixel as 8, a gap of one
    assert picture.min() == 0
    assert picture.max() == 1


def test_an_sde_whose_noise_does_not_hide_the_data_is_reported(capsys):
    with pytest.warns(UserWarning, match="does not hide the data"):
        table_of(capsys, "experiment=digits", "sde=ve", "sde.sigma_max=1", "limit=10")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table_of(capsys, "experiment=digits", "limit=10")


def test_a_table_has_its_shape_and_its_columns(capsys, tmp_path):
    values = np.random.RandomState(0).normal(size=(400, 3)) * [1, 10, 0.1] + [0, 50, 0]
    np.savetxt("x.csv", np.r_[values, values[:1]], delimiter=",", header="a,b,c", comments="")
    rows = table_of(capsys, "data=table", "data.path=x.csv", "data.shares=[0.1,0.1]", "out=deep/x.png")
    assert rows["items"] == ["321", "40", "40"]
    assert rows["shape"] == ["[3]"]
    assert rows["whole numbers"] == ["no"] * 3
    assert rows["train"] == ["mean", "standard deviation"]
    assert float(rows["b"][0]) == pytest.approx(50, abs=2)
    assert float(rows["c"][1]) == pytest.approx(0.1, rel=0.15)
    assert "standard deviation 1" in rows["model space"][0]  # it is standardised
    assert (tmp_path / "deep" / "x.png").stat().st_size > 5000


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("mean", "std"), [(5.4e6, 0.2), (1.7e9, 50.0)])
def test_values_far_from_zero_are_described_and_drawn(mean, std, dtype, capsys, tmp_path):
    """Of float64 they are standardised; float32 has lost them, and the command says so."""
    values = (mean + std * np.random.RandomState(0).normal(size=(400, 2))).astype(dtype)
    np.save("x.npy", values)
    if dtype == np.float32:
        assert main(["data", "data=arrays", "data.path=x.npy"]) == 2
        assert "must have values that float32 can tell apart" in capsys.readouterr().err
    else:
        rows = table_of(capsys, "data=arrays", "data.path=x.npy")
        spread = float(re.search(r"standard deviation ([\d.]+)", rows["model space"][0])[1])
        assert spread == pytest.approx(1, rel=0.01)
    assert (tmp_path / "datasets" / "figures" / "arrays,data.path=x.npy.png").stat().st_size > 5000


def test_a_table_of_decimal_commas_with_gaps_and_classes(capsys, tmp_path):
    rng = np.random.RandomState(0)
    lines = [f"{x:.3f};{y:.2f};{'ab'[i % 2]}".replace(".", ",") for i, (x, y) in enumerate(rng.normal(size=(200, 2)))]
    (tmp_path / "x.csv").write_text("\n".join(["x;y;kind", *lines, ";1,5;a"]) + "\n")
    rows = table_of(capsys, "data=table", "data.path=x.csv", "data.labels=kind", "data.missing=drop")
    assert rows["items"] == ["180", "10", "10"]
    assert rows["labels"][0].startswith("2 classes of")
    counts = [[int(cell.split()[0]) for cell in rows[name]] for name in "ab"]
    assert np.sum(counts, axis=0).tolist() == [180, 10, 10]
    assert float(rows["x"][1]) == pytest.approx(1, rel=0.2)


def test_series_of_an_array(capsys, tmp_path):
    np.save("x.npy", np.random.RandomState(0).normal(size=(60, 2, 16)).cumsum(axis=-1))
    rows = table_of(capsys, "experiment=series", "data.path=x.npy", "limit=10")
    assert rows["items"] == ["54", "3", "3"]
    assert rows["examined"][0] == "10"
    assert rows["shape"] == ["[2, 16]"]
    assert (tmp_path / "datasets" / "figures" / "series,data.path=x.npy,limit=10.png").stat().st_size > 5000


@pytest.mark.parametrize("option", ["parquet", "image_folder"])
def test_images_of_ones_own(option, capsys, tmp_path):
    pictures = {f"{i}.png": np.full((8, 8, 3), i, np.uint8) for i in range(200)}
    write_images(tmp_path / "images", pictures)
    write_parquet(tmp_path / "images" / "train-0.parquet", list(map(png, pictures.values())))
    write_parquet(tmp_path / "images" / "test-0.parquet", list(map(png, pictures.values())))
    arguments = ["data.root=images", "data.size=8", "n=4", f"out={option}.png"]
    assert "mirror images" not in table_of(capsys, f"data={option}", *arguments)
    rows = table_of(capsys, f"data={option}", *arguments, "data.flip=true")
    assert rows["shape"] == ["[3, 8, 8]"]
    assert rows["whole numbers"][0].endswith(" levels")
    if option == "parquet":
        assert rows["items"] == ["380", "10", "200"]
        assert rows["mirror images"] == ["190"]  # which these equal
        assert rows["duplicates"] == ["190", "0", "0"]
        assert rows["also in train"] == ["0", "190"]
        assert rows["also in validation"] == ["10"]
    assert matplotlib.image.imread(tmp_path / f"{option}.png").shape[:2] == (152, 152)  # 2 x 2 of 64, with gaps


def test_classes_are_counted_and_drawn_in_rows(capsys, tmp_path):
    rows = table_of(capsys, "data=digits", "data.labels=true", "out=x.png")
    expected = np.bincount(Digits("fit", labels=True).labels)
    assert rows["label"] == ["train", "validation", "test"]
    assert [rows[str(digit)][0] for digit in range(10)] == [f"{n} ({n / 1500:.1%})" for n in expected]
    picture = matplotlib.image.imread(tmp_path / "x.png")
    assert picture.shape[0] > 10 * 72  # a row for each class
    assert picture.shape[1] > 8 * 72
    assert main(["data", "data=digits", "data.labels=true", "--json"]) == 0
    classes = json.loads(capsys.readouterr().out)["classes"]["label"]
    assert [(c["class"], c["name"], c["count"]["train"]) for c in classes] == [
        (i, str(i), int(n)) for i, n in enumerate(expected)
    ]
    assert sum(c["share"]["test"] for c in classes) == pytest.approx(1)


def test_rare_and_missing_classes_are_warned_of(capsys, tmp_path):
    """Of 100 rows in the order of the file the last ten are validation and test rows, all of class c."""
    lines = [f"{i}.5,{'a' if i < 85 else 'b' if i < 88 else 'c'}" for i in range(100)]
    (tmp_path / "x.csv").write_text("\n".join(["x,kind", *lines]) + "\n")
    arguments = ["data=table", "data.path=x.csv", "data.labels=[kind]", "data.order=null"]
    with pytest.warns(UserWarning, match="classes of 'kind'") as caught:
        rows = table_of(capsys, *arguments)
    messages = [str(warning.message) for warning in caught]
    assert "2 of the 3 classes of 'kind' have fewer than 20 samples in train (b: 3, c: 2): collect more" in messages[0]
    assert "2 of the 3 classes of 'kind' do not occur in validation (a, b): change the splits" in messages[1]
    assert "do not occur in test (a, b)" in messages[2]
    assert rows["a"] == ["85 (94.4%)", "0 (0.0%)", "0 (0.0%)"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table_of(capsys, *arguments, "limit=5")  # of some samples only nothing is known about the others


def test_classes_of_a_folder_and_pictures_that_name_their_makers(capsys, tmp_path, openmoji):
    pictures = {f"{'cat' if i % 2 else 'dog'}/{i}.png": np.full((8, 8, 3), i, np.uint8) for i in range(200)}
    write_images(tmp_path / "images", pictures)
    arguments = ["data=image_folder", "data.root=images", "data.size=8", "data.labels=true", "data.flip=true"]
    rows = table_of(capsys, *arguments, "out=x.png")
    assert int(rows["cat"][0].split()[0]) + int(rows["dog"][0].split()[0]) == int(rows["items"][0])
    assert "credit" not in rows
    arguments = ["data=openmoji", f"data.root={openmoji}", "data.size=16", "data.labels=[group,tone]", "limit=50"]
    rows = table_of(capsys, *arguments, "out=y.png")
    assert "CC BY-SA 4.0" in rows["credit"][0]
    assert rows["group"] == rows["tone"] == ["train", "validation", "test"]
    assert (tmp_path / "y.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=table"], "data.path has no default: set data.path=..."),
        (["data=table", "data.path=none.csv"], "none.csv"),
        (["data=digits", "split=fit"], "split must be one of train, validation, test; got 'fit'"),
        (["data=digits", "limit=0"], "limit must be an integer >= 1 or null; got 0"),
        (["data=digits", "n=-1"], "n must be an integer >= 1 or null; got -1"),
        (["~data"], "no dataset: set data=... or experiment=..."),
    ],
    ids=str,
)
def test_wrong_input_is_answered_in_one_line(arguments, message, refused, tmp_path):
    assert message in refused("data", *arguments)
    assert not list(tmp_path.iterdir())
