"""The transform to latents: its bound against exact likelihoods, and everything that works on latents unchanged."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

import scoresde as ss
from scoresde.data import Affine, Compose, Levels
from scoresde.dequantization import DataMap
from scoresde.pipelines import Autoencoder, GreyLevels, Latents, Normal
from scoresde.random_stream import RandomStream
from scoresde.solvers import Adams
from tests.conftest import close, f64, normal, oracle, seeded, within
from tests.flowmaps.test_flow_map import gaussian
from tests.pipelines.linear import LinearNetwork

LONG = ss.VP(beta_max=40.0)
MODEL = ss.GaussianMixture(torch.zeros(1, 2, 4, 4), torch.ones(1)).score_model(LONG)
SHAPES = pytest.mark.parametrize(("shape", "latent_shape"), [((4,), (4,)), ((2, 2), (2, 2))])


def latents_of(shape, latent_shape, spread=1e-6, width=1e-6, pixels=Affine(), **arguments):  # noqa: B008
    """Latents of a linear autoencoder, by default with shift 0 and scale 1; and the autoencoder's network."""
    network = LinearNetwork(shape, latent_shape, spread, width)
    arguments = {"shift": 0.0, "scale": 1.0, **arguments}
    return Latents(Autoencoder(network, Normal()), pixels, **arguments), network


def mixture(shape):
    """Two isotropic Gaussians."""
    means = torch.stack([torch.full(shape, 0.6), torch.full(shape, -0.8)]).double()
    return ss.GaussianMixture(means, f64(0.7, 0.4))


def rotated(latent, network):
    """The mixture of x = W z, for an orthogonal W."""
    means = (latent.means.flatten(1).double() @ network.matrix.mT).unflatten(1, network.shape)
    return ss.GaussianMixture(means, f64(0.7, 0.4))


@SHAPES
def test_the_bound_is_the_exact_likelihood_of_continuous_data_if_the_autoencoder_is_orthogonal(shape, latent_shape):
    """log p(x | z) - log q(z | x) is 0 for every z, and p(z) at z differs from that at W^T x by the spread of q."""
    latents, network = latents_of(shape, latent_shape, shift=0.3, scale=1.7)
    density = mixture(latent_shape)
    x = rotated(density, network).sample(5, generator=seeded())
    state, nats = DataMap(latents).draw(x, RandomStream(seeds=range(5)), LONG)
    scaled = ss.GaussianMixture((density.means.unflatten(1, latent_shape) - 0.3) / 1.7, f64(0.7, 0.4) / 1.7)
    flow = ss.log_prob(scaled.score_model(LONG), state, trace=ss.ExactTrace(), solver=Adams(100)).value
    close((flow + nats) / 4, rotated(density, network).log_prob(x) / 4, rtol=0, atol=1e-4)


def test_bits_of_latents_are_those_of_the_pixels_if_the_autoencoder_is_orthogonal():
    """The same dequantisation, once under the density of pixels, once under that of latents."""
    pixels = Levels(8, -1, 1)
    latents, _ = latents_of((1, 2, 2), (4, 1, 1), pixels=pixels)
    density = ss.GaussianMixture(torch.zeros(1, 4, 1, 1, dtype=torch.float64), f64(0.5)[None])
    of_pixels = ss.GaussianMixture(torch.zeros(1, 1, 2, 2, dtype=torch.float64), f64(0.5)[None])
    images = torch.randint(0, 8, (4, 1, 2, 2), generator=seeded())
    options = {"trace": ss.ExactTrace(), "solver": Adams(30)}
    exact = ss.bits_per_dim(of_pixels.score_model(LONG), images, pixels, **options)
    bits = ss.bits_per_dim(density.score_model(LONG), images, latents, **options)
    close(bits.per_image, exact.per_image, rtol=0, atol=1e-4)
    assert exact.terms == {}
    assert set(bits.terms) == {"prior", "reconstruction", "entropy"}
    close(sum(bits.terms.values()), bits.per_image)
    assert bits.conventions["quantity"].endswith("by dequantisation and an autoencoder)")
    assert ss.bits_per_dim(density.score_model(LONG), images, latents, samples=2, **options).terms == {}
    bound = ss.bounds.continuous(density.score_model(LONG), images, latents, draws=32)
    assert abs(bound.mean - exact.mean) < 5 * bound.monte_carlo + 0.01


def test_a_lossy_autoencoder_lies_below_by_the_divergence_of_q_from_the_posterior():
    """x = W z + noise with 2 of 3 dimensions: log p(x), the posterior and the divergence are closed forms."""
    spread, width, std = 0.5, 0.3, 0.8
    latents, network = latents_of((3,), (2,), spread, width, shift=0.2, scale=1.5)
    w, eye = network.matrix, torch.eye(3, dtype=torch.float64)
    x = 0.7 * normal(1, 3)
    exact = MultivariateNormal(torch.zeros(3, dtype=torch.float64), std**2 * w @ w.mT + width**2 * eye).log_prob(x)
    precision = 1 / std**2 + 1 / width**2
    shift = x @ w * (1 - 1 / (precision * width**2))  # mean of q minus that of the posterior
    gap = 0.5 * (2 * (spread**2 * precision - 1 - math.log(spread**2 * precision)) + precision * shift.square().sum())
    draws = 20_000
    state, nats = DataMap(latents).draw(x.expand(draws, 3), RandomStream(generator=seeded()), LONG)
    prior = ss.GaussianMixture(-f64(0.2, 0.2)[None] / 1.5, f64(std)[None] / 1.5).log_prob(state)
    values = nats + prior
    error = float(values.std()) / math.sqrt(draws)
    assert error < 0.02
    assert abs(float(values.mean()) - float(exact - gap)) < 4 * error
    assert float(exact) - float(values.mean()) > 10 * error


def test_a_composition_and_its_parts_agree():
    whole, _ = latents_of((1, 2, 2), (3, 1, 1), 0.1, 0.2, pixels=Levels(8, -1, 1), shift=[0.1, 0, 0], scale=[1, 2, 3])
    part, _ = latents_of((1, 2, 2), (3, 1, 1), 0.1, 0.2, shift=[0.1, 0.0, 0.0], scale=[1.0, 2.0, 3.0])
    composed, x = Compose([Levels(8, -1, 1), part]), 8 * torch.rand(3, 1, 2, 2, generator=seeded(), dtype=torch.float64)
    for transform in (composed, whole):
        assert transform.levels == 8
        assert transform.data_shape == (1, 2, 2)
    states, nats = zip(
        *(DataMap(t).draw(x, RandomStream(seeds=range(3)), LONG) for t in (whole, composed)), strict=True
    )
    close(states[0], states[1])
    close(nats[0], nats[1])
    close(whole.inverse(states[0]), composed.inverse(states[1]))
    close(whole.encode(x, RandomStream(seeds=range(3))), states[0])
    assert composed.state_shape == whole.state_shape
    assert DataMap(composed).bounds == DataMap(whole).bounds == "by an autoencoder"


def test_the_scale_comes_from_the_data():
    latents, network = latents_of((3,), (2,), 0.5, 0.3, shift=None, scale=None)
    x = normal(2000, 3) * f64(2.0, 1.0, 0.5) + f64(1.0, 0.0, -2.0)
    with pytest.raises(ValueError, match="no shift and scale"):
        latents(x)
    arguments = latents.fit(x)
    z = x @ network.matrix
    close(f64(*arguments["shift"]), z.mean(dim=0), rtol=0, atol=0.06)
    close(f64(*arguments["scale"]), (z.var(dim=0) + 0.25).sqrt(), rtol=0.05)
    fitted = Latents(latents.autoencoder, latents.pixels, **arguments)
    states = fitted.encode(x, RandomStream(generator=seeded()))
    close(states.std(dim=0), f64(1.0, 1.0), rtol=0.05)
    close(fitted.inverse(fitted(x)), z @ network.matrix.mT, atol=1e-9)
    with pytest.raises(ValueError, match="every channel of the latents must vary"):
        Latents(Autoencoder(LinearNetwork((3,), (2,), 1e-300, 0.3), Normal()), Affine()).fit(torch.zeros(8, 3))


def test_shift_and_scale_may_be_tensors_and_have_one_number_for_each_channel():
    latents, _ = latents_of((3,), (2,), shift=f64(0.1, 0.2), scale=f64(1.0, 2.0))
    same, _ = latents_of((3,), (2,), shift=[0.1, 0.2], scale=[1.0, 2.0])
    assert torch.equal(latents(normal(2, 3)), same(normal(2, 3)))
    with pytest.raises(ValueError, match="lists of 2, one for each channel"):
        latents_of((3,), (2,), shift=[0.0] * 3, scale=[1.0] * 3)
    with pytest.raises(ValueError, match="scale positive"):
        latents_of((3,), (2,), shift=0.0, scale=0.0)


def test_grey_levels_keep_their_latents_under_dequantisation():
    network = ss.networks.ConvolutionalAutoencoder(8, 1, 2, width=4, multipliers=(1, 2), blocks=1, scales=True)
    latents = Latents(Autoencoder(network, GreyLevels(17)), Levels(17, -1, 1), 0.0, 1.0)
    images = torch.randint(0, 17, (3, 1, 8, 8), generator=seeded())
    first, second = (latents(images + u) for u in (0.0, 0.7))
    assert torch.equal(first.float(), second.float())
    mean, log_std = latents.moments(images).chunk(2, dim=1)
    narrow = torch.cat([mean, log_std - 20], dim=1)
    close(latents.state_of_moments(narrow, RandomStream(seeds=range(3))), first.float(), atol=1e-6)
    with pytest.raises(TypeError, match="has no log-determinant"):
        latents.log_det(images)
    with pytest.raises(TypeError, match="has no log-determinant"):
        ss.bits_per_dim(MODEL, images, latents, dequantization=ss.TruncatedNormal())


# --- in latents unchanged


@pytest.fixture(scope="module")
def problem():
    """Latents of a lossy autoencoder, a mixture of states, and a measurement of one entry of x."""
    latents, network = latents_of((3,), (2,), 0.05, 0.1, shift=0.2, scale=1.5)
    density = oracle((2,))
    operator = ss.inverse.Linear(f64(0.6, -0.3, 1.0)[None], noise_std=0.5)
    return latents, network, density, operator, f64(0.4)[None]


def exact_operator(latents, network, operator):
    """A(decode(y)) as a matrix, after the subtraction of its value at 0."""
    matrix = operator.matrix @ network.matrix * 1.5
    offset = operator(latents.decode(torch.zeros(1, 2, dtype=torch.float64)))[0]
    return ss.inverse.Linear(matrix, noise_std=0.5), offset


def test_posterior_samples_through_the_decoder_have_the_exact_posterior(problem):
    """The decoder is linear, so the posterior of a mixture of latents is a mixture again."""
    latents, network, density, operator, y = problem
    linear, offset = exact_operator(latents, network, operator)
    truth, through, x = density.posterior(linear, y - offset), latents.through(operator), normal(3, 2)
    close(through(x) - offset, linear(x))
    gradient = torch.func.vjp(through, x)[1](torch.ones(3, 1, dtype=torch.float64))[0]
    close(gradient, linear.adjoint(torch.ones(3, 1, dtype=torch.float64)))
    sampler = ss.inverse.TwistedParticles(steps=40)
    found = sampler(density.score_model(LONG), through, y, (800, 2), seed=0)
    assert abs(found.log_evidence - float(density.log_evidence(linear, y - offset))) < 5 * found.stderr + 0.02
    error = truth.covariance().diagonal().sqrt() / math.sqrt(found.ancestors)
    assert ((found.mean() - truth.mean()).abs() < 5 * error).all()


def test_samplers_and_flow_maps_of_latents_decode_to_pixels(problem):
    """A Gaussian of latents: samples have the mean and covariance of W z, and a flow map the bound of the flow."""
    latents, network, *_ = problem
    model, density = gaussian(LONG, (2,))
    mean = network.matrix @ (1.5 * density.mean() + 0.2)
    w = 1.5 * network.matrix
    covariance = w @ density.covariance() @ w.mT
    for samples in (
        ss.samplers.PredictorCorrector(ss.samplers.DDIM(), steps=30)(model, shape=(4000, 2), seeds=range(4000)).x,
        model.sample((4000, 2), steps=1, seeds=range(4000)),
    ):
        pixels = latents.inverse(samples.double())
        within(pixels, mean)
        close(torch.cov(pixels.mT), covariance, rtol=0, atol=0.15 * float(covariance.diagonal().max()))
    data, stream = normal(4, 3), RandomStream(seeds=range(4))
    state, nats = DataMap(latents).draw(data, stream, LONG)
    jumps = model.log_prob(state, steps=2).value + nats
    flow = ss.log_prob(model, state, trace=ss.ExactTrace(), solver=Adams(60)).value + nats
    close(jumps, flow, rtol=0, atol=2e-3)
