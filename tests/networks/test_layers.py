"""Linear layers, normalisation and recomputation."""

import math

import pytest
import torch
from torch import nn

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


def recorded(module, runs):
    """Appends the module to `runs` at each of its calls; returns it."""
    module.register_forward_pre_hook(lambda module, _: runs.append(module))
    return module


@DIMS
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_keeps_the_resolution(dims, kernel):
    x = torch.randn(2, 3, *[6] * dims, generator=seeded())
    assert layers.convolution(dims, 3, 5, kernel)(x).shape == (2, 5, *[6] * dims)


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0])
def test_weights_have_the_variance_of_the_fan_average(scale):
    torch.manual_seed(0)
    given = nn.Conv1d(40, 80, 5)
    assert layers.initialise(given, scale) is given
    cases = (layers.linear(200, 300, scale), 250), (layers.convolution(2, 30, 60, scale=scale), 9 * 45), (given, 5 * 60)
    for layer, fan in cases:
        assert float(layer.weight.detach().square().mean()) == pytest.approx(scale / fan, rel=0.05)
        assert float(layer.weight.detach().abs().max()) <= math.sqrt(3 * scale / fan)
        assert not layer.bias.any()


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (3, 1), (4, 1), (8, 2), (12, 3), (20, 5), (44, 11), (96, 24), (128, 32), (384, 32)]
)
def test_group_norm_divides_the_channels(channels, groups):
    assert layers.group_norm(channels).num_groups == groups


@pytest.mark.parametrize(
    ("channels", "group_size", "groups"), [(8, 1, 8), (44, 1, 22), (128, 1, 32), (128, 8, 16), (12, 5, 2), (4, 8, 1)]
)
def test_group_norm_has_groups_of_a_size_at_least(channels, group_size, groups):
    assert layers.group_norm(channels, group_size).num_groups == groups


def test_group_norm_divides_by_the_standard_deviation_of_its_group():
    x, norm = 1e-3 * normal(2, 8, 3, 5), layers.group_norm(8, eps=1e-5).double()
    groups = x.reshape(2, 2, 4, 15)
    centred = groups - groups.mean(dim=(2, 3), keepdim=True)
    expected = centred / (centred.square().mean(dim=(2, 3), keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected.reshape(x.shape))
    assert layers.group_norm(8).eps == 1e-6


def test_attend_in_every_mode_of_differentiation():
    """Where the fused kernels serve the value, they have no forward-mode derivative: there plain operations do."""
    query, key, value = normal(2, 3, 4, 6), normal(2, 3, 5, 6, seed=1), normal(2, 3, 5, 6, seed=2)

    def written_out(query):
        exps = torch.exp(torch.einsum("bhqc,bhkc->bhqk", query, key) / math.sqrt(6))
        return torch.einsum("bhqk,bhkc->bhqc", exps / exps.sum(dim=3, keepdim=True), value)

    def attended(query):
        return layers.attend(query, key, value)

    torch.testing.assert_close(attended(query), written_out(query))
    tangent, cotangent = normal(2, 3, 4, 6, seed=3), normal(2, 3, 4, 6, seed=4)
    for actual, expected in (
        (torch.func.jvp(attended, (query,), (tangent,))[1], torch.func.jvp(written_out, (query,), (tangent,))[1]),
        (torch.func.vjp(attended, query)[1](cotangent)[0], torch.func.vjp(written_out, query)[1](cotangent)[0]),
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("active", [False, True])
def test_checkpointed_runs_again_in_the_backward_pass_alone(active):
    runs = []
    layer = recorded(nn.Bilinear(3, 4, 2).double(), runs)
    x, y = normal(5, 3).requires_grad_(), normal(5, 4, seed=1)
    output = layers.checkpointed(layer, x, y, active=active)
    assert len(runs) == 1
    torch.testing.assert_close(output, nn.functional.bilinear(x, y, layer.weight, layer.bias))
    gradient = torch.autograd.grad(output.sum(), x)[0]
    torch.testing.assert_close(gradient, torch.einsum("oij,bj->bi", layer.weight, y))
    assert len(runs) == (2 if active else 1)
    with torch.no_grad():
        assert not layers.checkpointed(layer, x, y, active=active).requires_grad
