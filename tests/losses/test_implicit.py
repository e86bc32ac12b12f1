"""Implicit and sliced score matching: their formulas written out, and denoising score matching up to a constant."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import scoresde as ss
from scoresde import losses
from scoresde.random_stream import RandomStream
from tests.conftest import INSTANCES, close, exact_model, normal, oracle, seeded, within
from tests.losses.networks import column
from tests.losses.published import SUITED, published_density, published_omega

SHAPES = [(3,), (1, 2, 2)]
PATHS = ["vp", "ddpm", "ncsn"]


def tanh_model(sde, prediction="noise"):
    """A network with a full Jacobian that depends on the state and on the label."""

    def network(x, label, cond):
        return torch.tanh(x + column(x.flatten(1).mean(dim=1), x) + column(label, x))

    return ss.ScoreModel(network, sde, prediction)


def parts(model, x, t):
    """The model's score s (B, d) and its Jacobian ds/dx (B, d, d), sample by sample."""
    jacobians = []
    for row, time in zip(x, t, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda y, at=time: model.score(y[None], at)[0], row)
        jacobians.append(jacobian.reshape(row.numel(), row.numel()))
    return model.score(x, t).flatten(1), torch.stack(jacobians)


def samples(sde, shape, n=6):
    """(x0, t, eps, x_t)."""
    x0, eps = normal(n, *shape), normal(n, *shape, seed=1)
    t = sde.t_min + (sde.t_max - sde.t_min) * torch.linspace(0.05, 0.95, n, dtype=torch.float64)
    return x0, t, eps, sde.perturb(x0, t, eps)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighting", list(SUITED))
@pytest.mark.parametrize("path", PATHS)
def test_the_value_is_the_weighted_formula_of_hyvarinen(path, weighting, shape):
    """1905.07088, eq. 4: tr(ds/dx) + |s|^2/2, times 2/d and lambda = weight sigma^2."""
    sde = INSTANCES[path]
    model, (x0, t, eps, x) = tanh_model(sde, "v"), samples(sde, shape)
    score, jacobian = parts(model, x, t)
    hyvarinen = jacobian.diagonal(dim1=1, dim2=2).sum(dim=1) + score.square().sum(dim=1) / 2
    weight = published_omega(weighting, sde, t) / published_density(SUITED[weighting], sde, t)
    expected = weight * sde.sigma(t) ** 2 * 2 / score.shape[1] * hyvarinen
    for trace in (None, ss.ExactTrace(chunk=1)):
        terms = losses.ImplicitScoreMatching(weighting, trace=trace)(model, x0, t=t, noise=eps)
        close(terms.value.detach(), expected, rtol=1e-6, atol=1e-9)
        close(terms.weight, weight, rtol=1e-7)


@pytest.mark.parametrize("weighting", ["variance", "likelihood", "min_snr"])
@pytest.mark.parametrize(("path", "shape"), [("vp", (3,)), ("ddpm", (1, 2, 2)), ("ncsn", (3,))])
def test_it_is_denoising_score_matching_minus_the_weight_for_every_network(path, weighting, shape):
    sde, n, mixture = INSTANCES[path], 3000, oracle(shape)
    x0, eps = mixture.sample(n, generator=seeded(1)), normal(n, *shape, seed=2)
    denoising, implicit = (
        kind(weighting, stratified=False) for kind in (losses.DenoisingScoreMatching, losses.ImplicitScoreMatching)
    )
    t = denoising.draw_times(sde, n, seeded(3))

    def feature(x, t):
        return torch.tanh(x / column(torch.hypot(sde.sigma(t), torch.ones_like(t)), x)) + 0.5

    models = {
        "exact": exact_model(mixture, sde, "v"),
        "wrong": exact_model(mixture, sde, "v", 0.5, feature),
        "tanh": ss.ScoreModel(lambda x, label, cond: feature(x, label), sde, "noise"),
    }
    values = {}
    for name, model in models.items():
        noisy, clean = (loss(model, x0, t=t, noise=eps) for loss in (denoising, implicit))
        within(clean.value.detach() - noisy.value + noisy.weight, 0.0)
        values[name] = clean.value.detach()
    for name in ("wrong", "tanh"):  # the networks differ by far more than the uncertainty of the constant
        worse = values[name] - values["exact"]
        assert float(worse.mean()) > 8 * float(worse.std()) / n**0.5


# --- sliced score matching


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("reduced", [True, False])
def test_sliced_values_are_the_formulas_of_the_paper(reduced, distribution, shape):
    """1905.07088, eq. 7: v^T (ds/dx) v + (v^T s)^2/2, or |s|^2/2 in eq. 8: the mean over the drawn directions."""
    sde, loss = ss.VP(), losses.SlicedScoreMatching(3, distribution, reduced)
    model, (x0, t, eps, x) = tanh_model(sde, "v"), samples(sde, shape)
    terms = loss(model, x0, t=t, noise=eps, generator=seeded(5))
    stream = RandomStream(seeded(5))
    score, jacobian = parts(model, x, t)
    expected = 0.0
    for _ in range(3):
        v = (stream.rademacher(x) if distribution == "rademacher" else stream.normal(x)).flatten(1)
        projected = score.square().sum(dim=1) if reduced else (v * score).sum(dim=1) ** 2
        expected = expected + (torch.einsum("bi,bij,bj->b", v, jacobian, v) + projected / 2) / 3
    close(terms.value.detach(), sde.sigma(t) ** 2 * 2 / score.shape[1] * expected, rtol=1e-6, atol=1e-9)


# --- gradients


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [1, 2, 64])
def test_the_gradient_goes_through_value_and_trace(chunk, shape):
    """For eps_hat = W x: ||W x||^2 - 2 sigma tr W, with the gradient 2 W x x^T - 2 sigma I."""
    sde, (x0, t, eps, x) = ss.VP(), samples(ss.VP(), shape)
    size = x[0].numel()
    weight = normal(size, size, seed=7).requires_grad_()
    model = ss.ScoreModel(lambda x, label, cond: (x.flatten(1) @ weight.T).reshape(x.shape), sde)
    losses.ImplicitScoreMatching(trace=ss.ExactTrace(chunk))(model, x0, t=t, noise=eps).value.sum().backward()
    flat = x.flatten(1)
    expected = 2 * weight.detach() @ flat.T @ flat - 2 * sde.sigma(t).sum() * torch.eye(size, dtype=torch.float64)
    close(weight.grad, expected / size, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduced", [True, False])
def test_the_gradient_of_sliced_score_matching(reduced):
    sde, (x0, t, eps, x) = ss.VP(), samples(ss.VP(), (3,))
    weight = normal(3, 3, seed=7).requires_grad_()
    model = ss.ScoreModel(lambda x, label, cond: x @ weight.T, sde)
    loss = losses.SlicedScoreMatching(2, variance_reduction=reduced)
    loss(model, x0, t=t, noise=eps, generator=seeded(5)).value.sum().backward()
    stream, expected, value = RandomStream(seeded(5)), torch.zeros(3, 3).double(), x @ weight.detach().T
    for v in (stream.normal(x), stream.normal(x)):
        # of ||W x||^2: 2 W x x^T; of (v^T W x)^2: 2 (v^T W x) v x^T; of v^T W v: v v^T
        square = value if reduced else (v * value).sum(dim=1, keepdim=True) * v
        expected += (2 * square.T @ x - 2 * (sde.sigma(t)[:, None] * v).T @ v) / 2
    close(weight.grad, expected / 3, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("trace", [ss.ExactTrace(), ss.Hutchinson()])
def test_networks_with_attention_can_be_differentiated_twice(trace):
    """Fused attention has no second derivative; unfused attention has."""
    scale = torch.ones((), requires_grad=True)

    def network(x, label, cond):
        rows = x.reshape(len(x), 1, 4, 2)
        return scale * scaled_dot_product_attention(scale * rows, rows, rows).reshape(x.shape)

    model = ss.ScoreModel(network, ss.VP())
    terms = losses.ImplicitScoreMatching(trace=trace)(model, normal(3, 8).float(), generator=seeded())
    terms.value.mean().backward()
    assert float(scale.grad.abs()) > 0


def test_float32_loses_no_digits_at_small_t():
    """Nothing is divided by sigma = 1e-3: the noise is used, not the score."""
    t = torch.full((6,), 1e-5, dtype=torch.float64)
    x0, eps, model = normal(6, 3), normal(6, 3, seed=1), tanh_model(ss.VP())
    single, double = (
        losses.ImplicitScoreMatching()(model, x0.to(dtype), t=t, noise=eps.to(dtype)).value.detach().double()
        for dtype in (torch.float32, torch.float64)
    )
    close(single, double, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"projections": 0}, "projections must be at least 1; got 0"), ({"distribution": "sphere"}, "'sphere'")],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        losses.SlicedScoreMatching(**arguments)
