"""Each example runs with --small, and its figures are what a short run can show."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
EXPECTED = {
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
