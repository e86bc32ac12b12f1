"""The blocks of the U-Net against their formulas."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from scoresde.networks import blocks
from scoresde.networks.blocks import Attention, Block, NetworkStyle, ResidualBlock
from scoresde.networks.resampling import Resample, ResampledConvolution
from tests.conftest import normal
from tests.networks.test_layers import DIMS, difference, randomised

FIR = (1, 3, 3, 1)
BOOLEANS = (False, True)
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def normalised(x, groups, eps=1e-6):
    """Every group of channels of a sample with mean 0 and variance 1."""
    grouped = x.reshape(len(x), groups, -1)
    centred = grouped - grouped.mean(dim=2, keepdim=True)
    return (centred / (centred.square().mean(dim=2, keepdim=True) + eps).sqrt()).reshape(x.shape)


def over_space(v, x):
    """A value for each channel, at every position of x."""
    return v.reshape(*v.shape, *[1] * (x.ndim - 2))


def norm(layer, x, groups, eps=1e-6):
    return normalised(x, groups, eps) * over_space(layer.weight, x) + over_space(layer.bias, x)


def convolve(layer, x):
    return CONVOLVE[x.ndim - 2](x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)


def affine(layer, x):
    return x @ layer.weight.T + layer.bias


def silu(x):
    return x / (1 + torch.exp(-x))


def joined(style, skip, update):
    return (skip + update) / (math.sqrt(2) if style.skip_rescale else 1)


def residual(block, style, x, time, direction, groups, project):
    """The output of a residual block, computed from its weights."""
    resample = Resample(style.dims, direction, style.fir).double() if direction else lambda x: x
    h = convolve(block.conv1, resample(silu(norm(block.norm1, x, groups[0], style.norm_eps))))
    features = affine(block.time, time)
    if style.scale_shift:
        scale, shift = (over_space(part, h) for part in (features[:, : h.shape[1]], features[:, h.shape[1] :]))
        h = norm(block.norm2, h, groups[1], style.norm_eps) * (1 + scale) + shift
    else:
        h = norm(block.norm2, h + over_space(features, h), groups[1], style.norm_eps)
    skip = resample(x)
    return joined(style, convolve(block.skip, skip) if project else skip, convolve(block.conv2, silu(h)))


STYLES = [
    {},
    {"scale_shift": True, "fir": FIR, "norm_eps": 1e-2},
    {"skip_rescale": False},
    {"project_skip": False, "fir": FIR},
    {"dims": 1, "fir": FIR},
    {"dims": 3, "scale_shift": True, "fir": FIR},
]


@pytest.mark.parametrize("out", [8, 4])
@pytest.mark.parametrize("direction", [None, "down", "up"])
@pytest.mark.parametrize("options", STYLES, ids=str)
def test_residual_block_is_its_formula(options, direction, out):
    style = NetworkStyle(time_features=6, **options)
    x, time = normal(2, 8, *[4] * style.dims), normal(2, 6, seed=1)
    block = randomised(ResidualBlock(style, 8, out, direction))
    project = out != 8 or (direction is not None and style.project_skip)
    assert (block.skip is not None) == project
    torch.testing.assert_close(block(x, time), residual(block, style, x, time, direction, (2, out // 4), project))


@pytest.mark.parametrize("direction", [None, "down", "up"])
def test_blocks_start_as_their_skip(direction):
    style, x, time = NetworkStyle(time_features=16, project_skip=False), normal(2, 8, 4, 4).float(), torch.ones(2, 16)
    resampled = {None: x, "down": F.avg_pool2d(x, 2), "up": F.interpolate(x, scale_factor=2)}[direction]
    torch.testing.assert_close(ResidualBlock(style, 8, 8, direction)(x, time), resampled / math.sqrt(2))
    torch.testing.assert_close(Attention(style, 8)(x), x / math.sqrt(2))
    torch.testing.assert_close(Attention(style, 8, 6)(x, torch.ones(2, 5, 6)), x / math.sqrt(2))


@pytest.mark.parametrize("scale_shift", BOOLEANS)
def test_dropout_is_before_the_last_convolution(scale_shift):
    """If it drops everything, that convolution adds only its bias."""
    block = randomised(ResidualBlock(NetworkStyle(time_features=6, dropout=1.0, scale_shift=scale_shift), 8, 8))
    x, time = normal(2, 8, 4, 4), normal(2, 6, seed=1)
    dropped = joined(block.style, x, over_space(block.conv2.bias, x))
    assert difference(block(x, time), dropped) > 1e-3
    torch.testing.assert_close(block.train()(x, time), dropped)


def softmax_attention(query, key, value, heads):
    """For queries (B, C, N), keys and values (B, C, L): (B, C, N), each head on its own channels."""
    parts = []
    for q, k, v in zip(*(part.chunk(heads, dim=1) for part in (query, key, value)), strict=True):
        exps = torch.exp(torch.einsum("bcn,bcl->bnl", q, k) / math.sqrt(q.shape[1]))
        parts.append(torch.einsum("bnl,bcl->bcn", exps / exps.sum(dim=2, keepdim=True), v))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("context_features", [0, 6])
@pytest.mark.parametrize(
    ("options", "heads"),
    [
        ({}, 1),
        ({"heads": 2, "dims": 1}, 2),
        ({"head_channels": 2}, 4),
        ({"heads": 3, "head_channels": 8, "dims": 3}, 1),
        ({"heads": 4, "skip_rescale": False, "norm_eps": 1e-2}, 4),
    ],
    ids=str,
)
def test_attention_is_softmax_attention(options, heads, context_features):
    """To all positions, or to the vectors of a context."""
    style = NetworkStyle(**options)
    x, context = normal(2, 8, *[3, 4, 2][: style.dims]), normal(2, 5, 6, seed=1) if context_features else None
    attention = randomised(Attention(style, 8, context_features))
    tokens = norm(attention.norm, x, 2, style.norm_eps)
    if context is None:
        query, key, value = convolve(attention.qkv, tokens).flatten(2).chunk(3, dim=1)
    else:
        query = convolve(attention.query, tokens).flatten(2)
        key, value = affine(attention.context, context).transpose(1, 2).chunk(2, dim=1)
    mixed = softmax_attention(query, key, value, heads).reshape(x.shape)
    torch.testing.assert_close(attention(x, context), joined(style, x, convolve(attention.out, mixed)))


@pytest.mark.parametrize("context_features", [0, 6])
def test_attention_can_use_the_fused_kernels(context_features):
    """They reject queries, keys and values with strided features."""
    attention = Attention(NetworkStyle(heads=2), 8, context_features)
    x, context = normal(2, 8, 4, 4).float(), normal(2, 5, context_features).float() if context_features else None
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert attention(x, context).shape == x.shape


def test_queries_start_with_a_tenth_of_the_variance():
    torch.manual_seed(0)
    assert float(Attention(NetworkStyle(), 100).qkv.weight.detach().var()) == pytest.approx(0.1 / 100, rel=0.02)


@pytest.mark.parametrize(("options", "heads"), [({"heads": 3}, 3), ({"head_channels": 16}, 0), ({"heads": 0}, 0)])
def test_heads_must_divide_the_channels(options, heads):
    with pytest.raises(ValueError, match=f"heads must be at least 1 and divide .*; got 8 channels and {heads} heads"):
        Attention(NetworkStyle(**options), 8)


@pytest.mark.parametrize("checkpointing", BOOLEANS)
def test_block_is_residual_then_attention_then_context(checkpointing):
    style = NetworkStyle(time_features=6, context_features=5, checkpointing=checkpointing)
    block = randomised(Block(style, 8, 4, attends=True, resample="down"))
    x, time, context = normal(2, 8, 4, 4), normal(2, 6, seed=1), normal(2, 3, 5, seed=2)
    attended = block.attention(block.residual(x, time))
    assert torch.equal(block(x, time), attended)
    assert torch.equal(block(x, time, context), block.cross(attended, context))
    assert block(x, time).shape == (2, 4, 2, 2)
    for context_features in (0, 5):
        for attends in BOOLEANS:
            block = Block(NetworkStyle(time_features=6, context_features=context_features), 4, 4, attends)
            assert (block.attention is not None, block.cross is not None) == (attends, attends and context_features > 0)


@pytest.mark.parametrize(
    ("resampling", "kind"),
    [
        (blocks.residual_resampling, Block),
        (blocks.convolution_resampling, ResampledConvolution),
        (blocks.filter_resampling, Resample),
    ],
)
def test_resampling_modules_accept_the_arguments_of_a_block(resampling, kind):
    """They keep the channels and use the filter of the style."""
    style, x, time = NetworkStyle(dims=1, time_features=6, fir=FIR), normal(2, 4, 8), normal(2, 6, seed=1)
    for direction, length in (("down", 4), ("up", 16)):
        module = randomised(resampling(style, 4, direction))
        assert type(module) is kind
        output = module(x, time, None)
        assert output.shape == (2, 4, length)
        assert (
            difference(output, randomised(resampling(NetworkStyle(dims=1, time_features=6), 4, direction))(x, time))
            > 1e-3
        )


@DIMS
def test_head_is_norm_silu_convolution(dims):
    x, style = normal(3, 8, *[4] * dims), NetworkStyle(dims=dims, norm_eps=1e-2, group_size=2)
    head = randomised(blocks.Head(style, 8, 3))
    torch.testing.assert_close(head(x), convolve(head.conv, silu(norm(head.norm, x, 4, 1e-2))))
    assert not blocks.Head(style, 8, 3)(x.float()).any()
