"""Features of a layer and modulated layers, on a network whose layers are known functions."""

import pytest
import torch
from torch import nn

import scoresde as ss
from scoresde.counting import counting
from tests.conftest import normal


class Network(nn.Module):
    """F = second(first(x)), where first doubles and second adds the noise label and the mean of the sample."""

    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    class Add(nn.Module):
        def forward(self, x, c_noise):
            return x + (
                c_noise.reshape(-1, *[1] * (x.ndim - 1)) + x.flatten(1).mean(1).reshape(-1, *[1] * (x.ndim - 1))
            )

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    def __init__(self):
        super().__init__()
        self.first, self.second, self.pair = self.Double(), self.Add(), self.Pair()

    def forward(self, x, c_noise, cond=None):
        return self.second(self.pair(self.first(x))[0], c_noise)


@pytest.fixture
def model():
    return ss.ScoreModel(Network(), ss.VP(), "noise")


@pytest.mark.parametrize("shape", [(2, 2), (3, 1, 4, 4)])
def test_features_are_the_outputs_at_the_scaled_state(model, shape):
    x, t = normal(*shape), torch.linspace(0.2, 0.7, shape[0], dtype=torch.float64)
    c_in = model.prediction.c_in(model.sde, t).reshape(-1, *[1] * (len(shape) - 1))
    with counting() as calls:
        first = model.features(x, t, at="first")
    torch.testing.assert_close(first, 2 * c_in * x)
    assert calls.forward == 1
    both = model.features(x, t, at=["second", "first"])
    torch.testing.assert_close(both["second"], model.predict(x, t).noise)  # the last layer's output is the network's
    torch.testing.assert_close(both["first"], first)
    assert not model.network.first._forward_hooks


def test_wrappers_pass_the_features_of_the_conditional_model_on():
    torch.manual_seed(0)
    network = ss.networks.MLP(3, width=8, classes=4)
    inner = ss.ScoreModel(network, ss.VP(), "v")
    x = normal(5, 3).float()
    found = [ss.ModelWrapper(inner).given(label).features(x, 0.3, at="time") for label in (1, 2)]
    torch.testing.assert_close(found[0], inner.given(1).features(x, 0.3, at="time"))
    assert float((found[0] - found[1]).detach().abs().max()) > 1e-3
    torch.testing.assert_close(found[0][2:3], inner.given(1).features(x[2:3], 0.3, at="time"))


@pytest.mark.parametrize("shape", [(2, 2), (3, 1, 4, 4)])
def test_a_modulated_layer_changes_what_follows(model, shape):
    """Adding c after `first` adds 2 c to F: c itself, and c in the mean."""
    x, c = normal(*shape), 0.7
    changed = ss.Modulated(model, "first", lambda y: y + c)
    torch.testing.assert_close(changed.noise(x, 0.4), model.noise(x, 0.4) + 2 * c)
    torch.testing.assert_close(changed.features(x, 0.4, at="first"), model.features(x, 0.4, at="first"))
    twice = ss.Modulated(changed, "second", lambda y: -y)
    torch.testing.assert_close(twice.noise(x, 0.4), -model.noise(x, 0.4) - 2 * c)
    assert changed.density == "Modulated(ScoreModel)"
    assert not model.network.first._forward_hooks


def test_hooks_are_removed_after_an_error(model):
    def fail(y):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        ss.Modulated(model, "first", fail).predict(normal(2, 2), 0.4)
    assert not model.network.first._forward_hooks


def test_wrong_layers_are_named(model):
    with pytest.raises(ValueError, match=r"at must be the name of a layer of Network; got 'fist': .*such as first"):
        model.features(normal(2, 2), 0.4, at="fist")
    with pytest.raises(ValueError, match="got 'frist'"):
        ss.Modulated(model, "frist", lambda y: y)
    with pytest.raises(TypeError, match="the layer pair must return a tensor; got tuple"):
        model.features(normal(2, 2), 0.4, at="pair")
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module; got function"):
        ss.ScoreModel(lambda x, c, cond: x, ss.VP(), "noise").features(normal(2, 2), 0.4, at="first")
