"""Each example runs with --small, and its figures are what a short run can show."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from scoresde.convert import save_run, score_sde
from tests.convert.reference import described, weights

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
EXPECTED = {
    "fine_tuning": lambda f: (
        f["all weights: bound, last step"] < f["all weights: bound, first step"]
        and f["LoRA, rank 1: trained"] < 0.05 * f["all weights: trained"]
        and f["LoRA, rank 1: bits/dim"] < f["from random weights: bits/dim"]
    ),
    "planning": lambda f: (
        f["shortest route"] == 1.0
        and f["plans, guided"] > f["straight line"]
        and f["plans, guided, length of all"] < f["plans, length of all"]
    ),
    "policy": lambda f: (
        f["diffusion"] > 0.3  # of 100 episodes, with an error of 5%
        and f["Gaussian, its mean"] < 0.1
        and 0.2 < f["diffusion, above"] < 0.8  # half, with an error of 9% for 30 successes
        and f["expert"] > 0.9
    ),
    "density_superposition": lambda f: (
        f["exact score, kernels, given data: r.m.s. error"] < f["exact score, Ito, given data: r.m.s. error"] / 2
        and abs(f["OR, weights 0.8 and 0.2, share of p_1"] - 0.8) < 0.15  # four standard errors of 100 samples
        and f["AND, the same as tracked"] < 1e-6 < 0.1 < f["AND, median |log p_1 - log p_2|"]
    ),
    "simulation_based_inference": lambda f: all(
        f[f"{name}: information over the prior (nats)"] > 0.3
        and f[f"{name}: KL (nats)"] > -3 * f[f"{name}: KL, standard error"]
        and 0.3 < f[f"{name}: errors with eight probes / standard errors"] < 3
        for name in ("two moons", "SIR epidemic")
    ),
    "time_series": lambda f: (
        f["diffusion: CRPS"] < 1.1 * f["linear: CRPS"]
        and abs(f["diffusion: log score"] - f["linear: log score"]) < 0.1  # it begins as the linear forecast
        and f["diffusion: AUC, other time"] > 0.7
        and f["diffusion: coverage 95%"] > 0.8  # quantiles of 20 samples hold 90%, with an error of about 3%
    ),
    "video": lambda f: (
        max(f["video"], f["future given past"]) < 2  # bits/dim; uniform grey levels have 2.32
        and 2 < f["no motion: pixels 1 ahead"] < f["no motion: pixels 2 ahead"]
    ),
    "diffusion_classifier": lambda f: (
        f["flow: clean"] > 0.4  # chance: 0.1, with an error of 0.075 for 16 images
        and f["discriminative: clean"] > 0.6
        and abs(f["parameters"] / f["parameters, discriminative"] - 1) < 0.1
    ),
    "molecules": lambda f: (
        f["data: valid"] > 0.9
        and f["model: C-H"] < f["independent: C-H"]
        and f["model: log p"] > f["Gaussian: log p"] + 30
    ),
    "crystals": lambda f: (
        f["nearest element: known"] == 1.0
        and f["elements of the training: known"] > f["independent columns: known"] + 0.05
        and f["model: distance"] < f["independent columns: distance"]
        and f["model: log p"] > 0
    ),
    "features": lambda f: f["correspondence"] > f["correspondence: random weights"],
}
"""For each example, a claim on the figures of its small run."""
PICTURES = ("features",)
"""The examples that take the folder of OpenMoji's pictures."""


def run_small(name, **options):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](small=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_small_run_shows_what_it_says(name, tmp_path, monkeypatch, openmoji):
    create, bars = tqdm.__init__, []

    def listed(self, *args, **settings):
        bars.append(settings.get("disable"))  # None: shown at a terminal alone
        create(self, *args, **settings)

    monkeypatch.setattr(tqdm, "__init__", listed)
    monkeypatch.chdir(tmp_path)
    figures = run_small(name, **({"root": openmoji} if name in PICTURES else {}))
    assert EXPECTED[name](figures), figures
    assert not list(tmp_path.iterdir())  # a small run leaves no files behind
    assert not all(bars)  # it shows its progress


@pytest.mark.slow
def test_fine_tuning_of_a_checkpoint_of_score_sde(tmp_path):
    about = described("score_sde/variants", "ddpmpp_grey")
    state = weights(about["shapes"])
    averages = {"decay": 0.999, "num_updates": 3, "shadow_params": [state[name] for name in about["trainable"]]}
    torch.save({"model": state, "ema": averages}, tmp_path / "small.pth")
    config = about["config"] | {"data": about["config"]["data"] | {"dataset": "digits"}}
    (tmp_path / "small.config.json").write_text(json.dumps(config))
    figures = run_small("fine_tuning", checkpoint=tmp_path / "small.pth")
    assert figures["all weights: trained"] == sum(math.prod(shape) for name, shape in about["shapes"])
    assert figures["LoRA, rank 1: trained"] < 0.2 * figures["all weights: trained"]
    assert figures["all weights: bits/dim"] < figures["not fine-tuned: bits/dim"]
    assert "from random weights: bits/dim" not in figures
    loaded, converted = runpy.run_path(str(EXAMPLES / "fine_tuning.py"))["loaded"], score_sde(tmp_path / "small.pth")
    stored = loaded(save_run(converted, tmp_path / "run")).state_dict()
    torch.testing.assert_close(stored, converted.model.state_dict(), rtol=0, atol=0)
    (tmp_path / "small.config.json").write_text(json.dumps(about["config"]))
    with pytest.raises(ValueError, match=r"must be a model of images in Levels\(levels=17.*got Levels\(levels=256"):
        loaded(tmp_path / "small.pth")


@pytest.mark.parametrize("name", NAMES)
def test_each_example_has_its_row_its_picture_and_its_command(name):
    rows, gallery = (path.read_text() for path in (EXAMPLES / "README.md", EXAMPLES.parent / "docs" / "gallery.md"))
    assert f"[{name}.py]({name}.py)" in rows
    assert f"](../examples/figures/{name}.png)" in gallery
    assert f"`python examples/{name}.py`" in gallery
    assert (EXAMPLES / "figures" / f"{name}.png").exists()
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 200
