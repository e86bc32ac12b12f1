"""Pools against their definitions, one sample and one position after the other."""

import math

import pytest
import torch
from torch.nn import functional as F

from scoresde.networks.blocks import NetworkStyle
from scoresde.networks.pooling import AttentionPool, AveragePool, SkipPool
from tests.conftest import normal
from tests.networks.test_layers import randomised

SIDES = [(4,), (2, 3), (2, 2, 2)]


def features(sides):
    """Features of a fine and a coarse resolution, with 4 and 8 channels."""
    return [normal(2, 4, *(2 * side for side in sides)), normal(2, 8, *sides, seed=1)]


def pool(kind, sides, **options):
    style = NetworkStyle(dims=len(sides), heads=2, group_size=4)
    return randomised(kind(style, sides, [4, 8], 5, **options))


@pytest.mark.parametrize("sides", SIDES, ids=len)
def test_average_pool(sides):
    module, parts = pool(AveragePool, sides), features(sides)
    mean = F.silu(module.norm(parts[-1])).flatten(2).mean(dim=2)
    torch.testing.assert_close(module(parts), mean @ module.linear.weight.T + module.linear.bias)


@pytest.mark.parametrize("sides", SIDES, ids=len)
def test_attention_pool(sides):
    """The mean token attends to itself and to every position, head by head."""
    module, parts = pool(AttentionPool, sides), features(sides)
    hidden = F.silu(module.norm(parts[-1])).flatten(2)
    for row, logits in zip(hidden, module(parts), strict=True):
        tokens = torch.stack([row.mean(dim=1), *row.T]) + module.positions
        query, key, value = (tokens @ module.qkv.weight.T + module.qkv.bias).chunk(3, dim=1)
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            weights = torch.softmax(key[:, head] @ query[0, head] / math.sqrt(4), dim=0)
            heads.append(weights @ value[:, head])
        torch.testing.assert_close(logits, torch.cat(heads) @ module.linear.weight.T + module.linear.bias)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("sides", SIDES, ids=len)
def test_skip_pool(sides, normalise):
    module, parts = pool(SkipPool, sides, normalise=normalise, hidden=8), features(sides)
    hidden = module.inner(torch.cat([part.flatten(2).mean(dim=2) for part in parts], dim=1))
    hidden = F.silu(F.group_norm(hidden, 2, module.norm.weight, module.norm.bias, 1e-6)) if normalise else hidden.relu()
    torch.testing.assert_close(module(parts), module.linear(hidden))
