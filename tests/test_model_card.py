"""The model card: settings, the likelihood of the present checkpoint with its errors, and code that loads the run."""

import hashlib
import json

import pytest
import yaml

from scoresde import model_card

CONFIG = {
    "sde": {"_target_": "scoresde.sdes.VP", "beta_min": 0.1, "beta_max": 20.0},
    "prediction": {"_target_": "scoresde.predictions.Noise"},
    "network": {"_target_": "scoresde.networks.UNet", "width": 32, "multipliers": [1, 2]},
    "data": {
        "shape": [1, 8, 8],
        "train": {"_target_": "scoresde.data.Digits", "split": "fit"},
        "transform": {"_target_": "scoresde.data.Levels", "levels": 17},
    },
    "conditional": None,
}


def line(mean, checkpoint, **changes):
    row = {"kind": "likelihood", "split": "test", "n": 100, "mean": mean, "stderr": 0.0213, "unit": "bits/dim"}
    errors = {"population": 0.02, "monte_carlo": 0.0073, "discretisation": {"mean": 0.0012, "stderr": 0.0004}}
    conventions = {"dequantisation": "uniform | one draw", "trace": "Hutchinson"}
    return {
        **row,
        **errors,
        "bound": None,
        "conventions": conventions,
        "provenance": {"checkpoint": checkpoint},
        **changes,
    }


@pytest.fixture
def run(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"weights")
    return tmp_path


def write(run, *lines):
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def test_the_likelihood_of_the_present_checkpoint_and_its_errors(run):
    now = hashlib.sha256(b"weights").hexdigest()
    rows = [line(1.8, now), line(1.5, now, split="train"), line(1.1, "older"), line(0.9, now, guidance={"scale": 1})]
    rows += [line(2.5, now, weights="raw"), line(2.1, now, weights=0.1)]
    write(run, *rows)
    found = (model_card.likelihood(run, weights) for weights in ("ema", "raw", "0.1", 0.2))
    assert list(found) == [rows[0], rows[4], rows[5], None]
    text = model_card.card("ada/digits", run, CONFIG, 12345, 200)
    assert "| test data, 100 samples | **1.800 ± 0.021 bits/dim** |" in text
    assert "| error from the choice of samples | ± 0.0200 |" in text
    assert "| error from probes and dequantisation | ± 0.0073 |" in text
    assert "| change under a finer solve | 0.00120 ± 0.00040 |" in text
    assert "| dequantisation | uniform \\| one draw |" in text
    assert "evidence bound" not in text


def test_the_header_the_settings_and_the_code(run):
    text = model_card.card("ada/digits", run, CONFIG, 12345, 200, "mit")
    header = yaml.safe_load(text.split("---")[1])
    assert header["pipeline_tag"] == "unconditional-image-generation"
    assert (header["library_name"], header["license"]) == ("scoresde", "mit")
    assert "# digits" in text
    assert "| sde | `VP(beta_min=0.1, beta_max=20.0)` |" in text
    assert "| parameters | 12,345 |" in text
    assert "| training data | `Digits` |" in text
    assert "| training steps | 200 |" in text
    assert 'run = ss.load("hf://ada/digits")' in text
    assert "shape=(4, 1, 8, 8)" in text
    assert "No likelihood was measured." in text
    assert "samples.png" not in text
    conditional = model_card.card("ada/digits", run, {**CONFIG, "conditional": ["label"]}, 1, None)
    assert "| conditions | label |" in conditional
    assert "pipeline_tag" not in conditional
    assert "cond=" in conditional


def test_the_latest_picture_of_samples(run):
    assert model_card.picture(run) is None
    figures = run / "figures"
    figures.mkdir()
    for name in ("step000200.png", "samples_ddim.png"):
        (figures / name).write_bytes(b"")
    assert model_card.picture(run).name == "samples_ddim.png"
    assert "![Samples of digits](samples.png)" in model_card.card("ada/digits", run, CONFIG, 1, None)
