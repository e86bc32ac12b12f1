"""Systems of several models: autoencoders with a diffusion of their latents (2112.10752).

autoencoder             `Autoencoder`: a Gaussian q(z | x) and the density p(x | z) of a decoder
autoencoder_objective   `AutoencoderObjective`: trains an autoencoder by the `Trainer`
latent                  `Latents`: the transform from data to latents, whose cost in nats is a bound
"""

from scoresde.pipelines.autoencoder import Autoencoder, Density, GreyLevels, Normal
from scoresde.pipelines.autoencoder_objective import AutoencoderObjective
from scoresde.pipelines.latent import Latents

__all__ = ["Autoencoder", "AutoencoderObjective", "Density", "GreyLevels", "Latents", "Normal"]
