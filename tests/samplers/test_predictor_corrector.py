"""Predictor-corrector sampling and the probability flow: order, steps that go up, failures, and bad input."""

import pytest
import torch

import scoresde as ss
from scoresde.samplers import DDIM, Ancestral, PredictorCorrector, ProbabilityFlow, uniform_log_snr
from scoresde.samplers.grids import segments
from tests.conftest import close, f64, oracle, seeded


@pytest.mark.parametrize("order", ["predictor_first", "corrector_first"])
def test_a_corrector_acts_at_the_end_or_at_the_start_of_a_transition_up_or_down(order):
    times_of_corrector, grid = [], [1.0, 0.5, 0.8, 0.3]

    def corrector(model, x, t, stream):
        times_of_corrector.append(float(t))
        return x

    make = PredictorCorrector(Ancestral(), corrector, grid=grid, order=order)
    assert make(oracle((2,)).score_model(ss.VP()), shape=(2, 2), seeds=[0, 1]).nfe == 2  # the step up costs nothing
    assert times_of_corrector == (grid[1:] if order == "predictor_first" else grid[:-1])


def test_going_up_again_brings_inpainting_nearer_to_the_conditional_law():
    """RePaint (2201.09865): the second coordinate of a Gaussian with correlation 0.9, given the first.

    After each transition the known coordinate is put back, at the noise of that time. If the states only go down, the
    other coordinate does not agree with it, and its mean stays behind. The exact law is N(0.9 value, 1 - 0.81).
    """
    rho, value, n, errors = 0.9, 1.5, 4000, []
    stds = f64((1 + rho) ** 0.5, (1 - rho) ** 0.5)[None]
    mixture = ss.GaussianMixture(torch.zeros(1, 2), stds, rotation=f64([1, -1], [1, 1]) / 2**0.5)
    close(mixture.covariance(), f64([1, rho], [rho, 1]))
    model = mixture.score_model(ss.VP())

    def known(model, x, t, stream):
        return torch.stack([model.sde.perturb(torch.full_like(x, value), t, stream.normal(x))[:, 0], x[:, 1]], dim=1)

    for jumps in (0, 8):
        times = uniform_log_snr(model.sde, 40).tolist()
        grid = [*times[:5]]
        for i in range(5, 41, 4):  # down four steps, and `jumps` times up and down again over those four
            part = times[i : i + 4]
            grid += part + jumps * [times[i - 1], *part]
        make = PredictorCorrector(Ancestral(), grid=grid)
        x = make(model, shape=(n, 2), generator=seeded(), constraint=known, dtype=torch.float64).x
        errors.append((float(x[:, 1].mean()) - rho * value, float(x[:, 1].var()) - (1 - rho**2)))
    (mean, variance), (mended_mean, mended_variance) = errors
    assert mean < -0.4
    assert variance > 0.05
    assert abs(mended_mean) < 0.1
    assert abs(mended_variance) < 0.03


def test_the_probability_flow_starts_where_no_signal_is_left():
    """One Gaussian, whose flow is affine: x - alpha m grows with its standard deviation, which is 1 at the start."""
    sde, x_T = ss.Cosine(t_max=1.0), torch.linspace(-2, 2, 10, dtype=torch.float64).reshape(5, 2)
    model = ss.GaussianMixture(f64([0.5, 0.5])[None], f64(0.3)[None]).score_model(sde)
    alpha, sigma = (function(f64(sde.t_min)) for function in (sde.alpha, sde.sigma))
    expected = 0.5 * alpha + torch.hypot(0.3 * alpha, sigma) * x_T
    for count in (1, 3):
        sampler = ProbabilityFlow(segments=count) if count == 1 else ProbabilityFlow(ss.solvers.Adams(160))
        close(sampler(model, x_T=x_T).x, expected, rtol=0, atol=2e-4)
    assert ProbabilityFlow(segments=3).transitions(ss.VP()) == segments(ss.VP(), 3)


def test_a_flow_that_fails_says_how_many_samples():
    model = ss.ScoreModel(lambda x, label, cond: x * torch.nan, ss.VP())
    with pytest.raises(RuntimeError, match="2 of 2 samples"):
        ProbabilityFlow()(model, shape=(2, 3), seeds=[0, 1])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PredictorCorrector(), ValueError, "a predictor, a corrector or both; got neither"),
        (lambda: PredictorCorrector(DDIM(), steps=0), ValueError, "steps must be an integer >= 1"),
        (
            lambda: PredictorCorrector(DDIM(), steps=3, grid=[0.9, 0.5, 0.1]),
            ValueError,
            "3 times has 2 steps; got steps=3",
        ),
        (lambda: PredictorCorrector(DDIM(), order="both"), ValueError, "order must be one of predictor_first, corr"),
        (lambda: PredictorCorrector(corrector=3), ValueError, "corrector must be a function or null; got 3"),
        (lambda: PredictorCorrector(corrector=ss.samplers.MALA), TypeError, "a corrector must be a function"),
        (lambda: ProbabilityFlow(segments=0), ValueError, "segments must be at least 1"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
