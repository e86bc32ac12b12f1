"""Samplers: predictor-corrector, multistep and single-step methods, and the probability flow."""

from scoresde.samplers.adaptive import ErrorControlled
from scoresde.samplers.base import Sampler, Samples
from scoresde.samplers.correctors import MALA, AnnealedLangevin, Langevin
from scoresde.samplers.exponential import DDIM, DPMSolverPP, SASolver, UniPC
from scoresde.samplers.grids import (
    Angle,
    Indices,
    Karras,
    Power,
    angle,
    karras,
    quadratic,
    uniform_angle,
    uniform_log_snr,
    uniform_time,
)
from scoresde.samplers.linear import Linear
from scoresde.samplers.multistep import DEIS, IPNDM, AngularAdams
from scoresde.samplers.predictor_corrector import PredictorCorrector, ProbabilityFlow
from scoresde.samplers.predictors import (
    Ancestral,
    EulerMaruyama,
    OptimalVariance,
    ReverseDiffusion,
    StochasticHeun,
)
from scoresde.samplers.singlestep import EDM, DPMSolver, Heun
from scoresde.samplers.torchsde import TorchSDE

__all__ = [
    "DDIM",
    "DEIS",
    "EDM",
    "IPNDM",
    "MALA",
    "Ancestral",
    "Angle",
    "AngularAdams",
    "AnnealedLangevin",
    "DPMSolver",
    "DPMSolverPP",
    "ErrorControlled",
    "EulerMaruyama",
    "Heun",
    "Indices",
    "Karras",
    "Langevin",
    "Linear",
    "OptimalVariance",
    "Power",
    "PredictorCorrector",
    "ProbabilityFlow",
    "ReverseDiffusion",
    "SASolver",
    "Sampler",
    "Samples",
    "StochasticHeun",
    "TorchSDE",
    "UniPC",
    "angle",
    "karras",
    "quadratic",
    "uniform_angle",
    "uniform_log_snr",
    "uniform_time",
]
