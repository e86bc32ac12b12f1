"""The values of a diffusion path at one time (`Point`), and the Gaussian kernels between two times.

With r = alpha_t / alpha_s and v = sigma_t^2 - r^2 sigma_s^2 for s < t (t is noisier), on every path

    q(x_t | x_s)      = N(r x_s, v I)
    q(x_s | x_t, x_0) = N((r sigma_s^2 x_t + v alpha_s x_0) / sigma_t^2, v sigma_s^2 / sigma_t^2 I)

(2006.11239, eq. 7). All values are floats, for coefficients computed before a loop, or float64 tensors () or (B,).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from scoresde.views import Path

Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class Point(Generic[Number]):
    """A time t, float64, with alpha, sigma and lambda = log(alpha/sigma) there."""

    t: Tensor
    alpha: Number
    sigma: Number
    lam: Number

    @property
    def ratio(self) -> Number:
        """The noise-to-signal ratio sigma/alpha."""
        return _call("exp", -self.lam)

    @property
    def size(self) -> Number:
        """(alpha^2 + sigma^2)^(1/2), the standard deviation of x_t for data of unit variance."""
        return _call("hypot", self.alpha, self.sigma)

    @property
    def angle(self) -> Number:
        """phi = atan(sigma/alpha), from 0 (data) to pi/2 (noise)."""
        return _call("atan2", self.sigma, self.alpha)


def points(sde: Path, times: Sequence[Tensor]) -> list[Point[float]]:
    """Return the points of a path at these times, as floats, from one evaluation of the path."""
    t = torch.stack(list(times))
    values = [part.tolist() for part in (sde.alpha(t), sde.sigma(t), 0.5 * sde.log_snr(t))]
    return [Point(*point) for point in zip(t, *values, strict=True)]


def transition(clean: Point[Number], noisy: Point[Number]) -> tuple[Number, Number]:
    """Return (r, v) of q(x_t | x_s), with s and t the times of `clean` and `noisy`; see the module docstring.

    v = -sigma_t^2 expm1(2 (lambda_t - lambda_s)) is free of cancellation.
    """
    if isinstance(clean.alpha, float) and clean.alpha == 0:
        raise ValueError(
            f"alpha must be positive at the cleaner time of a step; got alpha(t={clean.t:g}) = 0, where the SDE has no "
            "signal left: lower its noise (beta_max of VP and sub-VP), or choose a smaller t_max"
        )
    return noisy.alpha / clean.alpha, -(noisy.sigma**2) * _call("expm1", 2 * (noisy.lam - clean.lam))


def posterior(clean: Point[Number], noisy: Point[Number]) -> tuple[Number, Number, Number]:
    """Return (a, b, variance) of q(x_s | x_t, x_0) = N(a x_t + b x_0, variance I), with s and t as in `transition`."""
    ratio, variance = transition(clean, noisy)
    factor = (clean.sigma / noisy.sigma) ** 2
    return ratio * factor, clean.alpha * variance / noisy.sigma**2, variance * factor


def _call(name: str, *values: Number) -> Number:
    """Call the function `name` of torch for tensors, of math for floats."""
    return getattr(torch if isinstance(values[0], Tensor) else math, name)(*values)
