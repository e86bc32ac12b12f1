"""Thresholded models: consistent views, predictions in the range, and nothing changed that is in it already."""

import pytest
import torch
from torch import nn

import scoresde as ss
from scoresde.samplers import DDIM, EDM, Ancestral, DPMSolverPP, PredictorCorrector, ProbabilityFlow, ReverseDiffusion
from scoresde.thresholding import Clipped, DynamicThresholding, Thresholded, quantile
from scoresde.wrappers import ModelWrapper
from tests.conftest import close, exact_model, f64, gradient, normal, oracle, paths_with, seeded, some, times

VIEWS = ("score", "noise", "denoised", "velocity")
RANGE = {"low": -0.4, "high": 0.7}
KINDS = {"clipped": Clipped, "dynamic": lambda model, **range: DynamicThresholding(model, 0.6, **range)}
EACH = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def column(values, x):
    return values.reshape((-1,) + (1,) * (x.ndim - 1))


def states(sde, shape, t):
    return sde.perturb(2 * normal(*shape), t, normal(*shape, seed=1))


def predicting(x0, sde=None):
    """A model that predicts this tensor as the data."""
    return ss.ScoreModel(lambda x, c_noise, cond: x0.to(x.dtype), sde or ss.VP(), "data")


# Views


@EACH
@paths_with("shape", [(6, 3), (3, 3), (2, 1, 4, 4)])
def test_views_follow_from_the_thresholded_data(sde, shape, make):
    t = times(sde, shape[0], margin=0.02)
    x, plain = states(sde, shape, t), oracle(shape[1:]).score_model(sde)
    model = make(plain, **RANGE)
    views, before = model.predict(x, t), plain.denoise(x, t)
    data = model.threshold(before)
    assert not torch.equal(data, before)
    alpha, sigma, alpha_dot, sigma_dot = (
        column(c, x) for c in (sde.alpha(t), sde.sigma(t), gradient(sde.alpha, t), gradient(sde.sigma, t))
    )
    noise = (x - alpha * data) / sigma
    close(views.denoised, data, rtol=0)
    expected = {"noise": noise, "score": -noise / sigma, "velocity": alpha_dot * data + sigma_dot * noise}
    for name, value in expected.items():
        close(getattr(views, name), value, rtol=1e-8, atol=1e-8 * float(value.abs().max()))


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sde", some("vp", "ve", "rectified"))
def test_within_the_range_nothing_changes(sde, dtype, make):
    """To the last digit, in float32 and at the smallest time, where sigma divides the rounding errors."""
    for t in (sde.t_min, 0.3, sde.t_max):
        x, plain = states(sde, (5, 3), t).to(dtype), exact_model(oracle((3,)), sde, "noise")
        views, thresholded = plain.predict(x, t), make(plain, low=-1e6, high=2e6).predict(x, t)
        for name in VIEWS:
            assert torch.equal(getattr(thresholded, name), getattr(views, name)), name


def test_clipping_changes_only_the_clipped_elements():
    sde, t = ss.VP(), 1e-5
    x, plain = states(sde, (50, 3), t).float(), exact_model(oracle((3,)), sde, "noise")
    views, clipped = plain.predict(x, t), Clipped(plain).predict(x, t)
    inside = views.denoised.abs() <= 1
    assert 0.1 < inside.double().mean() < 0.9
    for name in VIEWS:
        assert torch.equal(getattr(clipped, name) == getattr(views, name), inside), name


@EACH
def test_a_state_without_noise(make):
    """At sigma = 0 there is no (x - alpha D)/sigma: the noise is the model's own, and the data are thresholded."""
    sde, x = ss.Rectified(t_min=0.0), normal(4, 3)
    plain = exact_model(oracle((3,)), sde, "velocity")
    model = make(plain, **RANGE)
    close(model.noise(x, 0.0), plain.noise(x, 0.0), rtol=0)
    close(model.denoise(x, 0.0), model.threshold(plain.denoise(x, 0.0)), rtol=0)
    assert torch.isfinite(model.velocity(x, 0.0)).all()


# Dynamic thresholding


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
@pytest.mark.parametrize("q", [1e-3, 0.25, 0.995, 1.0])
def test_quantiles(q, n):
    values = normal(5, n).abs()
    close(quantile(values, q), torch.quantile(values, q, dim=1), rtol=1e-12)
    close(quantile(values.float(), q), torch.quantile(values.float(), q, dim=1), rtol=1e-6)


def test_dynamic_thresholding_is_as_published_and_separate_for_each_sample():
    """2205.11487, section 2.3: s = max(1, quantile |x_0|), clip to [-s, s], divide by s."""
    x0 = column(f64(0.2, 1.0, 3.0, 40.0), torch.empty(4, 1, 8, 8)) * normal(4, 1, 8, 8)
    s = torch.quantile(x0.abs().flatten(1), 0.9, dim=1).clamp(min=1)
    assert s[0] == 1 < s[1]
    model = DynamicThresholding(predicting(x0), 0.9)
    close(model.denoise(torch.zeros_like(x0), 0.5), x0.clamp(-column(s, x0), column(s, x0)) / column(s, x0))
    assert torch.equal(model.threshold(x0[2:3])[0], model.threshold(x0)[2])
    scaled = DynamicThresholding(predicting(x0), 1.0).threshold(5 * x0)  # the largest quantile does not clip
    close(scaled, 5 * x0 / (5 * x0).abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1))


def test_dynamic_thresholding_of_another_range_is_that_of_the_scaled_data():
    x0, middle, half = 3 * normal(4, 20), 0.5, 0.25
    plain = DynamicThresholding(predicting(x0), 0.8).threshold(x0)
    moved = DynamicThresholding(predicting(x0), 0.8, 0.25, 0.75).threshold(middle + half * x0)
    close(moved, middle + half * plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@EACH
def test_the_range_is_kept_exactly(make, dtype):
    x0 = (torch.logspace(-3, 4, 60)[:, None] * normal(60, 30)).to(dtype)
    thresholded = make(predicting(x0), low=0.1, high=0.4).threshold(x0)
    assert thresholded.dtype == dtype
    assert thresholded.min() >= torch.tensor(0.1, dtype=dtype)
    assert thresholded.max() <= torch.tensor(0.4, dtype=dtype)


# Samplers


SAMPLERS = {
    "langevin": PredictorCorrector(ReverseDiffusion(), ss.samplers.Langevin(), steps=12, denoise_final=True),
    "dpm-solver++": PredictorCorrector(DPMSolverPP(3), steps=8, grid="uniform_log_snr", denoise_final=True),
    "edm": PredictorCorrector(EDM(), steps=8, grid="karras", denoise_final=True),
    "flow": ProbabilityFlow(ss.solvers.RungeKutta("heun2", 12), denoise_final=True),
}


@EACH
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_every_sampler_stays_in_the_range(sampler, make):
    plain = oracle((1, 4, 4)).score_model(ss.VP())
    free, bounded = (sampler(model, shape=(9, 1, 4, 4), seeds=range(9)) for model in (plain, make(plain, **RANGE)))
    assert free.x.max() > 1.5
    assert RANGE["low"] <= bounded.x.min() <= bounded.x.max() <= RANGE["high"] + 1e-7
    assert bounded.nfe == free.nfe
    alone = sampler(make(plain, **RANGE), shape=(1, 1, 4, 4), seeds=[4]).x
    close(alone[0], bounded.x[4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sde", some("sub-vp", "ve"))
def test_where_the_data_are_held_the_flow_is_a_straight_line(sde):
    """All data at 5 (+- 1e-6) and a bound of 1: D = 1 at once, and (x - alpha)/sigma is constant."""
    model = Clipped(ss.GaussianMixture(torch.full((1, 3), 5.0), f64(1e-6).reshape(1)).score_model(sde))
    x_T = sde.prior_std * normal(4, 3)
    (alpha, sigma), (alpha_T, sigma_T) = ((sde.alpha(f64(t)), sde.sigma(f64(t))) for t in (sde.t_min, sde.t_max))
    expected = alpha + sigma / sigma_T * (x_T - alpha_T)
    for sampler, tolerance in (
        (PredictorCorrector(DDIM(), steps=3), 1e-10),
        (PredictorCorrector(DPMSolverPP(2), steps=5, grid="uniform_log_snr"), 1e-10),
        (ProbabilityFlow(), 1e-5),
    ):
        close(sampler(model, x_T=x_T).x, expected, rtol=0, atol=tolerance)


def test_the_learned_variance_and_the_condition_pass():
    x0, raw, conditions = normal(4, 3), normal(4, 3, seed=1), []

    def network(x, c_noise, cond):
        conditions.append(cond)
        return torch.cat([3 * x0, raw], dim=1).to(x.dtype)

    model = Clipped(ss.ScoreModel(network, ss.VP(), "data", learned_variance=True))
    views = model.given(f64(1.0, 2.0, 3.0, 4.0)).predict(normal(4, 3), f64(0.5))
    close(views.variance, (raw + 1) / 2)
    close(views.denoised, (3 * x0).clamp(-1, 1))
    assert conditions[0].tolist() == [1.0, 2.0, 3.0, 4.0]
    PredictorCorrector(Ancestral("learned"), steps=3)(model, shape=(4, 3), seeds=range(4))


def test_it_is_a_module_around_a_module():
    plain = ss.ScoreModel(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), ss.VP())
    with pytest.raises(ValueError, match="active dropout"):
        ss.log_prob(plain, normal(2, 3))
    model = Clipped(plain).eval()
    assert not plain.training
    assert model.sde is plain.sde
    assert set(model.state_dict()) == {f"model.{name}" for name in plain.state_dict()}
    assert str(Clipped(plain, low=-2.0)).endswith(", low=-2.0)")
    assert str(DynamicThresholding(plain, low=0.0)).endswith(", low=0.0)")


def test_gradients_pass_where_nothing_is_clipped():
    x = f64(0.3, 5.0).reshape(2, 1).requires_grad_()
    model = Clipped(ss.ScoreModel(lambda x, label, cond: x, ss.VE(), "data"))
    (slope,) = torch.autograd.grad(model.denoise(x, 0.5).sum(), x)
    close(slope, f64(1.0, 0.0).reshape(2, 1))


# Likelihoods


class Renamed(ModelWrapper):
    """A model of another class around a model, which does not define its density."""


LIKELIHOODS = {
    "log_prob": lambda model, x: ss.log_prob(model, x),
    "sample_with_log_prob": lambda model, x: ss.sample_with_log_prob(model, shape=x.shape),
    "encode": lambda model, x: ss.encode(model, x),
    "decode": lambda model, x: ss.decode(model, x),
    "round_trip": lambda model, x: ss.round_trip(model, x),
    "bits_per_dim": lambda model, x: ss.bits_per_dim(model, x.round(), ss.data.Levels(256)),
}


@pytest.mark.parametrize("call", LIKELIHOODS.values(), ids=LIKELIHOODS)
@EACH
def test_likelihoods_need_the_inner_model(call, make):
    x, plain = normal(2, 3), oracle((3,)).score_model(ss.VP())
    for model in (make(plain), make(make(plain)), ModelWrapper(make(plain)), Renamed(make(plain))):
        with pytest.raises(ValueError, match=r"its \.model"):
            call(model, x)
    assert make(plain).model is plain


@EACH
def test_an_evidence_bound_holds_for_any_denoiser(make):
    """Data in the range are nearer to a clipped prediction, so every image has fewer bits."""
    transform, images = ss.data.Levels(256), torch.randint(0, 256, (6, 1, 2, 2), generator=seeded())
    plain = predicting(torch.full((6, 1, 2, 2), 1.5), ss.DDPM())
    bits = [ss.bounds.discrete(model, images, transform, draws=6).per_image for model in (plain, make(plain))]
    assert (bits[1] < bits[0]).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: Clipped(m, 1.0, 1.0), ValueError, "low < high; got low=1.0, high=1.0"),
        (lambda m: Clipped(m, high=float("inf")), ValueError, "must be a finite number; got"),
        (lambda m: Clipped(m, low=float("nan")), ValueError, "must be a finite number; got"),
        (lambda m: DynamicThresholding(m, 0.0), ValueError, r"quantile must be in \(0, 1\]; got 0.0"),
        (lambda m: DynamicThresholding(m, 99.5), ValueError, "got 99.5"),
        (lambda m: Clipped(nn.Identity()), TypeError, "Identity has no 'sde'"),
        (lambda m: Thresholded(m).denoise(normal(1, 3), 0.5), NotImplementedError, "must define threshold"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(oracle((3,)).score_model(ss.VP()))
