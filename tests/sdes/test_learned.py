"""The learned path: its network against its formula, always monotone and invertible, and its gradients."""

import copy
import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import scoresde as ss
from scoresde.tensors import float64
from tests.conftest import close, f64, learned, normal, times


def deviated(ends, shape, **arguments):
    """A path with these deviations."""
    sde = ss.LearnedVP(units=shape.shape[1], **arguments).double()
    with torch.no_grad():
        sde.ends.copy_(ends)
        sde.shape.copy_(shape)
    return sde


def in_fifty_digits(units, times):
    """phi and phi' at times in [0, 1], by their formulas, for units (a, b, c)."""
    units = list(zip(*((Decimal(float(value)) for value in part) for part in units), strict=True))

    def sigmoid(x):
        return 1 / (1 + (-x).exp())

    def height(u):
        return u + sum(a * sigmoid(b * (u - c)) for a, b, c in units)

    def slope(u):
        return 1 + sum(a * b * sigmoid(b * (u - c)) * sigmoid(b * (c - u)) for a, b, c in units)

    with localcontext(prec=50):
        start, end = height(Decimal(0)), height(Decimal(1))
        pairs = [((height(u) - start) / (end - start), slope(u) / (end - start)) for u in map(Decimal, times.tolist())]
    return f64(*([float(value) for value in pair] for pair in pairs)).unbind(1)


@pytest.mark.parametrize(("units", "t_min", "t_max"), [(1, 0.0, 1.0), (16, 0.3, 2.5)])
def test_gamma_is_the_monotone_network_of_its_formula(units, t_min, t_max):
    """2107.00630, appendix H: every positive number is the softplus of its initial value plus a deviation."""

    def softplus(initial, deviation):
        return [math.log1p(math.exp(math.log(math.expm1(initial)) + d)) for d in deviation.tolist()]

    sde = deviated(f64(0.7, -0.4), 1.5 * normal(3, units), gamma_min=-6.0, gamma_max=4.0, t_min=t_min, t_max=t_max)
    (low,), (high,) = softplus(6.0, sde.ends[:1]), softplus(4.0, sde.ends[1:])
    a, b, c = softplus(1 / units, sde.shape[0]), softplus(units / 2, sde.shape[1]), sde.shape[2].tolist()
    c = [(k + 0.5) / units + deviation for k, deviation in enumerate(c)]
    u = torch.linspace(0, 1, 13, dtype=torch.float64)
    phi, slope = in_fifty_digits((a, b, c), u)
    value, derivative = sde.requires_grad_(False).schedule(t_min + (t_max - t_min) * u)
    close(value, low - (low + high) * phi, rtol=1e-11, atol=1e-11)
    close(derivative, -(low + high) * slope / (t_max - t_min), rtol=1e-11)


def test_a_new_path_has_the_given_ends_and_is_nearly_linear():
    sde = ss.LearnedVP(gamma_min=-13.3, gamma_max=5.0)
    close(sde.log_snr(f64(0.0, 1.0)).detach(), f64(13.3, -5.0), rtol=1e-14)
    close(sde.gammas().detach(), f64(-13.3, 5.0), rtol=1e-14)
    t = times(sde)
    close(sde.log_snr(t).detach(), 13.3 - 18.3 * t, atol=0.6)
    assert sde.prior_std == 1.0
    assert "gamma_min=-13.3, gamma_max=5, units=64" in repr(sde)


# Monotone, and its inverse


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.floats(0, 12), st.floats(-15, 15), st.floats(-15, 15), st.integers(0, 10**6))
def test_gamma_rises_for_all_parameters(units, spread, low, high, seed):
    sde = deviated(f64(low, high), spread * normal(3, units, seed=seed)).requires_grad_(False)
    t = times(sde, n=201)
    gamma = -sde.log_snr(t)
    start, end = sde.gammas().tolist()
    assert start < 0 < end
    assert bool((gamma.diff() > 0).all())
    assert bool((sde.schedule(t)[1] < 0).all())
    assert bool((sde.diffusion(t) > 0).all())
    close(sde.log_snr(f64(0.0, 1.0)), -sde.gammas(), rtol=0)
    inverse = sde.time(-gamma)
    rounding = 1e-14 * (1 + gamma.abs() + end - start) / -sde.schedule(inverse)[1] + 1e-15
    assert bool(((inverse - t).abs() <= rounding).all())


@pytest.mark.parametrize("steepness", [60.0, 400.0])
def test_the_inverse_of_a_path_with_a_sharp_bend(steepness):
    """Newton's method alone would leave the range from the flat parts, or converge slowly at the foot of the bend."""
    sde = deviated(f64(0.0, 0.0), torch.tensor([[8.0], [steepness], [0.2]]))
    log_snr = torch.linspace(13.0, -9.9, 301, dtype=torch.float64)
    close(sde.log_snr(sde.time(log_snr)).detach(), log_snr, rtol=0, atol=1e-10)
    assert not sde.time(sde.log_snr(f64(0.2, 0.5))).requires_grad


@pytest.mark.parametrize("centre", [-3.0, -0.4, 0.2, 1.3])
@pytest.mark.parametrize("weight", [0.0, 1e4])
def test_the_shape_has_full_precision(weight, centre):
    """Far from the range sigmoids are 1 up to rounding: their differences would lose four digits and more."""
    sde = deviated(f64(0.0, 0.0), torch.tensor([[weight] * 2, [50.0] * 2, [centre, centre - 0.6]]))
    t = times(sde)
    for value, expected in zip(sde.requires_grad_(False).fraction(t), in_fifty_digits(sde._units(), t), strict=True):
        close(value, expected, rtol=5e-14)  # of exponents up to 200


# Gradients


class Function(torch.nn.Module):
    def __init__(self, sde, name):
        super().__init__()
        self.sde, self.name = sde, name

    def forward(self, t):
        return getattr(self.sde, self.name)(t)


@pytest.mark.parametrize("name", ["log_snr", "alpha_dot", "sigma_dot"])
def test_functions_are_twice_differentiable_in_the_parameters_and_in_time(name):
    sde = deviated(f64(0.3, -0.2), normal(3, 3))

    def function(ends, shape, t):
        return torch.func.functional_call(Function(sde, name), {"sde.ends": ends, "sde.shape": shape}, (t,))

    inputs = (sde.ends, sde.shape, f64(0.1, 0.95).requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-4)


def test_ends_that_are_not_trained():
    sde = ss.LearnedVP(learn_ends=False)
    sde.log_snr(f64(0.3)).backward()
    assert [p.requires_grad for p in (sde.ends, sde.shape)] == [False, True]
    assert float(sde.shape.grad.abs().max()) > 0


T, NAMES = f64(0.2, 0.9, 0.5), ("alpha", "sigma", "log_snr", "alpha_dot", "sigma_dot", "drift", "diffusion", "size")


def test_a_scaled_gradient_weighs_the_gradient_of_the_shape_and_not_of_the_ends():
    """Each time has its own factor, which is called in the backward pass, after the block; values do not change."""
    sde, factors, weights = deviated(f64(0.1, 0.2), normal(3, 6)), [], normal(len(NAMES), 3)

    def objective(scale=1.0):
        return (scale * weights * torch.stack([getattr(sde, name)(T).square() for name in NAMES])).sum()

    def gradients(value):
        return torch.autograd.grad(value, (sde.ends, sde.shape))

    with sde.scaled_gradient(T, lambda: factors[0]):
        first, again = sde.fraction(T), sde.fraction(T.clone())
        assert all(one is other for one, other in zip(first, again, strict=True))  # evaluated once
        inside = objective()
    close(inside, objective(), rtol=0)
    factors.append(f64(2.0, -3.0, 0.5))
    (ends, shape), (plain, _), (weighed, expected) = map(gradients, (inside, objective(), objective(factors[0])))
    close(ends, plain, rtol=1e-12)
    assert float((plain - weighed).abs().max()) > 1e-3 * float(plain.abs().max())
    close(shape, expected, rtol=1e-10, atol=1e-12)


def test_a_scaled_gradient_holds_for_its_times_and_within_its_block():
    """Also when the block fails, and for nested blocks; other times keep their plain gradient."""
    sde = deviated(f64(0.1, 0.2), normal(3, 6))
    none, others = torch.zeros(3, dtype=torch.float64), (f64(0.3, 0.4, 0.6), f64(0.2, 0.9), f64(0.2))

    def gradient(t=T):
        return torch.autograd.grad(sde.log_snr(t).square().sum(), sde.shape, retain_graph=True)[0]

    before, of_others = gradient(), [gradient(other) for other in others]
    with sde.scaled_gradient(T, lambda: none):
        assert float(gradient().abs().max()) == 0
        for other, expected in zip(others, of_others, strict=True):
            close(gradient(other), expected, rtol=0)
        with sde.scaled_gradient(others[0], lambda: 2 + none):
            close(gradient(others[0]), 2 * of_others[0])
            close(gradient(), before, rtol=0)
        assert float(gradient().abs().max()) == 0
        close(gradient(others[0]), of_others[0], rtol=0)
    close(gradient(), before, rtol=0)
    with pytest.raises(RuntimeError, match="in the block"), sde.scaled_gradient(T, lambda: none):
        raise RuntimeError("in the block")
    close(gradient(), before, rtol=0)


def test_a_scaled_gradient_has_no_effect_without_a_trained_shape():
    def never():
        raise AssertionError("the factor was called")

    frozen, ends = learned(), ss.LearnedVP()
    ends.shape.requires_grad_(False)
    for sde in (ss.VP(), ss.Tabulated(f64(8.0, 0.0, -8.0)), frozen, ends):
        t = T.clone().requires_grad_()
        with sde.scaled_gradient(t, never):
            (gradient,) = torch.autograd.grad(sde.alpha(t).sum(), t, allow_unused=True)
        if sde not in (frozen, ends):
            close(gradient, torch.autograd.grad(sde.alpha(t).sum(), t)[0], rtol=0)


# Device and dtype of the parameters


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_a_cast_does_not_change_the_path(cast):
    sde, t = learned(), times(ss.LearnedVP())
    moved = getattr(copy.deepcopy(sde), cast)()
    close(moved.log_snr(t), sde.log_snr(t), rtol=0)
    assert {p.dtype for p in moved.parameters()} == {torch.float64 if cast == "double" else torch.float32}
    assert torch.equal(sde.sigma(t.float()), sde.sigma(float64(t.float())).float())  # computed in float64


def test_a_cast_of_the_model_casts_its_network_alone():
    model = ss.ScoreModel(ss.networks.MLP(2, 8), learned(), "v").to(torch.bfloat16)
    assert {p.dtype for p in model.network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.sde.parameters()} == {torch.float32}
    assert model.noise(normal(3, 2).float(), 0.4).dtype == torch.float32


def test_a_state_dict_is_the_path_also_for_one_made_without_storage():
    with torch.device("meta"):
        model = ss.ScoreModel(ss.networks.MLP(2, 8), ss.LearnedVP(), "v")
    assert model.sde.shape.is_meta
    assert "units" not in repr(model.sde)
    sde, state = model.sde.to_empty(device="cpu"), learned(seed=1).state_dict()
    assert sorted(state) == ["ends", "shape"]
    sde.load_state_dict(state)
    close(sde.log_snr(times(sde)).detach(), learned(seed=1).log_snr(times(sde)), rtol=0)


# Models and samplers on a trained path


@pytest.fixture
def every_warning(recwarn):
    """PyTorch gives some warnings once in a process."""
    torch.set_warn_always(True)
    yield recwarn
    torch.set_warn_always(False)


def test_parameters_with_gradients_change_neither_samples_nor_likelihoods(every_warning):
    sampler = ss.samplers.PredictorCorrector(ss.samplers.DPMSolverPP(2), steps=4)
    mixture, results = ss.GaussianMixture(normal(2, 3), f64(0.4, 0.7)), []
    for trains in (False, True):
        model = mixture.score_model(learned().requires_grad_(trains))
        x = sampler(model, shape=(4, 3), seeds=range(4), dtype=torch.float64).x
        nats = ss.log_prob(model, x, trace=ss.ExactTrace(), solver=ss.solvers.Adams(8)).value
        bound = ss.bounds.continuous_nats(model, x, draws=4, seeds=range(4)).value
        results.append((x, nats, bound.detach()))
        assert not x.requires_grad
    close(results[0], results[1], rtol=1e-12)
    assert not [warning for warning in every_warning if "requires_grad" in str(warning.message)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma_min": 1.0}, r"gamma_min < 0 < gamma_max.*got gamma_min=1\.0, gamma_max=10\.0"),
        ({"gamma_max": -1.0}, r"got gamma_min=-13\.3, gamma_max=-1\.0"),
        ({"gamma_max": math.inf}, "gamma_max must be a finite number; got inf"),
        ({"units": 0}, "units must be a positive integer; got 0"),
        ({"t_min": 1.0}, "t_min=1.0"),
    ],
)
def test_impossible_paths_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ss.LearnedVP(**arguments)
