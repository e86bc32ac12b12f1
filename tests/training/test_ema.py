"""The moving average: its recursion, its warm-up, and a loan of the weights that is always returned."""

import copy

import pytest
import torch
from torch import nn

from scoresde.training import EMA
from tests.conftest import seeded


def model():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    network[1].bias.requires_grad_(False)
    return network


def moved(network, step):
    """The same network, its parameters moved as by an optimiser."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=seeded(step)))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_average_follows_its_recursion(decay):
    network = model()
    ema, expected = EMA(network, decay), {name: p.detach().double() for name, p in network.named_parameters()}
    for step in range(1, 20):
        moved(network, step)
        ema.update(step)
        rate = min(decay, (1 + step) / (10 + step))
        expected = {name: rate * expected[name] + (1 - rate) * p.double() for name, p in network.named_parameters()}
    assert set(ema.shadow) == {"0.weight", "0.bias", "1.weight"}
    for name, average in ema.shadow.items():
        torch.testing.assert_close(average.double(), expected[name].detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(average, network.get_parameter(name)) == (decay == 0)


@pytest.mark.parametrize("fails", [False, True])
def test_applied_lends_the_averages_and_returns_the_weights(fails):
    network = model()
    ema = EMA(network, 0.9)
    moved(network, 1)
    before = copy.deepcopy(network.state_dict())
    try:
        with ema.applied():
            assert all(torch.equal(network.get_parameter(name), average) for name, average in ema.shadow.items())
            assert not torch.equal(network[0].weight, before["0.weight"])
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not torch.equal(ema.shadow["0.weight"], network[0].weight)


def test_averages_are_taken_over_from_a_checkpoint():
    network = model()
    ema, other = EMA(network, 0.9), EMA(copy.deepcopy(network), 0.9)
    moved(network, 1)
    ema.update(1)
    other.load(ema.shadow)
    assert all(torch.equal(other.shadow[name], average) for name, average in ema.shadow.items())
    other.update(2)
    assert not torch.equal(other.shadow["0.bias"], ema.shadow["0.bias"])


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_refuses_a_decay_that_does_not_average(decay):
    with pytest.raises(ValueError, match=rf"decay in \[0, 1\) expected; got {decay}"):
        EMA(model(), decay)
