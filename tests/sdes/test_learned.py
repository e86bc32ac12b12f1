"""The learned path: its network against its formula, monotone and invertible always, and what its gradients are."""

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

PARAMETERS = ("ends", "shape")


def deviated(ends, shape, **arguments):
    """A path with these deviations."""
    sde = ss.LearnedVP(units=shape.shape[1], **arguments).double()
    with torch.no_grad():
        sde.ends.copy_(ends)
        sde.shape.copy_(shape)
    return sde


def by_hand(sde, t, gamma_min, gamma_max):
    """gamma(t) by the formula of 2107.00630, appendix H, unit by unit."""

    def softplus(x):
        return math.log1p(math.exp(x))

    def inverse(y):
        return math.log(math.expm1(y))

    units = sde.shape.shape[1]
    ends, (a, b, c) = sde.ends.tolist(), sde.shape.tolist()
    low, high = -softplus(inverse(-gamma_min) + ends[0]), softplus(inverse(gamma_max) + ends[1])

    def network(u):
        total = u
        for k in range(units):
            weight, steepness = softplus(inverse(1 / units) + a[k]), softplus(inverse(units / 2) + b[k])
            total += weight / (1 + math.exp(-steepness * (u - (k + 0.5) / units - c[k])))
        return total

    u = (t - sde.t_min) / (sde.t_max - sde.t_min)
    return low + (high - low) * (network(u) - network(0.0)) / (network(1.0) - network(0.0))


@pytest.mark.parametrize(("units", "t_min", "t_max"), [(1, 0.0, 1.0), (5, 0.0, 1.0), (16, 0.3, 2.5)])
def test_gamma_is_the_monotone_network_of_its_formula(units, t_min, t_max):
    sde = deviated(f64(0.7, -0.4), 1.5 * normal(3, units), gamma_min=-6.0, gamma_max=4.0, t_min=t_min, t_max=t_max)
    t = torch.linspace(t_min, t_max, 13, dtype=torch.float64)
    expected = torch.tensor([by_hand(sde, float(each), -6.0, 4.0) for each in t], dtype=torch.float64)
    close(-sde.log_snr(t).detach(), expected, rtol=1e-12, atol=1e-12)
    close(sde.alpha(t).detach() ** 2, torch.sigmoid(-expected), rtol=1e-11)
    close(sde.sigma(t).detach() ** 2, torch.sigmoid(expected), rtol=1e-11)


def test_a_new_path_has_the_ends_given_and_is_nearly_linear():
    sde = ss.LearnedVP(gamma_min=-13.3, gamma_max=5.0)
    ends = f64(0.0, 1.0)
    close(sde.log_snr(ends).detach(), f64(13.3, -5.0), rtol=1e-14)
    close(sde.gammas().detach(), f64(-13.3, 5.0), rtol=1e-14)
    t = times(sde)
    close(sde.log_snr(t).detach(), 13.3 - 18.3 * t, atol=0.6)
    assert sde.prior_std == 1.0
    assert "gamma_min=-13.3, gamma_max=5, units=64" in repr(sde)


# --- monotone, and its inverse


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.floats(0, 12), st.floats(-15, 15), st.floats(-15, 15), st.integers(0, 10**6))
def test_gamma_rises_whatever_the_parameters(units, spread, low, high, seed):
    sde = deviated(f64(low, high), spread * normal(3, units, seed=seed)).requires_grad_(False)
    t = times(sde, n=201)
    gamma = -sde.log_snr(t)
    start, end = sde.gammas().tolist()
    assert start < 0 < end
    assert bool((gamma.diff() > 0).all())
    assert bool((sde.schedule(t)[1] < 0).all())
    assert bool((sde.diffusion(t) > 0).all())
    close(sde.log_snr(f64(0.0, 1.0)), -sde.gammas(), rtol=0)
    found = sde.time(-gamma)
    rounding = 1e-14 * (1 + gamma.abs() + end - start) / -sde.schedule(found)[1] + 1e-15
    assert bool(((found - t).abs() <= rounding).all())


@pytest.mark.parametrize("steepness", [60.0, 200.0, 400.0])
def test_the_inverse_of_a_path_with_a_sharp_bend(steepness):
    """Newton's method alone would leave the range from the flat parts, or crawl down the foot of the bend."""
    sde = deviated(f64(0.0, 0.0), torch.tensor([[8.0], [steepness], [0.2]]))
    log_snr = torch.linspace(13.0, -9.9, 301, dtype=torch.float64)
    close(sde.log_snr(sde.time(log_snr)).detach(), log_snr, rtol=0, atol=1e-10)


def in_fifty_digits(sde, t):
    """phi and phi' at times in [0, 1], by their formulas."""
    units = list(zip(*((Decimal(value) for value in part.tolist()) for part in sde._units()), strict=True))

    def sigmoid(x):
        return 1 / (1 + (-x).exp())

    def height(u):
        return u + sum(a * sigmoid(b * (u - c)) for a, b, c in units)

    def slope(u):
        return 1 + sum(a * b * sigmoid(b * (u - c)) * sigmoid(b * (c - u)) for a, b, c in units)

    with localcontext(prec=50):
        start, end = height(Decimal(0)), height(Decimal(1))
        found = [((height(u) - start) / (end - start), slope(u) / (end - start)) for u in map(Decimal, t.tolist())]
    return torch.tensor([[float(value) for value in pair] for pair in found], dtype=torch.float64).unbind(1)


@pytest.mark.parametrize("centre", [-3.0, -0.9, -0.4, 0.2, 0.9, 1.3])
@pytest.mark.parametrize("weight", [0.0, 1e4])
def test_the_shape_is_rounded_and_no_more(weight, centre):
    """Far from the range sigmoids are 1, or 1 but for rounding: their differences would lose four digits and more."""
    sde = deviated(f64(0.0, 0.0), torch.tensor([[weight] * 2, [50.0] * 2, [centre, centre - 0.6]]))
    t = times(sde)
    for value, expected in zip(sde.requires_grad_(False).fraction(t), in_fifty_digits(sde, t), strict=True):
        close(value, expected, rtol=5e-14)  # of exponents up to 200


def test_the_inverse_has_no_gradient():
    sde = ss.LearnedVP()
    assert not sde.time(sde.log_snr(f64(0.2, 0.5))).requires_grad


# --- gradients


@pytest.mark.parametrize("name", ["alpha", "sigma", "log_snr", "alpha_dot", "sigma_dot", "drift", "diffusion"])
def test_functions_are_twice_differentiable_in_the_parameters_and_in_time(name):
    sde = deviated(f64(0.3, -0.2), normal(3, 4))

    def function(ends, shape, t):
        return torch.func.functional_call(_Function(sde, name), {"sde.ends": ends, "sde.shape": shape}, (t,))

    inputs = (sde.ends, sde.shape, f64(0.1, 0.4, 0.95).requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-4)


class _Function(torch.nn.Module):
    def __init__(self, sde, name):
        super().__init__()
        self.sde, self.name = sde, name

    def forward(self, t):
        return getattr(self.sde, self.name)(t)


def test_ends_that_do_not_learn():
    sde = ss.LearnedVP(learn_ends=False)
    sde.log_snr(f64(0.3)).backward()
    assert [p.requires_grad for p in (sde.ends, sde.shape)] == [False, True]
    assert float(sde.shape.grad.abs().max()) > 0


WEIGHED = ["alpha", "sigma", "log_snr", "alpha_dot", "sigma_dot", "drift", "diffusion", "size"]


@pytest.mark.parametrize("name", [*WEIGHED, "all"])
def test_a_scaled_gradient_weighs_what_goes_to_the_shape_and_leaves_the_ends(name):
    """Each time by its own factor, which is asked for on the way back, when the block may be over; values stay."""
    sde, t, factors = deviated(f64(0.1, 0.2), normal(3, 6)), f64(0.2, 0.9, 0.5), []
    names, weights = WEIGHED if name == "all" else [name], normal(3)

    def objective(scale=1.0):
        return (scale * weights * torch.stack([getattr(sde, name)(t).square() for name in names]).sum(dim=0)).sum()

    def gradients(value):
        return torch.autograd.grad(value, (sde.ends, sde.shape))

    with sde.scaled_gradient(t, lambda: factors[0]):
        inside = objective()
    close(inside, objective(), rtol=0)
    factors.append(f64(2.0, -3.0, 0.5))
    ends, shape = gradients(inside)
    plain, weighed = gradients(objective()), gradients(objective(factors[0]))
    if float(plain[0].abs().max()) > 0:  # (VP has a size of 1)
        close(ends, plain[0], rtol=1e-12)
        assert float((plain[0] - weighed[0]).abs().max()) > 1e-3 * float(plain[0].abs().max())
    close(shape, weighed[1], rtol=1e-10, atol=1e-12)


def test_a_scaled_gradient_is_of_its_times_and_is_over_with_its_block():
    """Also when the block fails, and one within another; other times have their plain gradient."""
    sde, t = deviated(f64(0.1, 0.2), normal(3, 6)), f64(0.2, 0.9, 0.5)
    none, others = torch.zeros(3, dtype=torch.float64), (f64(0.3, 0.4, 0.6), f64(0.2, 0.9), f64(0.2))

    def gradient(t=t):
        return torch.autograd.grad(sde.log_snr(t).square().sum(), sde.shape, retain_graph=True)[0]

    before, of_others = gradient(), [gradient(other) for other in others]
    with sde.scaled_gradient(t, lambda: none):
        assert float(gradient().abs().max()) == 0
        assert float(gradient(t.clone()).abs().max()) == 0
        for other, expected in zip(others, of_others, strict=True):
            close(sde.log_snr(other), -torch.lerp(*sde.gammas(), sde.fraction(other)[0]))
            close(gradient(other), expected, rtol=0)
        with sde.scaled_gradient(others[0], lambda: 2 * torch.ones(3, dtype=torch.float64)):
            close(gradient(others[0]), 2 * of_others[0])
            close(gradient(), before, rtol=0)
        assert float(gradient().abs().max()) == 0
        close(gradient(others[0]), of_others[0], rtol=0)
    close(gradient(), before, rtol=0)
    with pytest.raises(RuntimeError, match="in the block"), sde.scaled_gradient(t, lambda: none):
        raise RuntimeError("in the block")
    close(gradient(), before, rtol=0)


def test_within_a_scaled_gradient_the_shape_is_evaluated_once():
    sde, t = learned(), f64(0.2, 0.9, 0.5)
    with sde.scaled_gradient(t, lambda: t):
        first, again = sde.fraction(t), sde.fraction(t.clone())
        assert all(one is other for one, other in zip(first, again, strict=True))
    close(first, sde.fraction(t), rtol=0)


def test_a_scaled_gradient_says_nothing_about_paths_and_times_without_gradient():
    def never():
        raise AssertionError("asked for a factor")

    t = f64(0.1, 0.2).requires_grad_()
    for sde in (ss.VP(), ss.Tabulated(f64(8.0, 0.0, -8.0))):
        expected = torch.autograd.grad(sde.alpha(t).sum(), t)[0]
        with sde.scaled_gradient(t, never):
            close(torch.autograd.grad(sde.alpha(t).sum(), t)[0], expected, rtol=0)
    frozen, ends = learned(), ss.LearnedVP()
    ends.shape.requires_grad_(False)
    t = t.detach()
    with frozen.scaled_gradient(t, never), ends.scaled_gradient(t, never):
        assert not frozen.diffusion(t).requires_grad
        ends.diffusion(t).sum().backward()
    assert float(ends.ends.grad.abs().min()) > 0


# --- where and in what the parameters are


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_a_cast_leaves_the_path_as_it_is(cast):
    sde, t = learned(), times(ss.LearnedVP())
    moved = getattr(copy.deepcopy(sde), cast)()
    close(moved.log_snr(t), sde.log_snr(t), rtol=0)
    assert {p.dtype for p in moved.parameters()} == {torch.float64 if cast == "double" else torch.float32}


def test_a_cast_of_the_model_casts_its_network_alone():
    model = ss.ScoreModel(ss.networks.MLP(2, 8), learned(), "v").to(torch.bfloat16)
    assert {p.dtype for p in model.network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.sde.parameters()} == {torch.float32}
    assert model.noise(normal(3, 2).float(), 0.4).dtype == torch.float32


def test_a_state_dict_is_the_path():
    sde, other = learned(seed=1), ss.LearnedVP()
    assert sorted(sde.state_dict()) == sorted(PARAMETERS)
    other.load_state_dict(sde.state_dict())
    close(other.log_snr(times(sde)).detach(), sde.log_snr(times(sde)), rtol=0)


def test_a_path_made_without_storage_gets_its_state_later():
    with torch.device("meta"):
        model = ss.ScoreModel(ss.networks.MLP(2, 8), ss.LearnedVP(), "v")
    assert model.sde.shape.is_meta
    assert "units" not in repr(model.sde)
    sde = model.sde.to_empty(device="cpu")
    sde.load_state_dict(learned().state_dict())
    close(sde.log_snr(f64(0.3)).detach(), learned().log_snr(f64(0.3)), rtol=0)


def test_float32_times_are_float64_inside():
    sde, t = learned(), torch.linspace(0, 1, 7)
    assert torch.equal(sde.sigma(t), sde.sigma(float64(t)).float())


# --- models and samplers on a path that learns


@pytest.fixture
def every_warning(recwarn):
    """PyTorch says some things once in a process."""
    torch.set_warn_always(True)
    yield recwarn
    torch.set_warn_always(False)


def test_parameters_with_gradients_change_neither_samples_nor_likelihoods(every_warning):
    sampler = ss.samplers.PredictorCorrector(ss.samplers.DPMSolverPP(2), steps=8)
    mixture = ss.GaussianMixture(normal(2, 3), f64(0.4, 0.7))
    still = learned()
    moving = copy.deepcopy(still).requires_grad_(True)
    found = []
    for sde in (still, moving):
        model = mixture.score_model(sde)
        x = sampler(model, shape=(4, 3), seeds=range(4), dtype=torch.float64).x
        nats = ss.log_prob(model, x, trace=ss.ExactTrace()).value
        bound = ss.bounds.continuous_nats(model, x, draws=4, seeds=range(4)).value
        found.append((x, nats, bound.detach()))
        assert not x.requires_grad
    close(found[0], found[1], rtol=1e-12)
    assert not [warning for warning in every_warning if "requires_grad" in str(warning.message)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma_min": 1.0}, "gamma_min < 0 < gamma_max.*got 1.0, 10.0"),
        ({"gamma_max": -1.0}, r"got -13\.3, -1\.0"),
        ({"gamma_max": math.inf}, "finite"),
        ({"units": 0}, "units >= 1 expected, an integer; got 0"),
        ({"units": 2.5}, "an integer; got 2.5"),
        ({"t_min": 1.0}, "t_min=1.0"),
    ],
)
def test_impossible_paths_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ss.LearnedVP(**arguments)
