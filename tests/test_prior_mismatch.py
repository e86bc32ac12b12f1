"""The distance of the prior from the noisy data, against closed forms, and the warning wherever a prior is used."""

import math
import re
import warnings

import pytest
import torch

import scoresde as ss
from scoresde.prior_mismatch import LARGE_MISMATCH, PriorMismatch, prior_mismatches, warn_of_mismatch
from scoresde.samplers import DDIM, EulerMaruyama, PredictorCorrector, ProbabilityFlow
from scoresde.solvers import Adams
from tests.conftest import f64, normal, oracle, seeded, some

VP, VE = ss.VP(), ss.VE()
SHAPES = [(3,), (2, 2)]


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error", PriorMismatch)
        yield


@pytest.mark.parametrize("shape", SHAPES, ids=["vector", "matrix"])
@pytest.mark.parametrize("sde", some("vp", "sub-vp", "ve", "karras", "rectified"))
def test_a_mismatch_is_the_divergence_of_the_normal_distributions(sde, shape):
    """KL of products of normal distributions, the mean over dimensions; the noise at t_min is negligible."""
    x, (start, end) = 4 * normal(5, *shape), f64(sde.t_min, sde.t_max)
    ends = torch.distributions.Normal(sde.alpha(end) * x / sde.alpha(start), sde.sigma(end))
    expected = torch.distributions.kl_divergence(ends, torch.distributions.Normal(0.0, f64(sde.prior_std)))
    expected = expected.flatten(1).mean(dim=1)
    torch.testing.assert_close(prior_mismatches(sde, x), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("sde", some("vp", "sub-vp", "ve", "cosine", "karras", "rectified", "ddpm", "learned"))
@pytest.mark.parametrize("dims", [1, 2, 200])
def test_data_of_unit_scale_have_none_at_any_time(sde, dims, silent):
    """The noise of a noisy state is not taken for data."""
    data = normal(500, dims)
    for share in (0.0, 0.3, 0.8, 0.99, 1.0):
        t = sde.t_min + share * (sde.t_max - sde.t_min)
        warn_of_mismatch(sde, prior_mismatches(sde, sde.perturb(data, f64(t), normal(500, dims, seed=1)), t))


def test_a_noisy_state_of_large_data_is_found():
    data = torch.full((4, 200), 300.0, dtype=torch.float64)
    x = VE.perturb(data, f64(0.5), normal(4, 200))
    torch.testing.assert_close(prior_mismatches(VE, x, 0.5), f64(300.0**2 / 2 / 50**2).expand(4), rtol=1e-2, atol=0)


def message(mismatch, above, total, source="data"):
    value = re.escape(f"{mismatch:.2g}")
    return rf"hide the {source}: .* up to {value} nats/dim .*\({above} of {total} above {LARGE_MISMATCH:g}\)"


def test_every_sample_is_judged_alone(recwarn):
    """One of 600 samples at a distance of 1000, and 15 images of a mean of 15 under VE(sigma_max=50)."""
    model = oracle((2,)).score_model(VE)
    x = normal(600, 2)
    x[17] = 1000 / math.sqrt(2)
    near = ss.log_prob(model, x[:16], solver=Adams(40), seeds=range(16))
    assert not recwarn
    with pytest.warns(PriorMismatch, match=message(1000**2 / 4 / 50**2, 1, 600)) as caught:
        both = ss.log_prob(model, x, solver=Adams(40), seeds=range(600))
    assert caught[0].filename == __file__
    torch.testing.assert_close(both.value[:16], near.value)
    with pytest.warns(PriorMismatch, match=message(1000**2 / 4 / 50**2, 1, 1)):
        ss.log_prob(model, x[17:18], solver=Adams(4))
    with pytest.warns(PriorMismatch, match=message(15**2 / 2 / 50**2, 3, 3)):
        warn_of_mismatch(VE, prior_mismatches(VE, torch.full((3, 3, 32, 32), 15.0)))


def test_one_dimension_of_many_is_enough():
    x = normal(5, 200)
    x[2, 7] = 200.0
    expected = float(prior_mismatches(VE, x).max())
    assert expected == pytest.approx(200**2 / 2 / 50**2 / 200, rel=0.02)
    with pytest.warns(PriorMismatch, match=message(expected, 1, 5)):
        warn_of_mismatch(VE, prior_mismatches(VE, x))


FAR = ss.GaussianMixture(torch.full((1, 2), 300.0), torch.ones(1))
CALLS = {
    "encode": ("data", lambda model: ss.encode(model, FAR.sample(4, generator=seeded()).double())),
    "decode": ("samples", lambda model: ss.decode(model, normal(4, 2) * 50 + 300)),
    "sample_with_log_prob": ("samples", lambda model: ss.sample_with_log_prob(model, (4, 2), seeds=range(4))),
    "flow": ("samples", lambda model: ProbabilityFlow()(model, (4, 2), seeds=range(4))),
    "ddim": ("samples", lambda model: PredictorCorrector(DDIM(), steps=50)(model, (4, 2), seeds=range(4))),
    "sde": ("samples", lambda model: PredictorCorrector(EulerMaruyama(), steps=50)(model, (4, 2), seeds=range(4))),
    "one-step": (
        "samples",
        lambda model: PredictorCorrector(DDIM(), steps=2, denoise_final=True)(model, (4, 2), seeds=range(4)),
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_latents_and_samples_warn_as_the_likelihood_does(call):
    """Data at 300 under VE(sigma_max=50): a state from the prior is 6 standard deviations from those of the data."""
    source, function = CALLS[call]
    with pytest.warns(PriorMismatch, match=rf"hide the {source}: .* up to 1[789] nats/dim .*\(4 of 4 ") as caught:
        function(FAR.score_model(VE))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("sde", some("vp", "ve", "rectified"))
def test_latents_and_samples_of_unit_scale_do_not_warn(sde, silent):
    model = oracle((2,)).score_model(sde)
    x = PredictorCorrector(DDIM(), steps=20)(model, (32, 2), seeds=range(32), dtype=torch.float64).x
    latent = ss.encode(model, x, solver=Adams(20))
    ss.decode(model, latent, solver=Adams(20))
    ss.sample_with_log_prob(model, (32, 2), seeds=range(32), solver=Adams(20))
    ProbabilityFlow(Adams(20))(model, (32, 2), seeds=range(32))
    PredictorCorrector(EulerMaruyama(), steps=2, denoise_final=True)(VP_MODEL, (4, 3), seeds=range(4))


VP_MODEL = oracle((3,)).score_model(VP)


def test_given_starting_states_are_not_judged(silent):
    """They need not come from the prior: an edit starts from noisy data."""
    PredictorCorrector(DDIM(), steps=10)(FAR.score_model(VE), x_T=normal(4, 2) * 50 + 300)
