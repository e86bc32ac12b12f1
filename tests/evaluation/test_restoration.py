"""Restorations against exact posteriors, and their measures against definitions."""

import math

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import scoresde as ss
from scoresde.build import Run
from scoresde.data import Affine
from scoresde.evaluation.restoration import (
    Problem,
    Restoration,
    coverage,
    measure,
    picture_quality,
    quality,
    read_picture,
    residual,
    restore,
    state_of,
)
from tests.conftest import close, f64, normal
from tests.evaluation.runs import digits_run

SHAPE = (1, 2, 2)
MASK = torch.tensor([[True, False], [True, True]])
FLOW = ss.samplers.PredictorCorrector(ss.samplers.Heun(), steps=30)


@pytest.fixture
def gaussian(tmp_path):
    """A run whose data have one correlated Gaussian, its exact model, and a problem."""
    rotation = torch.linalg.qr(normal(4, 4, seed=5)).Q
    oracle = ss.GaussianMixture(
        f64([[0.3, -0.2, 0.1, 0.5]]).reshape(1, *SHAPE),
        f64([[1.0, 0.6, 0.4, 0.3]]).reshape(1, *SHAPE),
        None,
        rotation[None],
    )
    config = OmegaConf.create({"data": {"shape": list(SHAPE), "range": None}})
    run = Run(None, Affine(2.0), config, tmp_path)
    operator = ss.inverse.Inpainting(MASK, 0.2)
    data = oracle.sample(1, generator=torch.Generator().manual_seed(2))[0] / 2
    return run, oracle, measure(run, operator, data, seed=4)


def test_restorations_of_a_gaussian_have_the_exact_moments(gaussian):
    run, oracle, problem = gaussian
    exact = oracle.posterior(problem.operator, problem.y).sample(40_000, generator=torch.Generator().manual_seed(0))
    result = restore(
        run, oracle.score_model(ss.VP()), problem, lambda *parts: ss.inverse.MMPS(*parts, iterations=3), FLOW, n=800
    )
    scale = f64(exact).std(0)
    assert ((result.mean - f64(exact).mean(0)).abs() < 4.5 * scale / math.sqrt(800)).all()
    close(result.std, scale, rtol=0.12)
    assert (result.nfe, result.x.shape) == (60, (800, *SHAPE))
    row = quality(run, problem, result, 0.9)
    assert row["coverage_level"] == pytest.approx(0.9, abs=2e-3)
    assert row["rmse"] == pytest.approx(float((result.mean - problem.state).square().mean().sqrt()))


def test_particles_have_the_evidence_and_the_moments(gaussian):
    run, oracle, problem = gaussian
    model, method = oracle.score_model(ss.VP()), lambda *_: ss.inverse.TwistedParticles(steps=40)
    result = restore(run, model, problem, method, n=50, particles=800, batch_size=300)
    exact = float(oracle.log_evidence(problem.operator, problem.y))
    assert abs(result.log_evidence - exact) < 5 * result.stderr + 0.05
    moments = oracle.posterior(problem.operator, problem.y).sample(20_000, generator=torch.Generator().manual_seed(0))
    close(result.mean, f64(moments).mean(0), atol=5 * float(f64(moments).std()) / math.sqrt(result.ess))
    assert 50 < result.ess <= 800
    assert (result.nfe, result.backward) == (41, 40)
    with pytest.raises(ValueError, match="particles must be at least n; got particles=8 and n=50"):
        restore(run, model, problem, method, n=50, particles=8)
    with pytest.warns(UserWarning, match="effective particles"):
        restore(run, model, problem, lambda *_: ss.inverse.TwistedParticles(steps=3, threshold=0.0), n=20, particles=20)


def test_a_restoration_does_not_depend_on_its_batch(gaussian):
    run, oracle, problem = gaussian
    few = ss.samplers.PredictorCorrector(ss.samplers.Ancestral(), steps=4)
    whole, parts, later = (
        restore(run, oracle.score_model(ss.VP()), problem, ss.inverse.PiGDM, few, n=n, seed=seed, batch_size=size)
        for n, seed, size in ((5, 7, 256), (5, 7, 2), (2, 10, 256))
    )
    close(parts.x, whole.x, atol=1e-5)
    close(later.x, whole.x[3:], atol=1e-5)


def test_the_measurement_depends_on_its_seed_alone(gaussian):
    run, _, problem = gaussian
    other = measure(run, problem.operator, problem.data, seed=5)
    assert torch.equal(measure(run, problem.operator, problem.data, seed=4).y, problem.y)
    assert not torch.equal(other.y, problem.y)
    assert torch.equal(other.state, problem.state)  # without dequantisation
    close(problem.back_projected(run)[0][MASK], problem.y[0] / 2)


def test_states_are_dequantised_within_their_level(tmp_path):
    run = digits_run(tmp_path)
    data = torch.arange(64.0).remainder(17).reshape(1, 8, 8)
    states = [state_of(run, data, seed) for seed in (0, 1)]
    assert not torch.equal(*states)
    for state in states:
        assert torch.equal(run.transform.inverse(state).floor(), data)


@pytest.mark.parametrize(("n", "level", "stated", "k"), [(8, 0.9, 7 / 9, 1), (19, 0.9, 0.9, 1), (99, 0.9, 0.9, 5)])
def test_intervals_hold_their_stated_level(n, level, stated, k):
    """The truth is one more draw of the same law; entries that are the same in all samples are left out."""
    draws = normal(n + 1, 20_000, seed=n)
    x, truth = draws[1:].clone(), draws[0]
    x[:, :100], truth[:100] = 3.0, 5.0
    row = coverage(x, truth, level)
    assert row["coverage_level"] == pytest.approx(stated)
    assert row["coverage_entries"] == 19_900
    assert abs(row["coverage"] - stated) < 4 * math.sqrt(stated * (1 - stated) / 19_900)
    ordered = x.sort(dim=0).values[:, 100:]
    inside = (ordered[k - 1] <= truth[100:]) & (truth[100:] <= ordered[n - k])
    assert row["coverage"] == pytest.approx(float(inside.double().mean()))
    assert coverage(torch.ones(n, 3), torch.ones(3), level) == {}


def test_the_residual_is_per_measurement():
    operator = ss.inverse.Linear(2 * torch.eye(3))
    assert residual(Problem(operator, torch.zeros(3)), torch.tensor([[1.0, 0, 0], [0, 2.0, 2.0]])) == pytest.approx(
        math.sqrt(36 / 6)
    )


def test_pictures_are_compared_in_grey_levels(tmp_path):
    run, data = digits_run(tmp_path), torch.arange(64.0).remainder(17).reshape(1, 8, 8)
    near = data.clone()
    near[0, 0, 0] += 2
    states = run.transform(torch.stack((near, near)) + 0.3)  # rounded down to levels
    row = picture_quality(run, states, data)
    assert row["psnr"] == pytest.approx(10 * math.log10(16**2 / (4 / 64)))
    assert 0.9 < row["ssim"] < 1
    exact = picture_quality(run, run.transform(data[None] + 0.3), data)
    assert exact == {"ssim": pytest.approx(1)}
    assert picture_quality(digits_run(tmp_path, range=None), states, data) == {}
    row = quality(run, Problem(ss.inverse.Linear(torch.eye(64), shape=(1, 8, 8)), torch.zeros(64), data, states[0]),
                  Restoration(states, f64(states).mean(0), torch.zeros(1, 8, 8), 1, 0, 0.0), 0.9)  # fmt: skip
    assert (row["psnr"], row["sample_psnr"]) == (pytest.approx(row["psnr"]), pytest.approx(row["psnr"]))
    assert "coverage" not in row  # the samples are the same


def test_a_picture_becomes_levels_or_numbers_of_the_data(tmp_path):
    picture = np.zeros((8, 8), np.uint8)
    picture[0, 0], picture[0, 1] = 255, 100
    Image.fromarray(picture).save(tmp_path / "a.png")
    levels = read_picture(digits_run(tmp_path), tmp_path / "a.png")
    assert levels.shape == (1, 8, 8)
    assert levels[0, 0, :3].tolist() == [16, 6, 0]  # floor(100 * 17 / 256)
    assert read_picture(digits_run(tmp_path, 256), tmp_path / "a.png")[0, 0, :3].tolist() == [255, 100, 0]
    numbers = read_picture(digits_run(tmp_path, dequantization=None, range=[-1, 1]), tmp_path / "a.png")
    close(numbers[0, 0, :3], torch.tensor([1.0, -1 + 200 / 255, -1]), rtol=1e-6)
    with pytest.raises(ValueError, match=r"image needs a run of images \(1 or 3, H, W\).*states \(2,\): set index"):
        read_picture(digits_run(tmp_path, shape=[2]), tmp_path / "a.png")
    with pytest.raises(ValueError, match="the range of the images is unknown"):
        read_picture(digits_run(tmp_path, range=None), tmp_path / "a.png")
