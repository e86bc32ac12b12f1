"""Densities of training times, given by their quantile functions: t = quantile(u) for uniform u.

| class           | density q(t)                                    | for                                              |
| --------------- | ----------------------------------------------- | ------------------------------------------------ |
| `UniformTime`   | 1 / (t_max - t_min)                             | 2011.13456, section 3                            |
| `UniformLogSNR` | proportional to g^2/sigma^2 = -(log SNR)'       | 2101.09258, section 5, for every SDE             |
| `LogNormal`     | log(sigma/alpha) normal                         | 2206.00364, table 1                              |
| `Nodes`         | equal probabilities of N given times            | 2006.11239, eq. 14 (DDPM); 1907.05600, eq. 6     |

`UniformLogSNR` and `LogNormal` draw no log-SNR below -30, where the signal is 3e-7 of the noise, even if alpha(t_max) =
0. The times beyond contribute less than 5e-14 |x_0|^2 to the integral of an evidence bound.
"""

import math

import torch
from torch import Tensor

from scoresde.arguments import Positive, checked
from scoresde.configured import Configured
from scoresde.sdes import SDE
from scoresde.tensors import check_number, float64

PURE_NOISE = -30.0  # the log-SNR below which a state counts as pure noise


class TimeDensity(Configured):
    """Base class of the densities q(t) of training times on [t_min, t_max].

    A subclass defines `quantile(sde, u)`, the time t for a fraction u in [0, 1], and `density(sde, t)`, both float64
    (B,).
    """

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        """Return the time t below which a fraction u of the probability lies; u and t are float64 (B,)."""
        raise NotImplementedError(f"{type(self).__name__} must define quantile(sde, u)")

    def density(self, sde: SDE, t: Tensor) -> Tensor:
        """Return the density at t; it integrates to 1 over [t_min, t_max]."""
        raise NotImplementedError(f"{type(self).__name__} must define density(sde, t)")


class UniformTime(TimeDensity):
    """Training times uniform on [t_min, t_max]."""

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        return torch.lerp(torch.full_like(u, sde.t_min), torch.full_like(u, sde.t_max), u)

    def density(self, sde: SDE, t: Tensor) -> Tensor:
        return torch.full_like(t, 1 / (sde.t_max - sde.t_min))


@checked
class Nodes(UniformTime):
    r"""t uniform over N nodes t_0 < ... < t_(N-1): the discrete-time objectives.

    The integral over time becomes a sum, \int h(t) dt -> (t_max - t_min)/N sum_k h(t_k): `density` is that of
    `UniformTime`, so under the weighting "variance" every term has weight 1 and the objective is the plain mean over
    nodes. `DenoisingScoreMatching("variance", Nodes())` is

    - DDPM's L_simple (2006.11239, eq. 14) on `Tabulated.from_alphas_cumprod`, divided by the number of dimensions;
    - NCSN's objective with lambda = sigma^2 (1907.05600, eq. 5 and 6) on `Tabulated.from_sigmas`, times 2/d; with
      reduction="half_sum" it is that objective itself.

    Args:
        steps: number N of times up to t_max, for any SDE; default: the nodes of a `Tabulated` path.
        spacing: the N times are equally spaced in "time" or in "log_snr".
        start: the first of the N times; default: t_min.

    Raises:
        ValueError: steps is less than 2, or spacing is unknown. In the methods: the SDE has no nodes and steps is None,
            start is outside the SDE's range, or there is no noise at the first time with spacing="log_snr".
    """

    def __init__(self, steps: int | None = None, spacing: str = "time", start: float | None = None):
        if steps is not None and steps < 2:
            raise ValueError(f"steps must be at least 2; got {steps}")
        if spacing not in ("time", "log_snr"):
            raise ValueError(f"spacing must be 'time' or 'log_snr'; got {spacing!r}")
        self.steps, self.spacing, self.start = steps, spacing, start

    def nodes(self, sde: SDE) -> Tensor:
        """Return the times, increasing, float64 (N,), on the CPU."""
        if self.steps is None:
            if (table := getattr(sde, "nodes", None)) is None:
                raise ValueError(f"{type(sde).__name__} has no nodes: pass Nodes(steps=1000) for equally spaced times")
            return table
        start = sde.t_min if self.start is None else self.start
        if not sde.t_min <= start < sde.t_max:
            raise ValueError(f"start must lie in [{sde.t_min:g}, {sde.t_max:g}); got {start:g}")
        times = torch.linspace(start, sde.t_max, self.steps, dtype=torch.float64)
        if self.spacing == "log_snr":
            fractions = torch.linspace(0, 1, self.steps, dtype=torch.float64)[1:-1]
            times[1:-1] = sde.time(torch.lerp(*_log_snr_range(sde, start), fractions))
        return times

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        nodes = self.nodes(sde)
        return nodes[(u.cpu() * len(nodes)).long().clamp(max=len(nodes) - 1)].to(u)

    def index(self, sde: SDE, t: Tensor) -> Tensor:
        """Return the index k of the node at each time t (B,), integers (B,), on the CPU.

        Raises:
            ValueError: a time is further than 1e-6 of the range from every node.
        """
        nodes, t = self.nodes(sde), float64(t).detach().cpu()
        index = torch.bucketize(t.contiguous(), (nodes[1:] + nodes[:-1]) / 2)
        distance = (t - nodes[index]).abs()
        if bool((distance > 1e-6 * (sde.t_max - sde.t_min)).any()):
            wrong = float(t[distance.argmax()])
            raise ValueError(f"t must be one of the {len(nodes)} nodes; got {wrong:g}: draw times with `draw_times`")
        return index


def _log_snr_range(sde: SDE, start: float | None = None) -> tuple[Tensor, Tensor]:
    """Return the log-SNR at `start` (default: t_min) and at t_max, raised to -30 (`PURE_NOISE`) where it is lower.

    Raises:
        ValueError: there is no noise at `start`.
    """
    first = sde.t_min if start is None else start
    ends = sde.log_snr(torch.tensor([first, sde.t_max], dtype=torch.float64)).clamp(min=PURE_NOISE)
    if not bool(torch.isfinite(ends).all()):
        raise ValueError(
            f"drawing times by log-SNR needs noise at the first time; {type(sde).__name__} has an infinite log-SNR at "
            f"t={first:g}: raise t_min, or pass times=UniformTime()"
        )
    return ends[0], ends[1]


def log_snr_slope(sde: SDE, t: Tensor) -> Tensor:
    """Return -(log SNR)' = g^2/sigma^2."""
    return (sde.diffusion(t) / sde.sigma(t)).square()


class UniformLogSNR(TimeDensity):
    """Training times with log-SNR uniform between its values at t_min and t_max: density proportional to g^2/sigma^2.

    It is the importance sampling of 2101.09258 (section 5) in closed form for every SDE: under the weighting
    "likelihood" all samples have the same weight.
    """

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        clean, noisy = _log_snr_range(sde)
        return sde.time(clean + u * (noisy - clean))

    def density(self, sde: SDE, t: Tensor) -> Tensor:
        clean, noisy = _log_snr_range(sde)
        return log_snr_slope(sde, t) / (clean - noisy)


@checked
class LogNormal(TimeDensity):
    """Training times with log(sigma/alpha) ~ N(mean, std^2), restricted to the range of the SDE (2206.00364, table 1).

    Args:
        mean, std: mean and standard deviation of log(sigma/alpha); -1.2 and 1.2 in the paper.

    Raises:
        ValueError: std is not positive.
    """

    def __init__(self, mean: float = -1.2, std: Positive = 1.2):
        self.mean, self.std = float(mean), check_number("std", std, 0)

    def _cdf_range(self, sde: SDE) -> tuple[Tensor, Tensor]:
        """Return the cumulative probability of N(mean, std^2) at the log(sigma/alpha) of t_min and of t_max."""
        clean, noisy = _log_snr_range(sde)
        return torch.special.ndtr(self._standardised(clean)), torch.special.ndtr(self._standardised(noisy))

    def _standardised(self, log_snr: Tensor) -> Tensor:
        return (-0.5 * log_snr - self.mean) / self.std

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        low, high = self._cdf_range(sde)
        log_snr = -2 * (self.mean + self.std * torch.special.ndtri(low + u * (high - low)))
        return sde.time(log_snr.clamp(min=PURE_NOISE))

    def density(self, sde: SDE, t: Tensor) -> Tensor:
        low, high = self._cdf_range(sde)
        normal = torch.exp(-0.5 * self._standardised(sde.log_snr(t)).square()) / (self.std * math.sqrt(2 * math.pi))
        return normal * 0.5 * log_snr_slope(sde, t) / (high - low)
