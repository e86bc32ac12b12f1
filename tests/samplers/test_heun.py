"""Heun's method and EDM's sampler against their algorithms as published."""

import math
from itertools import pairwise

import pytest
import torch

import scoresde as ss
from scoresde import samplers
from scoresde.random_stream import RandomStream
from scoresde.sdes.transitions import points
from tests.conftest import close, f64, make_transition, normal, oracle, seeded
from tests.samplers.methods import EVERY_PATH, pairs

T, S = f64(0.7), f64(0.45)


@EVERY_PATH
def test_heun_in_the_ratio(sde):
    """The trapezoidal rule for dy/dr = E[eps | x], y = x/alpha, after a step of Euler's method; EDM without churn."""
    model, x = oracle((2,)).score_model(sde), float(sde.sigma(T)) * normal(3, 2)
    a, b = sde.alpha(T), sde.alpha(S)
    step, first = sde.sigma(S) / b - sde.sigma(T) / a, model.noise(x, T)
    second = model.noise(b * (x / a + step * first), S)
    moved = make_transition(samplers.Heun(), model, x, T, S)
    close(moved, b * (x / a + step * (first + second) / 2), 1e-9)
    assert torch.equal(make_transition(samplers.EDM(0.0), model, x, T, S), moved)


@pytest.mark.parametrize("churn", [0.0, 2.0, 40.0])
@pytest.mark.parametrize("size", [1.0, 1.007])
def test_edm_as_published(size, churn):
    """2206.00364, algorithm 2, on its own path: gamma = min(churn / N, 2^(1/2) - 1) where S_tmin <= t <= S_tmax."""
    sde, times = ss.Karras(), [40.0, 10.0, 3.0, 1.0, 0.2, 0.05]
    low, high = 0.5, 20.0
    model = oracle((2,)).score_model(sde)
    x = 40.0 * normal(3, 2)
    sampler = samplers.PredictorCorrector(samplers.EDM(churn, low, high, size), grid=times)
    ours = sampler(model, x_T=x, generator=seeded(2)).x
    stream = RandomStream(seeded(2))
    for t, s in pairwise(times):
        gamma = min(churn / 5, math.sqrt(2) - 1) if low <= t <= high else 0.0
        raised = t * (1 + gamma)
        if gamma:
            x = x + math.sqrt(raised**2 - t**2) * size * stream.normal(x)
        d = (x - model.denoise(x, f64(raised))) / raised
        y = x + (s - raised) * d
        x = x + (s - raised) * (d + (y - model.denoise(y, f64(s))) / s) / 2
    close(ours, x, 1e-9)


@EVERY_PATH
@pytest.mark.parametrize("churn", [0.5, 100.0])
def test_churn_raises_the_ratio_and_keeps_the_marginal(churn, sde):
    """p x + q z has the law at (1 + gamma) r: the signal alpha-hat, and the noise sigma-hat^2."""
    times = sde.time(2 * torch.linspace(-2, 1, 6, dtype=torch.float64))
    plan = samplers.EDM(churn).plan(sde, list(pairwise(times)))
    gamma = min(churn / 5, math.sqrt(2) - 1)
    for row, t in zip(plan, times[:-1], strict=True):
        here, raised = points(sde, [t, row.stages[0].t])
        p, q = row.kick
        assert raised.ratio == pytest.approx((1 + gamma) * here.ratio, rel=1e-9)
        assert p * here.alpha == pytest.approx(raised.alpha, rel=1e-9)
        assert p**2 * here.sigma**2 + q**2 == pytest.approx(raised.sigma**2, rel=1e-9)


def test_edm_adds_noise_only_between_its_bounds_and_never_exceeds_the_path():
    sde, times = ss.Karras(), [80.0, 70.0, 20.0, 5.0, 1.0, 0.1]
    plan = samplers.EDM(100.0, 1.0, 75.0).plan(sde, pairs(*times))
    raised = [float(row.stages[0].t) / t for row, t in zip(plan, times, strict=False)]
    assert raised == pytest.approx([1.0, 80 / 70, math.sqrt(2), math.sqrt(2), math.sqrt(2)])
    assert [row.kick is None for row in plan] == [True, False, False, False, False]
    assert samplers.EDM(100.0).plan(sde, pairs(80.0, 70.0))[0].kick is None
    plan = samplers.EDM(100.0, 2.0, 10.0).plan(sde, pairs(*times))
    assert [row.kick is None for row in plan] == [True, True, True, False, True]


@pytest.mark.parametrize("arguments", [{"churn": -1.0}, {"low": 2.0, "high": 1.0}, {"low": -1.0}, {"noise": 0.0}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="EDM needs churn >= 0, 0 <= low < high and noise > 0; got churn="):
        samplers.EDM(**arguments)
