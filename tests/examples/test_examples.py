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
}
"""For each example, a claim on the figures of its small run."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_the_small_run_shows_what_it_says(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](small=True)
    assert EXPECTED[name](figures), figures
    assert not list(tmp_path.iterdir())  # a small run leaves no files behind
