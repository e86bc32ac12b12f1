"""`scoresde restore`: the arrays, the picture and the row of a restoration."""

import json
import re
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from PIL import Image

import scoresde as ss
from scoresde.cli import main
from tests.cli.conftest import GREY, rows

FEW = ["n=3", "sampler.steps=2"]


def restored(run, *overrides):
    """The row and the samples of a restoration."""
    assert main(["restore", f"run={run}", *overrides]) == 0
    row = rows(run, "restoration")[-1]
    return row, np.load(run / "samples" / row["file"])


def test_a_restoration_is_that_of_the_library(grey, capsys):
    row, array = restored(grey, *FEW, "index=2", "seed=5")
    name = "restored_inpainting_mmps_n3_seed5,index=2,sampler.steps=2"
    assert row["file"] == f"{name}.npy"
    y = np.load(grey / "samples" / f"{name}.measurement.npy")
    run, operator = ss.load(grey), ss.inverse.SizedInpainting(noise_std=0.05)((1, 8, 8))
    sampler = ss.samplers.PredictorCorrector(ss.samplers.Ancestral(), steps=2, denoise_final=True)
    expected = ss.inverse.sample_posterior(
        run.model, operator, torch.from_numpy(y), 3, sampler=sampler, seeds=[5, 6, 7], shape=(1, 8, 8)
    )
    assert np.allclose(array, run.transform.inverse(expected.x), atol=1e-4)
    assert (row["nfe"], row["backward"]) == (expected.nfe, expected.backward)
    truth = np.asarray(run.transform(ss.data.Digits("test")[2]))
    known = np.asarray(operator.mask)
    assert np.abs(y[0] - truth[0][known]).max() < 0.5  # noise of 0.05, and dequantisation within 2/17
    assert (row["method"], row["sampler"], row["split"], row["index"]) == ("mmps", "ancestral", "test", 2)
    assert {"psnr", "ssim", "sample_psnr", "sample_ssim", "rmse", "residual", "coverage"} <= row.keys()
    assert row["log_evidence"] is None
    assert matplotlib.image.imread(grey / "figures" / f"{name}.png").ndim == 3
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("mmps, sampler ancestral, 3 samples", "residual", "PSNR", "in 48 measure"))


def test_a_stored_measurement_is_restored_without_the_truth(grey):
    first, array = restored(grey, *FEW, "index=2")
    path = (grey / "samples" / first["file"]).with_suffix(".measurement.npy")
    again, same = restored(grey, *FEW, f"measurement={path}")
    assert np.array_equal(same, array)
    assert again["residual"] == pytest.approx(first["residual"])
    assert (again["split"], again["measurement"]) == (None, str(path))
    assert not {"psnr", "rmse", "coverage"} & again.keys()
    known, _ = restored(grey, *FEW, f"measurement={path}", "index=2")
    assert known["rmse"] == pytest.approx(first["rmse"])


def test_the_noise_of_the_measurement_has_a_seed_of_its_own(grey):
    files = [restored(grey, *FEW, *seeds)[0]["file"] for seeds in ([], ["seed=1"], ["noise_seed=1"])]
    first, other, noisy = (np.load((grey / "samples" / file).with_suffix(".measurement.npy")) for file in files)
    assert np.array_equal(first, other)
    assert not np.array_equal(first, noisy)


@pytest.mark.parametrize(
    ("overrides", "nfe", "sampler"),
    [
        (["posterior=ddrm", "posterior.steps=2", "operator=downsampling", "operator.factor=2"], 3, None),
        (["posterior=ddnm", "posterior.steps=2", "operator=blur"], 3, None),
        (["posterior=repaint", "posterior.steps=4", "posterior.jump=2", "posterior.repeats=2"], 6, None),
        (["posterior=replacement", "sampler.steps=2"], 3, "ancestral"),
        (["posterior=pigdm", "sampler=ddim", "sampler.steps=2"], 2, "ddim"),
        (["posterior=dps", "posterior.rule=published", "sampler.steps=2", "operator.noise_std=0"], 3, "ancestral"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_every_method_restores(grey, overrides, nfe, sampler):
    row, array = restored(grey, "n=2", *overrides)
    assert (row["nfe"], row["sampler"]) == (nfe, sampler)
    assert np.isfinite(array).all()
    if row["method"] in ("repaint", "replacement"):
        assert row["residual"] < 1e-5


def test_particles_report_the_evidence(grey, capsys):
    words = ["posterior=particles", "posterior.steps=3", "particles=16", "n=2", "operator.noise_std=1", "--json"]
    row, array = restored(grey, *words)
    assert json.loads(capsys.readouterr().out)["rows"][0]["log_evidence"] == row["log_evidence"]
    operator = ss.inverse.SizedInpainting(noise_std=1.0)((1, 8, 8))
    y = torch.from_numpy(np.load((grey / "samples" / row["file"]).with_suffix(".measurement.npy")))
    run = ss.load(grey)
    expected = ss.inverse.TwistedParticles(steps=3)(run.model, operator, y, (16, 1, 8, 8), seed=0)
    assert row["log_evidence"] == pytest.approx(expected.log_evidence)
    assert row["log_evidence_error"] == pytest.approx(expected.stderr)
    assert row["particles"] == 16
    drawn = torch.from_numpy(array)[:, None] - run.transform.inverse(expected.x)[None]
    assert (drawn.flatten(2).abs().amax(dim=2).amin(dim=1) < 1e-4).all()  # each is one of the particles


def test_mean_and_variance_to_a_tolerance(grey, capsys):
    row, _ = restored(grey, "n=2", "sampler=dpmpp2", "sampler.steps=2", "posterior.iterations=1", "tolerance=1.0")
    assert max(row["mean_error"], row["variance_error"]) <= 2**0.5  # root mean square over both is at most 1
    assert row["moments_nfe"] > 16 * (8 + 8 + 16)
    assert "mean and variance" in capsys.readouterr().out


def test_a_picture_and_a_mask_from_files(grey, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(tmp_path / "photo.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:2] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    row, _ = restored(grey, *FEW, "image=photo.png", "operator.mask=mask.png")
    assert (row["measurements"], row["image"], row["index"]) == (16, "photo.png", None)
    assert "psnr" in row


def test_points_with_a_mask_of_their_shape(toy):
    np.save("mask.npy", np.array([1, 0]))
    row, array = restored(toy, *FEW, "operator.mask=mask.npy")
    assert array.shape == (3, 2)
    assert "rmse" in row
    assert "psnr" not in row
    assert list(Path(toy, "figures").glob("restored_*.png"))


def test_the_prior_may_have_a_condition(labelled):
    drawn = [restored(labelled, *FEW, f"cond.label={label}") for label in (3, 4)]
    assert not np.allclose(drawn[0][1], drawn[1][1], atol=1e-3)
    assert drawn[1][0]["cond"] == {"label": 4}
    assert drawn[1][0]["command"].endswith("cond.label=4")


def test_samples_that_do_not_fit_the_measurement_are_reported(grey, capsys):
    restored(grey, *FEW, "posterior.scale=0")  # samples of the prior
    error = capsys.readouterr().err
    assert re.search(r"warning: the samples do not fit the measurement: .* times operator.noise_std: take more", error)
    restored(grey, *FEW, "operator.noise_std=10")
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["operator=grey"], r"operator=grey must fit the states \(1, 8, 8\) of grey: states must be \(B, 3\)"),
        (
            ["operator=downsampling", "operator.factor=3"],
            "operator=downsampling must fit .* multiples of 3; .*: choose",
        ),
        (["operator=downsampling", "operator.filter=bicubic", "posterior=ddrm"], "singular values .* such as MMPS"),
        (["posterior=dps", "operator.noise_std=0"], "needs noise_std > 0"),
        (["posterior=ddrm", "sampler=heun"], "posterior=ddrm is a sampler itself; got sampler=heun: leave it out"),
        (["posterior=particles", "particles=4", "n=5"], "particles must be at least n; got particles=4 and n=5"),
        (["image=a.png", "index=1"], "the truth must be image or index, not both"),
        (["image=a.png"], "there is no file a.png"),
        (["operator.mask=a.npy"], "there is no file a.npy"),
        (["operator.box=[0,1,0,1]"], "which hides all"),
        (["index=297"], "index must be less than 297, the size of the test data"),
        (["n=1"], "n must be an integer >= 2"),
        (["posterior=ddrm", "posterior.steps=2", "tolerance=1"], "with a tolerance, posterior must be .*; got ddrm"),
        (["sampler=ode", "tolerance=1"], "with a tolerance, sampler must have a number of steps; got ode"),
        ([*FEW, "tolerance=1"], "sampler must be deterministic, .*sampler=dpmpp2"),
        (["cond.label=3"], "cond"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_that_do_not_fit_are_refused(grey, refused, overrides, message):
    assert re.search(message, refused("restore", f"run={grey}", *overrides))
    assert not Path(grey, "samples").is_dir() or not list(Path(grey, "samples").glob("restored*"))


def test_a_measurement_of_another_shape_is_refused(grey, refused):
    np.save("y.npy", np.zeros(5))
    error = refused("restore", f"run={grey}", "measurement=y.npy")
    assert "measurement must have the shape (1, 48), as Inpainting(" in error
    assert "noise_std=0.05) gives; y.npy has (5,)" in error
    np.save("y.npy", np.full((1, 48), np.nan))
    assert "y.npy is not an array of finite numbers" in refused("restore", f"run={grey}", "measurement=y.npy")


@pytest.fixture(scope="module")
def inpainting(trained):
    """A run of grey levels that is trained for inpainting, 1 step from the averaged weights of `grey`."""
    path = trained / "inpainting"
    if not path.exists():
        overrides = ["loss=inpainting", f"init_from={trained / 'grey'}", f"run={path}", "loss.noise_std=0.1"]
        assert main(["train", *GREY, *overrides, "optimizer.lr=0.1"]) == 0
    return path


def test_a_network_trained_for_inpainting_restores(inpainting, tmp_path, capsys):
    run = Path(shutil.copytree(inpainting, tmp_path / "inpainting").name)
    capsys.readouterr()
    row, array = restored(run, *FEW, "posterior=trained", "operator.noise_std=0.1", "index=2", "seed=5")
    assert "trained for measurements" not in capsys.readouterr().err
    assert (row["method"], row["nfe"], row["backward"]) == ("trained", 3, 0)
    assert {"psnr", "ssim", "coverage", "residual"} <= row.keys()
    loaded, operator = ss.load(run), ss.inverse.SizedInpainting(noise_std=0.1)((1, 8, 8))
    y = torch.from_numpy(np.load((run / "samples" / row["file"]).with_suffix(".measurement.npy")))
    image = torch.cat([operator.adjoint(y[None])[0], operator.mask[None].float()])
    sampler = ss.samplers.PredictorCorrector(ss.samplers.Ancestral(), steps=2, denoise_final=True)
    expected = sampler(loaded.model, shape=(3, 1, 8, 8), seeds=[5, 6, 7], cond={"image": image[None]}).x
    assert np.allclose(array, loaded.transform.inverse(expected), atol=1e-4)
    np.save("image.npy", image.numpy())
    words = ["sampler=ancestral", "sampler.steps=2", "sampler.denoise_final=true", "n=3", "seed=5"]
    assert main(["sample", f"run={run}", *words, "cond.image=image.npy"]) == 0
    assert np.allclose(np.load(run / "samples" / rows(run, "samples")[-1]["file"]), array, atol=1e-4)
    restored(run, *FEW, "posterior=trained")
    message = "the network was trained for measurements with noise_std=0.1, and treats y as such; got Inpainting("
    assert message in capsys.readouterr().err


def test_a_network_that_was_not_trained_for_inpainting_is_refused(grey, inpainting, refused):
    message = (
        "model must have a network that was trained for inpainting, with the condition image; got one with no condition"
    )
    assert message in refused("restore", f"run={grey}", "posterior=trained")
    error = refused("restore", f"run={inpainting}", "posterior=trained", "operator=blur")
    assert "operator must be Inpainting for a network that was trained for it; got GaussianBlur" in error
