"""Dequantisation: from grey levels to a density, so that discrete data has bits.

A density p over the continuous values bounds the probability of a level x by (Theis et al., 1511.01844, section 3.1)

    log P(x) >= E_{u ~ q(u|x)} [log p(x + u) - log q(u|x)],        u in [0, 1)^d.
"""

import torch
from torch import Tensor

from scoresde.tensors import Noise


class Uniform:
    """u uniform on [0, 1)^d, log q = 0."""

    def sample(self, images: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """(images + u (B, *), log q(u | images) in nats (B,)), in float64; noise draws u."""
        values = images.to(noise.dtype) + noise.uniform()
        return values, torch.zeros(images.shape[0], dtype=noise.dtype, device=values.device)

    def __str__(self) -> str:
        return "uniform"
