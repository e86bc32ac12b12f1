"""The objective of an autoencoder: its terms one by one, and a training whose optimum is known."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal as TorchNormal
from torch.distributions import kl_divergence

import scoresde as ss
from scoresde.dequantization import DataMap
from scoresde.flowmaps.discriminators import PatchDiscriminator
from scoresde.metrics import Pixels
from scoresde.pipelines import Autoencoder, AutoencoderObjective, GreyLevels, Normal
from scoresde.random_stream import RandomStream
from tests.conftest import close, normal, seeded
from tests.pipelines.linear import LinearNetwork

SMALL = {"image_size": 8, "channels": 3, "latent_channels": 2, "width": 4, "multipliers": (1, 2), "blocks": 1}


def value(objective, model, x):
    return objective(model, x, stream=RandomStream(seeds=range(len(x)))).value


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = Autoencoder(ss.networks.ConvolutionalAutoencoder(**SMALL), Normal())
    return model, torch.rand(4, 3, 8, 8, generator=seeded()) * 2 - 1


def test_the_value_is_the_bound_per_dimension():
    network, x = LinearNetwork((3,), (2,), 0.4, 0.2), normal(5, 3)
    model = Autoencoder(network, Normal())
    terms = AutoencoderObjective(kl_weight=0.3)(model, x, stream=RandomStream(seeds=range(5)))
    z, _ = model.encode(x).sample(RandomStream(seeds=range(5)))
    log_p = TorchNormal(z @ network.matrix.mT, 0.2).log_prob(x).sum(dim=1)
    reference = TorchNormal(x @ network.matrix, 0.4)
    divergence = kl_divergence(reference, TorchNormal(torch.zeros_like(z), torch.ones_like(z))).sum(dim=1)
    close(terms.value, (0.3 * divergence - log_p) / 3)
    assert terms.t.tolist() == [0.0] * 5
    assert terms.weight.tolist() == [1.0] * 5


def test_the_minimum_is_probabilistic_principal_components():
    """With kl_weight=1, the bound of a linear decoder is tight at the posterior: gradients vanish there (1312.6114)."""

    class Learned(LinearNetwork):
        def __init__(self):
            super().__init__((3,), (2,), 1.0, 0.5)
            std = torch.tensor([0.8, 0.6], dtype=torch.float64)  # p(x) = N(0, V V^T + 0.25), V = W diag(std)
            variance = 1 / (1 + std**2 / 0.25)
            self.up = nn.Parameter(self.matrix * std)
            self.down = nn.Parameter(self.matrix * std / 0.25 * variance)
            self.log_std = nn.Parameter(0.5 * variance.log())

        def encode(self, x):
            mean = x @ self.down
            return mean, self.log_std.expand_as(mean)

        def decode(self, z):
            mean = z @ self.up.mT
            return mean, torch.full_like(mean, math.log(0.5))

    network, count = Learned(), 40_000
    covariance = network.up @ network.up.mT + 0.25 * torch.eye(3, dtype=torch.float64)
    x = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance.detach())
    data = normal(count, 3) @ torch.linalg.cholesky(covariance.detach()).mT
    loss = AutoencoderObjective(kl_weight=1.0)(Autoencoder(network, Normal()), data, generator=seeded(1))
    assert float(loss.value.detach().mean()) == pytest.approx(-float(x.log_prob(data).mean()) / 3, abs=0.02)
    for parameter in (network.down, network.log_std):  # of q; those of p vanish in expectation over its own samples
        (gradient,) = torch.autograd.grad(loss.value.mean(), parameter, retain_graph=True)
        assert float(gradient.abs().max()) < 0.02


def test_the_perceptual_term_is_the_distance_of_the_features(small):
    model, x = small
    plain = value(AutoencoderObjective(), model, x)
    added = value(AutoencoderObjective(perceptual=Pixels(), perceptual_weight=3.0), model, x) - plain
    z, _ = model.encode(x).sample(RandomStream(seeds=range(4)))
    expected = 3.0 * (model.decode(z) - x).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(added, expected.double(), rtol=1e-4, atol=1e-5)

    class Rounded(Pixels):
        def __call__(self, images, span):
            return super().__call__(images.detach(), span)

    with pytest.raises(ValueError, match="perceptual must have a gradient in the image"):
        value(AutoencoderObjective(perceptual=Rounded()), model, x)


def test_the_two_players_of_the_adversarial_term(small):
    """The discriminator's gradient comes from its own loss, the autoencoder's from the generator's."""
    model, x = small
    discriminator = PatchDiscriminator(3, width=4, layers=2)
    plain = AutoencoderObjective()
    objective = AutoencoderObjective(discriminator=discriminator, adversarial_weight=0.5, penalty=0.0)
    total = value(objective, model, x)
    z, _ = model.encode(x).sample(RandomStream(seeds=range(4)))
    fake, real = discriminator([model.decode(z)]), discriminator([x])
    softplus = nn.functional.softplus
    generator, own = softplus(-fake), softplus(fake) + softplus(-real)
    torch.testing.assert_close(total, value(plain, model, x) + 0.5 * generator + own, rtol=1e-4, atol=1e-5)
    weight = discriminator.layers[0].weight
    (gradient,) = torch.autograd.grad(total.sum(), weight, retain_graph=True)
    detached = softplus(discriminator([model.decode(z).detach()])) + softplus(-real)
    torch.testing.assert_close(gradient, torch.autograd.grad(detached.sum(), weight, retain_graph=True)[0])
    assert dict(objective.named_parameters()).keys() == {
        f"discriminator.{n}" for n, _ in discriminator.named_parameters()
    }


def test_a_patch_discriminator_reads_patches_of_22_pixels():
    side = 1
    for layer in reversed([part for part in PatchDiscriminator(1).layers if isinstance(part, nn.Conv2d)]):
        side = (side - 1) * layer.stride[0] + layer.kernel_size[0]
    assert side == 22


def test_the_numbers_of_held_out_data_are_bits_of_the_data():
    network, images = LinearNetwork((1, 2, 2), (2, 1, 1), 0.4, 0.2), torch.randint(0, 8, (4, 1, 2, 2))
    model, data_map = Autoencoder(network, GreyLevels(8)), DataMap(ss.data.Levels(8, -1, 1), ss.Uniform())
    found = AutoencoderObjective().measured(model, images, data_map, RandomStream(seeds=range(4)))
    latents = ss.pipelines.Latents(model, data_map.transform, 0.0, 1.0)
    x = data_map.draw(images, RandomStream(seeds=range(4)), None)[0]
    _, terms = DataMap(latents, ss.Uniform()).draw_terms(images, RandomStream(seeds=range(4)), ss.VP())
    close(found["reconstruction"], -terms["reconstruction"] / (4 * math.log(2)), rtol=1e-4)
    error = (model.decode(model.encode(x).mean) - x).square().flatten(1).mean(dim=1)
    close(found["squared_error"], error, rtol=1e-4)
    close(found["kl"], model.encode(data_map.transform(images + 0.5)).divergence() / (4 * math.log(2)))


def test_another_model_is_refused():
    with pytest.raises(TypeError, match="this objective trains an Autoencoder; got ScoreModel"):
        AutoencoderObjective()(ss.ScoreModel(ss.networks.MLP(2), ss.VP()), torch.zeros(1, 2))
