r"""Adaptive samplers of the reverse SDE: error control for each sample, and the solvers of torchsde.

`ErrorControlled` compares a step of Euler-Maruyama with one of the stochastic improved Euler method, whose drift is that
of both ends, goes on from the second, and sets the step size by their difference (2105.14080, algorithm 1). There the
two are applied to x and t. Here they are applied to the same SDE in variables in which it is not stiff. With
r = sigma/alpha, the reverse family of `ReverseSDE` is

    y = r^-(1 + l^2) x/alpha,    m = r^-(1 + l^2):        dy = E[x_0 | x] dm + dB,    var B = r^(-2 l^2),

for every path: a drift without any factor, bounded by the data, and noise that is additive and known exactly
(with l = 1, m is the signal-to-noise ratio). In units of the size of the state, w = x / (alpha^2 + sigma^2)^(1/2), with
lambda = log(alpha/sigma), and h > 0 its increase from t to s, the two proposals are

    w'  = e^(-l^2 h) S_s/S_t w + A_s (1 - e^(-k h)) D_t + S_s (Z_s - e^(-l^2 h) Z_t),        k = 1 + l^2,
    w'' = w' + A_s (1 - (1 - e^(-k h)) / (k h)) (D_s - D_t),

where D is E[x_0 | x], at t in the state w and at s in w'; (A, S) = (alpha, sigma) / (alpha^2 + sigma^2)^(1/2); and Z is
the noise, r^(l^2) B, of unit variance: a stationary Ornstein-Uhlenbeck process in the clock l^2 lambda. Its correlation
over a step is e^(-l^2 h). w'' is the integral of a drift that is linear in lambda over the step.

The steps are in the variable of the probability flow's default solver (`flow.Ratio`), which is bounded also where
alpha(t_max) = 0.
"""

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde.flow import Ratio
from scoresde.protocols import Condition, ScoreModel, select
from scoresde.samplers.base import Sampler
from scoresde.samplers.grids import Transition, transitions, uniform_log_snr
from scoresde.samplers.predictors import check_level
from scoresde.sdes import SDE, ReverseSDE
from scoresde.solvers.base import double, finite, rms
from scoresde.tensors import Noise, broadcast, dimensions

SHRINK, GROW = 0.2, 5.0  # bounds of the change of a step size
FIRST = 1 / 32  # the first step, as a fraction of the way


def _choose(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """By a mask (n,) on the CPU, of two tensors (n, *)."""
    return torch.where(mask.to(new.device).reshape(-1, *(1,) * (new.ndim - 1)), new, old)


class Bridges:
    """Stationary Ornstein-Uhlenbeck processes, one for each sample: unit variance, correlation e^-|c - c'| of clocks.

    Each is known at the clocks where it has been asked for. Between two of them it is drawn from its bridge, with
    a = e^-(c - c_left) and b = e^-(c_right - c)

        mean (a (1 - b^2) Z_left + b (1 - a^2) Z_right) / (1 - a^2 b^2),
        variance (1 - a^2) (1 - b^2) / (1 - a^2 b^2),

    and beyond the last with b = 0. So a process does not depend on where it was asked first.

    Args:
        clock: where the processes start, with the value 0 (only differences matter), (n,), float64; or -inf.
        like: a state (n, *), for shape, dtype and device.
    """

    def __init__(self, clock: Tensor, like: Tensor):
        self.clocks = clock[:, None]  # (n, p), inf where there is nothing
        self.values = torch.zeros_like(like)[:, None]  # (n, p, *)

    def draw(self, which: Tensor, clock: Tensor, z: Tensor) -> Tensor:
        """Values (m, *) at clocks (m,) of the processes of these indices (m,), from normal draws z (m, *)."""
        known = self.clocks[which]
        before = known <= clock[:, None]
        left, i = known.masked_fill(~before, -math.inf).max(dim=1)
        right, j = known.masked_fill(before, math.inf).min(dim=1)
        since, until = clock - left, right - clock
        past, future, both = (-torch.expm1(-2 * span) for span in (since, until, since + until))
        a, b = torch.exp(-since) * future / both, torch.exp(-until) * past / both
        std = torch.sqrt(past * future / both)
        # The start may be its own last clock, and both of them -inf
        value = broadcast(a, z) * self.values[which, i] + broadcast(b, z) * self.values[which, j]
        value = value + broadcast(std, z) * z
        self._keep(which, clock, value)
        return value

    def _keep(self, which: Tensor, clock: Tensor, value: Tensor) -> None:
        """Values in a free column each; another one where there is none."""
        if bool(torch.isfinite(self.clocks[which]).all(dim=1).any()):
            self.clocks = torch.cat([self.clocks, torch.full_like(self.clocks[:, :1], math.inf)], dim=1)
            self.values = torch.cat([self.values, torch.zeros_like(self.values[:, :1])], dim=1)
        column = (self.clocks[which] == math.inf).to(torch.int8).argmax(dim=1)
        self.clocks[which, column] = clock
        self.values[which, column] = value

    def latest(self, clock: Tensor) -> Tensor:
        """Values at clocks (n,) that are known, one of each process."""
        column = (self.clocks == clock[:, None]).to(torch.int8).argmax(dim=1)
        return self.values[torch.arange(len(column)), column]

    def forget(self, clock: Tensor) -> None:
        """What lies before the clocks (n,)."""
        self.clocks = self.clocks.masked_fill(self.clocks < clock[:, None], math.inf)

    def rows(self, kept: Tensor) -> None:
        """The processes of some of the samples alone."""
        self.clocks, self.values = self.clocks[kept], self.values[kept]
