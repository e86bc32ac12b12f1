"""The multilayer perceptron: a state of any shape is a vector to it."""

import pytest
import torch

from scoresde.networks import MLP
from tests.conftest import normal
from tests.networks.test_layers import randomised


def test_sees_a_state_as_a_vector():
    vector, image = randomised(MLP(6, width=8)), randomised(MLP((1, 2, 3), width=8))
    x, label = normal(4, 6), normal(4, seed=1)
    torch.testing.assert_close(image(x.reshape(4, 1, 2, 3), label).flatten(1), vector(x, label))


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_has_as_many_layers_as_asked_for(depth):
    network = MLP(2, width=8, depth=depth)
    assert list(network.layers) == [f"layer{i}" for i in range(depth)]
    weights = sum(p.numel() for name, p in network.named_parameters() if name.endswith("weight"))
    embedding, ends, norms = 2 * 8 * 8, 2 * 2 * 8, (depth + 1) * 8
    assert weights == embedding + ends + norms + depth * 3 * 8 * 8


def test_layers_start_as_their_skips():
    network, x = MLP(2, width=8, depth=3), torch.ones(1, 2)
    seen = []
    network.norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    network(x, torch.ones(1))
    torch.testing.assert_close(seen[0], network.input(x))


def test_time_scale_is_the_highest_frequency():
    assert float(MLP(2, width=8, time_scale=30.0).time.position.frequencies.max()) == 30
