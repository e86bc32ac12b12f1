"""Noise-conditional networks F(x, c_noise, cond)."""

from scoresde.networks.dit import DiT, dit_b, dit_l, dit_s, dit_xl
from scoresde.networks.levels import LevelHead
from scoresde.networks.mlp import MLP
from scoresde.networks.presets import adm, ddpm, ddpmpp, ncsnpp
from scoresde.networks.unet import UNet

__all__ = ["MLP", "DiT", "LevelHead", "UNet", "adm", "ddpm", "ddpmpp", "dit_b", "dit_l", "dit_s", "dit_xl", "ncsnpp"]
