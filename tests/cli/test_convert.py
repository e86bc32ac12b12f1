"""`scoresde convert`: runs of other projects' checkpoints."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import scoresde as ss
from scoresde.cli import main
from tests.cli.conftest import rows
from tests.convert.reference import described, weights

FIXTURES = Path(__file__).parents[1] / "data" / "score_sde"


def test_convert_leaves_a_run_with_both_sets_of_weights(capsys):
    source = FIXTURES / "ddpmpp_vp_continuous.pth"
    assert main(["convert", "source=score_sde", f"path={source}", "data=digits", "data.range=[0,256]"]) == 0
    run = Path("runs", "ddpmpp_vp_continuous")
    assert "raw, ema" in capsys.readouterr().out
    reference = np.load(FIXTURES / "ddpmpp_vp_continuous.reference.npz")
    x, t = (torch.from_numpy(reference[name]) for name in ("x", "t"))
    for kind in ("raw", "ema"):
        loaded = ss.load(run, weights=kind)
        with torch.no_grad():
            score = loaded.model.score(x, t)
        torch.testing.assert_close(score, torch.from_numpy(reference[f"score_{kind}"]), rtol=1e-3, atol=1e-4)
    assert loaded.config.data.test["_target_"] == "scoresde.data.Digits"


@pytest.mark.slow
def test_a_converted_run_has_samples_and_bits_per_dimension():
    """A model of 8 x 8 digits with random weights, in score_sde's form: its network has weights by a rule."""
    variant = described("score_sde/variants", "ddpmpp_grey")
    state, config = weights(variant["shapes"]), variant["config"]
    config["data"]["dataset"] = "digits"
    averages = [state[name] for name in variant["trainable"]]
    torch.save({"model": state, "ema": {"shadow_params": averages}}, "grey.pth")
    Path("grey.config.json").write_text(json.dumps(config))
    assert main(["convert", "source=score_sde", "path=grey.pth"]) == 0
    assert main(["sample", "run=runs/grey", "n=2", "sampler.steps=1"]) == 0
    solver = ["likelihood.solver._target_=scoresde.solvers.RungeKutta", "likelihood.solver.steps=1"]
    assert main(["bpd", "run=runs/grey", *solver, "budget.samples=0", "budget.bound=null"]) == 0
    (row,) = rows("runs/grey", "likelihood")
    assert (row["n"], row["unit"]) == (297, "bits/dim")
    assert row["conventions"]["transform"] == "Levels(levels=17, low=-1.0, high=1.0)"


def test_a_run_without_data_has_no_likelihood(capsys, refused):
    source = FIXTURES / "ncsnpp_ve_continuous.pth"
    config = json.loads(source.with_suffix(".config.json").read_text())
    config["data"]["dataset"] = "LSUN"
    Path("lsun.json").write_text(json.dumps(config))
    assert main(["convert", "source=score_sde", f"path={source}", "config=lsun.json", "run=lsun", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["weights"] == ["raw", "ema"]
    assert record["parameters"] == sum(p.numel() for p in ss.load("lsun").model.parameters() if p.requires_grad)
    assert record["paths"] == {"checkpoint": "lsun/checkpoint.safetensors", "config": "lsun/config.yaml"}
    assert "has no test data" in refused("bpd", "run=lsun")


def test_a_converted_classifier_is_a_run_that_load_classifier_reads(refused):
    source = FIXTURES.parent / "adm" / "adm_classifier.pth"
    assert main(["convert", "source=adm_classifier", f"path={source}", "run=classifier"]) == 0
    reference = np.load(source.with_suffix(".reference.npz"))
    x, step, logits = (torch.from_numpy(reference[name]) for name in ("x", "t", "logits"))
    with torch.no_grad():
        torch.testing.assert_close(ss.load_classifier("classifier")(x, step / 999), logits, rtol=1e-4, atol=1e-4)
    assert "use ss.load_classifier" in refused("sample", "run=classifier")


def test_a_network_of_guided_diffusion_is_converted_with_its_learned_variance():
    source = FIXTURES.parent / "adm" / "adm_cond_learned.pth"
    assert main(["convert", "source=adm", f"path={source}", f"config={source.with_suffix('.config.json')}"]) == 0
    run = ss.load("runs/adm_cond_learned")
    assert (run.model.learned_variance, list(run.config.conditional)) == (True, ["label"])


def test_wrong_input_is_answered_in_one_line(refused):
    source = FIXTURES / "ddpmpp_vp_continuous.pth"
    one_of = "source must be one of score_sde, edm, edm2, adm, adm_classifier, diffusers; got 'gan'"
    assert one_of in refused("convert", "source=gan", f"path={source}")
    assert "no checkpoint at nowhere.pth" in refused("convert", "source=edm", "path=nowhere.pth")
    assert "no configuration at" in refused("convert", "source=score_sde", f"path={source}", "config=none.json")
    Path("run").mkdir()
    Path("run/config.yaml").write_text("{}")
    assert "run holds a run already (its config.yaml)" in refused(
        "convert", "source=score_sde", f"path={source}", "run=run"
    )
