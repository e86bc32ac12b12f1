"""Linear layers, normalisation, attention and checkpointing; what the tests of networks share."""

import math

import pytest
import torch
from torch import nn

from scoresde.networks import layers
from tests.conftest import normal, seeded

DIMS = pytest.mark.parametrize("dims", [1, 2, 3])


def randomised(module, seed=0):
    """Return the module in float64 and eval mode with random parameters, so that none stays at its initial zero."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return module.double().eval()


def difference(a, b):
    """Return by how much a and b differ in every sample: the smallest over samples of the largest difference."""
    return float((a - b).detach().abs().flatten(1).max(dim=1).values.min())


def recorded(module, runs):
    """Append the module to `runs` at each of its calls; return it."""
    module.register_forward_pre_hook(lambda module, _: runs.append(module))
    return module


def test_image_size_is_the_side_of_a_square_or_a_list_of_sides():
    assert layers.spatial_sides(4) == (4, 4)
    assert [layers.spatial_sides([4, 2, 6][:n]) for n in (1, 2, 3)] == [(4,), (4, 2), (4, 2, 6)]
    for wrong in ((), (4, 4, 4, 4), 0, (4, -1)):
        with pytest.raises(ValueError, match=r"one side or a list of 1 to 3 positive sides; got "):
            layers.spatial_sides(wrong)


@pytest.mark.parametrize(("sides", "padded"), [((5,), (8,)), ((8, 7), (8, 8)), ((1, 4, 6), (4, 4, 8))])
def test_a_border_of_zeros_is_added_and_removed(sides, padded):
    border, x = layers.Border(sides, 4, pad=True), normal(2, 3, *sides)
    assert border.padded == padded
    around = border.add(x)
    assert around.shape == (2, 3, *padded)
    assert torch.equal(border.remove(around), x)
    assert float(around.abs().sum()) == pytest.approx(float(x.abs().sum()), rel=1e-12)
    before = [(wide - side) // 2 for side, wide in zip(sides, padded, strict=True)]
    place = (..., *(slice(start, start + side) for start, side in zip(before, sides, strict=True)))
    assert torch.equal(around[place], x)


def test_patches_become_channels_and_pixels_again():
    """In two dimensions it is PyTorch's pixel unshuffle."""
    x = normal(2, 3, 4, 6)
    assert torch.equal(layers.patches_to_channels(x, 2), nn.functional.pixel_unshuffle(x, 2))
    for sides in ((6,), (3, 9), (3, 6, 9)):
        x = normal(2, 3, *sides)
        channels = layers.patches_to_channels(x, 3)
        assert channels.shape == (2, 3 ** (1 + len(sides)), *(side // 3 for side in sides))
        assert torch.equal(layers.channels_to_patches(channels, 3), x)


def test_a_border_is_refused_unless_it_is_asked_for():
    x = normal(2, 3, 4, 8)
    for pad in (False, True):
        assert layers.Border((4, 8), 4, pad).add(x) is x
    with pytest.raises(ValueError, match=r"a multiple of 4; got \[50\]: set pad=True .* to \[52\] with zeros"):
        layers.Border([50], 4, pad=False)


def test_states_of_another_shape_are_refused_with_the_networks_for_them():
    layers.check_shape(torch.zeros(7, 2, 3), (2, 3))
    with pytest.raises(ValueError, match=r"of shape \(B, 2, 3\); got \(7, 3, 2\): build .* network=mlp"):
        layers.check_shape(torch.zeros(7, 3, 2), (2, 3))


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0])
def test_weights_have_the_variance_of_the_fan_average(scale):
    torch.manual_seed(0)
    layer = nn.Conv1d(40, 80, 5)
    assert layers.initialise(layer, scale) is layer
    cases = (layers.linear(200, 300, scale), 250), (layers.convolution(2, 30, 60, scale=scale), 9 * 45), (layer, 5 * 60)
    for layer, fan in cases:
        assert float(layer.weight.detach().square().mean()) == pytest.approx(scale / fan, rel=0.05)
        assert float(layer.weight.detach().abs().max()) <= math.sqrt(3 * scale / fan)
        assert not layer.bias.any()


def test_group_norm_has_at_most_32_groups_of_at_least_the_group_size():
    for channels, groups in ((1, 1), (3, 1), (4, 1), (8, 2), (12, 3), (44, 11), (96, 24), (128, 32), (384, 32)):
        assert layers.group_norm(channels).num_groups == groups
    for channels, group_size, groups in ((8, 1, 8), (44, 1, 22), (128, 1, 32), (128, 8, 16), (12, 5, 2), (4, 8, 1)):
        assert layers.group_norm(channels, group_size).num_groups == groups


def test_group_norm_divides_by_the_standard_deviation_of_its_group():
    x, norm = 1e-3 * normal(2, 8, 3, 5), layers.group_norm(8, eps=1e-5).double()
    groups = x.reshape(2, 2, 4, 15)
    centred = groups - groups.mean(dim=(2, 3), keepdim=True)
    expected = centred / (centred.square().mean(dim=(2, 3), keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected.reshape(x.shape))
    assert layers.group_norm(8).eps == 1e-6


def test_attend_is_softmax_attention_in_every_mode_of_differentiation():
    """Forward mode has no fused kernel; unfused operations replace it."""
    query, key, value = normal(2, 3, 4, 6), normal(2, 3, 5, 6, seed=1), normal(2, 3, 5, 6, seed=2)

    def written_out(query):
        exps = torch.exp(torch.einsum("bhqc,bhkc->bhqk", query, key) / math.sqrt(6))
        return torch.einsum("bhqk,bhkc->bqhc", exps / exps.sum(dim=3, keepdim=True), value).flatten(2)

    def attended(query):
        return layers.attend(query, key, value)

    torch.testing.assert_close(attended(query), written_out(query))
    tangent, cotangent = normal(2, 3, 4, 6, seed=3), normal(2, 4, 18, seed=4)
    for actual, expected in (
        (torch.func.jvp(attended, (query,), (tangent,))[1], torch.func.jvp(written_out, (query,), (tangent,))[1]),
        (torch.func.vjp(attended, query)[1](cotangent)[0], torch.func.vjp(written_out, query)[1](cotangent)[0]),
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("active", [False, True])
def test_checkpointed_modules_run_again_in_the_backward_pass_only(active):
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
