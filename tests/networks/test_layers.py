"""Layers: embeddings, convolutions, residual blocks and attention against what they stand for."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scoresde.networks import layers
from tests.conftest import normal, seeded

DIMS = pytest.mark.parametrize("dims", [1, 2, 3])


def randomised(module, seed=0):
    """The module in float64 and eval mode with random parameters: none is left at the zero it starts from."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return module.double().eval()


def difference(a, b):
    """How much every sample of a differs from that of b, at least: the largest entry of the least different one."""
    return float((a - b).detach().abs().flatten(1).max(dim=1).values.min())


@pytest.mark.parametrize(("features", "scale"), [(4, 1.0), (16, 1000.0)])
def test_positional_embedding_frequencies(features, scale):
    embedding = layers.PositionalEmbedding(features, scale)
    frequencies = torch.logspace(math.log10(scale), math.log10(scale) - 4, features // 2)
    torch.testing.assert_close(embedding.frequencies, frequencies, rtol=1e-5, atol=0)
    label = torch.tensor([0.0, 0.3, -2.0])
    phase = label[:, None] * embedding.frequencies
    torch.testing.assert_close(embedding(label), torch.cat([torch.sin(phase), torch.cos(phase)], dim=1))
    assert embedding(label.double()).dtype == torch.float64
    assert not embedding.state_dict()


@pytest.mark.parametrize("features", [2, 7])
def test_positional_embedding_needs_pairs(features):
    with pytest.raises(ValueError, match=f"even number of features, 4 or more, expected; got {features}"):
        layers.PositionalEmbedding(features)


@DIMS
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_keeps_the_resolution(dims, kernel):
    x = torch.randn(2, 3, *[6] * dims, generator=seeded())
    assert layers.convolution(dims, 3, 5, kernel)(x).shape == (2, 5, *[6] * dims)


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0])
def test_weights_have_the_variance_of_the_fan_average(scale):
    torch.manual_seed(0)
    for layer, fan in ((layers.linear(200, 300, scale), 250), (layers.convolution(2, 30, 60, scale=scale), 9 * 45)):
        assert float(layer.weight.detach().square().mean()) == pytest.approx(scale / fan, rel=0.05)
        assert float(layer.weight.detach().abs().max()) <= math.sqrt(3 * scale / fan)
        assert not layer.bias.any()


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (3, 1), (4, 1), (8, 2), (12, 3), (20, 5), (44, 11), (96, 24), (128, 32), (384, 32)]
)
def test_group_norm_divides_the_channels(channels, groups):
    assert layers.group_norm(channels).num_groups == groups


def test_time_embedding_reads_the_condition():
    label, cond = normal(4), normal(4, 3, seed=1)
    embedding = randomised(layers.TimeEmbedding(8, 16, cond_features=3))
    outputs = [embedding(label, None), embedding(label, cond), embedding(label, cond.flip(0))]
    assert outputs[0].shape == (4, 16)
    assert min(difference(a, b) for a, b in pairwise(outputs)) > 1e-3
    with pytest.raises(ValueError, match="without a condition"):
        layers.TimeEmbedding(8, 16)(label.float(), cond.float())


def test_attention_is_softmax_attention_over_all_positions():
    x = normal(2, 8, 3, 4)
    attention = randomised(layers.SelfAttention(2, 8, heads=2))
    qkv = attention.qkv(attention.norm(x)).flatten(2)
    q, k, v = (part.unflatten(1, (2, 4)) for part in qkv.chunk(3, dim=1))
    weights = torch.einsum("bhcq,bhck->bhqk", q, k).div(math.sqrt(4)).softmax(dim=3)
    mixed = torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(x.shape)
    torch.testing.assert_close(attention(x), (x + attention.out(mixed)) / math.sqrt(2))
    with pytest.raises(ValueError, match="8 channels, 3 heads"):
        layers.SelfAttention(2, 8, heads=3)


@DIMS
def test_attention_starts_as_its_skip(dims):
    x = torch.randn(2, 8, *[4] * dims, generator=seeded())
    torch.testing.assert_close(layers.SelfAttention(dims, 8)(x), x / math.sqrt(2))


@DIMS
@pytest.mark.parametrize("resample", [None, "down", "up"])
def test_residual_block_starts_as_its_skip(dims, resample):
    x, time = torch.randn(2, 8, *[4] * dims, generator=seeded()), torch.randn(2, 16, generator=seeded())
    pool = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[dims - 1](2)
    resampled = {None: x, "down": pool(x), "up": F.interpolate(x, scale_factor=2)}[resample]
    assert float(resampled.std()) > 0.1
    block = layers.ResidualBlock(dims, 8, 8, 16, resample)
    torch.testing.assert_close(block(x, time), block.skip(resampled) / math.sqrt(2))
    assert isinstance(block.skip, nn.Identity) == (resample is None)


@DIMS
def test_residual_block_adds_time_to_every_position(dims):
    x, time = normal(2, 8, *[4] * dims), normal(2, 16, seed=1)
    block = randomised(layers.ResidualBlock(dims, 8, 4, 16))
    seen = []
    block.norm2.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    block(x, time)
    block(x, torch.zeros_like(time))
    shift = block.time(time) - block.time(torch.zeros_like(time))
    torch.testing.assert_close(seen[0] - seen[1], shift.reshape(2, 4, *[1] * dims).expand_as(seen[0]))
