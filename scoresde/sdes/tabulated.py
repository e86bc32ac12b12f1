"""Diffusions given by a table, and the zero-terminal-SNR rescaling of any diffusion.

The discrete schedules of DDPM, NCSN and diffusers are tables of noise levels. Monotone interpolation of their log-SNR
(Fritsch-Carlson cubics: once continuously differentiable, no overshoot) gives a continuous path through every entry;
the rest follows from the log-SNR and its slope (`LogSNRPath`).
"""

import math
from collections.abc import Sequence
from typing import Self

import numpy as np
import scipy  # its subpackages are imported where they are first used
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from scoresde.arguments import checked
from scoresde.sdes.log_snr import LogSNRPath
from scoresde.sdes.sde import SDE
from scoresde.tensors import check_instance, float64, listed

Table = Tensor | Sequence[float]


class Tabulated(LogSNRPath):
    """A path through nodes (t_i, log SNR_i), interpolated monotonically.

    Args:
        log_snr: the log-SNR at each node: at least two values, strictly decreasing.
        times: times of the nodes, strictly increasing; default i / (N - 1), from 0 to 1.
        preserving: True for alpha^2 + sigma^2 = 1 (DDPM), False for alpha = 1 (NCSN).

    Raises:
        ValueError: there are fewer than two nodes, the number of times is not that of the values, or the values are not
            finite or not monotone.
    """

    def __init__(self, log_snr: Table, times: Table | None = None, preserving: bool = True):
        values = float64(log_snr).cpu().flatten()
        if times is None:
            times = torch.linspace(0, 1, len(values), dtype=torch.float64, device="cpu")
        nodes = float64(times).cpu()
        if len(values) < 2 or nodes.shape != values.shape:
            raise ValueError(
                f"a table must have two nodes or more and a time for each; got {len(values)} values, {len(nodes)} times"
            )
        if not bool(torch.isfinite(values).all() and (values.diff() < 0).all() and (nodes.diff() > 0).all()):
            raise ValueError(
                "the log-SNR must be finite and strictly decreasing (alphas_cumprod decreasing in (0, 1), sigmas "
                f"increasing), and the times strictly increasing; got log-SNR {listed(values)}, times {listed(nodes)}"
            )
        super().__init__(float(nodes[0]), float(nodes[-1]), preserving)
        slopes = scipy.interpolate.PchipInterpolator(nodes.numpy(), values.numpy()).derivative()(nodes.numpy())
        # Plain attributes, not buffers: they stay in float64 on the CPU when the model moves.
        self.nodes, self.values, self.slopes = nodes, values, torch.from_numpy(np.asarray(slopes))

    def chain_alpha(self, t: Tensor, steps: int = 1000) -> Tensor:
        """Return alpha(t_i)^2 / alpha(t_(i-1))^2 = 1 - beta_i at the last node t_i <= t, with alpha(t_(-1)) = 1."""
        squares = self.alpha(self.nodes).square()
        ratios = torch.cat([squares[:1], squares[1:] / squares[:-1]])
        below = torch.searchsorted(self.nodes, t.cpu() + 1e-9 * (self.t_max - self.t_min), right=True) - 1
        return ratios[below.clamp(min=0)].to(t)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Table, times: Table | None = None) -> Self:
        """Return the path of DDPM or diffusers with alpha^2 = alphas_cumprod at each step (2006.11239, eq. 4)."""
        squared = float64(alphas_cumprod)
        return cls(torch.logit(squared), times)

    @classmethod
    def from_sigmas(cls, sigmas: Table, times: Table | None = None) -> Self:
        """Return the path of NCSN with increasing noise levels sigma, and alpha = 1 (1907.05600)."""
        return cls(-2 * float64(sigmas).log(), times, preserving=False)

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = float64(t).cpu()
        right = torch.searchsorted(self.nodes, t.detach().contiguous()).clamp(1, len(self.nodes) - 1)
        left = right - 1
        width = self.nodes[right] - self.nodes[left]
        u = (t - self.nodes[left]) / width
        rise, start = self.values[right] - self.values[left], self.values[left]
        in_slope, out_slope = width * self.slopes[left], width * self.slopes[right]
        cubic, square = in_slope + out_slope - 2 * rise, 3 * rise - 2 * in_slope - out_slope
        value = start + u * (in_slope + u * (square + u * cubic))
        return value, (in_slope + u * (2 * square + u * 3 * cubic)) / width


@checked
class DDPM(Tabulated):
    """The N steps of DDPM, the i-th at t = i / (N - 1) (2006.11239, section 4).

    alpha_i^2 = prod_{j <= i} (1 - beta_j) with beta_j in equal steps from beta_start to beta_end.

    Args:
        steps: N.
        beta_start, beta_end: first and last beta.

    Raises:
        ValueError: steps < 2, or 0 < beta_start <= beta_end < 1 does not hold.
    """

    def __init__(self, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02):
        if steps < 2 or not 0 < beta_start <= beta_end < 1:
            raise ValueError(
                f"DDPM needs steps >= 2 and 0 < beta_start <= beta_end < 1; got {steps=}, {beta_start=}, {beta_end=}"
            )
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64, device="cpu")
        log_signal = torch.log1p(-betas).cumsum(dim=0)
        super().__init__(log_signal - torch.log(-torch.expm1(log_signal)))


@checked
class CosineDDPM(Tabulated):
    """The N steps of improved DDPM with its cosine schedule, the i-th at t = i / (N - 1) (2102.09672, section 3.2).

    alpha_i^2 = prod_{j <= i} (1 - beta_j), beta_j = min(1 - a((j + 1)/N) / a(j/N), 0.999) and
    a(s) = cos^2(pi/2 (s + 0.008)/1.008).

    Args:
        steps: N.

    Raises:
        ValueError: steps < 2.
    """

    def __init__(self, steps: int = 1000):
        if steps < 2:
            raise ValueError(f"CosineDDPM needs steps >= 2; got {steps=}")
        s = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
        squares = torch.cos((s + 0.008) / 1.008 * (math.pi / 2)).square()
        betas = (1 - squares[1:] / squares[:-1]).clamp(max=0.999)
        log_signal = torch.log1p(-betas).cumsum(dim=0)
        super().__init__(log_signal - torch.log(-torch.expm1(log_signal)))


@checked
class NCSN(Tabulated):
    """The N noise levels of NCSN, a geometric sequence, with alpha = 1 (1907.05600, section 4.3; 2006.09011).

    Between these levels the path is that of `VE`. The discrete objective (`losses.Nodes`) draws times at the levels.

    Args:
        steps: N.
        sigma_min, sigma_max: lowest and highest noise level.

    Raises:
        ValueError: steps < 2, or 0 < sigma_min < sigma_max does not hold.
    """

    def __init__(self, steps: int = 1000, sigma_min: float = 0.01, sigma_max: float = 50.0):
        if steps < 2 or not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"NCSN needs steps >= 2 and 0 < sigma_min < sigma_max; got {steps=}, {sigma_min=}, {sigma_max=}"
            )
        exponents = torch.linspace(math.log(sigma_min), math.log(sigma_max), steps, dtype=torch.float64, device="cpu")
        super().__init__(-2 * exponents, preserving=False)


class ZeroTerminalSNR(SDE):
    """Any path, rescaled so that no signal is left at its end (2305.08891, algorithm 1, in continuous time).

    With alpha and sigma of `path`, n = (alpha^2 + sigma^2)^(1/2) and a = alpha / n (the root of alpha-bar, for a
    variance-preserving path), the rescaled path has

        a_new(t) = a(t_min) (a(t) - a(t_max)) / (a(t_min) - a(t_max)),
        alpha_new = n a_new,   sigma_new = n (1 - a_new^2)^(1/2).

    Its f diverges at path.t_max, where alpha_new = 0: models must predict data, v or velocity there, not noise.

    Args:
        path: the path to rescale.
        t_max: end of the time range, default path.t_max; alpha_new is zero at path.t_max in any case.

    Raises:
        ValueError: t_max is above path.t_max.
    """

    def __init__(self, path: SDE, t_max: float | None = None):
        check_instance("path", path, "alpha", "sigma", "log_snr")
        super().__init__(path.t_min, path.t_max if t_max is None else t_max)
        if self.t_max > path.t_max:
            raise ValueError(f"t_max must be at most that of the path, {path.t_max}; got {t_max}")
        self.path = path

    def _unit(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (a, nu, n) of the path: alpha = n a and sigma = n nu, with a^2 + nu^2 = 1."""
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        norm = torch.sqrt(alpha.square() + sigma.square())
        return alpha / norm, sigma / norm, norm

    def _ends(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a(t_min), nu(t_min) and a(t_max) of the path, see `_unit`, each () in the dtype of t."""
        (first, last), (start, _), _ = self._unit(t.new_tensor([self.path.t_min, self.path.t_max]))
        return first, start, last

    def _rescaled(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (a_new, nu_new, n) at t, see the class docstring.

        nu_new = (1 - a_new^2)^(1/2) is computed without cancellation at small t.
        """
        first, start, last = self._ends(t)
        signal, noise, norm = self._unit(t)
        fallen = (noise - start) * (noise + start) / (first + signal)  # a(t_min) - a(t)
        rest = start.square() / (1 + first) + first * fallen / (first - last)  # 1 - a_new
        return first * ((signal - last) / (first - last)), torch.sqrt(rest * (2 - rest)), norm

    def _slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (a_new', n'/n) at t, with a_new and n of the class docstring.

        a_new' follows from a' = -a g^2/(2 n^2), with the g of the path.
        """
        first, _, last = self._ends(t)
        signal, noise, norm = self._unit(t)
        fall = -0.5 * signal * (self.path.diffusion(t) / norm).square()
        growth = (signal * self.path.alpha_dot(t) + noise * self.path.sigma_dot(t)) / norm
        return first * fall / (first - last), growth

    def alpha(self, t: Tensor) -> Tensor:
        signal, _, norm = self._rescaled(t)
        return norm * signal

    def sigma(self, t: Tensor) -> Tensor:
        _, noise, norm = self._rescaled(t)
        return norm * noise

    def alpha_dot(self, t: Tensor) -> Tensor:
        (signal, _, norm), (fall, growth) = self._rescaled(t), self._slopes(t)
        return norm * (growth * signal + fall)

    def sigma_dot(self, t: Tensor) -> Tensor:
        (signal, noise, norm), (fall, growth) = self._rescaled(t), self._slopes(t)
        return norm * (growth * noise - signal * fall / noise)

    def drift(self, t: Tensor) -> Tensor:
        fall, growth = self._slopes(t)
        return growth + fall / self._rescaled(t)[0]

    def diffusion(self, t: Tensor) -> Tensor:
        """The diffusion coefficient g(t) = n (-2 a_new'/a_new)^(1/2), with a_new and n of the class docstring."""
        signal, _, norm = self._rescaled(t)
        return norm * torch.sqrt(-2 * self._slopes(t)[0] / signal)

    def time(self, log_snr: Tensor) -> Tensor:
        """Inverse of `log_snr`, clamped to [t_min, t_max].

        a_new follows from the log-SNR, a from a_new (class docstring), and t from `path.time` at the log-SNR of a.
        """
        first, start, last = self._ends(log_snr)
        scale = (first - last) / first
        a_new = torch.exp(0.5 * logsigmoid(log_snr))
        missing = start.square() / (1 + first)  # 1 - a, without cancellation at small t: first at t_min
        missing = missing + scale * (-torch.expm1(0.5 * logsigmoid(log_snr)) - missing)
        a = last + scale * a_new
        return self.path.time(2 * a.log() - (missing * (1 + a)).log()).clamp(self.t_min, self.t_max)
