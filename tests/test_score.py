"""Score models: every view of an exact network is exact, for any prediction type; how the network is called."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import scoresde as ss
from scoresde import predictions
from scoresde.counting import counting
from tests.conftest import INSTANCES, close, f64, gradient, normal, paths_with, times

TYPES = ["noise", "data", "score", "velocity", "v", predictions.KarrasPreconditioning(0.7), predictions.Denoiser()]
SHAPES = [(4, 3), (2, 2), (2, 1, 4, 4)]  # (2, 2): a time of shape (B,) must not run along the other dimension
VIEWS = ("score", "noise", "denoised", "velocity")


def named(prediction):
    return prediction if isinstance(prediction, str) else type(prediction).__name__.lower()


def column(values, x):
    return values.reshape((-1,) + (1,) * (x.ndim - 1))


class Emits(nn.Module):
    """Returns `output` for any input, in a dtype of its own; `inputs` are those of the last call."""

    def __init__(self, output, dtype=torch.float64):
        super().__init__()
        self.output = output
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, x, c_noise, cond=None):
        self.inputs = x, c_noise, cond
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


@paths_with("shape", SHAPES)
@pytest.mark.parametrize("prediction", TYPES, ids=named)
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


# Errors at t = 1e-5 of VP, where sigma = 1e-3, in roundings of float32 (2^-24) relative to the largest value. Every
# view keeps all digits of the network's output, and the denoised view gains three, for it multiplies the output by
# sigma. The exception is inherent: for a data network, eps = (x - alpha F) / sigma divides the rounding of F by sigma.
# A view computed from another view in float32 would lose this factor of a thousand everywhere.
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
def test_types_that_divide_by_alpha_are_refused_if_it_ends_at_zero(sde, prediction):
    with pytest.raises(ValueError, match=r"singular at t_max=1 .*alpha=0 .*'v', 'velocity' or 'data'.* t_max"):
        ss.ScoreModel(nn.Identity(), sde, prediction)
    ss.ScoreModel(nn.Identity(), type(sde)(*([sde.path] if hasattr(sde, "path") else []), t_max=0.99), prediction)


@pytest.mark.parametrize("prediction", ["data", "score", "karras", TYPES[-1]], ids=named)
@pytest.mark.parametrize("kind", [ss.Rectified, ss.Cosine])
def test_types_that_divide_by_sigma_are_refused_if_it_starts_at_zero(kind, prediction):
    with pytest.raises(ValueError, match=r"singular at t_min=0 .*sigma=0; .*or another t_min"):
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
def test_views_are_exact_if_no_signal_is_left(sde, prediction):
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
    scaled, label, conditions = model.network.inputs
    assert scaled.dtype == conditions["text"].dtype == network
    assert label.dtype == torch.promote_types(network, torch.float32)
    assert conditions["label"].dtype == torch.int64
    assert {getattr(views, name).dtype for name in VIEWS} == {state}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_in_half_precision_receives_all_labels(dtype):
    model = ss.ScoreModel(Emits(normal(1000, 1), dtype), ss.VP(t_min=0.0), predictions.Discrete("v", [0.0, 999.0]))
    model.predict(normal(1000, 1), torch.linspace(0, 1, 1000, dtype=torch.float64))
    assert model.network.inputs[0].dtype == dtype
    close(model.network.inputs[1], torch.arange(1000.0), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prediction", ["noise", "v", "karras"])
def test_the_views_of_a_state_in_half_precision_are_rounded_once(prediction, dtype):
    """The coefficients of a view are not rounded to the dtype of the state, only the view itself is."""
    sde, t = ss.VP(), f64(0.01, 0.3, 0.9)
    x, output = (normal(3, 2, seed=seed).to(dtype) for seed in (0, 1))
    views, exact = (
        ss.ScoreModel(Emits(output.to(kind), kind), sde, prediction).predict(x.to(kind), t)
        for kind in (dtype, torch.float64)
    )
    for name in VIEWS:
        assert getattr(views, name).dtype == dtype
        close(getattr(views, name).double(), getattr(exact, name), rtol=0.51 * torch.finfo(dtype).eps)


def test_a_network_without_parameters_runs_in_the_dtype_of_the_state():
    dtypes = []
    model = ss.ScoreModel(lambda x, label, cond: dtypes.append((x.dtype, label.dtype)) or x, ss.VP())
    for dtype in (torch.float64, torch.float32):
        model.score(normal(2, 3).to(dtype), f64(0.5))
    assert dtypes == [(torch.float64,) * 2, (torch.float32,) * 2]


@pytest.mark.parametrize("prediction", ["noise", "karras", predictions.Discrete("noise", [0.0, 500.0, 999.0])])
def test_network_reads_the_scaled_state_and_the_label_of_each_sample(prediction):
    sde, x, t = ss.VP(), normal(3, 2), f64(0.1, 0.5, 0.9)
    model = ss.ScoreModel(Emits(x), sde, prediction)
    model.predict(x, t)
    scaled, label, cond = model.network.inputs
    resolved = predictions.resolve(prediction)
    close(scaled, resolved.c_in(sde, t)[:, None] * x)
    close(label, resolved.c_noise(sde, t))
    assert cond is None
    model.predict(x, t[1])
    close(model.network.inputs[1], resolved.c_noise(sde, t[1]).expand(3))


@pytest.mark.parametrize("prediction", ["noise", "v", "karras"])
def test_a_number_a_scalar_and_a_vector_are_the_same_time(prediction):
    x, model = normal(3, 2), ss.ScoreModel(lambda x, label, cond: x.tanh() * label[:, None], ss.VE(), prediction)
    expected = model.score(x, f64(0.3).expand(3))
    close(model.score(x, f64(0.3)), expected, rtol=1e-14)
    close(model.score(x, 0.3), expected, rtol=1e-14)


@pytest.mark.parametrize("cond", [None, normal(2, 4), {"a": normal(2, 4), "b": torch.tensor([3, 1])}])
def test_a_condition_reaches_the_network_through_every_view(cond):
    model, x = ss.ScoreModel(Emits(normal(2, 3)), ss.VP()), normal(2, 3)
    for method in (model.score, model.noise, model.denoise, model.velocity):
        model.network.inputs = None
        method(x, f64(0.5), cond)
        torch.testing.assert_close(model.network.inputs[2], cond, rtol=0, atol=0)


WRONG = [(False, (2, 3), shape) for shape in [(2, 4), (1, 3), (2, 3, 1), (3,), (2, 6)]]
WRONG += [(True, (2, 6), shape) for shape in [(2, 3), (2, 4), (2, 12), (1, 6), (2, 6, 1), (6,)]]


@pytest.mark.parametrize(("learned", "expected", "output"), WRONG)
def test_an_output_of_another_shape_is_refused(learned, expected, output):
    """The state's, or with a learned variance twice its channels."""
    model = ss.ScoreModel(lambda x, label, cond: torch.zeros(output), ss.VP(), learned_variance=learned)
    twice = ", twice the state's channels for a learned variance" if learned else ""
    with pytest.raises(ValueError, match=re.escape(f"of shape {expected}{twice}; got {output}")):
        model.predict(normal(2, 3), f64(0.5))


@pytest.mark.parametrize("t", [f64(0.1, 0.2, 0.3), f64(0.1, 0.2)[:, None]])
def test_times_of_another_shape_are_refused(t):
    with pytest.raises(ValueError, match=r"shape \(\) or \(2,\) for a state \(2, 3\)"):
        ss.ScoreModel(Emits(normal(2, 3)), ss.VP()).predict(normal(2, 3), t)


# --- learned variance


@pytest.mark.parametrize("shape", [(2, 3), (2, 2), (2, 1, 4, 4), (2, 2, 3)])
@pytest.mark.parametrize("prediction", TYPES, ids=named)
def test_a_learned_variance_is_a_second_output_and_changes_no_view(prediction, shape):
    """2102.09672, section 3.1: the output has twice the channels, F and v; nu = (v + 1)/2."""
    sde, x, t = ss.VP(), normal(*shape), f64(0.3, 0.8)
    output, raw = normal(*shape, seed=1), normal(*shape, seed=2)
    model = ss.ScoreModel(Emits(torch.cat([output, raw], dim=1)), sde, prediction, learned_variance=True)
    views, plain = model.predict(x, t), ss.ScoreModel(Emits(output), sde, prediction).predict(x, t)
    close(views.variance, (raw + 1) / 2)
    assert plain.variance is None
    for name in VIEWS:
        close(getattr(views, name), getattr(plain, name))
    (slope,) = torch.autograd.grad(views.variance.sum(), model.network.scale)
    close(slope, raw.sum() / 2)
    assert model.float().predict(x, t).variance.dtype == torch.float64  # the dtype of the state


# --- parameters, gradients, conditions


def test_gradients_reach_the_network_and_the_state():
    sde, t = INSTANCES["vp"], f64(0.2, 0.7)
    model, x = ss.ScoreModel(Emits(normal(2, 3)), sde, "noise"), normal(2, 3).requires_grad_()
    model.denoise(x, t).sum().backward()
    close(x.grad, (1 / sde.alpha(t))[:, None].expand(2, 3), rtol=1e-10)
    expected = -(sde.sigma(t) / sde.alpha(t))[:, None] * model.network.output
    close(model.network.scale.grad, expected.sum(), rtol=1e-10)


def test_a_model_given_a_condition_has_the_same_network_and_leaves_the_other_as_it_is():
    model, x = ss.ScoreModel(Emits(normal(2, 3)), ss.VP()), normal(2, 3)
    conditional = model.given(normal(2, 4))
    assert conditional.network is model.network
    assert type(conditional) is ss.ScoreModel
    assert [*dict(conditional.named_parameters())] == [*dict(model.named_parameters())] == ["network.scale"]
    model.predict(x, 0.5)
    assert model.network.inputs[2] is None
    conditional.given(torch.tensor([1, 2])).predict(x, 0.5)
    assert torch.equal(model.network.inputs[2], torch.tensor([1, 2]))


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
    torch.testing.assert_close(model.network.inputs[2], expected, rtol=0, atol=0)


@pytest.mark.parametrize(("cond", "kind"), [("two", "str"), ([[1], [1, 2]], "list"), ({"label": object()}, "object")])
def test_a_condition_of_another_kind_is_refused(cond, kind):
    with pytest.raises(TypeError, match=f"a number, a list, a NumPy array, or a dict of them; got {kind}"):
        ss.ScoreModel(Emits(normal(2, 3)), ss.VP()).given(cond)


def test_some_rows_of_a_conditional_model_have_their_conditions():
    model, x = ss.ScoreModel(Emits(normal(2, 3), torch.float32), ss.VP()), normal(2, 3)
    cond = {"label": torch.arange(5), "vector": torch.tensor([1.0, 2.0])}  # one label each, one vector for all
    for rows in (torch.tensor([4, 1]), slice(1, 5, 3)):
        model.given(cond).rows(rows, 5).predict(x, 0.5)
        label, vector = (model.network.inputs[2][name] for name in ("label", "vector"))
        assert torch.equal(label, torch.arange(5)[rows])
        assert torch.equal(vector, torch.tensor([[1.0, 2.0]] * 2))
    # A vector of two dimensions for all samples, and two rows
    model.given(torch.tensor([1.0, 2.0])).rows(slice(0, 2), 5).predict(x, 0.5)
    assert torch.equal(model.network.inputs[2], torch.tensor([[1.0, 2.0]] * 2))
    assert model.rows(slice(0, 2), 5) is model


def test_evaluations_are_counted_when_the_network_runs():
    model, x = ss.ScoreModel(Emits(normal(2, 3)), ss.VP()), normal(2, 3)
    with counting() as outer:
        views = model.predict(x, 0.5)
        _ = views.score, views.noise
        with counting() as inner:
            model.predict(x, 0.5)
    model.predict(x, 0.5)
    assert (outer.forward, inner.forward, outer.backward) == (2, 1, 0)


@pytest.mark.parametrize(
    ("name", "null", "got"),
    [
        ("label", torch.tensor([0, -1]), "the null label -1"),
        ("tone", torch.tensor([0, -1]), "the null label -1 for tone"),
        ("vector", torch.tensor([[1.0, 2.0], [float("nan"), float("nan")]]), "NaN for vector"),
    ],
)
def test_a_null_condition_is_refused_if_the_network_never_saw_one(name, null, got):
    model = ss.ScoreModel(lambda x, c_noise, cond: x, ss.VP(), conditional=(name,))
    with pytest.raises(ValueError, match=f"for every sample, never without; got {got}"):
        model.given({name: null})
    assert model.given({name: null[:1]}).cond is not None
    free = ss.ScoreModel(lambda x, c_noise, cond: x, ss.VP())
    assert free.given({name: null}).cond is not None
