"""Samplers: predictor-corrector, multistep, single-step and adaptive methods, and the probability flow."""

from scoresde.samplers.adaptive import ErrorControlled
from scoresde.samplers.correctors import MALA, AnnealedLangevin, Langevin
from scoresde.samplers.ddim import DDIM
from scoresde.samplers.deis import DEIS, IPNDM, AngularAdams
from scoresde.samplers.dpm_solver import DPMSolver, DPMSolverPP
from scoresde.samplers.grids import (
    Angle,
    Indices,
    KarrasGrid,
    Power,
    angle,
    bounded_karras,
    bounded_log_snr,
    karras,
    quadratic,
    uniform_angle,
    uniform_log_snr,
    uniform_time,
)
from scoresde.samplers.heun import EDM, Heun
from scoresde.samplers.learned_solver import LearnedSolver, SolverTable, StoredSolver
from scoresde.samplers.learning import learn
from scoresde.samplers.linear import Linear
from scoresde.samplers.predictor_corrector import PredictorCorrector, ProbabilityFlow
from scoresde.samplers.predictors import Ancestral, EulerMaruyama, OptimalVariance, ReverseDiffusion, StochasticHeun
from scoresde.samplers.sa_solver import SASolver
from scoresde.samplers.sampler import Sampler, Samples, StateConstraint
from scoresde.samplers.solver_fit import Learning
from scoresde.samplers.torchsde import TorchSDE
from scoresde.samplers.unipc import UniPC

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
    "KarrasGrid",
    "Langevin",
    "LearnedSolver",
    "Learning",
    "Linear",
    "OptimalVariance",
    "Power",
    "PredictorCorrector",
    "ProbabilityFlow",
    "ReverseDiffusion",
    "SASolver",
    "Sampler",
    "Samples",
    "SolverTable",
    "StateConstraint",
    "StochasticHeun",
    "StoredSolver",
    "TorchSDE",
    "UniPC",
    "angle",
    "bounded_karras",
    "bounded_log_snr",
    "karras",
    "learn",
    "quadratic",
    "uniform_angle",
    "uniform_log_snr",
    "uniform_time",
]
