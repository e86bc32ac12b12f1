r"""Denoising score matching for any SDE and any prediction type.

The objective is an integral over time of the squared error of the predicted noise, per dimension (Vincent 2011;
2011.13456, eq. 7 with score = -eps/sigma),

    L = \int omega(t) E ||eps_hat(x_t, t) - eps||^2 / d  dt,        x_t = alpha x_0 + sigma eps,

estimated without bias by drawing t from a density q and weighting each sample with omega(t) / q(t). A weighting is its
omega; with each comes the q that suits it, and any other may be asked for. The error is computed from the network's
own target F = p x_0 + q eps, as eps_hat - eps = (alpha / D) (F_hat - F), which loses no digits at small t.

The four weightings, in terms of the error of the noise (that of the score is 1/sigma^2 of it, that of the data
sigma^2/alpha^2 of it):

| name         | omega(t)                                                | drawn from        | source             |
| ------------ | ------------------------------------------------------- | ----------------- | ------------------ |
| "variance"   | 1 / (t_max - t_min): lambda = sigma^2                   | uniform t         | 2011.13456, sec. 3 |
| "likelihood" | g^2/sigma^2: lambda = g^2. L d/2 bounds -log p in nats  | uniform log-SNR   | 2101.09258, eq. 7  |
| "karras"     | (s^2 + sigma_data^2)/sigma_data^2 N(log s), s=sigma/alpha| log-normal s     | 2206.00364, tab. 1 |
| "min_snr"    | min(1, gamma/SNR) / (t_max - t_min)                     | uniform t         | 2303.09556, eq. 8  |

Since g^2/sigma^2 = -(log SNR)', drawing t uniformly in log-SNR makes the importance weight of "likelihood" constant:
the draw of 2101.09258 (section 5) has a closed form for every SDE.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoresde.protocols import Condition
from scoresde.score import ScoreModel
from scoresde.sdes import SDE
from scoresde.tensors import broadcast, float64


class TimeDensity:
    """A density of training times on [t_min, t_max], by its quantile function."""

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        """The time below which a fraction u of the density lies; u and t float64 (B,)."""
        raise NotImplementedError(f"{type(self).__name__} must define quantile(sde, u)")

    def density(self, sde: SDE, t: Tensor) -> Tensor:
        """The density at t, integrating to 1 over [t_min, t_max]."""
        raise NotImplementedError(f"{type(self).__name__} must define density(sde, t)")


class UniformTime(TimeDensity):
    """t uniform on [t_min, t_max]."""

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        return torch.lerp(torch.full_like(u, sde.t_min), torch.full_like(u, sde.t_max), u)

    def density(self, sde: SDE, t: Tensor) -> Tensor:
        return torch.full_like(t, 1 / (sde.t_max - sde.t_min))


def _log_snr_range(sde: SDE) -> tuple[Tensor, Tensor]:
    """Log-SNR at t_min and at t_max."""
    ends = sde.log_snr(torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64))
    if not bool(torch.isfinite(ends).all()):
        raise ValueError(
            f"a finite log-SNR at t_min and t_max expected to draw times by log-SNR; {type(sde).__name__} has "
            f"{ends.tolist()}: raise t_min, lower t_max, or pass times=UniformTime()"
        )
    return ends[0], ends[1]


def _log_snr_slope(sde: SDE, t: Tensor) -> Tensor:
    """-(log SNR)' = g^2/sigma^2."""
    return (sde.diffusion(t) / sde.sigma(t)).square()


class UniformLogSNR(TimeDensity):
    """log-SNR uniform between its values at t_min and t_max: density proportional to g^2/sigma^2."""

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        clean, noisy = _log_snr_range(sde)
        return sde.time(clean + u * (noisy - clean))

    def density(self, sde: SDE, t: Tensor) -> Tensor:
        clean, noisy = _log_snr_range(sde)
        return _log_snr_slope(sde, t) / (clean - noisy)


class LogNormal(TimeDensity):
    """log(sigma/alpha) ~ N(mean, std^2), restricted to the range of the SDE (2206.00364, table 1: -1.2 and 1.2)."""

    def __init__(self, mean: float = -1.2, std: float = 1.2):
        self.mean, self.std = float(mean), float(std)

    def _tails(self, sde: SDE) -> tuple[Tensor, Tensor]:
        """The normal's cumulative probability at t_min and t_max."""
        clean, noisy = _log_snr_range(sde)
        return torch.special.ndtr(self._standard(clean)), torch.special.ndtr(self._standard(noisy))

    def _standard(self, log_snr: Tensor) -> Tensor:
        return (-0.5 * log_snr - self.mean) / self.std

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        low, high = self._tails(sde)
        return sde.time(-2 * (self.mean + self.std * torch.special.ndtri(low + u * (high - low))))

    def density(self, sde: SDE, t: Tensor) -> Tensor:
        low, high = self._tails(sde)
        normal = torch.exp(-0.5 * self._standard(sde.log_snr(t)).square()) / (self.std * math.sqrt(2 * math.pi))
        return normal * 0.5 * _log_snr_slope(sde, t) / (high - low)


class Weighting:
    """omega(t), the weight in time of the squared error of the predicted noise; `times` is the density it suits."""

    times: TimeDensity = UniformTime()

    def omega(self, sde: SDE, t: Tensor) -> Tensor:
        """The weight at float64 t (B,), per unit of time."""
        raise NotImplementedError(f"{type(self).__name__} must define omega(sde, t)")


class Variance(Weighting):
    """lambda = sigma^2 on the score: every noise level's error of the noise counts the same (2011.13456, sec. 3)."""

    def omega(self, sde: SDE, t: Tensor) -> Tensor:
        return UniformTime().density(sde, t)


class Likelihood(Weighting):
    """lambda = g^2 on the score: L d/2 plus a constant bounds the negative log-likelihood (2101.09258, theorem 1)."""

    times = UniformLogSNR()

    def omega(self, sde: SDE, t: Tensor) -> Tensor:
        return _log_snr_slope(sde, t)


class Karras(Weighting):
    """EDM's: unit weight on the network's own error, log-normal noise levels (2206.00364, table 1)."""

    def __init__(self, sigma_data: float = 0.5, mean: float = -1.2, std: float = 1.2):
        self.sigma_data, self.times = float(sigma_data), LogNormal(mean, std)

    def omega(self, sde: SDE, t: Tensor) -> Tensor:
        ratio = torch.exp(-0.5 * sde.log_snr(t))
        return (1 + (ratio / self.sigma_data).square()) * self.times.density(sde, t)


class MinSNR(Weighting):
    """min(SNR, gamma) on the error of the data (2303.09556, eq. 8; gamma = 5)."""

    def __init__(self, gamma: float = 5.0):
        self.gamma = float(gamma)

    def omega(self, sde: SDE, t: Tensor) -> Tensor:
        return torch.exp(math.log(self.gamma) - sde.log_snr(t)).clamp(max=1) * UniformTime().density(sde, t)


WEIGHTINGS = {"variance": Variance, "likelihood": Likelihood, "karras": Karras, "min_snr": MinSNR}


@dataclass
class LossTerms:
    """Per-sample terms: `value` (B,) = weight * squared error per dimension, with gradient; `t`, `weight` (B,).

    `value.mean()` estimates the objective without bias.
    """

    value: Tensor
    t: Tensor
    weight: Tensor


class DenoisingScoreMatching(nn.Module):
    """The denoising score-matching loss of the module's first formula.

    Args:
        weighting: "variance", "likelihood", "karras", "min_snr", or a `Weighting`.
        times: density that times are drawn from; the weighting's own if not given.
        stratified: draw the batch's times at one random offset of a regular lattice in probability (2107.00630,
            appendix I.1) instead of independently: unbiased as well, with less variance.

    Raises:
        ValueError: an unknown weighting.
    """

    def __init__(
        self, weighting: str | Weighting = "variance", times: TimeDensity | None = None, stratified: bool = True
    ):
        super().__init__()
        if isinstance(weighting, str):
            if weighting not in WEIGHTINGS:
                raise ValueError(f"weighting among {', '.join(WEIGHTINGS)} expected; got {weighting!r}")
            weighting = WEIGHTINGS[weighting]()
        self.weighting, self.times, self.stratified = weighting, times or weighting.times, stratified

    def draw_times(self, sde: SDE, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n times from the density, (n,), float64, on the CPU."""
        device = "cpu" if generator is None else generator.device
        u = torch.rand(1 if self.stratified else n, generator=generator, device=device, dtype=torch.float64).cpu()
        if self.stratified:
            u = (u + torch.arange(n, dtype=torch.float64) / n).frac()
        return self.times.quantile(sde, u)

    def forward(
        self,
        model: ScoreModel,
        x0: Tensor,
        cond: Condition = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> LossTerms:
        """Loss terms of clean states x0 (B, *).

        Args:
            model: the score model to train.
            x0: clean data.
            cond: the network's condition.
            t: times (B,), taken as drawn from `times`; drawn here if not given.
            noise: (B, *); drawn here if not given.
            generator: for the draws.
        """
        sde = model.sde
        if t is None:
            t = self.draw_times(sde, x0.shape[0], generator)
        elif (t := float64(t)).shape not in ((), x0.shape[:1]):
            raise ValueError(f"times () or {tuple(x0.shape[:1])}, one per state, expected; got {tuple(t.shape)}")
        t = t.expand(x0.shape[0])
        if noise is not None and noise.shape != x0.shape:
            raise ValueError(f"noise of the shape of the states, {tuple(x0.shape)}, expected; got {tuple(noise.shape)}")
        if noise is None:
            device = x0.device if generator is None else generator.device
            noise = torch.randn(x0.shape, generator=generator, device=device, dtype=x0.dtype).to(x0.device)
        p, q = model.prediction.target(sde, t)
        target = broadcast(p, x0) * x0 + broadcast(q, x0) * noise
        output = model.predict(sde.perturb(x0, t, noise), t, cond).output
        to_noise = sde.alpha(t) / model.prediction.determinant(sde, t)
        weight = self.weighting.omega(sde, t) / self.times.density(sde, t)
        error = (output - target).square().flatten(1).mean(dim=1)
        value = (weight * to_noise.square()).to(error) * error
        return LossTerms(value=value, t=t, weight=weight)
