"""Each example runs with --small, and its figures are what a short run can show."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
EXPECTED = {
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
}
"""For each example, a claim on the figures of its small run."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_the_small_run_shows_what_it_says(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](small=True)
    assert EXPECTED[name](figures), figures
    assert not list(tmp_path.iterdir())  # a small run leaves no files behind
