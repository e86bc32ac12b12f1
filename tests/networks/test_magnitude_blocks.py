"""Magnitude-preserving blocks: features of unit magnitude through the whole network, at any scale of its weights.

`tests/convert/test_from_edm2.py` compares the blocks with the equations of EDM2.
"""

import torch

from scoresde.networks import edm2
from scoresde.networks.blocks import Block
from scoresde.networks.magnitude_blocks import MagnitudeAttention
from tests.conftest import normal


def test_features_keep_their_magnitude():
    """A block on the way up adds to the magnitude where its skip connection and its update are correlated."""
    torch.manual_seed(0)
    network, magnitudes = edm2(16, width=32, multipliers=(1, 2), blocks=1, attention=(8,), head_channels=32).eval(), {}
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.fill_(0.5) if name.endswith("gain") else parameter.mul_(3)
        for name, module in network.named_modules():
            if isinstance(module, Block):
                module.register_forward_hook(
                    lambda module, inputs, output, name=name: magnitudes.update({name: float(output.square().mean())})
                )
        network(normal(4, 3, 16, 16).float(), torch.zeros(4))
    assert len(magnitudes) == 10
    assert all(0.7 < value**0.5 < 1.5 for value in magnitudes.values()), magnitudes


def test_a_block_with_fewer_channels_than_a_head_has_no_attention():
    network = edm2(8, width=8, multipliers=(1, 2), blocks=1, attention=(8, 4), head_channels=16)
    names = {name for name, module in network.named_modules() if isinstance(module, MagnitudeAttention)}
    assert {name.rsplit(".", 2)[0] for name in names} == {"down.4x4", "middle", "up.4x4"}
