"""The Gaussian mixture against torch.distributions, automatic differentiation and quadrature."""

import copy
import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import scoresde as ss
from tests.conftest import PATHS, close, f64, normal, oracle, paths_with, seeded, some, times, within

MEANS = normal(3, 2, seed=5)
WEIGHTS = f64(0.2, 0.3, 0.5)
TURN = torch.linalg.qr(normal(3, 2, 2, seed=6)).Q
STDS = 0.3 + torch.rand(3, 2, generator=seeded(7), dtype=torch.float64)
MIXTURES = {
    "isotropic": ss.GaussianMixture(MEANS, STDS[:, 0], WEIGHTS),
    "diagonal": ss.GaussianMixture(MEANS, STDS, WEIGHTS),
    "one rotation": ss.GaussianMixture(MEANS, STDS, WEIGHTS, TURN[0]),
    "rotated": ss.GaussianMixture(MEANS, STDS, WEIGHTS, TURN),
    "equal weights": ss.GaussianMixture(MEANS, STDS, rotation=TURN),
    "one": ss.GaussianMixture(MEANS[:1], STDS[:1], rotation=TURN[:1]),
    "images": oracle((1, 2, 2)),
}
CASES = [pytest.param(mixture, id=name) for name, mixture in MIXTURES.items()]


def reference(mixture, alpha=1.0, sigma=0.0):
    """The same law in torch.distributions, over the flattened state."""
    size = mixture.means.shape[1]
    rotation = torch.eye(size, dtype=torch.float64) if mixture.rotation is None else mixture.rotation
    data = rotation @ torch.diag_embed(mixture.stds**2) @ rotation.mT
    covariance = alpha**2 * data + sigma**2 * torch.eye(size, dtype=torch.float64)
    components = MultivariateNormal(alpha * mixture.means, covariance.expand(len(mixture.means), size, size))
    return MixtureSameFamily(Categorical(logits=mixture.log_weights), components)


def states(mixture, n=6, seed=0):
    return 1.5 * normal(n, *mixture.event_shape, seed=seed)


def autograd_score(mixture, x, *at):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(mixture.log_prob(x, *at).sum(), x, create_graph=True)[0], x


def trace_of_jacobian(value, x):
    """The divergence of value(x) (B, *), by coordinates."""
    gradients = (torch.autograd.grad(part.sum(), x, retain_graph=True)[0] for part in value.flatten(1).unbind(1))
    return sum(gradient.flatten(1)[:, i] for i, gradient in enumerate(gradients))


@paths_with("mixture", MIXTURES.values(), ids=tuple(MIXTURES.values()).index)
def test_density_at_each_time_is_that_of_torch_distributions(sde, mixture):
    t, data = times(sde, n=4, margin=0.02), states(mixture, n=4)
    close(mixture.log_prob(data), reference(mixture).log_prob(data.flatten(1)), rtol=1e-10)
    x = sde.perturb(data, t, states(mixture, n=4, seed=1))
    expected = [
        reference(mixture, sde.alpha(each), sde.sigma(each)).log_prob(row.flatten())
        for each, row in zip(t, x, strict=True)
    ]
    close(mixture.log_prob(x, sde, t), torch.stack(expected), rtol=1e-9)
    close(mixture.log_prob(x[:1], sde, t[0]), expected[0][None], rtol=1e-9)
    assert mixture.log_prob(x.float(), sde, t).dtype == torch.float64


@pytest.mark.parametrize("mixture", CASES)
@pytest.mark.parametrize("at", [(), (ss.VP(), f64(0.3)), (ss.VE(), f64(0.2, 0.4, 0.5, 0.6, 0.7, 0.9))])
def test_score_and_divergence_are_derivatives_of_the_density(mixture, at):
    expected, x = autograd_score(mixture, states(mixture), *at)
    close(mixture.score(x, *at), expected, rtol=1e-10, atol=1e-12)
    close(mixture.divergence(x, *at), trace_of_jacobian(expected, x), rtol=1e-9, atol=1e-10)
    assert mixture.score(x.float(), *at).dtype == torch.float32


@pytest.mark.parametrize("mixture", CASES)
@pytest.mark.parametrize("sde", some("vp", "ve", "rectified", "zero-snr-vp"))
def test_posterior_obeys_tweedie_to_second_order(sde, mixture):
    """E[x_0|x] = (x + sigma^2 score) / alpha, and the covariance of x_0 given x is sigma^2/alpha d E[x_0|x] / dx."""
    t = times(sde, n=4, margin=0.1)
    score, x = autograd_score(mixture, sde.perturb(states(mixture, 4), t, states(mixture, 4, seed=1)), sde, t)
    alpha, sigma = (c.reshape((-1,) + (1,) * (x.ndim - 1)) for c in (sde.alpha(t), sde.sigma(t)))
    close(mixture.denoise(x, sde, t), (x + sigma**2 * score) / alpha, rtol=1e-8, atol=1e-9)
    weights, means, stds = mixture.denoising_posterior(x, sde, t)
    close(weights.sum(dim=1), torch.ones(4, dtype=torch.float64))
    denoised = mixture.denoise(x, sde, t)
    second = (weights[..., None] * (means.flatten(2) ** 2 + stds.flatten(2) ** 2)).sum(dim=(1, 2))
    variance = second - denoised.flatten(1).square().sum(dim=1)
    gain = (sigma**2 / alpha).flatten()
    close(variance, gain * trace_of_jacobian(denoised, x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("sde", PATHS)
def test_posterior_is_bayes_rule_by_quadrature(sde):
    """In one dimension: p(x_0 | x) proportional to p(x_0) N(x; alpha x_0, sigma^2) on a fine grid, alpha = 0 too."""
    mixture = ss.GaussianMixture(f64(-1.0, 0.5, 2.0)[:, None], f64(0.3, 0.6, 0.2), WEIGHTS)
    t = torch.cat((sde.time(f64(3.0, 0.0, -3.0)), f64(sde.t_max)[None]))
    x = sde.perturb(f64(-0.7, 1.2, 0.3, 1.9)[:, None], t, f64(0.5, -1.0, 0.2, 1.0)[:, None])
    grid = torch.linspace(-5, 6, 20001, dtype=torch.float64)
    alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    joint = reference(mixture).log_prob(grid[:, None]) - 0.5 * ((x - alpha * grid) / sigma) ** 2
    density = joint.softmax(dim=1)
    mean = (density * grid).sum(dim=1)
    close(mixture.denoise(x, sde, t)[:, 0], mean, rtol=1e-7, atol=1e-8)
    weights, means, stds = mixture.denoising_posterior(x, sde, t)
    moment = (weights * (means**2 + stds**2)[..., 0]).sum(dim=1)
    close(moment, (density * grid**2).sum(dim=1), rtol=1e-7)
    # the whole law, not only its moments
    cumulative = (weights[:, :, None] * torch.special.ndtr((grid - means) / stds)).sum(dim=1)
    close(cumulative[:, ::500], (density.cumsum(dim=1) - density / 2)[:, ::500], atol=1e-6, rtol=0)


def test_rotated_posterior_is_bayes_rule_on_a_grid():
    sde, t, mixture = ss.VP(), f64(0.2), MIXTURES["rotated"]
    x = f64(0.4, -0.8)[None]
    axis = torch.linspace(-6, 6, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    joint = reference(mixture).log_prob(grid) - 0.5 * ((x - sde.alpha(t) * grid) / sde.sigma(t)).square().sum(dim=1)
    density = joint.softmax(dim=0)
    mean = density @ grid
    covariance = (density[:, None] * (grid - mean)).T @ (grid - mean)
    weights, means, stds = (value[0] for value in mixture.denoising_posterior(x, sde, t))
    axes = mixture.rotation * stds[:, None, :]
    offset = means - mean
    expected = torch.einsum("k,kij->ij", weights, axes @ axes.mT) + torch.einsum("k,ki,kj->ij", weights, offset, offset)
    close(mixture.denoise(x, sde, t)[0], mean, rtol=1e-8)
    close(expected, covariance, rtol=1e-7)


@pytest.mark.parametrize("mixture", CASES)
def test_mean_and_covariance_are_those_of_the_samples(mixture):
    x = mixture.sample(40_000, generator=seeded())
    assert x.shape == (40_000, *mixture.event_shape)
    within(x, mixture.mean())
    centred = x.flatten(1) - mixture.mean().flatten()
    within(torch.einsum("bi,bj->bij", centred, centred), mixture.covariance())
    parts = reference(mixture)
    close(mixture.mean().flatten(), parts.mean, rtol=1e-12)
    close(mixture.covariance().diagonal(), parts.variance, rtol=1e-10)


@pytest.mark.parametrize("sde", some("vp", "ve", "zero-snr-vp"))
def test_samples_of_a_marginal_have_its_moments(sde):
    mixture, t = MIXTURES["rotated"], sde.time(f64(0.5))
    x = mixture.sample(40_000, sde, t, generator=seeded())
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    within(x, alpha * mixture.mean())
    centred = x - alpha * mixture.mean()
    identity = torch.eye(2, dtype=torch.float64)
    within(torch.einsum("bi,bj->bij", centred, centred), alpha**2 * mixture.covariance() + sigma**2 * identity)
    # E[score] = 0 and E[score x^T] = -I if the samples and the score have the same law
    score = mixture.score(x, sde, t)
    within(score, torch.zeros(2))
    within(torch.einsum("bi,bj->bij", score, x), -identity)


def test_samples_repeat_with_the_generator_and_weights_set_their_shares():
    first, second = (MIXTURES["rotated"].sample(5, generator=seeded(3)) for _ in range(2))
    assert torch.equal(first, second)
    apart = ss.GaussianMixture(f64(-10.0, 10.0)[:, None], f64(1.0, 1.0), [3.0, 1.0])
    within((apart.sample(20_000, generator=seeded()) > 0).double(), f64(0.25))


@pytest.mark.parametrize("sde", PATHS)
@pytest.mark.parametrize("mixture", [MIXTURES["rotated"], MIXTURES["images"]], ids=["vectors", "images"])
def test_score_model_has_the_views_of_the_oracle_at_every_time(sde, mixture):
    model = mixture.score_model(sde)
    t = torch.cat((times(sde, n=5), f64(sde.t_min, sde.t_max)))
    x = sde.perturb(states(mixture, 7), t, states(mixture, 7, seed=1))
    views, score, denoised = model.predict(x, t), mixture.score(x, sde, t), mixture.denoise(x, sde, t)
    sigma, alpha_dot, sigma_dot = (
        c.reshape((-1,) + (1,) * (x.ndim - 1)) for c in (sde.sigma(t), sde.alpha_dot(t), sde.sigma_dot(t))
    )
    close(views.score, score, rtol=1e-9, atol=1e-9)
    close(views.noise, -sigma * score, rtol=1e-9, atol=1e-11)
    close(views.denoised, denoised, rtol=1e-9, atol=1e-11)
    velocity = alpha_dot * denoised - sigma_dot * sigma * score
    close(views.velocity, velocity, rtol=1e-9, atol=1e-12 * float(velocity.abs().max()))


@pytest.mark.parametrize("sde", some("vp", "ve", "karras"))
def test_score_model_of_float32_states_keeps_float32_accuracy(sde):
    mixture, t = MIXTURES["rotated"], times(sde, n=6, margin=0.0)
    x = mixture.sample(6, sde, t, generator=seeded())
    expected, score = mixture.score(x, sde, t), mixture.score_model(sde).score(x.float(), t)
    assert score.dtype == torch.float32
    close(score.double(), expected, rtol=2e-4, atol=2e-6)


def test_numbers_and_lists_mean_the_same_as_float64_tensors():
    mixture, sde, x = MIXTURES["rotated"], ss.VP(), states(MIXTURES["rotated"])
    close(mixture.log_prob(x, sde, 0.3), mixture.log_prob(x, sde, f64(0.3)), rtol=1e-15)
    close(mixture.score(x, sde, 0.3), mixture.score(x, sde, f64(0.3)), rtol=1e-14)
    close(*(mixture.sample(4, sde, t, generator=seeded()) for t in (0.3, f64(0.3))), rtol=1e-14)
    listed = ss.GaussianMixture([[0.1], [0.7]], [0.3, 0.9], [0.1, 0.9])
    exact = ss.GaussianMixture(f64(0.1, 0.7)[:, None], f64(0.3, 0.9), f64(0.1, 0.9))
    close(listed.log_prob(x[:, :1]), exact.log_prob(x[:, :1]), rtol=1e-14)


def test_a_mixture_is_a_module_that_moves_and_saves():
    state = MIXTURES["rotated"].state_dict()
    assert set(state) == {"means", "stds", "log_weights", "rotation"}
    blank = ss.GaussianMixture(torch.zeros(3, 2), torch.ones(3, 2), rotation=torch.eye(2))
    blank.load_state_dict(state)
    x = states(blank)
    close(blank.log_prob(x), MIXTURES["rotated"].log_prob(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_to_half_precision_does_not_change_the_mixture(dtype):
    mixture, sde = oracle((2,)), ss.VP()
    x, model = normal(5, 2), copy.deepcopy(mixture).score_model(sde).to(dtype)
    close(model.score(x, 0.3), mixture.score(x, sde, 0.3), rtol=1e-9)
    close(model.score(x.to(dtype), 0.3), mixture.score(x.to(dtype), sde, 0.3), rtol=1e-2)


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_parameters_in_float32_are_rounded_but_the_arithmetic_is_in_float64(mixture):
    sde, x = ss.VP(), states(mixture)
    rounded = copy.deepcopy(mixture).float()
    mixture = copy.deepcopy(rounded).double()
    assert rounded.means.dtype == torch.float32
    for name in ("log_prob", "score", "denoise"):
        close(getattr(rounded, name)(x, sde, 0.3), getattr(mixture, name)(x, sde, 0.3), atol=1e-13)
    close(rounded.score_model(sde).noise(x, 0.3), mixture.score_model(sde).noise(x, 0.3), atol=1e-13)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ss.GaussianMixture(torch.zeros(3), torch.ones(3)), r"means \(K, \*\) and stds .* got \(3,\)"),
        (lambda: ss.GaussianMixture(torch.zeros(3, 2), torch.ones(2)), r"got \(3, 2\) and \(2,\)"),
        (lambda: ss.GaussianMixture(torch.zeros(2, 2), torch.ones(2), torch.ones(3)), "2 positive weights"),
        (lambda: ss.GaussianMixture(torch.zeros(2, 2), torch.ones(2), f64(1.0, 0.0)), "positive weights"),
        (lambda: ss.GaussianMixture(torch.zeros(2, 2), f64(0.5, -0.5)), r"positive stds; got .*-0\.5"),
        (lambda: ss.GaussianMixture(torch.zeros(2, 2), f64(0.5, math.nan)), "stds must be finite; got .*nan"),
        (lambda: ss.GaussianMixture(torch.zeros(99, 2), torch.zeros(99)), r"got \[1, 1, 1, \.\.\., .* \(99 numbers"),
        (lambda: ss.GaussianMixture(MEANS, STDS, rotation=torch.eye(3)), r"a rotation \(2, 2\) or \(3, 2, 2\)"),
        (lambda: ss.GaussianMixture(MEANS, STDS, rotation=2 * torch.eye(2)), "rotation must be orthogonal"),
        (lambda: MIXTURES["rotated"].log_prob(torch.zeros(4, 3)), r"expected states \(B, 2\); got \(4, 3\)"),
        (lambda: MIXTURES["rotated"].log_prob(torch.zeros(4, 2), ss.VP(), torch.ones(2, 2)), r"got .*\(2, 2\)"),
        (lambda: MIXTURES["rotated"].score(torch.zeros(4, 2), ss.VP(), torch.ones(4, 1)), r"got .*\(4, 1\)"),
        (lambda: MIXTURES["rotated"].log_prob(torch.zeros(4, 2), ss.VP()), "sde and t must be given together"),
        (lambda: MIXTURES["rotated"].score(torch.zeros(4, 2), t=0.5), "sde and t must be given together"),
        (lambda: MIXTURES["rotated"].sample(4, ss.VP()), "sde and t must be given together"),
        (lambda: MIXTURES["rotated"].log_prob(torch.zeros(1, 2), ss.VP(), f64(0.1, 0.2, 0.3)), r"got .*\(3,\)"),
        (
            lambda: MIXTURES["rotated"].score_model(ss.VP()).score(torch.zeros(4, 2), 0.5, torch.ones(4)),
            "built without a condition 'vector'",
        ),
        (
            lambda: MIXTURES["rotated"].score_model(ss.VP()).score(torch.zeros(4, 2), 0.5, 7),
            r"one of its components 0 \.\. 2, or -1 for all; got",
        ),
        (lambda: MIXTURES["rotated"].component(3), "k must be from 0 to 2; got 3"),
        (lambda: MIXTURES["rotated"].tilted(torch.zeros(2)), "3 finite numbers, one for each component"),
    ],
)
def test_bad_arguments_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


CLEAN = [ss.VP(t_min=0.0), ss.SubVP(t_min=0.0), ss.Cosine(t_min=0.0), ss.Rectified(t_min=0.0)]


@pytest.mark.parametrize("sde", CLEAN, ids=["vp", "sub-vp", "cosine", "rectified"])
@pytest.mark.parametrize("mixture", [CASES[0], CASES[3], CASES[-1]])
def test_the_exact_model_has_a_score_and_a_velocity_without_noise(sde, mixture):
    """At t = 0, where sigma is 0 and its derivative may be infinite: the score of the data, and the limit of t -> 0."""
    model, x = mixture.score_model(sde), states(mixture)
    close(model.score(x, 0.0), autograd_score(mixture, x)[0].detach(), rtol=1e-9)
    close(model.denoise(x, 0.0), x)
    close(model.velocity(x, 0.0), model.velocity(x, 1e-12), rtol=1e-5, atol=1e-5)
    t = f64(*([0.0, 0.3] * 3))
    mixed = model.score(x, t)
    close(mixed[::2], model.score(x[::2], 0.0), rtol=1e-9)
    close(mixed[1::2], model.score(x[1::2], 0.3), rtol=1e-9)
    close(mixture.divergence(x, sde, 0.0), mixture.divergence(x), rtol=1e-12)


def test_no_samples_of_a_mixture():
    assert oracle((2, 3)).sample(0).shape == (0, 2, 3)
