"""Noise-conditional networks F(x, c_noise, cond): functions of a state, a noise label and a condition."""

from scoresde.networks.blocks import (
    BlockStyle,
    convolution_resampling,
    filter_resampling,
    residual_resampling,
)
from scoresde.networks.condition_embeddings import Conditions
from scoresde.networks.convolutional_autoencoder import ConvolutionalAutoencoder
from scoresde.networks.dit import DiT, dit_b, dit_l, dit_s, dit_xl
from scoresde.networks.dual_encoder import ConditionEncoder, DualEncoder
from scoresde.networks.embeddings import FourierEmbedding, PositionalEmbedding, ShiftedFourierEmbedding
from scoresde.networks.encoder import EncoderUNet, Ends
from scoresde.networks.equivariant import EquivariantNetwork
from scoresde.networks.level_head import LevelHead
from scoresde.networks.lora import adapters, add_lora, load_adapters, merge_lora, save_adapters
from scoresde.networks.magnitude_layers import MagnitudeStyle, force_normalisation
from scoresde.networks.mlp import MLP
from scoresde.networks.pooling import AttentionPool, AveragePool, SkipPool
from scoresde.networks.presets import adm, ddpm, ddpmpp, edm2, ncsnpp
from scoresde.networks.pyramids import InputResidual, InputSkip, OutputResidual, OutputSkip
from scoresde.networks.spatial_transformer import LabelContext, SpatialTransformer
from scoresde.networks.text_encoder import TextEncoder, TextStyle
from scoresde.networks.unet import UNet
from scoresde.networks.video import VideoNetwork

__all__ = [
    "MLP",
    "ConvolutionalAutoencoder",
    "DiT",
    "EncoderUNet",
    "EquivariantNetwork",
    "LevelHead",
    "UNet",
    "adm",
    "ddpm",
    "ddpmpp",
    "dit_b",
    "dit_l",
    "dit_s",
    "dit_xl",
    "edm2",
    "ncsnpp",
]
__all__ += ["LabelContext", "SpatialTransformer"]
__all__ += ["BlockStyle", "Conditions", "Ends", "FourierEmbedding", "MagnitudeStyle", "PositionalEmbedding"]
__all__ += ["ShiftedFourierEmbedding", "force_normalisation"]
__all__ += ["adapters", "add_lora", "load_adapters", "merge_lora", "save_adapters"]
__all__ += ["AttentionPool", "AveragePool", "SkipPool"]
__all__ += ["TextEncoder", "TextStyle"]
__all__ += ["InputResidual", "InputSkip", "OutputResidual", "OutputSkip"]
__all__ += ["convolution_resampling", "filter_resampling", "residual_resampling"]
__all__ += ["ConditionEncoder", "DualEncoder"]
__all__ += ["VideoNetwork"]
