"""The multilayer perceptron, which flattens a state of any shape to a vector."""

import pytest
import torch

from scoresde.networks import MLP
from tests.conftest import normal
from tests.networks.test_layers import randomised


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_has_the_requested_number_of_layers(depth):
    network = MLP(2, width=8, depth=depth)
    assert list(network.layers) == [f"layer{i}" for i in range(depth)]
    weights = sum(p.numel() for name, p in network.named_parameters() if name.endswith("weight"))
    embedding, ends, norms = 2 * 8 * 8, 2 * 2 * 8, (depth + 1) * 8
    assert weights == embedding + ends + norms + depth * 3 * 8 * 8


def test_is_its_formula_on_the_flattened_state():
    network = randomised(MLP((2, 3), width=8, depth=2, time_scale=30.0, classes=4, cond_features=3))
    x, label, parts = normal(4, 2, 3), normal(4, seed=1), {"label": torch.tensor([1, -1, 3, 0]), "vector": normal(4, 3)}

    def affine(layer, x):
        return x @ layer.weight.T + layer.bias

    def norm(layer, x):
        centred = x - x.mean(dim=1, keepdim=True)
        return centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    def silu(x):
        return x / (1 + torch.exp(-x))

    h, time = affine(network.input, x.reshape(4, 6)), network.time(label, parts)
    for layer in network.layers.values():
        inner = affine(layer.inner, silu(norm(layer.norm, h))) + affine(layer.time, time)
        h = h + affine(layer.outer, silu(inner))
    expected = affine(network.output, silu(norm(network.norm, h))).reshape(4, 2, 3)
    torch.testing.assert_close(network(x, label, parts), expected)
    assert float(network.time.position.frequencies.max()) == 30


def test_layers_start_as_their_skips():
    network, x = MLP(2, width=8, depth=3), torch.ones(1, 2)
    network.norm.register_forward_hook(
        lambda module, inputs, output: torch.testing.assert_close(inputs[0], network.input(x))
    )
    network(x, torch.ones(1))
