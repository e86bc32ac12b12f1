"""`scoresde sample`: the array, the picture and the row of its samples."""

import re

import matplotlib.image
import numpy as np
import pytest
import torch

import scoresde as ss
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
