"""The moving average: its recursion, its warm-up, and a loan of the weights that is always returned."""

import copy

import pytest
import torch
from torch import nn

from scoresde.training import EMA
from scoresde.training.ema import decay_of_half_life
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


def followed(steps, decay, rule, **arguments):
    """The first weight's average over a random walk, and what the recursion with the decay rule(n) says."""
    network = model()
    ema, expected = EMA(network, decay, **arguments), network[0].weight.detach().double()
    for step in range(1, steps + 1):
        moved(network, step)
        ema.update(step)
        expected = rule(step) * expected + (1 - rule(step)) * network[0].weight.detach().double()
    return ema.shadow["0.weight"].double(), expected


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
def test_without_a_warmup_the_decay_is_constant(decay):
    torch.testing.assert_close(*followed(20, decay, lambda step: decay, warmup="none"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.05, 0.5])
def test_edm_ramps_the_half_life_up(ratio):
    batch, half_life = 512, 5_000  # in samples, as 2206.00364 counts

    def rule(step):
        samples = (step - 1) * batch
        return 0.5 ** (batch / max(min(half_life, samples * ratio), 1e-8))

    decay = decay_of_half_life(half_life, batch)
    found, expected = followed(300, decay, rule, warmup="edm", rampup_ratio=ratio)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ramp = EMA(model(), decay, warmup="edm", rampup_ratio=ratio)
    assert ramp.decay_at(1) == 0
    assert 0 < ramp.decay_at(2) < ramp.decay_at(3) < decay
    assert ramp.decay_at(int(half_life / batch / ratio) + 2) == decay


def test_the_default_is_the_rule_of_tensorflow_bit_for_bit():
    network = model()
    named, default = EMA(network, 0.999, warmup="tensorflow"), EMA(network)
    by_hand = [p.detach().clone() for p in network.parameters() if p.requires_grad]
    for step in range(1, 50):
        moved(network, step)
        named.update(step)
        default.update(step)
        current = [p.detach() for p in network.parameters() if p.requires_grad]
        torch._foreach_lerp_(by_hand, current, 1 - min(0.999, (1 + step) / (10 + step)))
    assert all(map(torch.equal, named.shadow.values(), by_hand))
    assert all(map(torch.equal, default.shadow.values(), by_hand))


@pytest.mark.parametrize(("half_life", "batch"), [(1, 1), (500_000, 512), (0.5, 3)])
def test_decay_halves_what_is_older_than_the_half_life(half_life, batch):
    assert decay_of_half_life(half_life, batch) ** (half_life / batch) == pytest.approx(0.5)


def test_refuses_warmups_that_there_are_not():
    with pytest.raises(ValueError, match="'tensorflow', 'edm', 'none' expected; got 'linear'"):
        EMA(model(), 0.9, warmup="linear")
    for ratio in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"rampup_ratio > 0 expected.*got {ratio}"):
            EMA(model(), 0.9, warmup="edm", rampup_ratio=ratio)
    for half_life, batch in ((0, 1), (1, 0), (float("nan"), 1)):
        with pytest.raises(ValueError, match=f"> 0 expected; got {half_life} and {batch}"):
            decay_of_half_life(half_life, batch)


def test_load_names_what_does_not_fit():
    ema = EMA(model(), 0.9)
    before = copy.deepcopy(ema.shadow)
    for change, found in (({"1.weight": torch.zeros(3)}, r"\(3,\)"), ({}, "nothing")):
        stored = {name: average + 1 for name, average in ema.shadow.items() if name != "1.weight"} | change
        with pytest.raises(ValueError, match=rf"do not fit: 1.weight \(2, 4\) expected, got {found}"):
            ema.load(stored)
    assert all(torch.equal(average, before[name]) for name, average in ema.shadow.items())
