r"""Inverse problems: samples of x given a measurement y = A(x) + noise, with a model that need not be trained for it.

    operators           `Operator`, compositions a @ b, and linear physics objects of `deepinv`
    general_operators   `Inpainting`, `Linear`, `Nonlinear`: states of any shape
    image_operators     `Downsampling`, `Blur`, `GaussianBlur`, `Grey`, `Colour`, `Fourier`
    sized_operators     `SizedInpainting`: the mask is made when the size of the images is known
    posterior_models    `DPS`, `PiGDM`, `MMPS`: models with approximations of the score of p(x_t | y)
    constraints         `Replacement`, which overwrites the measured part of the state, and `RePaint`
    spectral            `DDRM`, `DDNM`: samplers for operators with known singular values
    trained_inpainting  `TrainedInpainting`: a network that was trained for inpainting, the measurement its condition
    hidden_entries      `HiddenEntries`: the model of the hidden entries alone, with the density p(hidden | measured)
    twisted_particles   `TwistedParticles`: exact in the limit of many particles, with the evidence p(y)
    posterior_samples   `sample_posterior`: samples by the name of a method
    posterior_moments   `posterior_moments`: means and variances by multilevel Monte Carlo

For a Gaussian mixture the posterior under a linear measurement is a mixture again, `GaussianMixture.posterior`, and the
evidence p(y) is known, `GaussianMixture.log_evidence`: every method is tested against them.
"""

from scoresde.inverse.constraints import RePaint, Replacement, Resampled, corrected
from scoresde.inverse.general_operators import Inpainting, Nonlinear
from scoresde.inverse.general_operators import LinearOperator as Linear
from scoresde.inverse.hidden_entries import HiddenEntries
from scoresde.inverse.image_operators import Blur, ChannelMixing, Colour, Downsampling, Fourier, GaussianBlur, Grey
from scoresde.inverse.operators import Composed, Operator, PhysicsOperator, as_operator
from scoresde.inverse.particles import Particles, pooled
from scoresde.inverse.posterior_models import DPS, MMPS, Measured, PiGDM
from scoresde.inverse.posterior_moments import PosteriorMoments, posterior_moments
from scoresde.inverse.posterior_samples import PosteriorSamples, sample_posterior
from scoresde.inverse.sized_operators import SizedInpainting, SizedOperator
from scoresde.inverse.spectral import DDNM, DDRM
from scoresde.inverse.trained_inpainting import TrainedInpainting
from scoresde.inverse.twisted_particles import TwistedParticles

__all__ = [
    "DDNM",
    "DDRM",
    "DPS",
    "MMPS",
    "Blur",
    "ChannelMixing",
    "Colour",
    "Composed",
    "Downsampling",
    "Fourier",
    "GaussianBlur",
    "Grey",
    "HiddenEntries",
    "Inpainting",
    "Linear",
    "Measured",
    "Nonlinear",
    "Operator",
    "Particles",
    "PhysicsOperator",
    "PiGDM",
    "PosteriorMoments",
    "PosteriorSamples",
    "RePaint",
    "Replacement",
    "Resampled",
    "SizedInpainting",
    "SizedOperator",
    "TrainedInpainting",
    "TwistedParticles",
    "as_operator",
    "corrected",
    "pooled",
    "posterior_moments",
    "sample_posterior",
]
