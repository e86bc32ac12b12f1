"""`scoresde sample`: the array, the picture and the row of its samples."""

import re
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

import scoresde as ss
from scoresde import build
from scoresde.cli import main
from tests.cli.conftest import contents, rows


@pytest.mark.parametrize(("sampler", "nfe"), [("pc", 7), ("ode", None), ("ancestral", 4)])
def test_sample_leaves_an_array_a_picture_and_a_row(toy, sampler, nfe, capsys):
    steps = [] if sampler == "ode" else ["sampler.steps=3"]
    assert main(["sample", f"run={toy}", f"sampler={sampler}", "n=5", *steps]) == 0
    (row,) = rows(toy)
    name = f"{sampler}_n5_seed0" + ",sampler.steps=3" * len(steps)
    assert row["file"] == f"{name}.npy"
    array = np.load(toy / "samples" / row["file"])
    assert array.shape == (5, 2)
    assert np.isfinite(array).all()
    assert matplotlib.image.imread(toy / "figures" / f"samples_{name}.png").shape[:2] == (600, 600)
    assert (row["kind"], row["sampler"], row["n"], row["seed"], row["weights"]) == ("samples", sampler, 5, 0, "ema")
    assert row["nfe"] == nfe or (nfe is None and row["nfe"] > 3)
    assert re.search(rf"^nfe +{row['nfe']}$", capsys.readouterr().out, re.MULTILINE)


def test_a_sample_depends_only_on_its_seed_and_the_weights(toy):
    def draw(*overrides):
        assert main(["sample", f"run={toy}", "sampler.steps=2", *overrides]) == 0
        return np.load(toy / "samples" / rows(toy)[-1]["file"])

    whole = draw("n=5", "seed=10")
    assert draw("n=5", "seed=10", "batch_size=2") == pytest.approx(whole, abs=1e-5)
    assert draw("n=2", "seed=13") == pytest.approx(whole[3:], abs=1e-5)
    assert np.abs(draw("n=5", "seed=10", "weights=raw") - whole).min() > 1e-6
    assert len(np.unique(whole, axis=0)) == 5


def test_samples_do_not_replace_those_of_other_settings(toy):
    changes = ["seed=1", "n=3", "sampler=ddim", "sampler.steps=3", "weights=raw", "sampler.corrector=null", "seed=0"]
    for override in (*changes, changes[0]):
        assert main(["sample", f"run={toy}", "n=2", "sampler.steps=2", override]) == 0
    files = [row["file"] for row in rows(toy)]
    assert len(set(files)) == len(changes)
    assert files[0] == files[-1]
    assert sorted(path.name for path in (toy / "samples").iterdir()) == sorted(set(files))
    assert len(list((toy / "figures").iterdir())) == len(changes)


@pytest.mark.parametrize(("name", "arguments"), [("Clipped", ""), ("DynamicThresholding", ", quantile: 0.5")])
def test_sample_with_a_threshold(toy, name, arguments, refused):
    command = ["sample", f"run={toy}", "n=5", "sampler.steps=2"]
    transform, drawn = ss.load(toy).transform, []
    for options in ([], [f"threshold={{_target_: scoresde.thresholding.{name}, low: -0.5, high: 0.25{arguments}}}"]):
        assert main([*command, *options]) == 0
        drawn.append(transform(torch.from_numpy(np.load(toy / "samples" / rows(toy)[-1]["file"]))))
    assert drawn[0].abs().max() > 0.5
    assert -0.5 - 1e-6 <= drawn[1].min() <= drawn[1].max() <= 0.25 + 1e-6
    plain, thresholded = rows(toy)
    assert plain["threshold"] is None
    assert thresholded["threshold"]["_target_"] == f"scoresde.thresholding.{name}"
    assert thresholded["nfe"] == plain["nfe"]
    assert "threshold must be a ModelWrapper (_target_: ...) or null; got 'clipped'" in refused(
        *command, "threshold=clipped"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["n=many"], "many"),
        (["weights=best"], "got 'best'"),
        (["device=cuda:99"], "cuda"),
        (["sampler=ode", "+sampler.solver.max_steps=2"], "did not reach"),
    ],
    ids=str,
)
def test_wrong_input_is_answered_in_one_line(toy, overrides, message, refused):
    assert message in refused("sample", f"run={toy}", *overrides)


def test_a_damaged_checkpoint_is_answered_in_one_line(toy, refused):
    (toy / "checkpoint.safetensors").unlink()
    assert "no checkpoint at toy" in refused("sample", "run=toy")
    (toy / "checkpoint.safetensors").write_bytes(b"damaged")
    assert "is not a checkpoint" in refused("sample", "run=toy")


def test_a_run_of_a_sweep_is_named_as_it_is(toy):
    before = contents(toy)
    run = toy.rename("sde=vp,seed=1")
    assert main(["sample", f"run={run}", "n=2", "sampler.steps=2"]) == 0
    assert rows(run)[0]["command"] == """scoresde sample 'run="sde=vp,seed=1"' n=2 sampler.steps=2"""
    assert contents(run) == before


QUICK = ["sampler=ddim", "sampler.steps=2"]


def array_of(run):
    row = rows(run, "samples")[-1]
    return row, np.load(run / "samples" / row["file"])


def test_a_class_is_drawn_by_number_name_or_alone(labelled, capsys):
    expected = None
    for settings in (["cond.label=3"], ["cond=3"], ["cond={label: 3}"], ["+cond.label=3"], ["cond.label='3'"]):
        assert main(["sample", f"run={labelled}", "n=4", *QUICK, *settings]) == 0
        _, array = array_of(labelled)
        expected = array if expected is None else expected
        assert np.allclose(array, expected, atol=1e-5)
        assert "condition" in capsys.readouterr().out
    assert main(["sample", f"run={labelled}", "n=4", *QUICK, "cond.label=4"]) == 0
    row, other = array_of(labelled)
    assert not np.allclose(other, expected, atol=1e-3)
    assert row["cond"] == {"label": 4}
    assert row["file"] == "ddim_n4_seed0,cond.label=4,sampler.steps=2.npy"
    assert row["command"] == f"scoresde sample run={labelled} n=4 sampler=ddim sampler.steps=2 cond.label=4"
    model = ss.load(labelled).model.given(4)
    drawn = ss.samplers.PredictorCorrector(ss.samplers.DDIM(), steps=2)(model, shape=(4, 1, 8, 8), seeds=range(4)).x
    assert np.allclose(other, ss.load(labelled).transform.inverse(drawn), atol=1e-4)


def test_all_classes_are_rows_with_the_same_seeds(labelled):
    assert main(["sample", f"run={labelled}", "n=2", *QUICK, "cond.label=all", "seed=5", "batch_size=7"]) == 0
    row, array = array_of(labelled)
    assert (row["n"], row["rows"], array.shape) == (20, [str(digit) for digit in range(10)], (20, 1, 8, 8))
    conditions = np.load((labelled / "samples" / row["file"]).with_suffix(".cond.npz"))
    assert conditions["label"].tolist() == [digit for digit in range(10) for _ in range(2)]
    assert main(["sample", f"run={labelled}", "n=2", *QUICK, "cond.label=7", "seed=5"]) == 0
    assert np.allclose(array_of(labelled)[1], array[14:16], atol=1e-4)
    (picture,) = (labelled / "figures").glob("samples_*all*.png")
    width = matplotlib.image.imread(picture).shape[1]
    assert width > (2 * 9 + 1) * 8  # two images of eight pixels, eight times magnified, with gaps, and the names
    assert main(["sample", f"run={labelled}", *QUICK, "cond.label=all"]) == 0
    assert array_of(labelled)[1].shape == (80, 1, 8, 8)


def test_guidance_changes_samples_and_is_recorded(labelled, capsys):
    plain, arrays = ["sample", f"run={labelled}", "n=3", *QUICK, "cond.label=3"], []
    weak = Path(shutil.copytree(labelled, "weak"))
    for guidance, nfe in (
        ([], 2),
        (["guidance=none"], 2),
        (["guidance=cfg", "guidance.scale=0"], 2),
        (["guidance=cfg", "guidance.scale=20"], 4),
        (["guidance=cfg", "guidance.scale=20", "guidance.interval=[1e-6,1e-5]"], 2),
        (["guidance=autoguidance", f"guidance.weak={weak}", "guidance.scale=2"], 4),
    ):
        assert main([*plain, *guidance]) == 0
        row, array = array_of(labelled)
        assert row["nfe"] == nfe
        assert (row["guidance"] or {"scale": 0})["scale"] in (0, 2, 20)
        arrays.append(array)
        printed = capsys.readouterr().out
        assert ("guidance " in printed) == (row["guidance"] is not None)
    for array in arrays[1:3] + arrays[4:]:  # a weak model that is the model itself changes nothing
        assert np.allclose(array, arrays[0], atol=1e-3)
    assert not np.allclose(arrays[3], arrays[0], atol=1e-2)
    model = ss.guidance.ClassifierFree(ss.load(labelled).model, 3, 20.0)
    sampler = ss.samplers.PredictorCorrector(ss.samplers.DDIM(), steps=2)
    expected = sampler(model, shape=(3, 1, 8, 8), seeds=range(3)).x
    assert np.allclose(arrays[3], ss.load(labelled).transform.inverse(expected), atol=1e-3)


def test_a_classifier_guides_a_run_without_labels(grey, trained, tmp_path):
    """The classes are those of the classifier."""
    shutil.copytree(trained / "classifier", tmp_path / "classifier")
    guidance = ["guidance=classifier", "guidance.classifier=classifier", "guidance.scale=50"]
    for settings in (["guidance=none"], [*guidance, "cond.label=3"], [*guidance, "cond.label=4"]):
        assert main(["sample", f"run={grey}", "n=3", *QUICK, *settings]) == 0
    drawn = [np.load(grey / "samples" / row["file"]) for row in rows(grey, "samples")]
    assert rows(grey)[1]["backward"] == 2
    assert all(not np.allclose(a, b, atol=1e-3) for a, b in ((drawn[0], drawn[1]), (drawn[1], drawn[2])))


def test_a_threshold_is_outside_of_guidance(labelled):
    threshold = "threshold={_target_: scoresde.thresholding.Clipped, low: -0.25, high: 0.25}"
    settings = [*QUICK, "sampler.denoise_final=true", "cond.label=3", "guidance=cfg", "guidance.scale=50", threshold]
    assert main(["sample", f"run={labelled}", "n=3", *settings]) == 0
    states = ss.load(labelled).transform(torch.from_numpy(array_of(labelled)[1]))
    assert states.abs().max() <= 0.25 + 1e-5


def test_samples_of_a_table_have_its_columns_and_classes(run):
    command = ["sample", run, "n=2", "cond.label=all", "sampler.steps=2"]
    assert main(command) == 0
    array = np.load("run/samples/" + rows("run")[0]["file"])
    assert main([*command, "out=rows.csv", "batch_size=4"]) == 0
    header, *lines = Path("rows.csv").read_text().splitlines()
    assert header == "a,b,kind"
    assert [line.split(",")[2] for line in lines] == ["x", "x", "y", "y", "z", "z"]
    assert np.array([line.split(",")[:2] for line in lines], float) == pytest.approx(array, rel=1e-5)
    assert [path.suffix for path in sorted(Path("run/samples").iterdir())] == [".npz", ".csv", ".npy"]
    assert rows("run")[1]["file"] == "rows.csv"


def test_conditions_of_the_data_have_their_frequencies(run, toy, refused, capsys):
    labels = build.instantiate(ss.load("run").config.data.train).labels
    assert main(["sample", run, f"n={len(labels)}", "cond=data", *QUICK, "out=rows.csv"]) == 0
    drawn = [line.split(",")[2] for line in Path("rows.csv").read_text().splitlines()[1:]]
    assert drawn == [["x", "y", "z"][label] for label in labels.tolist()]
    assert "of the training data" in capsys.readouterr().out
    assert "needs training data with conditions" in refused("sample", f"run={toy}", "cond=data")
