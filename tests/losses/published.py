"""Densities and weights, written independently from the formulas of the papers."""

import numpy as np
import torch

import scoresde as ss
from scoresde import losses
from tests.conftest import f64, gradient

TYPES = [
    "noise",
    "data",
    "score",
    "velocity",
    "v",
    ss.predictions.KarrasPreconditioning(0.7),
    ss.predictions.Denoiser(),
]
DENSITIES = {"uniform": losses.UniformTime(), "log-snr": losses.UniformLogSNR(), "log-normal": losses.LogNormal()}
SUITED = {"variance": "uniform", "likelihood": "log-snr", "karras": "log-normal", "min_snr": "uniform"}


def named(prediction):
    return prediction if isinstance(prediction, str) else type(prediction).__name__.lower()


def snr(sde, t):
    return sde.alpha(t) ** 2 / sde.sigma(t) ** 2


def falling(sde, t):
    """-(log SNR)'."""
    return -gradient(lambda t: snr(sde, t).log(), t)


def published_density(name, sde, t):
    """The density of times."""
    if name == "uniform":
        return torch.full_like(t, 1 / (sde.t_max - sde.t_min))
    clean, noisy = (0.5 * snr(sde, f64(end)).log() for end in (sde.t_min, sde.t_max))
    if name == "log-snr":
        return falling(sde, t) / (2 * clean - 2 * noisy)
    log_sigma = torch.distributions.Normal(f64(-1.2), f64(1.2))  # 2206.00364, table 1: ln(sigma) ~ N(-1.2, 1.2^2)
    mass = log_sigma.cdf(-noisy) - log_sigma.cdf(-clean)
    return log_sigma.log_prob(-0.5 * snr(sde, t).log()).exp() * 0.5 * falling(sde, t) / mass


def published_omega(name, sde, t):
    """The weight of the squared error of the noise, from each paper's weight of its own error."""
    s2 = 1 / snr(sde, t)  # squared errors: that of the data is s^2 times that of the noise, that of the score 1/sigma^2
    uniform = published_density("uniform", sde, t)
    if name == "variance":  # lambda = sigma^2 on the score
        return sde.sigma(t) ** 2 / sde.sigma(t) ** 2 * uniform
    if name == "likelihood":  # lambda = g^2 on the score, g^2 = (sigma^2)' - 2 (alpha'/alpha) sigma^2
        drift = gradient(sde.alpha, t) / sde.alpha(t)
        return (gradient(lambda t: sde.sigma(t) ** 2, t) - 2 * drift * sde.sigma(t) ** 2) / sde.sigma(t) ** 2
    if name == "karras":  # lambda = (s^2 + sigma_data^2) / (s sigma_data)^2 on the data
        return (s2 + 0.25) / (s2 * 0.25) * s2 * published_density("log-normal", sde, t)
    return torch.minimum(snr(sde, t), f64(5.0)) * s2 * uniform  # min(SNR, gamma) on the data


def grid(sde, n=4_000):
    """Times dense enough for a trapezoidal rule, also if the integrand is large at an end."""
    fine = np.concatenate((np.linspace(0, 1, n), np.geomspace(1e-10, 1, n), 1 - np.geomspace(1e-10, 1, n)))
    return torch.from_numpy(sde.t_min + (sde.t_max - sde.t_min) * np.unique(fine.clip(0, 1)))
