"""The autoencoder of latent diffusion: its published size, its shapes, and what each position reads."""

import pytest
import torch
from torch import nn

from scoresde.networks import BlockStyle, ConvolutionalAutoencoder
from tests.conftest import seeded


def test_it_has_the_size_of_the_published_one():
    """The first stage of Stable Diffusion, a KL autoencoder of factor 8 (2112.10752): 83,653,863 parameters."""
    with torch.device("meta"):
        network = ConvolutionalAutoencoder(256, 3, 4, width=128, multipliers=(1, 2, 4, 4), blocks=2)
    assert sum(p.numel() for p in network.parameters()) == 83_653_863
    assert network.latent_shape == (4, 32, 32)


@pytest.mark.parametrize("sides", [(8,), (8, 12), (4, 4, 8)])
@pytest.mark.parametrize("scales", [False, True])
def test_encoder_and_decoder_fit_each_other_in_any_dimensions(sides, scales):
    torch.manual_seed(0)
    network = ConvolutionalAutoencoder(sides, 2, 3, width=4, multipliers=(1, 2, 2), blocks=1, scales=scales)
    x = torch.randn(2, 2, *sides, generator=seeded())
    mean, log_std = network.encode(x)
    assert mean.shape == log_std.shape == (2, *network.latent_shape) == (2, 3, *(side // 4 for side in sides))
    output, log_scale = network.decode(mean)
    assert output.shape == x.shape
    assert (log_scale is None) == (not scales)
    torch.testing.assert_close(network.encode(x[1:])[0], mean[1:], rtol=1e-4, atol=1e-5)
    assert float(output.detach().std()) > 1e-3  # the last layer is not zero at the start
    with torch.no_grad():
        for parameter in network.parameters():  # the residual blocks start as the identity
            parameter += 0.1 * torch.randn(parameter.shape, generator=seeded())
    parts = [*network.encode(x), *(part for part in network.decode(network.encode(x)[0]) if part is not None)]
    gradients = torch.autograd.grad(sum(part.square().sum() for part in parts), network.parameters())
    assert all(bool((gradient != 0).any()) for gradient in gradients)


def test_log_scales_stay_bounded():
    network = ConvolutionalAutoencoder(4, 1, 1, width=4, multipliers=(1, 1), blocks=1, scales=True)
    nn.init.constant_(network.to_moments.bias, 1e6)
    nn.init.constant_(network.decoder_output.conv.bias, -1e6)
    assert float(network.encode(torch.zeros(1, 1, 4, 4))[1].max()) == 10.0
    assert float(network.decode(torch.zeros(1, 1, 2, 2))[1].min()) == -10.0


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="each side of image_size must be a multiple of 4; got 6"):
        ConvolutionalAutoencoder(6, multipliers=(1, 1, 1))
    with pytest.raises(ValueError, match=r"attention must be at resolutions among \[8, 4\]; got \[2\]"):
        ConvolutionalAutoencoder(8, multipliers=(1, 1), attention=[2])
    network = ConvolutionalAutoencoder(8, width=4, multipliers=(1, 1), block=BlockStyle(dropout=0.0))
    with pytest.raises(ValueError, match="expected states of shape"):
        network.encode(torch.zeros(1, 3, 4, 4))
