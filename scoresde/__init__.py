"""scoresde: continuous-time score-based generative models.

import scoresde as ss

model = ss.ScoreModel(network, ss.VP(), prediction="noise")
samples = ss.samplers.PredictorCorrector(ss.samplers.ReverseDiffusion())(model, shape=(16, 1, 8, 8)).x
nats = ss.log_prob(model, samples).value
"""

from scoresde import convert, data, losses, networks, predictions, samplers, solvers
from scoresde.analytic import GaussianMixture
from scoresde.build import Run, load
from scoresde.dequantization import Uniform
from scoresde.divergence import ExactTrace, Hutchinson
from scoresde.likelihood import BitsPerDim, LogProb, bits_per_dim, decode, encode, log_prob
from scoresde.score import ScoreModel, Views
from scoresde.sdes import (
    DDPM,
    NCSN,
    SDE,
    VE,
    VP,
    Cosine,
    Karras,
    Rectified,
    ReverseSDE,
    SubVP,
    Tabulated,
    ZeroTerminalSNR,
)

__version__ = "0.1.0"

__all__ = [
    "DDPM",
    "NCSN",
    "SDE",
    "VE",
    "VP",
    "BitsPerDim",
    "Cosine",
    "ExactTrace",
    "GaussianMixture",
    "Hutchinson",
    "Karras",
    "LogProb",
    "Rectified",
    "ReverseSDE",
    "Run",
    "ScoreModel",
    "SubVP",
    "Tabulated",
    "Uniform",
    "Views",
    "ZeroTerminalSNR",
    "bits_per_dim",
    "convert",
    "data",
    "decode",
    "encode",
    "load",
    "log_prob",
    "losses",
    "networks",
    "predictions",
    "samplers",
    "solvers",
]
