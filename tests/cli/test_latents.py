"""Latents by the command line: an autoencoder, a diffusion of its latents, and what the verbs say of it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import scoresde as ss
from scoresde.cli import main
from scoresde.dequantization import DataMap
from scoresde.evaluation.generation import draw_samples
from scoresde.evaluation.trained_latents import cached
from scoresde.pipelines import Normal
from scoresde.random_stream import RandomStream
from scoresde.report.film import run_film
from scoresde.report.likelihood_section import bound_terms
from scoresde.report.run_files import RunFiles
from scoresde.training.checkpoint import load, save
from tests.cli.conftest import rows
from tests.data.files import levels, write_images

IMAGES = ["data=image_folder", "data.root=pictures", "data.size=8", "data.low=-1.0", "data.training=null"]
SHORT = ["trainer.batch_size=8", "trainer.warmup=0", "network.width=8", "network.multipliers=[1,2]"]
AUTOENCODER = ["train", "experiment=openmoji_autoencoder", *IMAGES, *SHORT, "network.latent_channels=2", "run=ae"]
LATENT = ["train", "experiment=openmoji_latent", *IMAGES, *SHORT, "network.attention=[]", "data.transform.run=ae"]
BITS = ["likelihood.solver.steps=4", "likelihood.batch_size=300", "budget.samples=2", "budget.bound=null"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with pictures, the run `ae` of an autoencoder, and the run `latent` of its latents."""
    path = tmp_path_factory.mktemp("latents")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        write_images(path / "pictures", {f"{i}.png": levels(8, 8, seed=i) for i in range(100)})
        assert main([*AUTOENCODER, "trainer.steps=4", "trainer.preview_every=4", "trainer.evaluate_every=4"]) == 0
        assert main([*LATENT, "run=latent", "trainer.steps=3", "trainer.preview_every=3", "held_out.draws=2"]) == 0
    return path


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A copy of the trained runs, in which the test works."""
    shutil.copytree(trained, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    return tmp_path / "runs"


def test_the_autoencoder_is_trained_and_evaluated_by_the_same_verb(folder):
    (held_out,) = (line for line in rows(Path("ae"), file="log.jsonl") if "validation_loss" in line)
    bits = held_out["validation_reconstruction"] + 0.1 * held_out["validation_kl"]
    unit = np.log(2)
    # the loss is in nats of model space, and its divergence has the weight 0.1
    assert held_out["validation_loss"] == pytest.approx(bits * unit - np.log(128), rel=1e-4)
    assert held_out["validation_squared_error"] > 0
    assert [path.name for path in Path("ae/figures").iterdir()] == ["step000004.png"]
    latents = ss.load_autoencoder("ae")
    assert (latents.data_shape, latents.state_shape, latents.levels) == ((3, 8, 8), (2, 4, 4), 256)
    with pytest.raises(ValueError, match=r"use ss\.load_autoencoder"):
        ss.load("ae")
    with pytest.raises(ValueError, match="must be the run of an autoencoder"):
        ss.load_autoencoder("latent")


def test_the_run_of_latents_remembers_its_autoencoder(folder):
    run, config = ss.load("latent"), yaml.safe_load(Path("latent/config.yaml").read_text())
    transform = config["data"]["transform"]
    assert transform["digest"] == run.transform.digest == ss.load_autoencoder("ae").digest
    assert (config["data"]["shape"], transform["data_shape"]) == ([2, 4, 4], [3, 8, 8])
    assert (run.state_shape, run.data_shape) == ((2, 4, 4), (3, 8, 8))
    data = torch.stack([ss.data.ImageFolder("pictures", size=8, split="train")[i] for i in range(20)])
    states = DataMap(run.transform).training_states(data, RandomStream(seeds=range(20)))
    assert (states.mean(dim=(0, 2, 3)).abs() < 0.5).all()
    assert ((states.std(dim=(0, 2, 3)) - 1).abs() < 0.5).all()
    shutil.move("ae", "elsewhere")
    with pytest.raises(ValueError, match="the autoencoder of these latents must be in ae"):
        ss.load("latent")
    text = Path("latent/config.yaml").read_text()
    Path("latent/config.yaml").write_text(text.replace("run: ae", "run: elsewhere"))
    assert ss.load("latent").transform.digest == transform["digest"]
    Path("latent/config.yaml").write_text(text)
    shutil.move("elsewhere", "ae")
    groups, info = load(Path("ae/checkpoint.safetensors"))
    save(Path("ae/checkpoint.safetensors"), {**groups, "ema": {k: v + 1e-3 for k, v in groups["ema"].items()}}, info)
    with pytest.raises(ValueError, match="must have the autoencoder that these latents were made with"):
        ss.load("latent")


class Augmented(list):
    """Items with random noise."""

    def __getitem__(self, index):
        return super().__getitem__(index).float() + torch.rand(())


def test_the_latents_are_encoded_once(folder):
    (file,) = Path("ae/latents").iterdir()
    before, (groups, info) = file.stat().st_mtime_ns, load(file)
    assert groups["latents"]["moments"].shape[1:] == (4, 4, 4)
    latents = ss.load("latent").transform
    assert info["autoencoder"] == latents.digest
    dataset = ss.data.ImageFolder("pictures", size=8, split="train", flip=True)
    items, data_map = cached(dataset, DataMap(latents, ss.Uniform()))
    assert [path.stat().st_mtime_ns for path in Path("ae/latents").iterdir()] == [before]
    rows = [0, 7, 100]
    moments, data = (torch.stack([source[i] for i in rows]) for source in (items, dataset))
    torch.testing.assert_close(moments, latents.moments(data), rtol=1e-4, atol=1e-5)
    states = data_map.training_states(moments, RandomStream(seeds=rows))
    torch.testing.assert_close(states, latents.encode(data, RandomStream(seeds=rows)), rtol=1e-4, atol=1e-4)
    latents.cached(data)  # of other data
    assert len(list(Path("ae/latents").iterdir())) == 2
    with pytest.raises(ValueError, match="items must be equal at every access"):
        latents.cached(Augmented(data))
    latents.autoencoder.density = Normal()  # q(z | x + u) depends on u
    data_map = DataMap(latents, ss.Uniform())
    assert cached(dataset, data_map) == (dataset, data_map)
    latents.cache = False
    data_map = DataMap(latents)
    assert cached(dataset, data_map) == (dataset, data_map)


def test_bpd_states_the_bound_with_its_parts(folder, capsys):
    assert main(["bpd", "run=latent", "split=train", *BITS]) == 0
    printed = capsys.readouterr().out
    (row,) = rows(Path("latent"))
    parts = row["summands"]
    total = sum(parts[name]["mean"] for name in ("prior", "reconstruction", "entropy"))
    assert total == pytest.approx(row["mean"], rel=1e-9)
    assert parts["kl"]["mean"] == pytest.approx(parts["prior"]["mean"] + parts["entropy"]["mean"])
    assert all(part["stderr"] > 0 for part in parts.values())
    assert row["conventions"]["quantity"].endswith("by dequantisation and an autoencoder)")
    for name in ("-log p(z), flow", "-log p(x | z)", "log q(z | x)", "KL(q || p)"):
        assert re.search(rf"  {re.escape(name)} +-?\d", printed), name
    assert "reconstruction error" in printed
    bars = bound_terms(row)
    assert len(bars) == 4
    run = ss.load("latent")
    images = torch.stack([ss.data.ImageFolder("pictures", size=8, split="train")[i] for i in range(3)])
    error = (run.transform.inverse(run.transform(images)) - images - 0.5).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(run.transform.squared_error(images), error.double(), rtol=1e-3, atol=1e-3)
    bits = ss.bits_per_dim(run.model, images, run.transform, solver=ss.solvers.Adams(4))
    torch.testing.assert_close(sum(bits.terms.values()), bits.per_image)


def test_samples_films_and_restorations_are_pictures(folder, capsys):
    run = ss.load("latent")
    sampler = ss.samplers.PredictorCorrector(ss.samplers.DDIM(), steps=2)
    assert draw_samples(run, sampler, 3).x.shape == (3, 3, 8, 8)
    restoration = [
        "restore",
        "run=latent",
        "operator=inpainting",
        "posterior=dps",
        "split=train",
        "n=2",
        "sampler.steps=3",
    ]
    assert main([*restoration, "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert np.load(record["paths"]["array"]).shape == (2, 3, 8, 8)
    assert {"psnr", "residual"} <= set(record["rows"][0])
    files = RunFiles(Path("latent"), yaml.safe_load(Path("latent/config.yaml").read_text()))
    assert (files.shape, files.kind) == ((3, 8, 8), "images")
    film = run_film(run.model, run.transform, run.state_shape, 2, 3, 2)
    assert film.flow.shape == (4, 2, 3, 8, 8)
