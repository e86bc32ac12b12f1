"""The blocks of the U-Net against their formulas."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from scoresde.networks import blocks
from scoresde.networks.blocks import Attention, Block, ResidualBlock, Style
from scoresde.networks.resampling import Resample
from tests.conftest import normal, seeded
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


def residual(block, style, x, time, direction=None, groups=(2, 2), project=False):
    """The residual block's output, of its weights."""
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


@pytest.mark.parametrize("direction", [None, "down", "up"])
@pytest.mark.parametrize(
    ("scale_shift", "skip_rescale", "project_skip", "out"),
    list(itertools.product(BOOLEANS, BOOLEANS, BOOLEANS, (8, 4))),
)
def test_residual_block_as_written_out(direction, scale_shift, skip_rescale, project_skip, out):
    options = {"scale_shift": scale_shift, "skip_rescale": skip_rescale, "project_skip": project_skip}
    style = Style(time_features=6, fir=FIR if scale_shift else None, norm_eps=1e-2, **options)
    x, time = normal(2, 8, 4, 4), normal(2, 6, seed=1)
    block = randomised(ResidualBlock(style, 8, out, direction))
    project = out != 8 or (direction is not None and project_skip)
    assert (block.skip is not None) == project
    expected = residual(block, style, x, time, direction, groups=(2, out // 4), project=project)
    torch.testing.assert_close(block(x, time), expected)


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("direction", [None, "down", "up"])
@pytest.mark.parametrize("scale_shift", BOOLEANS)
def test_residual_block_in_other_dimensions(dims, direction, scale_shift):
    style = Style(dims=dims, time_features=6, fir=FIR, scale_shift=scale_shift, group_size=1)
    x, time = normal(2, 4, *[4] * dims), normal(2, 6, seed=1)
    out = 4 if direction else 6
    block = randomised(ResidualBlock(style, 4, out, direction))
    expected = residual(block, style, x, time, direction, groups=(4, out), project=True)
    torch.testing.assert_close(block(x, time), expected)


@DIMS
@pytest.mark.parametrize("direction", [None, "down", "up"])
def test_residual_block_starts_as_its_skip(dims, direction):
    x, time = torch.randn(2, 8, *[4] * dims, generator=seeded()), torch.randn(2, 16, generator=seeded())
    pool = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[dims - 1](2)
    resampled = {None: x, "down": pool(x), "up": F.interpolate(x, scale_factor=2)}[direction]
    block = ResidualBlock(Style(dims=dims, time_features=16, project_skip=False), 8, 8, direction)
    torch.testing.assert_close(block(x, time), resampled / math.sqrt(2))


@DIMS
def test_residual_block_adds_time_to_every_position(dims):
    x, time = normal(2, 8, *[4] * dims), normal(2, 16, seed=1)
    block = randomised(ResidualBlock(Style(dims=dims, time_features=16), 8, 4))
    seen = []
    block.norm2.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    block(x, time)
    block(x, torch.zeros_like(time))
    shift = block.time(time) - block.time(torch.zeros_like(time))
    torch.testing.assert_close(seen[0] - seen[1], shift.reshape(2, 4, *[1] * dims).expand_as(seen[0]))


@pytest.mark.parametrize("scale_shift", BOOLEANS)
def test_dropout_is_before_the_last_convolution(scale_shift):
    """Where it drops everything, that convolution adds its bias alone."""
    block = randomised(ResidualBlock(Style(time_features=6, dropout=1.0, scale_shift=scale_shift), 8, 8))
    x, time = normal(2, 8, 4, 4), normal(2, 6, seed=1)
    dropped = joined(block.style, x, over_space(block.conv2.bias, x))
    assert difference(block(x, time), dropped) > 1e-3
    torch.testing.assert_close(block.train()(x, time), dropped)


def softmax_attention(query, key, value, heads):
    """For queries (B, C, N), keys and values (B, C, L): (B, C, N), every head on its own channels."""
    parts = []
    for q, k, v in zip(*(part.chunk(heads, dim=1) for part in (query, key, value)), strict=True):
        exps = torch.exp(torch.einsum("bcn,bcl->bnl", q, k) / math.sqrt(q.shape[1]))
        parts.append(torch.einsum("bnl,bcl->bcn", exps / exps.sum(dim=2, keepdim=True), v))
    return torch.cat(parts, dim=1)


ATTENTIONS = pytest.mark.parametrize(
    ("options", "heads"),
    [
        ({}, 1),
        ({"heads": 2}, 2),
        ({"head_channels": 2}, 4),
        ({"heads": 3, "head_channels": 8}, 1),
        ({"heads": 4, "skip_rescale": False, "norm_eps": 1e-2}, 4),
    ],
    ids=str,
)


@DIMS
@ATTENTIONS
def test_attention_is_softmax_attention_over_all_positions(dims, options, heads):
    x, style = normal(2, 8, *[3, 4, 2][:dims]), Style(dims=dims, **options)
    attention = randomised(Attention(style, 8))
    query, key, value = convolve(attention.qkv, norm(attention.norm, x, 2, style.norm_eps)).flatten(2).chunk(3, dim=1)
    mixed = softmax_attention(query, key, value, heads).reshape(x.shape)
    torch.testing.assert_close(attention(x), joined(style, x, convolve(attention.out, mixed)))


@DIMS
@ATTENTIONS
def test_attention_to_a_context(dims, options, heads):
    x, context, style = normal(2, 8, *[3, 4, 2][:dims]), normal(2, 5, 6, seed=1), Style(dims=dims, **options)
    attention = randomised(Attention(style, 8, context_features=6))
    query = convolve(attention.query, norm(attention.norm, x, 2, style.norm_eps)).flatten(2)
    key, value = affine(attention.context, context).transpose(1, 2).chunk(2, dim=1)
    mixed = softmax_attention(query, key, value, heads).reshape(x.shape)
    torch.testing.assert_close(attention(x, context), joined(style, x, convolve(attention.out, mixed)))


@pytest.mark.parametrize("context_features", [0, 6])
def test_attention_may_use_the_fused_kernels(context_features):
    """They refuse queries, keys and values of which the features are strided."""
    attention = Attention(Style(heads=2), 8, context_features)
    x, context = normal(2, 8, 4, 4).float(), normal(2, 5, context_features).float() if context_features else None
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert attention(x, context).shape == x.shape


@DIMS
@pytest.mark.parametrize("context_features", [0, 6])
def test_attention_starts_as_its_skip(dims, context_features):
    x = torch.randn(2, 8, *[4] * dims, generator=seeded())
    context = torch.randn(2, 5, context_features) if context_features else None
    torch.testing.assert_close(Attention(Style(dims=dims), 8, context_features)(x, context), x / math.sqrt(2))


def test_queries_start_with_a_tenth_of_the_variance():
    torch.manual_seed(0)
    assert float(Attention(Style(), 100).qkv.weight.detach().var()) == pytest.approx(0.1 / 100, rel=0.02)


@pytest.mark.parametrize(("options", "heads"), [({"heads": 3}, 3), ({"head_channels": 16}, 0), ({"heads": 0}, 0)])
def test_attention_needs_channels_for_its_heads(options, heads):
    with pytest.raises(ValueError, match=f"channels divisible by heads expected; got 8 channels, {heads} heads"):
        Attention(Style(**options), 8)


@pytest.mark.parametrize("checkpointing", BOOLEANS)
def test_block_is_residual_then_attention_then_context(checkpointing):
    style = Style(time_features=6, context_features=5, checkpointing=checkpointing)
    block = randomised(Block(style, 8, 4, attend=True, resample="down"))
    x, time, context = normal(2, 8, 4, 4), normal(2, 6, seed=1), normal(2, 3, 5, seed=2)
    attended = block.attention(block.residual(x, time))
    assert torch.equal(block(x, time), attended)
    assert torch.equal(block(x, time, context), block.cross(attended, context))
    assert block(x, time).shape == (2, 4, 2, 2)


def test_block_attends_where_it_is_told_to():
    both, own = Style(time_features=6, context_features=5), Style(time_features=6)
    made = [(Block(style, 4, 4, attend), style, attend) for style in (both, own) for attend in BOOLEANS]
    for block, style, attend in made:
        assert (block.attention is not None) == attend
        assert (block.cross is not None) == (attend and style is both)


@DIMS
@pytest.mark.parametrize("fir", [None, FIR], ids=str)
@pytest.mark.parametrize("combine", ["sum", "cat"])
def test_input_skip(dims, fir, combine):
    skip = randomised(blocks.InputSkip(Style(dims=dims, fir=fir), 2, 4, combine))
    hidden, pyramid = normal(3, 4, *[4] * dims), normal(3, 2, *[8] * dims, seed=1)
    smaller = Resample(dims, "down", fir).double()(pyramid)
    image = torch.einsum("oi,bi...->bo...", skip.project.weight.flatten(1), smaller)
    image = image + over_space(skip.project.bias, image)
    output, carried = skip(hidden, pyramid)
    torch.testing.assert_close(output, image + hidden if combine == "sum" else torch.cat([image, hidden], dim=1))
    torch.testing.assert_close(carried, smaller)


@DIMS
@pytest.mark.parametrize("skip_rescale", BOOLEANS)
def test_input_and_output_residual(dims, skip_rescale):
    style, hidden = Style(dims=dims, fir=FIR, skip_rescale=skip_rescale), normal(3, 4, *[4] * dims)
    for residual, pyramid in (
        (randomised(blocks.InputResidual(style, 2, 4)), normal(3, 2, *[8] * dims, seed=1)),
        (randomised(blocks.OutputResidual(style, 6, 4)), normal(3, 6, *[2] * dims, seed=1)),
    ):
        expected = joined(style, residual.resample(pyramid), hidden)
        for actual in residual(hidden, pyramid):
            torch.testing.assert_close(actual, expected)
        assert difference(expected, joined(style, hidden, 0)) > 1e-3


@DIMS
def test_output_residual_begins_with_a_head(dims):
    residual, hidden = randomised(blocks.OutputResidual(Style(dims=dims), None, 8)), normal(3, 8, *[4] * dims)
    output, pyramid = residual(hidden, None)
    assert torch.equal(output, hidden)
    torch.testing.assert_close(pyramid, convolve(residual.head.conv, silu(norm(residual.head.norm, hidden, 2))))


def test_output_residual_does_not_begin_at_zero():
    torch.manual_seed(0)
    head = blocks.OutputResidual(Style(), None, 64).head
    assert float(head.conv.weight.detach().var()) == pytest.approx(1 / (9 * 64), rel=0.05)


@DIMS
@pytest.mark.parametrize("fir", [None, FIR], ids=str)
def test_output_skip(dims, fir):
    skip = randomised(blocks.OutputSkip(Style(dims=dims, fir=fir), 2, 8))
    hidden, pyramid = normal(3, 8, *[4] * dims), normal(3, 2, *[2] * dims, seed=1)
    image = convolve(skip.head.conv, silu(norm(skip.head.norm, hidden, 2)))
    for before, expected in ((None, image), (pyramid, Resample(dims, "up", fir).double()(pyramid) + image)):
        output, after = skip(hidden, before)
        assert torch.equal(output, hidden)
        torch.testing.assert_close(after, expected)


@DIMS
def test_head_is_norm_silu_convolution(dims):
    x = normal(3, 8, *[4] * dims)
    head = randomised(blocks.Head(Style(dims=dims, norm_eps=1e-2, group_size=2), 8, 3))
    torch.testing.assert_close(head(x), convolve(head.conv, silu(norm(head.norm, x, 4, 1e-2))))
    assert not blocks.Head(Style(dims=dims), 8, 3)(x.float()).any()
