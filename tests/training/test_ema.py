"""The moving average: its recursion, its warm-up, and the exchange of the weights."""

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


def move(network, step):
    """Change the parameters at random, as an optimiser would."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=seeded(step)))


def tensorflow(decay):
    return lambda step: min(decay, (1 + step) / (10 + step))


def edm(ratio, batch=512, half_life=5_000):
    """The rule in samples, as 2206.00364 counts them."""
    return lambda step: 0.5 ** (batch / max(min(half_life, (step - 1) * batch * ratio), 1e-8))


HALF_LIFE = decay_of_half_life(5_000, 512)
RULES = {
    "default": ({"decay": 0.999}, tensorflow(0.999)),
    "tensorflow": ({"decay": 0.5, "warmup": "tensorflow"}, tensorflow(0.5)),
    "no average": ({"decay": 0.0}, tensorflow(0.0)),
    "constant": ({"decay": 0.9999, "warmup": "none"}, lambda step: 0.9999),
    "edm": ({"decay": HALF_LIFE, "warmup": "edm"}, edm(0.05)),
    "edm, slow": ({"decay": HALF_LIFE, "warmup": "edm", "rampup_ratio": 0.5}, edm(0.5)),
}


@pytest.mark.parametrize(("options", "rule"), RULES.values(), ids=RULES)
def test_the_average_follows_its_recursion(options, rule):
    network = model()
    ema, expected = EMA(network, **options), {name: p.detach().double() for name, p in network.named_parameters()}
    for step in range(1, 101):
        move(network, step)
        ema.update(step)
        d = rule(step)
        assert ema.decay_at(step) == pytest.approx(d, rel=1e-12, abs=1e-300)
        expected = {name: d * expected[name] + (1 - d) * p.double() for name, p in network.named_parameters()}
    assert set(ema.shadow) == {"0.weight", "0.bias", "1.weight"}
    for name, average in ema.shadow.items():
        torch.testing.assert_close(average.double(), expected[name].detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(average, network.get_parameter(name)) == (options["decay"] == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_average_of_weights_in_half_precision_does_not_stall(dtype):
    """From 1 to 2 in 566 steps: 2 - 0.999^566. In bfloat16, 0.001 is lost in every step."""
    network = nn.Linear(1, 1, bias=False).to(dtype)
    nn.init.ones_(network.weight)
    ema = EMA(network, 0.999, warmup="none")
    nn.init.constant_(network.weight, 2.0)
    for step in range(1, 567):
        ema.update(step)
    assert ema.shadow["weight"].dtype == torch.float32
    assert float(ema.shadow["weight"]) == pytest.approx(2 - 0.999**566, abs=1e-5)
    with ema.applied():
        assert network.weight.dtype == dtype
        assert float(network.weight) == float(ema.shadow["weight"].to(dtype))
    assert float(network.weight) == 2


@pytest.mark.parametrize(("half_life", "batch"), [(1, 1), (500_000, 512), (0.5, 3)])
def test_the_weight_of_a_step_halves_within_the_half_life(half_life, batch):
    assert decay_of_half_life(half_life, batch) ** (half_life / batch) == pytest.approx(0.5)


@pytest.mark.parametrize("fails", [False, True])
def test_the_averages_are_applied_within_the_block_only(fails):
    network = model()
    ema = EMA(network, 0.9)
    move(network, 1)
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


def test_loaded_averages_are_copies():
    network = model()
    ema, other = EMA(network, 0.9), EMA(copy.deepcopy(network), 0.9)
    move(network, 1)
    ema.update(1)
    other.load(ema.shadow)
    assert all(torch.equal(other.shadow[name], average) for name, average in ema.shadow.items())
    other.update(2)
    assert not torch.equal(other.shadow["0.bias"], ema.shadow["0.bias"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": -0.1}, r"decay must lie in \[0, 1\); got -0.1"),
        ({"decay": 1.0}, "got 1.0"),
        ({"decay": float("nan")}, "got nan"),
        ({"warmup": "linear"}, "warmup must be one of tensorflow, edm, none; got 'linear'"),
        ({"warmup": "edm", "rampup_ratio": 0}, "rampup_ratio must be positive; got 0"),
        ({"warmup": "edm", "rampup_ratio": float("nan")}, "got nan"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EMA(model(), **options)


@pytest.mark.parametrize(("half_life", "batch"), [(0, 1), (1, 0), (float("nan"), 1)])
def test_a_half_life_that_is_not_positive_is_refused(half_life, batch):
    with pytest.raises(ValueError, match=f"must be positive; got {half_life} and {batch}"):
        decay_of_half_life(half_life, batch)
