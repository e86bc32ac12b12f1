"""scoresde: continuous-time score-based generative models.

import scoresde as ss

model = ss.ScoreModel(network, ss.VP(), prediction="noise")
samples = ss.samplers.PredictorCorrector(ss.samplers.ReverseDiffusion())(model, shape=(16, 1, 8, 8)).x
nats = ss.log_prob(model, samples).value
"""

from scoresde import (
    bounds,
    convert,
    data,
    editing,
    flowmaps,
    guidance,
    inverse,
    losses,
    networks,
    pipelines,
    predictions,
    samplers,
    solvers,
    text,
    thresholding,
)
from scoresde.adams_learning import AdamsLearning, learn_adams
from scoresde.analytic import GaussianMixture
from scoresde.bits import BitsPerDim, bits_per_dim
from scoresde.build import Run, load, load_autoencoder, load_classifier, load_embedder
from scoresde.classifier import NoisyClassifier
from scoresde.classify import Classification, classify
from scoresde.contrastive import ContrastiveModel
from scoresde.dequantization import DataMap, TruncatedNormal, Uniform, Variational
from scoresde.divergence import ExactTrace, Hutchinson
from scoresde.fitting import fit
from scoresde.flowmaps import FlowMap
from scoresde.likelihood import (
    LogProb,
    RoundTrip,
    decode,
    encode,
    log_prob,
    round_trip,
    sample_with_log_prob,
)
from scoresde.score import ScoreModel
from scoresde.sdes import (
    DDPM,
    NCSN,
    SDE,
    VE,
    VP,
    Cosine,
    CosineDDPM,
    Karras,
    LearnedVP,
    Rectified,
    ReverseSDE,
    SubVP,
    Tabulated,
    ZeroTerminalSNR,
)
from scoresde.training import EMA, Trainer
from scoresde.views import BlendedViews, ShiftedViews, TiltedViews, Views
from scoresde.wrappers import ModelWrapper, Modulated

__version__ = "0.1.0"

__all__ = [
    "DDPM",
    "EMA",
    "NCSN",
    "SDE",
    "VE",
    "VP",
    "AdamsLearning",
    "BitsPerDim",
    "BlendedViews",
    "Classification",
    "ContrastiveModel",
    "Cosine",
    "CosineDDPM",
    "DataMap",
    "ExactTrace",
    "FlowMap",
    "GaussianMixture",
    "Hutchinson",
    "Karras",
    "LearnedVP",
    "LogProb",
    "ModelWrapper",
    "Modulated",
    "NoisyClassifier",
    "Rectified",
    "ReverseSDE",
    "RoundTrip",
    "Run",
    "ScoreModel",
    "ShiftedViews",
    "SubVP",
    "Tabulated",
    "TiltedViews",
    "Trainer",
    "TruncatedNormal",
    "Uniform",
    "Variational",
    "Views",
    "ZeroTerminalSNR",
    "bits_per_dim",
    "bounds",
    "classify",
    "convert",
    "data",
    "decode",
    "editing",
    "encode",
    "fit",
    "flowmaps",
    "guidance",
    "inverse",
    "learn_adams",
    "load",
    "load_autoencoder",
    "load_classifier",
    "load_embedder",
    "log_prob",
    "losses",
    "networks",
    "pipelines",
    "predictions",
    "round_trip",
    "sample_with_log_prob",
    "samplers",
    "solvers",
    "text",
    "thresholding",
]
