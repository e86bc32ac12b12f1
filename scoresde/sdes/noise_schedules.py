"""The common diffusions, each by its alpha(t) and sigma(t), with closed forms where they exist.

| class             | alpha             | sigma                        | source                       |
| ----------------- | ----------------- | ---------------------------- | ---------------------------- |
| `VP`              | exp(-B/2)         | (1 - exp(-B))^(1/2)          | 2011.13456, eq. 11 and 33    |
| `SubVP`           | exp(-B/2)         | 1 - exp(-B)                  | 2011.13456, eq. 12 and 33    |
| `VE`              | 1                 | s_min (s_max / s_min)^t      | 2011.13456, eq. 9 and 30     |
| `Cosine`          | cos(pi t / 2)     | sin(pi t / 2)                | 2102.09672, 2202.00512       |
| `Karras`          | 1                 | t                            | 2206.00364, table 1          |
| `Rectified`       | 1 - t             | t                            | 2209.03003, 2210.02747       |
| `Tabulated`       | from a table of log-SNR, interpolated monotonically (DDPM, NCSN)               |
| `LearnedVP`       | log-SNR is a monotone network of t, which is trained (2107.00630)              |
| `ZeroTerminalSNR` | any path, rescaled so that alpha(t_max) = 0 (2305.08891)                       |

with B(t) the integral of beta(s) = beta_min + s (beta_max - beta_min) from 0 to t.
"""

import math

import torch
from torch import Tensor

from scoresde.arguments import checked
from scoresde.sdes.sde import SDE


@checked
class LinearBeta(SDE):
    """Base class of VP and sub-VP: alpha = exp(-B/2), f = -beta/2, with beta linear in t and B its integral from 0.

    Args:
        beta_min, beta_max: beta at t = 0 and t = 1.
        t_min: time of the data, default 1e-5, at which 2011.13456 computes likelihoods (appendices C and D.2).
        t_max: time of the prior, default 1.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-5, t_max: float = 1.0):
        super().__init__(t_min, t_max)
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"betas must satisfy 0 < beta_min <= beta_max; got {beta_min=}, {beta_max=}")
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)

    def beta(self, t: Tensor) -> Tensor:
        """beta(t) = beta_min + t (beta_max - beta_min)."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def integrated_beta(self, t: Tensor) -> Tensor:
        """B(t), the integral of beta from 0 to t."""
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def time_of_integrated_beta(self, integral: Tensor) -> Tensor:
        """Inverse of `integrated_beta`, a quadratic in t, clamped to [t_min, t_max]; computed without cancellation."""
        slope = self.beta_max - self.beta_min
        # Clamp to the integral at t_max, as the formula below gives NaN for an infinite integral.
        integral = integral.clamp(max=self.t_max * (self.beta_min + 0.5 * self.t_max * slope))
        t = 2 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * integral))
        return t.clamp(self.t_min, self.t_max)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self.integrated_beta(t))

    def alpha_dot(self, t: Tensor) -> Tensor:
        return self.drift(t) * self.alpha(t)

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t)

    @property
    def prior_std(self) -> float:
        """1, as published: sigma(1) differs from it by 2e-5 at the published constants."""
        return 1.0


class VP(LinearBeta):
    """Variance preserving: alpha = exp(-B/2), sigma^2 = 1 - alpha^2, g^2 = beta (2011.13456, eq. 11 and 33).

    B(t) is the integral of beta(s) = beta_min + s (beta_max - beta_min) from 0 to t. The continuous limit of DDPM
    (2006.11239).

        sde = ss.VP()
        x_t = sde.perturb(x_0, t, noise)  # alpha(t) x_0 + sigma(t) noise

    Args:
        beta_min, beta_max: beta at t = 0 and t = 1.
        t_min: time of the data, default 1e-5, at which 2011.13456 computes likelihoods (appendices C and D.2).
        t_max: time of the prior.

    Raises:
        ValueError: 0 < beta_min <= beta_max or 0 <= t_min < t_max does not hold.
    """

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self.integrated_beta(t)))

    def sigma_dot(self, t: Tensor) -> Tensor:
        return 0.5 * self.beta(t) * torch.exp(-self.integrated_beta(t)) / self.sigma(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.beta(t))

    def log_snr(self, t: Tensor) -> Tensor:
        """The log-SNR in closed form: -log(exp(B) - 1), with B = integrated_beta(t)."""
        integral = self.integrated_beta(t)
        return -integral - torch.log(-torch.expm1(-integral))

    def time(self, log_snr: Tensor) -> Tensor:
        # log(1 + 1/SNR); torch's softplus would drop a term beyond 20
        return self.time_of_integrated_beta(torch.logaddexp(-log_snr, torch.zeros_like(log_snr)))


class SubVP(LinearBeta):
    """sub-VP: alpha = exp(-B/2), sigma = 1 - alpha^2, g^2 = beta (1 - exp(-2B)) (2011.13456, eq. 12 and 33).

    B(t) is the integral of beta(s) = beta_min + s (beta_max - beta_min) from 0 to t. Its noise is below that of `VP` at
    every time: sigma(1e-5) = 1e-6.

    Args:
        beta_min, beta_max: beta at t = 0 and t = 1.
        t_min: time of the data, default 1e-5, at which 2011.13456 computes likelihoods (appendices C and D.2).
        t_max: time of the prior.

    Raises:
        ValueError: 0 < beta_min <= beta_max or 0 <= t_min < t_max does not hold.
    """

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self.integrated_beta(t))

    def sigma_dot(self, t: Tensor) -> Tensor:
        return self.beta(t) * torch.exp(-self.integrated_beta(t))

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(-self.beta(t) * torch.expm1(-2 * self.integrated_beta(t)))

    def log_snr(self, t: Tensor) -> Tensor:
        """The log-SNR in closed form: -2 log(2 sinh(B/2)), with B = integrated_beta(t)."""
        integral = self.integrated_beta(t)
        return -integral - 2 * torch.log(-torch.expm1(-integral))

    def time(self, log_snr: Tensor) -> Tensor:
        return self.time_of_integrated_beta(2 * torch.asinh(0.5 * torch.exp(-0.5 * log_snr)))


class ConstantSignal(SDE):
    """Base class of the paths with alpha = 1, and so f = 0."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)


@checked
class VE(ConstantSignal):
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t (2011.13456, eq. 9 and 30).

    The continuous limit of NCSN (1907.05600). sigma(0) = sigma_min, not 0: x at t_min = 1e-5 already carries noise of
    about sigma_min.

    Args:
        sigma_min, sigma_max: noise level at t = 0 and t = 1, in the units of the data in model space.
        t_min, t_max: times of the data and of the prior.

    Raises:
        ValueError: 0 < sigma_min < sigma_max or 0 <= t_min < t_max does not hold.
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0, t_min: float = 1e-5, t_max: float = 1.0):
        super().__init__(t_min, t_max)
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"noise levels must satisfy 0 < sigma_min < sigma_max; got {sigma_min=}, {sigma_max=}")
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        self.log_ratio = math.log(sigma_max / sigma_min)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(self.log_ratio * t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return self.log_ratio * self.sigma(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return math.sqrt(2 * self.log_ratio) * self.sigma(t)

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * (math.log(self.sigma_min) + self.log_ratio * t)

    def time(self, log_snr: Tensor) -> Tensor:
        return ((-0.5 * log_snr - math.log(self.sigma_min)) / self.log_ratio).clamp(self.t_min, self.t_max)


@checked
class Karras(ConstantSignal):
    """alpha = 1, sigma = t: time is the noise level itself (EDM, 2206.00364, table 1), by default from 0.002 to 80.

    Args:
        t_min, t_max: lowest and highest noise level, in the units of the data in model space.

    Raises:
        ValueError: 0 <= t_min < t_max does not hold.
    """

    def __init__(self, t_min: float = 0.002, t_max: float = 80.0):
        super().__init__(t_min, t_max)
        if t_min == 0:
            raise ValueError("Karras needs t_min > 0, because sigma(t) = t is 0 at t = 0; got t_min=0")

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(2 * t)

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-0.5 * log_snr).clamp(self.t_min, self.t_max)


@checked
class UnitTime(SDE):
    """Base class of the paths on [0, 1] with alpha(1) = 0, where the drift diverges: by default t_max is 1 - 1e-3."""

    def __init__(self, t_min: float = 1e-3, t_max: float = 1 - 1e-3):
        super().__init__(t_min, t_max)
        if t_max > 1:
            raise ValueError(f"t_max must be at most 1; got {t_max=}")


class Cosine(UnitTime):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2) (2102.09672, without offset; 2202.00512, section 2).

    f = -(pi/2) tan(pi t / 2) diverges at t = 1, where alpha = 0: t_max is 1 - 1e-3 by default.

    Args:
        t_min, t_max: times of the data and of the prior, in [0, 1].

    Raises:
        ValueError: 0 <= t_min < t_max <= 1 does not hold.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * (1 - t))

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi * torch.sin(0.5 * math.pi * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * self.alpha(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(math.pi * self.sigma(t) / self.alpha(t))

    def time(self, log_snr: Tensor) -> Tensor:
        return (2 / math.pi * torch.atan(torch.exp(-0.5 * log_snr))).clamp(self.t_min, self.t_max)


class Rectified(UnitTime):
    """alpha = 1 - t, sigma = t: straight lines (rectified flow 2209.03003, flow matching 2210.02747).

    f = -1/(1 - t) and g^2 = 2t/(1 - t) diverge at t = 1, where alpha = 0: t_max is 1 - 1e-3 by default.

    Args:
        t_min, t_max: times of the data and of the prior, in [0, 1].

    Raises:
        ValueError: 0 <= t_min < t_max <= 1 does not hold.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(2 * t / (1 - t))

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * log_snr).clamp(self.t_min, self.t_max)
