"""Noise-conditional networks F(x, c_noise, cond)."""

from scoresde.networks.levels import LevelHead
from scoresde.networks.mlp import MLP
from scoresde.networks.unet import UNet

__all__ = ["MLP", "LevelHead", "UNet"]
