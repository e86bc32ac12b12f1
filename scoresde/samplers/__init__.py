"""Samplers: predictor-corrector and probability flow."""

from scoresde.samplers.base import Sampler, Samples, UniformTime, uniform_log_snr, uniform_time
from scoresde.samplers.correctors import AnnealedLangevin, Langevin
from scoresde.samplers.predictor_corrector import PredictorCorrector, ProbabilityFlow
from scoresde.samplers.predictors import Ancestral, EulerMaruyama, ReverseDiffusion

__all__ = [
    "Ancestral",
    "AnnealedLangevin",
    "EulerMaruyama",
    "Langevin",
    "PredictorCorrector",
    "ProbabilityFlow",
    "ReverseDiffusion",
    "Sampler",
    "Samples",
    "UniformTime",
    "uniform_log_snr",
    "uniform_time",
]
