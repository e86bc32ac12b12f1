"""Paths given by their log-SNR: one function of time determines the path.

With f and g of the SDE dx = f(t) x dt + g(t) dw, and ' for the derivative in t:

| kind                | alpha^2          | sigma^2           | f      | g^2                 |
| ------------------- | ---------------- | ----------------- | ------ | ------------------- |
| variance preserving | sigmoid(log SNR) | sigmoid(-log SNR) | -g^2/2 | -sigma^2 (log SNR)' |
| variance exploding  | 1                | exp(-log SNR)     | 0      | -sigma^2 (log SNR)' |
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from scoresde.sdes.sde import SDE


class LogSNRPath(SDE):
    """A path given by its log-SNR. A subclass defines `schedule`.

    Args:
        t_min, t_max: see `SDE`.
        preserving: True for alpha^2 + sigma^2 = 1, False for alpha = 1.
    """

    def __init__(self, t_min: float, t_max: float, preserving: bool = True):
        super().__init__(t_min, t_max)
        self.preserving = preserving

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The log-SNR and its derivative in t, float64, on the CPU, for t on any device."""
        raise NotImplementedError(f"{type(self).__name__} must define schedule(t) -> (log-SNR, its derivative)")

    def log_snr(self, t: Tensor) -> Tensor:
        return self.schedule(t)[0].to(t)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(0.5 * logsigmoid(self.schedule(t)[0])).to(t) if self.preserving else torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        log_snr = self.schedule(t)[0]
        return torch.exp(0.5 * logsigmoid(-log_snr) if self.preserving else -0.5 * log_snr).to(t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        return self.drift(t) * self.alpha(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """d sigma / dt = alpha^2 g^2 / (2 sigma), for both kinds of path (module docstring)."""
        return 0.5 * (self.alpha(t) * self.diffusion(t)).square() / self.sigma(t)

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * self.diffusion(t).square() if self.preserving else torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        fall = (-self.schedule(t)[1]).clamp(min=0)  # rounding may make it negative where the log-SNR is flat
        return self.sigma(t) * torch.sqrt(fall).to(t)
