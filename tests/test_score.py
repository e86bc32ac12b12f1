"""Every view of a score model recovers the truth from an exact network, of any parameterisation."""

import numpy as np
import pytest
import torch
from torch import nn

import scoresde as ss
from scoresde import predictions
from scoresde.counting import counting
from scoresde.wrappers import as_model
from tests.conftest import INSTANCES, PATHS, close, f64, gradient, normal, some, times

TYPES = ["noise", "data", "score", "velocity", "v", predictions.KarrasPreconditioning(0.7), predictions.Denoiser()]
SHAPES = [(4, 3), (2, 2), (2, 1, 4, 4)]  # (2, 2): a time of shape (B,) must not run along the other dimension
VIEWS = ("score", "noise", "denoised", "velocity")


def named(prediction):
    return prediction if isinstance(prediction, str) else type(prediction).__name__.lower()


def column(values, x):
    return values.reshape((-1,) + (1,) * (x.ndim - 1))


class Emits(nn.Module):
    """A network that emits a tensor, whatever it is given, in a dtype of its own; keeps what it was given."""

    def __init__(self, output, dtype=torch.float64):
        super().__init__()
        self.output = output
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, x, c_noise, cond=None):
        self.given = x, c_noise, cond
        return self.scale * self.output.to(x.dtype)


def emitting(sde, prediction, t, x0, eps, dtype=torch.float64):
    """A model whose network emits exactly F = p x0 + q eps."""
    p, q = predictions.resolve(prediction).target(sde, t)
    return ss.ScoreModel(Emits(column(p, x0) * x0 + column(q, x0) * eps, dtype), sde, prediction)


def truth(sde, t, x0, eps):
    alpha_dot, sigma_dot, sigma = gradient(sde.alpha, t), gradient(sde.sigma, t), sde.sigma(t)
    return {
        "score": -eps / column(sigma, x0),
        "noise": eps,
        "denoised": x0,
        "velocity": column(alpha_dot, x0) * x0 + column(sigma_dot, x0) * eps,
    }


def accepted(sde, prediction):
    """Noise and score networks cannot tell x_0 where alpha(t_max) = 0; EDM's label, and x/alpha, are infinite there."""
    return float(sde.alpha(f64(sde.t_max))) > 0 or named(prediction) in ("data", "velocity", "v")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prediction", TYPES, ids=named)
@pytest.mark.parametrize("sde", PATHS)
def test_every_view_recovers_the_truth(sde, prediction, shape):
    if not accepted(sde, prediction):
        with pytest.raises(ValueError, match="singular at t_max"):
            ss.ScoreModel(nn.Identity(), sde, prediction)
        return
    t = times(sde, n=shape[0], margin=0.02)
    x0, eps = normal(*shape), normal(*shape, seed=1)
    x = sde.perturb(x0, t, eps)
    model = emitting(sde, prediction, t, x0, eps)
    views = model.predict(x, t)
    methods = {"score": model.score, "noise": model.noise, "denoised": model.denoise, "velocity": model.velocity}
    for name, value in truth(sde, t, x0, eps).items():
        close(getattr(views, name), value, rtol=1e-8, atol=1e-8 * float(value.abs().max()))
        close(methods[name](x, t), getattr(views, name), rtol=0)
    phi = torch.atan2(sde.sigma(t), sde.alpha(t))
    close(views.v, column(phi.cos(), x0) * eps - column(phi.sin(), x0) * x0, rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize("second", TYPES, ids=named)
@pytest.mark.parametrize("first", TYPES, ids=named)
@pytest.mark.parametrize("sde", some("vp", "ve", "rectified"))
def test_a_view_as_the_output_of_another_type_is_the_same_model(sde, first, second):
    """Any type's output read from the views of another (`combine` with its target) gives the same views again."""
    t = times(sde, n=4, margin=0.02)
    x0, eps = normal(4, 3), normal(4, 3, seed=1)
    x = sde.perturb(x0, t, eps)
    with torch.no_grad():
        views = emitting(sde, first, t, x0, eps).predict(x, t)
        output = views.combine(*predictions.resolve(second).target(sde, t))
        again = ss.ScoreModel(Emits(output), sde, second).predict(x, t)
    for name in VIEWS:
        value = getattr(views, name)
        close(getattr(again, name), value, rtol=1e-8, atol=1e-8 * float(value.abs().max()))


# Errors at t = 1e-5 of VP, where sigma = 1e-3, in roundings of float32 (2^-24) relative to the largest value; measured
# within half of these bounds. Every view keeps all the digits of the network's output, and the denoised one gains
# three, the output entering it times sigma. The exception is inherent: a data network says little about the noise
# there, since eps = (x - alpha F) / sigma divides its rounding by sigma, whatever the arithmetic. One view computed
# through another in float32 would lose the same factor of a thousand everywhere.
@pytest.mark.parametrize(
    ("state", "digits", "denoised", "from_data"),
    [(torch.float64, 1.3, 0.01, 1000.0), (torch.float32, 3.2, 2.2, 4000.0)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("prediction", TYPES, ids=named)
def test_precision_of_a_float32_network_at_small_t(prediction, state, digits, denoised, from_data):
    sde, t = ss.VP(), torch.full((64,), 1e-5, dtype=torch.float64)
    x0, eps = normal(64, 3), normal(64, 3, seed=1)
    model = emitting(sde, prediction, t, x0, eps, dtype=torch.float32)
    with torch.no_grad():
        views = model.predict(sde.perturb(x0, t, eps).to(state), t)
    for name, value in truth(sde, t, x0, eps).items():
        if named(prediction) in ("data", "denoiser"):
            bound = digits if name == "denoised" else from_data
        else:
            bound = denoised if name == "denoised" else digits
        error = (getattr(views, name).double() - value).abs().max() / value.abs().max()
        assert float(error) < bound * 2**-24, name


# --- ends of the time range


@pytest.mark.parametrize("prediction", ["noise", "score", "karras", TYPES[-1]], ids=named)
@pytest.mark.parametrize("sde", [ss.ZeroTerminalSNR(ss.VP()), ss.Cosine(t_max=1.0), ss.Rectified(t_max=1.0)])
def test_types_that_divide_by_alpha_are_refused_where_it_ends_at_zero(sde, prediction):
    with pytest.raises(ValueError, match=r"singular at t_max=1 .*alpha=0 .*'v', 'velocity' or 'data'.* t_max"):
        ss.ScoreModel(nn.Identity(), sde, prediction)
    ss.ScoreModel(nn.Identity(), type(sde)(*([sde.path] if hasattr(sde, "path") else []), t_max=0.99), prediction)


@pytest.mark.parametrize("prediction", ["data", "score", "karras", TYPES[-1]], ids=named)
@pytest.mark.parametrize("kind", [ss.Rectified, ss.Cosine])
def test_types_that_divide_by_sigma_are_refused_where_it_starts_at_zero(kind, prediction):
    with pytest.raises(ValueError, match=r"singular at t_min=0 .*sigma=0 .*or another t_min"):
        ss.ScoreModel(nn.Identity(), kind(t_min=0.0), prediction)
    ss.ScoreModel(nn.Identity(), kind(t_min=1e-4), prediction)
    ss.ScoreModel(nn.Identity(), kind(t_min=0.0), "velocity")


def test_the_velocity_of_vp_is_infinite_at_zero():
    with pytest.raises(ValueError, match="singular at t_min=0 of VP"):
        ss.ScoreModel(nn.Identity(), ss.VP(t_min=0.0), "velocity")
    ss.ScoreModel(nn.Identity(), ss.VP(t_min=0.0), "noise")


@pytest.mark.parametrize("prediction", ["velocity", "v", "data"])
@pytest.mark.parametrize(
    "sde", [ss.ZeroTerminalSNR(ss.VP()), ss.ZeroTerminalSNR(ss.VE()), ss.Cosine(t_max=1.0), ss.Rectified(t_max=1.0)]
)
def test_views_stay_exact_where_no_signal_is_left(sde, prediction):
    t = torch.full((3,), sde.t_max, dtype=torch.float64)
    x0, eps = normal(3, 2), normal(3, 2, seed=1)
    views = emitting(sde, prediction, t, x0, eps).predict(sde.perturb(x0, t, eps), t)
    for name, value in truth(sde, t, x0, eps).items():
        close(getattr(views, name), value, rtol=1e-9, atol=1e-9 * float(value.abs().max()))


# --- calling the network


@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@pytest.mark.parametrize("network", [torch.float32, torch.float64, torch.bfloat16])
def test_network_runs_in_its_own_dtype_and_views_in_that_of_the_state(network, state):
    sde, t, x = ss.VP(), f64(0.2, 0.6), normal(2, 3)
    model = ss.ScoreModel(Emits(x, network), sde, "v")
    cond = {"text": normal(2, 5), "label": torch.tensor([1, 2])}
    views = model.given(cond).predict(x.to(state), t)
    given, label, conditions = model.network.given
    assert given.dtype == label.dtype == conditions["text"].dtype == network
    assert conditions["label"].dtype == torch.int64
    assert {getattr(views, name).dtype for name in VIEWS} == {state}


def test_a_network_without_parameters_runs_in_the_dtype_of_the_state():
    seen = []

    def network(x, label, cond):
        seen.extend((x.dtype, label.dtype))
        return x

    model = ss.ScoreModel(network, ss.VP())
    model.score(normal(2, 3), f64(0.5))
    model.score(normal(2, 3).float(), f64(0.5))
    assert seen == [torch.float64] * 2 + [torch.float32] * 2


@pytest.mark.parametrize("prediction", ["noise", "karras", predictions.Discrete("noise", [0.0, 500.0, 999.0])])
def test_network_reads_the_scaled_state_and_the_label_of_each_sample(prediction):
    sde, x, t = ss.VP(), normal(3, 2), f64(0.1, 0.5, 0.9)
    model = ss.ScoreModel(Emits(x), sde, prediction)
    model.predict(x, t)
    scaled, label, cond = model.network.given
    resolved = predictions.resolve(prediction)
    close(scaled, resolved.c_in(sde, t)[:, None] * x)
    close(label, resolved.c_noise(sde, t))
    assert cond is None
    model.predict(x, t[1])
    close(model.network.given[1], resolved.c_noise(sde, t[1]).expand(3))


@pytest.mark.parametrize("prediction", ["noise", "v", "karras"])
def test_a_number_a_scalar_and_a_vector_are_the_same_time(prediction):
    x, model = normal(3, 2), ss.ScoreModel(lambda x, label, cond: x.tanh() * label[:, None], ss.VE(), prediction)
    expected = model.score(x, f64(0.3).expand(3))
    close(model.score(x, f64(0.3)), expected, rtol=1e-14)
    close(model.score(x, 0.3), expected, rtol=1e-14)


@pytest.mark.parametrize("cond", [None, normal(2, 4), {"a": normal(2, 4), "b": torch.tensor([3, 1])}])
def test_condition_reaches_the_network_through_every_view(cond):
    model, x = ss.ScoreModel(Emits(normal(2, 3)), ss.VP()), normal(2, 3)
    views = (model.score, model.noise, model.denoise, model.velocity)
    calls = [lambda method=method: method(x, f64(0.5), cond) for method in views]
    for call in (*calls, lambda: model.given(cond).predict(x, f64(0.5))):
        model.network.given = None
        call()
        given = model.network.given[2]
        if isinstance(cond, dict):
            assert given.keys() == cond.keys()
            assert all(torch.equal(given[key], cond[key]) for key in cond)
        else:
            assert given is None if cond is None else torch.equal(given, cond)


@pytest.mark.parametrize("output", [(2, 4), (1, 3), (2, 3, 1), (3,)])
def test_an_output_of_another_shape_is_refused(output):
    model = ss.ScoreModel(lambda x, label, cond: torch.zeros(output), ss.VP())
    with pytest.raises(ValueError, match=r"state's shape \(2, 3\) expected; got"):
        model.predict(normal(2, 3), f64(0.5))


# --- learned variance


@pytest.mark.parametrize("shape", [(2, 3), (2, 2), (2, 1, 4, 4), (2, 2, 3)])
@pytest.mark.parametrize("prediction", TYPES, ids=named)
def test_a_learned_variance_is_beside_the_output_and_changes_no_view(prediction, shape):
    """2102.09672, section 3.1: the output has twice the channels, F and v; nu = (v + 1)/2."""
    sde, x, t = ss.VP(), normal(*shape), f64(0.3, 0.8)
    output, raw = normal(*shape, seed=1), normal(*shape, seed=2)
    model = ss.ScoreModel(Emits(torch.cat([output, raw], dim=1)), sde, prediction, learned_variance=True)
    views, plain = model.predict(x, t), ss.ScoreModel(Emits(output), sde, prediction).predict(x, t)
    close(views.variance, (raw + 1) / 2)
    assert plain.variance is None
    for name in VIEWS:
        close(getattr(views, name), getattr(plain, name))
    close(model.denoise(x, t), plain.denoised)
    (slope,) = torch.autograd.grad(views.variance.sum(), model.network.scale)
    close(slope, raw.sum() / 2)


def test_a_learned_variance_is_in_the_dtype_of_the_state():
    model = ss.ScoreModel(Emits(normal(2, 6), torch.float32), ss.VP(), learned_variance=True)
    views = model.predict(normal(2, 3), f64(0.5))
    assert views.variance.dtype == views.noise.dtype == torch.float64


@pytest.mark.parametrize("output", [(2, 3), (2, 4), (2, 12), (1, 6), (2, 6, 1), (6,)])
def test_an_output_without_twice_the_channels_is_refused(output):
    model = ss.ScoreModel(lambda x, label, cond: torch.zeros(output), ss.VP(), learned_variance=True)
    with pytest.raises(ValueError, match=r"state's shape, with a learned variance beside it, \(2, 6\) expected; got"):
        model.predict(normal(2, 3), f64(0.5))


def test_twice_the_channels_are_refused_where_no_variance_is_learned():
    model = ss.ScoreModel(lambda x, label, cond: torch.zeros(2, 6), ss.VP())
    with pytest.raises(ValueError, match=r"state's shape \(2, 3\) expected; got \(2, 6\)"):
        model.predict(normal(2, 3), f64(0.5))


@pytest.mark.parametrize("t", [f64(0.1, 0.2, 0.3), f64(0.1, 0.2)[:, None]])
def test_times_of_another_shape_are_refused(t):
    with pytest.raises(ValueError, match=r"shape \(\) or \(2,\) beside a state \(2, 3\)"):
        ss.ScoreModel(Emits(normal(2, 3)), ss.VP()).predict(normal(2, 3), t)


def test_unknown_types_are_refused():
    with pytest.raises(ValueError, match="got 'eps'"):
        ss.ScoreModel(nn.Identity(), ss.VP(), "eps")
    with pytest.raises(TypeError, match="got NoneType"):
        ss.ScoreModel(nn.Identity(), ss.VP(), None)


def test_gradients_reach_the_network_and_the_state():
    sde, t = INSTANCES["vp"], f64(0.2, 0.7)
    model, x = ss.ScoreModel(Emits(normal(2, 3)), sde, "noise"), normal(2, 3).requires_grad_()
    model.denoise(x, t).sum().backward()
    close(x.grad, (1 / sde.alpha(t))[:, None].expand(2, 3), rtol=1e-10)
    expected = -(sde.sigma(t) / sde.alpha(t))[:, None] * model.network.output
    close(model.network.scale.grad, expected.sum(), rtol=1e-10)


def test_parameters_of_network_are_those_of_the_model():
    model = ss.ScoreModel(nn.Linear(3, 3), ss.VP())
    assert {name for name, _ in model.named_parameters()} == {"network.weight", "network.bias"}


def test_a_model_given_a_condition_has_the_same_network_and_leaves_the_other_as_it_is():
    model, x = ss.ScoreModel(Emits(normal(2, 3)), ss.VP()), normal(2, 3)
    conditional = model.given(normal(2, 4))
    assert conditional.network is model.network
    assert type(conditional) is ss.ScoreModel
    assert dict(conditional.named_parameters()).keys() == dict(model.named_parameters()).keys()
    model.predict(x, 0.5)
    assert model.network.given[2] is None
    again = conditional.given(torch.tensor([1, 2]))
    again.predict(x, 0.5)
    assert torch.equal(model.network.given[2], torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("cond", "expected"),
    [
        (7, torch.tensor([7, 7])),
        (0.5, torch.tensor([0.5, 0.5])),
        ([4, 2], torch.tensor([4, 2])),
        (np.array([4, 2]), torch.tensor([4, 2])),
        (torch.tensor([3]), torch.tensor([3, 3])),
        (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1.0, 2.0, 3.0]] * 2)),
        (
            {"label": 3, "vector": [[1.0, 2.0]]},
            {"label": torch.tensor([3, 3]), "vector": torch.tensor([[1.0, 2.0]] * 2)},
        ),
    ],
    ids=repr,
)
def test_a_condition_is_a_number_a_list_an_array_or_one_sample_for_all(cond, expected):
    model = ss.ScoreModel(Emits(normal(2, 3), torch.float32), ss.VP())
    model.given(cond).predict(normal(2, 3), 0.5)
    seen = model.network.given[2]
    if isinstance(expected, dict):
        assert all(torch.equal(seen[name], value) for name, value in expected.items())
    else:
        assert torch.equal(seen, expected)


@pytest.mark.parametrize(("cond", "kind"), [("two", "str"), ([[1], [1, 2]], "list"), ({"label": object()}, "object")])
def test_a_condition_of_another_kind_is_refused(cond, kind):
    with pytest.raises(TypeError, match=f"a number, a list, a NumPy array, or a dict of them, expected; got {kind}"):
        ss.ScoreModel(Emits(normal(2, 3)), ss.VP()).given(cond)


def test_some_rows_of_a_conditional_model_have_their_conditions():
    model, x = ss.ScoreModel(Emits(normal(2, 3), torch.float32), ss.VP()), normal(2, 3)
    cond = {"label": torch.arange(5), "vector": torch.tensor([1.0, 2.0])}  # one label each, one vector for all
    for rows in (torch.tensor([4, 1]), slice(1, 5, 3)):
        model.given(cond).rows(rows, 5).predict(x, 0.5)
        seen = model.network.given[2]
        assert torch.equal(seen["label"], torch.arange(5)[rows])
        assert torch.equal(seen["vector"], torch.tensor([[1.0, 2.0]] * 2))
    # Two dimensions of a vector for all, and two rows: still one vector for all
    model.given(torch.tensor([1.0, 2.0])).rows(slice(0, 2), 5).predict(x, 0.5)
    assert torch.equal(model.network.given[2], torch.tensor([[1.0, 2.0]] * 2))
    assert model.rows(slice(0, 2), 5) is model


def test_evaluations_are_counted_where_the_network_runs():
    model = ss.ScoreModel(Emits(normal(2, 3)), ss.VP())
    with counting() as outer:
        for _ in range(3):
            views = model.predict(normal(2, 3), f64(0.5))
            assert views.score is not None
            assert views.noise is not None
        with counting() as inner:
            model.predict(normal(2, 3), f64(0.5))
    model.predict(normal(2, 3), f64(0.5))
    assert (outer.forward, inner.forward, outer.backward) == (4, 1, 0)


# --- a model around a model


class Doubled(ss.ModelWrapper):
    """Evaluates the model inside twice."""

    def predict(self, x, t):
        self.model.predict(x, t)
        return super().predict(x, t)


def test_a_wrapper_passes_on_what_it_does_not_change():
    inner = ss.ScoreModel(nn.Linear(3, 3), ss.VP(), "v", learned_variance=True)
    wrapper = ss.ModelWrapper(ss.ModelWrapper(inner))
    assert wrapper.sde is inner.sde
    assert wrapper.prediction is inner.prediction
    assert wrapper.network is inner.network
    assert wrapper.learned_variance
    assert wrapper.density == inner.density == "ScoreModel"
    assert [*wrapper.parameters()] == [*inner.parameters()]
    with pytest.raises(AttributeError, match="has no attribute 'networks'"):
        _ = wrapper.networks
    assert Doubled(inner).density == "Doubled(ScoreModel)"
    assert ss.ModelWrapper(ss.thresholding.Clipped(inner)).density is None


def test_a_wrapper_given_a_condition_is_around_the_conditional_model():
    inner, x = ss.ScoreModel(Emits(normal(2, 3)), ss.VP()), normal(2, 3)
    wrapper = Doubled(ss.ModelWrapper(inner))
    conditional = wrapper.given(torch.tensor([4, 2]))
    assert type(conditional) is Doubled
    conditional.predict(x, 0.5)
    assert torch.equal(inner.network.given[2], torch.tensor([4, 2]))
    conditional.rows(torch.tensor([1, 0]), 2).predict(x, 0.5)
    assert torch.equal(inner.network.given[2], torch.tensor([2, 4]))
    wrapper.predict(x, 0.5)
    assert inner.network.given[2] is None
    assert conditional.state_dict().keys() == wrapper.state_dict().keys()
    assert wrapper.given(None) is wrapper


def test_what_is_missing_in_a_foreign_model_is_named():
    class Alone:
        sde = ss.VP()

        def predict(self, x, t):
            return normal(2, 3)

    class NoPath:
        def predict(self, x, t):
            return normal(2, 3)

    with pytest.raises(TypeError, match="NoPath has no 'sde'"):
        as_model(NoPath())
    with pytest.raises(TypeError, match="function has no 'sde'"):
        ss.ModelWrapper(lambda x, t: x)
    for call, name in (
        (lambda model: model.density, "density"),
        (lambda model: model.given(3), "given"),
        (lambda model: model.rows(torch.tensor([0]), 2), "rows"),
    ):
        with pytest.raises(TypeError, match=f"Alone has no '{name}'.* subclass of scoresde.ModelWrapper"):
            call(as_model(Alone()))
    assert as_model(Alone()).rows(slice(0, 8), 2) is not None  # all of them
    with counting() as count:
        as_model(Alone()).predict(normal(2, 3), 0.5)
    assert count.forward == 1
