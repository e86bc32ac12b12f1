"""Multilevel means and variances of posteriors, against closed forms and against their own cost."""

import pytest
import torch

import scoresde as ss
from scoresde.inverse import MMPS, Inpainting, posterior_moments
from scoresde.multilevel import rms
from tests.conftest import close, f64, oracle

SHAPES = pytest.mark.parametrize("shape", [(2,), (1, 2, 2)])
STEPS = (8, 16, 32, 64)


def problem(shape):
    """An exact posterior whose first entry is measured with noise 0.5."""
    mask = torch.zeros(shape)
    mask.view(-1)[0] = 1
    return oracle(shape).posterior(Inpainting(mask.bool(), 0.5), f64(0.3)[None])


def variances(mixture):
    size = mixture.mean().numel()
    return mixture.covariance().reshape(size, size).diagonal().reshape(mixture.mean().shape)


def estimated(posterior, tolerance=0.05, **settings):
    return posterior_moments(
        posterior.score_model(ss.VP()), posterior.mean().shape, tolerance, steps=STEPS, dtype=torch.float64, **settings
    )


@SHAPES
def test_the_stated_errors_of_both_moments_hold(shape):
    """The mean square of error / stated error over 8 estimates is near 1; the limit is exceeded once in 1e4 times."""
    posterior, squares = problem(shape), []
    for seed in range(8):
        found = estimated(posterior, seed=seed)
        assert rms(found.estimate.error) <= 0.05
        squares += [
            (((found.mean - posterior.mean()) / found.mean_stderr).square().mean()),
            (((found.variance - variances(posterior)) / found.variance_stderr).square().mean()),
        ]
    assert 0.2 < float(torch.stack(squares).mean()) < 2.0


def test_a_tighter_tolerance_costs_less_than_plain_samples():
    """Plain samples of 16 or more steps cost at least twice as much where the cheapest level has 8."""
    found = estimated(problem((2,)), 0.02)
    assert found.plain > 2 * (found.nfe + found.backward)
    draws = [term.draws for term in found.estimate.terms]
    assert draws[0] > 10 * draws[1] > 0


def test_the_evaluations_are_counted():
    found = estimated(problem((2,)))
    terms = zip(STEPS, (0, *STEPS), found.estimate.terms, strict=False)
    assert found.backward == 0
    assert found.nfe == sum((fine + coarse) * t.draws for fine, coarse, t in terms) + (16 + 2) * STEPS[0]


def test_seeds_and_batches():
    """Equal seeds give equal estimates in batches of any size, and other seeds give others."""
    posterior = problem((2,))
    first, second, other = (estimated(posterior, 0.2, seed=s, batch_size=b) for s, b in ((0, 256), (0, 50), (1, 256)))
    torch.testing.assert_close(first.mean, second.mean, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(first.mean, other.mean)


def test_a_posterior_model_and_its_backward_passes():
    mixture = oracle((2,))
    model = MMPS(mixture.score_model(ss.VP()), Inpainting([1, 0], 0.5), f64(0.3)[None])
    found = posterior_moments(model, (2,), 0.2, steps=(8, 16, 32))
    assert found.backward >= found.nfe > 0
    assert found.mean.shape == found.std.shape == (2,)


def test_a_posterior_of_one_point_needs_one_sample():
    model = ss.ScoreModel(lambda x, label, cond=None: torch.zeros_like(x), ss.VP(), ss.predictions.Data())
    found = posterior_moments(
        model,
        (2,),
        0.2,
        lambda n: ss.samplers.PredictorCorrector(ss.samplers.DPMSolverPP(2), steps=n, denoise_final=True),
        steps=STEPS,
    )
    close(found.variance, f64(0.0, 0.0))
    assert 0 < found.plain <= STEPS[-1] + 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": (16, 8)}, "increasing"),
        ({"steps": (8,)}, "at least two"),
        ({"tolerance": 0.0}, "tolerance must"),
        ({"batch_size": 0}, "batch_size must"),
        ({"seed": -1}, "seed must"),
        ({"sampler": lambda n: ss.samplers.PredictorCorrector(ss.samplers.Ancestral(), steps=n)}, "deterministic"),
    ],
)
def test_errors(settings, message):
    model = problem((2,)).score_model(ss.VP())
    with pytest.raises(ValueError, match=message):
        posterior_moments(model, (2,), **{"tolerance": 0.1, **settings})
