"""Magnitude-preserving layers: magnitudes of 1 for weights of any scale, and forced weight normalisation."""

import pytest
import torch
from torch.func import functional_call, jvp

from scoresde.networks.magnitude_layers import (
    MagnitudeLayer,
    MagnitudeTable,
    concatenate,
    force_normalisation,
    mix,
    normalise,
    silu,
)
from tests.conftest import normal

CHANNELS, COUNT = 64, 2000


def magnitude(x):
    return float(x.detach().square().mean().sqrt())


def test_functions_keep_a_magnitude_of_one():
    a, b = normal(COUNT, CHANNELS), normal(COUNT, 2 * CHANNELS, seed=1)
    assert magnitude(silu(a)) == pytest.approx(1, rel=0.01)
    for weight in (0.0, 0.3, 1.0):
        assert magnitude(mix(a, b[:, :CHANNELS], weight)) == pytest.approx(1, rel=0.01)
        joined = concatenate(a, b, weight)
        assert magnitude(joined) == pytest.approx(1, rel=0.01)
        parts = (joined[:, :CHANNELS].square().sum(), joined[:, CHANNELS:].square().sum())
        assert float(parts[1] / sum(parts)) == pytest.approx(weight**2 / (weight**2 + (1 - weight) ** 2), abs=0.01)
    torch.testing.assert_close(normalise(30 * a, 1).square().mean(dim=1), torch.ones(COUNT).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_layers_keep_a_magnitude_of_one_for_weights_of_any_scale(dims):
    torch.manual_seed(0)
    layer = MagnitudeLayer(dims, 16, 256, kernel=1).double()
    x = normal(400, 16, *[2] * dims)
    expected = layer.eval()(x).detach()
    assert magnitude(expected) == pytest.approx(1, rel=0.05)
    with torch.no_grad():
        layer.weight *= 7
    torch.testing.assert_close(layer(x).detach(), expected, rtol=1e-3, atol=1e-3)


def test_a_constant_channel_takes_the_place_of_a_bias_and_a_gain_starts_at_zero():
    layer, x = MagnitudeLayer(2, 3, 5, constant=True, gain=True).double().eval(), normal(2, 3, 4, 4)
    assert not layer(x).any()
    with torch.no_grad():
        layer.gain.fill_(2.0)
    weight = layer.weight.detach() / (1e-4 + layer.weight.detach().square().mean(dim=(1, 2, 3), keepdim=True).sqrt())
    expected = 2 / 36**0.5 * torch.conv2d(torch.cat([x, torch.ones(2, 1, 4, 4)], dim=1), weight, padding=1)
    torch.testing.assert_close(layer(x).detach(), expected)


def test_a_table_has_features_of_magnitude_one_over_the_classes():
    table = MagnitudeTable(7, 32).double().eval()
    rows = table(torch.arange(7)).detach()
    torch.testing.assert_close(rows.square().mean(dim=0), torch.ones(32).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(rows / rows[0], table.weight.detach() / table.weight[0].detach())


def test_training_normalises_the_stored_weights_once_after_each_step():
    """Two evaluations before one backward pass are allowed; evaluation mode changes nothing."""
    torch.manual_seed(0)
    layer, x = MagnitudeLayer(0, 8, 4), normal(5, 8).float()
    with torch.no_grad():
        layer.weight *= 3
    stored = layer.weight.detach().clone()
    layer.eval()(x)
    assert torch.equal(layer.weight, stored)
    optimizer = torch.optim.SGD(layer.train().parameters(), 1.0)
    for _ in range(3):
        (layer(x).square().sum() + layer(2 * x).sum()).backward()
        torch.testing.assert_close(layer.weight.square().mean(dim=1), torch.ones(4), rtol=1e-3, atol=0)
        optimizer.step()
        assert float((layer.weight.detach().square().mean(dim=1) - 1).abs().max()) > 0.01  # a step leaves the sphere


def test_optimisers_may_change_the_data_of_the_weights():
    """Such a change leaves no mark on a tensor; the trainer normalises before each step."""
    layer = MagnitudeTable(5, 4)
    force_normalisation(layer)
    layer.weight.data.mul_(3)
    force_normalisation(layer)
    torch.testing.assert_close(layer.weight.square().mean(dim=0), torch.ones(4), rtol=1e-3, atol=0)


def test_derivatives_under_torch_func_work_in_training_mode():
    """After `force_normalisation`, which the trainer calls before each step; given weights are not changed."""
    torch.manual_seed(0)
    layer, x, weight = MagnitudeLayer(0, 8, 4), normal(5, 8).float(), normal(4, 8).float()
    force_normalisation(layer)
    output, tangent = jvp(layer, (x,), (x,))
    torch.testing.assert_close(output, tangent)
    before = weight.clone()
    torch.testing.assert_close(functional_call(layer, {"weight": weight}, (x,)), x @ normalise(weight, 1).T / 8**0.5)
    assert torch.equal(weight, before)
