"""Views follow from `combine`: every view, blends, shifts and errors."""

import pytest
import torch

import scoresde as ss
from scoresde.views import Pair, Views
from tests.conftest import FINITE, close, exact_model, f64, normal, oracle, times

SHAPES = [(3,), (2, 2), (1, 2, 2)]


def column(values, x):
    return values.reshape(-1, *[1] * (x.ndim - 1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sde", FINITE)
def test_every_view_follows_from_combine(sde, shape):
    t = times(sde, 2, 0.1)
    x0, eps = normal(2, *shape), normal(2, *shape, seed=1)
    views = Pair(sde, t, x0, eps)
    alpha, sigma = column(sde.alpha(t), x0), column(sde.sigma(t), x0)
    size = (alpha.square() + sigma.square()).sqrt()
    close(views.denoised, x0)
    close(views.noise, eps)
    close(views.score, -eps / sigma)
    close(views.v, (alpha * eps - sigma * x0) / size)
    close(views.velocity, column(sde.alpha_dot(t), x0) * x0 + column(sde.sigma_dot(t), x0) * eps)


@pytest.mark.parametrize("shape", [(2, 1), (1, 3), (3,)])
def test_states_that_would_broadcast_are_refused(shape):
    x, other = normal(2, 3), normal(*shape)
    views, pair = exact_model(oracle((3,)), ss.VP(), "noise").predict(x, 0.5), Pair(ss.VP(), f64(0.5), x, x)
    calls = {
        "noise": [
            lambda: Pair(ss.VP(), f64(0.5), x, other),
            lambda: pair.error(x, other),
            lambda: views.error(x, other),
        ],
        "x0": [lambda: views.error(other, x)],
        "the shifted mean": [lambda: ss.ShiftedViews(pair, x, other)],
    }
    for name, group in calls.items():
        for call in group:
            with pytest.raises(ValueError, match=rf"{name} must have the shape of the states, \(2, 3\); got \("):
                call()


def test_a_class_without_combine_is_refused():
    with pytest.raises(TypeError, match="combine"):
        Views(ss.VP(), f64(0.5))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prediction", ["noise", "data", "v", "velocity", "score", "karras"])
def test_the_error_of_a_network_is_that_of_its_views(prediction, shape):
    sde, t, x0, eps = ss.VP(), f64(0.2, 0.8), normal(2, *shape), normal(2, *shape, seed=1)
    views = exact_model(oracle(shape), sde, prediction).predict(sde.perturb(x0, t, eps), t)
    error = views.error(x0, eps)
    close(error.noise, views.noise - eps, rtol=1e-9, atol=1e-11)
    close(error.denoised, views.denoised - x0, rtol=1e-9, atol=1e-11)
    d, n = f64(0.3, -2.0), f64(1.5, 0.2)
    expected = views.combine(d, n) - column(d, x0) * x0 - column(n, x0) * eps
    close(error.combine(d, n), expected, rtol=1e-9, atol=1e-11)
    close(error.error(torch.zeros_like(x0), torch.zeros_like(eps)).noise, error.noise)


def test_the_error_loses_no_digits_at_small_times():
    """In float32 at sigma = 1e-4, for a network that predicts the data to 1e-3, so that eps_hat - eps is about 10.

    The noise of the views is a difference of two states of size 1 over sigma, with an absolute error of about
    2^-24/sigma = 6e-4; the error view has a relative error of a few 2^-24.
    """
    sde, t = ss.Rectified(t_min=1e-4), f64(1e-4)
    x0, eps = normal(500, 8).float(), normal(500, 8, seed=1).float()
    wrong = 1e-3 * normal(500, 8, seed=2).float()
    model = ss.ScoreModel(lambda x, label, cond: x0 + wrong, sde, "data")
    views = model.predict(sde.perturb(x0, t, eps), t)
    output = (x0 + wrong).double() - x0.double()
    expected = -(sde.alpha(t) / sde.sigma(t)) * output
    exact, lossy = views.error(x0, eps).noise.double() - expected, (views.noise - eps).double() - expected
    assert exact.abs().max() < 1e-5
    assert lossy.abs().max() > 30 * exact.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [(1.0,), (2.5, -1.5), (0.3, 0.3, 0.3)])
def test_a_blend_is_the_weighted_sum_of_its_views_and_so_is_its_error(shape, weights):
    sde, t, x0, eps = ss.VE(), f64(0.3, 0.7), normal(2, *shape, seed=1), normal(2, *shape, seed=2)
    x = sde.perturb(x0, t, eps)
    views = [oracle(shape, seed).score_model(sde).predict(x, t) for seed in range(len(weights))]
    blend = ss.BlendedViews(views, [f64(weight).expand(2) for weight in weights])
    for name in ("denoised", "noise", "score", "velocity", "v"):
        close(getattr(blend, name), sum(w * getattr(v, name) for w, v in zip(weights, views, strict=True)), rtol=1e-9)
    error = blend.error(x0, eps)
    close(error.noise, blend.noise - eps, rtol=1e-9, atol=1e-10)
    close(error.denoised, blend.denoised - x0, rtol=1e-8, atol=1e-8)


def test_weights_are_numbers_or_tensors_for_all_samples_or_each():
    sde, x0, eps = ss.VP(), normal(2, 3), normal(2, 3, seed=1)
    x, t = sde.perturb(x0, f64(0.4), eps), f64(0.4)
    first, second = (oracle((3,), seed).score_model(sde).predict(x, t) for seed in (0, 1))
    for weights in ([1.25, -0.5], [torch.tensor([1.25, 3.0]), torch.tensor(-0.5)]):
        blend, (v, w) = ss.BlendedViews([first, second], weights), (torch.as_tensor(each).double() for each in weights)
        close(blend.noise, column(v.expand(2), x) * first.noise + column(w.expand(2), x) * second.noise, rtol=1e-9)
        close(blend.error(x0, eps).noise, blend.noise - eps, rtol=1e-9, atol=1e-11)


def test_a_blend_needs_as_many_weights_as_views():
    views = Pair(ss.VP(), f64(0.5), normal(2, 3), normal(2, 3))
    for parts in (([], []), ([views], [f64(1.0), f64(2.0)])):
        with pytest.raises(ValueError, match="one weight per view"):
            ss.BlendedViews(*parts)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sde", FINITE)
def test_a_shift_moves_the_mean_and_keeps_the_state(sde, shape):
    """alpha E[x_0 | x] + sigma E[eps | x] = x before and after."""
    t, delta = times(sde, 2, 0.1), normal(2, *shape, seed=3)
    x0, eps = normal(2, *shape, seed=1), normal(2, *shape, seed=2)
    x = sde.perturb(x0, t, eps)
    views = oracle(shape).score_model(sde).predict(x, t)
    shifted = ss.ShiftedViews(views, views.denoised, views.denoised + delta)
    alpha, sigma = column(sde.alpha(t), x), column(sde.sigma(t), x)
    close(shifted.denoised, views.denoised + delta)
    close(shifted.noise, (x - alpha * shifted.denoised) / sigma, rtol=1e-6, atol=1e-8)
    expected = column(sde.alpha_dot(t), x) * shifted.denoised + column(sde.sigma_dot(t), x) * shifted.noise
    close(shifted.velocity, expected, rtol=1e-7, atol=1e-8)
    close(shifted.error(x0, eps).noise, shifted.noise - eps, rtol=1e-9, atol=1e-9)
    close(shifted.error(x0, eps).denoised, shifted.denoised - x0, rtol=1e-9, atol=1e-9)


def test_a_shift_of_zero_changes_no_digit():
    t, x = f64(0.3, 0.7), normal(2, 3).float()
    views = oracle((3,)).score_model(ss.VP()).predict(x, t)
    shifted = ss.ShiftedViews(views, views.denoised, views.denoised)
    for name in ("denoised", "noise", "score", "velocity", "v"):
        assert torch.equal(getattr(shifted, name), getattr(views, name))
