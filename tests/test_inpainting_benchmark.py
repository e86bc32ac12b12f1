"""The benchmark of inpainting: the cost that it counts, and its measures."""

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch

import scoresde as ss
from scoresde.evaluation.restoration import Restoration, measure
from scoresde.networks import MLP
from tests.conftest import f64
from tests.evaluation.runs import digits_run
from tests.networks.test_layers import randomised

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of this distribution", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
import inpainting  # noqa: E402

OPTIONS = argparse.Namespace(patches=1, samples=4, passes=9)


def run_of(path, **options):
    network = randomised(MLP((1, 8, 8), width=8, depth=1, **options)).float()
    return dataclasses.replace(digits_run(path), model=ss.ScoreModel(network, ss.VP(), "karras"))


def test_every_method_keeps_to_its_budget_and_uses_it(tmp_path):
    trained, prior = run_of(tmp_path, cond_channels=2), run_of(tmp_path)
    used = {}
    for name, draw in inpainting.methods(trained, prior, OPTIONS.passes).items():
        found = inpainting.cell(draw, prior, "box", OPTIONS)
        used[name] = found["passes"]
        assert all(math.isfinite(value) for row in found["rows"] for value in row)
    assert used.pop("trained, a fifth of the passes") == 2
    assert used.pop("mmps(3)") <= 8  # conjugate gradients may stop early
    assert min(used.values()) >= OPTIONS.passes - 1
    draw, fewer = inpainting.methods(trained, prior, 9)["trained"], argparse.Namespace(**{**vars(OPTIONS), "passes": 8})
    with pytest.raises(RuntimeError, match="at most 8 passes; it made 9"):
        inpainting.cell(draw, prior, "box", fewer)


def test_the_measures_are_of_the_hidden_entries(tmp_path):
    """Samples that are off by 0.1 and 0.3 where the truth is hidden, and right elsewhere."""
    run = run_of(tmp_path)
    operator = ss.inverse.SizedInpainting(inpainting.BOXES["half"], noise_std=0.0)((1, 8, 8))
    problem = measure(run, operator, ss.data.Digits("test")[3])
    assert operator.mask[:, :4].all()
    assert not operator.mask[:, 4:].any()
    x = problem.state + torch.where(operator.mask, 0.0, torch.tensor([0.1, 0.3]).reshape(2, 1, 1, 1))
    x = x + torch.where(operator.mask, 0.0, torch.where(torch.arange(8) < 6, -0.2, 0.0))
    row = inpainting.errors(run, problem, Restoration(x, x.double().mean(0), f64(0.0), 1, 0, 0.0))
    assert row["rmse"] == pytest.approx(0.2 / math.sqrt(2), rel=1e-4)
    assert row["coverage"] == 0.5  # within -0.1 .. 0.1 in two of four columns, not within 0.1 .. 0.3
    assert row["residual"] == 0
    assert {"psnr", "sample_psnr", "ssim", "sample_ssim"} <= row.keys()
