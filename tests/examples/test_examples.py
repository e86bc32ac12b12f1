"""Each example runs with --small, and its figures are what a short run can show."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
EXPECTED = {
    "fine_tuning": lambda f: (
        f["all weights: bound, last step"] < f["all weights: bound, first step"]
        and f["LoRA, rank 1: trained"] < 0.05 * f["all weights: trained"]
        and f["LoRA, rank 1: bits/dim"] < f["from random weights: bits/dim"]
    ),
    "planning": lambda f: f["shortest route"] == 1.0 and f["plans, guided"] > f["straight line"] + 0.1,
    "policy": lambda f: (
        f["diffusion"] > 0.5
        and f["Gaussian, its mean"] < 0.2
        and 0.2 < f["diffusion, above"] < 0.8
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
        f["diffusion: CRPS"] < 1.2 * f["linear: CRPS"]
        and f["diffusion: AUC, other time"] > 0.7
        and 0.3 < f["diffusion: coverage 50%"] < 0.7
    ),
    "diffusion_classifier": lambda f: (
        f["flow: clean"] > 0.6  # chance: 0.1
        and f["discriminative: clean"] > 0.6
        and abs(f["parameters"] / f["parameters, discriminative"] - 1) < 0.1
    ),
    "features": lambda f: f["correspondence"] > f["correspondence: random weights"],
}
"""For each example, a claim on the figures of its small run."""
PICTURES = ("features",)
"""The examples that take the folder of OpenMoji's pictures."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_the_small_run_shows_what_it_says(name, tmp_path, monkeypatch, openmoji):
    monkeypatch.chdir(tmp_path)
    options = {"root": openmoji} if name in PICTURES else {}
    figures = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](small=True, **options)
    assert EXPECTED[name](figures), figures
    assert not list(tmp_path.iterdir())  # a small run leaves no files behind
