"""Samplers: predictor-corrector, multistep and single-step methods, and the probability flow."""

from scoresde.samplers.base import Sampler, Samples
from scoresde.samplers.correctors import AnnealedLangevin, Langevin
from scoresde.samplers.exponential import DDIM, DPMSolverPP, SASolver, UniPC
from scoresde.samplers.grids import Indices, Karras, Power, karras, quadratic, uniform_log_snr, uniform_time
from scoresde.samplers.linear import Linear
from scoresde.samplers.multistep import DEIS, IPNDM
from scoresde.samplers.predictor_corrector import PredictorCorrector, ProbabilityFlow
from scoresde.samplers.predictors import (
    Ancestral,
    EulerMaruyama,
    OptimalVariance,
    ReverseDiffusion,
    StochasticHeun,
)
from scoresde.samplers.singlestep import EDM, DPMSolver, Heun

__all__ = [
    "DDIM",
    "DEIS",
    "EDM",
    "IPNDM",
    "Ancestral",
    "AnnealedLangevin",
    "DPMSolver",
    "DPMSolverPP",
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
    "UniPC",
    "karras",
    "quadratic",
    "uniform_log_snr",
    "uniform_time",
]
