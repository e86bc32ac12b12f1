"""Densities of decoders, and q(z | x) of autoencoders, against torch.distributions and closed forms."""

import math

import pytest
import torch
from torch.distributions import Normal as TorchNormal
from torch.distributions import kl_divergence

import scoresde as ss
from scoresde.pipelines.autoencoder import Autoencoder, GreyLevels, Normal, Posterior
from scoresde.random_stream import RandomStream
from tests.conftest import close, f64, normal, seeded
from tests.pipelines.linear import LinearNetwork


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 0.3), (-0.9, 0.01), (1.4, 0.05), (0.2, 1e-4), (5.0, 1e-3), (0, 30)])
def test_probabilities_of_all_grey_levels_sum_to_one(mean, scale):
    density = GreyLevels(16, -1.0, 1.0)
    centres = density.canonical(torch.linspace(-1, 1, 16 + 1, dtype=torch.float64)[:-1])
    log_p = density.log_prob(centres, f64(mean), f64(scale).log()) + math.log(density.width)
    close(log_p.exp().sum(), f64(1.0), rtol=0, atol=1e-12)
    assert bool(torch.isfinite(log_p).all())


def test_the_probability_of_a_level_is_that_of_the_logistic_distribution_on_its_cell():
    density, mean, scale = GreyLevels(16, -1.0, 1.0), 0.1, 0.2
    cell = torch.tensor([4], dtype=torch.float64)
    edges = -1 + density.width * torch.cat([cell, cell + 1])
    low, high = torch.sigmoid((edges - mean) / scale)
    inside = density.canonical(edges[:1])
    close(density.log_prob(inside, f64(mean), f64(scale).log()), ((high - low) / density.width).log()[None])
    first, last = f64(-0.99), f64(0.99)
    log_scale = f64(scale).log()
    close(
        density.log_prob(first, f64(mean), log_scale),
        torch.sigmoid((-1 + density.width - f64(mean)) / scale).log() - math.log(density.width),
    )
    close(
        density.log_prob(last, f64(mean), log_scale),
        torch.sigmoid((f64(mean) - 1 + density.width) / scale).log() - math.log(density.width),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_density_is_constant_on_the_cell_of_a_level(dtype):
    """So uniform dequantisation does not change the probability of a level, nor its latent."""
    density, transform = GreyLevels(256, -1.0, 1.0), ss.data.Levels(256, -1, 1)
    levels = torch.arange(256, dtype=dtype)
    mean, log_scale = f64(0.05).to(dtype), f64(-3.0).to(dtype)
    values = [density.log_prob(transform(levels + u), mean, log_scale) for u in (0.0, 0.3, 0.99)]
    centres = [density.canonical(transform(levels + u)) for u in (0.0, 0.3, 0.99)]
    for value, centre in zip(values[1:], centres[1:], strict=True):
        assert torch.equal(value, values[0])
        assert torch.equal(centre, centres[0])
    close(centres[0].double(), transform(levels.double() + 0.5), rtol=0, atol=1e-6)


def test_log_q_and_the_divergence_are_those_of_normal_distributions():
    mean, log_std = normal(4, 3, 2), 0.3 * normal(4, 3, 2, seed=1)
    posterior, reference = Posterior(mean, log_std), TorchNormal(mean, log_std.exp())
    z, log_q = posterior.sample(RandomStream(seeds=range(4)))
    close(log_q, reference.log_prob(z).flatten(1).sum(dim=1))
    divergence = kl_divergence(reference, TorchNormal(torch.zeros_like(mean), torch.ones_like(mean)))
    close(posterior.divergence(), divergence.flatten(1).sum(dim=1))
    alone, _ = Posterior(mean[2:3], log_std[2:3]).sample(RandomStream(seeds=[2]))
    assert torch.equal(alone[0], z[2])


def test_a_decoder_without_scales_has_one_for_each_channel():
    network = ss.networks.ConvolutionalAutoencoder(8, 2, 1, width=4, multipliers=(1, 2), blocks=1)
    model = Autoencoder(network, Normal(), log_scale=-1.5)
    assert tuple(model.log_scale.shape) == (2,)
    x = torch.randn(2, 2, 8, 8, generator=seeded())
    found = model.likelihood(x, model.encode(x).mean)
    close(found.log_prob, TorchNormal(found.mean, math.exp(-1.5)).log_prob(x).double().flatten(1).sum(dim=1), rtol=1e-5)


def test_means_stay_within_two_levels_of_the_range():
    density = GreyLevels(8, 0.0, 1.0)
    bounded = density.bounded(f64(-100.0, 0.5, 100.0))
    close(bounded, f64(-0.25, 0.5, 1.25))


def test_what_is_not_an_autoencoder_is_refused():
    with pytest.raises(TypeError, match="encode"):
        Autoencoder(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="log_prob"):
        Autoencoder(LinearNetwork((2,), (1,), 1.0, 1.0), "logistic")
    with pytest.raises(ValueError, match="low must be below high"):
        GreyLevels(8, 1.0, -1.0)


def test_many_levels_have_the_same_density_in_float32_and_float64():
    """The width of a cell is not taken from rounded edges."""
    density, mean, log_scale = GreyLevels(60000, -1.0, 1.0), f64(0.05), f64(0.7)
    x = density.canonical(torch.linspace(-0.9, 0.9, 200, dtype=torch.float64))
    single = density.log_prob(x.float(), mean.float(), log_scale.float())
    close(single.double(), density.log_prob(x, mean, log_scale), rtol=0, atol=1e-5)
