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
    "materials": lambda f: (
        f["data, training: valid"] == f["data, held out: valid"] == 1.0
        and f["Gaussian: valid"] < 0.5
        and f["data, held out: distances to training (A)"] < f["model: distances to training (A)"]
    ),
}
"""For each example, a claim on the figures of its small run."""
NEEDS = {"materials": "ase"}
"""The package that an example needs besides those of the library."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_the_small_run_shows_what_it_says(name, tmp_path, monkeypatch):
    pytest.importorskip(NEEDS.get(name, "scoresde"))
    monkeypatch.chdir(tmp_path)
    figures = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](small=True)
    assert EXPECTED[name](figures), figures
    assert not list(tmp_path.iterdir())  # a small run leaves no files behind
