"""The transformer blocks of latent diffusion, and the class label as a context."""

import math

import pytest
import torch

from scoresde.networks import BlockStyle, Conditions, LabelContext, SpatialTransformer, UNet
from scoresde.networks.blocks import NetworkStyle
from scoresde.networks.spatial_transformer import TransformerAttention
from tests.conftest import seeded


def block(context_features=0, heads=2):
    torch.manual_seed(0)
    module = SpatialTransformer(NetworkStyle(heads=heads, context_features=context_features), 8).double()
    torch.nn.init.normal_(module.leave.weight, generator=seeded())
    return module


def test_attention_is_the_formula():
    torch.manual_seed(0)
    attention, x = TransformerAttention(6, 1, 4).double(), torch.randn(2, 5, 6, generator=seeded(), dtype=torch.float64)
    context = torch.randn(2, 3, 4, generator=seeded(1), dtype=torch.float64)
    query, key, value = attention.query(attention.norm(x)), attention.key(context), attention.value(context)
    weights = (query @ key.mT / math.sqrt(6)).softmax(dim=2)
    torch.testing.assert_close(attention(x, context), attention.out(weights @ value))


def test_a_block_starts_as_the_identity_and_commutes_with_permutations_of_the_positions():
    x, order = torch.randn(2, 8, 3, 4, generator=seeded(), dtype=torch.float64), torch.randperm(12, generator=seeded())
    start = SpatialTransformer(NetworkStyle(), 8).double()
    assert torch.equal(start(x), x)
    module = block()
    shuffled = x.flatten(2)[..., order].reshape(x.shape)
    torch.testing.assert_close(module(shuffled).flatten(2), module(x).flatten(2)[..., order])
    assert float((module(x) - x).detach().abs().max()) > 0.1


def test_padding_in_the_context_is_left_out():
    module, x = block(4), torch.randn(3, 8, 2, 2, generator=seeded(), dtype=torch.float64)
    context = torch.randn(3, 2, 4, generator=seeded(1), dtype=torch.float64)
    padded = torch.cat([context, torch.full((3, 2, 4), torch.nan, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(module(x, padded), module(x, context))
    padded[1] = torch.nan  # the null condition
    torch.testing.assert_close(module(x, padded)[1], module(x)[1])
    assert not torch.equal(module(x, context), module(x))


def test_each_label_has_a_context_of_its_own_and_so_has_the_null_label():
    torch.manual_seed(0)
    style = BlockStyle(dropout=0.0, attention_block=SpatialTransformer, heads=1)
    unet = UNet(4, 2, 8, (1,), 1, (4,), block=style, conditions=Conditions(context_features=3))
    network = LabelContext(unet, 2, 3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=seeded())
    x, c = torch.randn(1, 2, 4, 4, generator=seeded()).expand(4, -1, -1, -1), torch.full((4,), 0.3)
    output = network(x, c, torch.tensor([0, 1, -1, 1]))
    torch.testing.assert_close(output[1], output[3])
    torch.testing.assert_close(network(x, c), output[2:3].expand(4, -1, -1, -1))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert float((output[i] - output[j]).abs().max()) > 1e-4


def test_the_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="must be at least 1 and divide the number of channels; got 8 channels and 3"):
        block(heads=3)
