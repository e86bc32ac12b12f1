"""Systems of several trained models, each of them a run.

autoencoder             `Autoencoder`: a Gaussian q(z | x) and the density p(x | z) of a decoder (2112.10752)
autoencoder_objective   `AutoencoderObjective`: trains an autoencoder by the `Trainer`
cascade, cascade_stage  `Cascade`: a base model and models of finer resolutions (2106.15282)
latent                  `Latents`: the transform from data to latents, whose cost in nats is a bound
unclip                  `UnCLIP`: a diffusion of embeddings and a decoder given the embedding (2204.06125)
"""

from scoresde.pipelines.autoencoder import Autoencoder, Density, GreyLevels, Normal
from scoresde.pipelines.autoencoder_objective import AutoencoderObjective
from scoresde.pipelines.cascade import Cascade
from scoresde.pipelines.cascade_stage import CascadeBits, CascadeLogProb, CascadeSamples, CascadeStage
from scoresde.pipelines.latent import Latents
from scoresde.pipelines.unclip import Embedder, EmbeddingSamples, UnCLIP

__all__ = ["Autoencoder", "AutoencoderObjective", "Density", "GreyLevels", "Latents", "Normal"]
__all__ += ["Cascade", "CascadeBits", "CascadeLogProb", "CascadeSamples", "CascadeStage"]
__all__ += ["Embedder", "EmbeddingSamples", "UnCLIP"]
