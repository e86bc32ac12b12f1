"""Dequantisation."""

import torch

from scoresde.dequantization import Uniform
from scoresde.tensors import Noise


def test_uniform_fills_each_level_and_has_no_entropy_term():
    images = torch.randint(0, 17, (2000, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    values, log_q = Uniform().sample(images, Noise(images.shape, torch.Generator().manual_seed(1), dtype=torch.float64))
    assert torch.equal(values.floor(), images.double())
    offset = values - images
    assert abs(float(offset.mean()) - 0.5) < 0.01
    assert abs(float(offset.var()) - 1 / 12) < 0.002
    assert torch.equal(log_q, torch.zeros(2000, dtype=torch.float64))
