"""Weightings omega(t) of an objective over time, each with a density of training times that suits it.

omega(t) weights the squared error of one view of the model (E[eps | x_t], E[x_0 | x_t] or a combination), by default
the noise E[eps | x_t]. The squared error of the score is 1/sigma^2 times that of the noise, and the squared error of
the data is sigma^2/alpha^2 times that of the noise. Where alpha = 0, the noise is x_t / sigma, which is known without
x_0, so a finite weight on the error of the noise does not train the prediction of x_0 there. The last three weightings
of the table do, because they weight the errors of other views.

| name         | omega(t)                                                | times drawn from  | source             |
| ------------ | ------------------------------------------------------- | ----------------- | ------------------ |
| "variance"   | 1 / (t_max - t_min): lambda = sigma^2                   | uniform t         | 2011.13456, sec. 3 |
| "likelihood" | g^2/sigma^2: lambda = g^2. L d/2 bounds -log p in nats  | uniform log-SNR   | 2101.09258, eq. 7  |
| "karras"     | (s^2 + sigma_data^2)/sigma_data^2 q(t), s = sigma/alpha | q: log-normal s   | 2206.00364, tab. 1 |
| "min_snr"    | min(1, gamma/SNR) / (t_max - t_min)                     | uniform t         | 2303.09556, eq. 8  |
| "velocity"   | 1 / (t_max - t_min), on the error of the velocity       | uniform t         | 2210.02747, eq. 9  |
| "v"          | 1 / (t_max - t_min), on the error of v                  | uniform t         | 2202.00512, sec. 4 |
| "data"       | 1 / (t_max - t_min), on the error of x_0                | uniform t         | 2202.00512, sec. 4 |

lambda is the corresponding weight of the squared error of the score. Since g^2/sigma^2 = -(log SNR)', drawing t
uniformly in log-SNR makes the importance weight of "likelihood" constant: the importance sampling of 2101.09258
(section 5) has a closed form for every SDE.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from scoresde.arguments import Positive, checked
from scoresde.configured import Configured
from scoresde.losses.time_densities import LogNormal, TimeDensity, UniformLogSNR, UniformTime, log_snr_slope
from scoresde.sdes import SDE
from scoresde.tensors import check_instance, check_number

VIEWS = ("velocity", "v", "denoised", "noise", "score")


class Weighting(Configured):
    """Base class of the weights omega(t) of the squared error of a view. A subclass defines `omega(sde, t)`.

        class Mine(ss.losses.Weighting):
            def omega(self, sde, t):  # float64 (B,) -> (B,)
                return 1 / (1 + sde.log_snr(t).exp())

    Attributes:
        times: the density of training times that suits the weighting; default `UniformTime()`.
        view: the attribute of `Views` whose error is weighted, by default "noise". Losses without denoising
            (`ImplicitScoreMatching`) accept only "noise".
    """

    times: TimeDensity = UniformTime()
    view: str = "noise"

    def omega(self, sde: SDE, t: Tensor) -> Tensor:
        """Return the weight at float64 t (B,), per unit of time."""
        raise NotImplementedError(f"{type(self).__name__} must define omega(sde, t)")


class VarianceWeighting(Weighting):
    """Weight sigma^2 on the error of the score: equal weight on the noise at all times (2011.13456, sec. 3).

    omega(t) = 1 / (t_max - t_min) on |eps_hat - eps|^2 / d, times uniform. Its name in losses is "variance".
    """

    def omega(self, sde: SDE, t: Tensor) -> Tensor:
        return UniformTime().density(sde, t)


@checked
class UnitWeighting(Weighting):
    """Equal weight on the error of a view at all times, as in the plain loss of a network that predicts this view.

    For a predicted velocity u it is the flow-matching loss |u - (alpha' x_0 + sigma' eps)|^2 / d (2210.02747, eq. 9).
    Where alpha is 0, the errors of the velocity, v and data are errors of x_0, which the model learns there as at any
    other time.

    Args:
        view: "velocity", "v", "denoised", "noise" or "score".
        times: the density q of the times; the weight omega is q, so that every drawn time has the weight 1. Default:
            `UniformTime()`. `LogNormal(0, 1)` on the `Rectified` path, where sigma/alpha = t/(1 - t), is the
            logit-normal density of Stable Diffusion 3 (2403.03206, eq. 19).

    Raises:
        ValueError: view is unknown.
    """

    def __init__(self, view: str = "velocity", times: TimeDensity | None = None):
        if view not in VIEWS:
            raise ValueError(f"view must be one of {', '.join(VIEWS)}; got {view!r}")
        self.view, self.times = view, times or UniformTime()

    def omega(self, sde: SDE, t: Tensor) -> Tensor:
        return self.times.density(sde, t)


class LikelihoodWeighting(Weighting):
    """Weight g^2 on the error of the score, for maximum likelihood (2101.09258, theorem 1).

    omega(t) = g^2/sigma^2 on |eps_hat - eps|^2 / d, times uniform in log-SNR. The objective times d/2, plus a constant,
    is an upper bound on -log p in nats for data of d dimensions. Its name in losses is "likelihood".
    """

    times = UniformLogSNR()

    def omega(self, sde: SDE, t: Tensor) -> Tensor:
        return log_snr_slope(sde, t)


@checked
class KarrasWeighting(Weighting):
    """EDM's weighting: unit weight on the error of the network's output, log-normal times (2206.00364, table 1).

    omega(t) = (1 + s^2/sigma_data^2) q(t) on |eps_hat - eps|^2 / d, with s = sigma/alpha and q the density of the
    times. Its name in losses is "karras".

    Args:
        sigma_data: root mean square of the data in model space, as in `predictions.KarrasPreconditioning`.
        mean, std: mean and standard deviation of log(sigma/alpha) of the training times.

    Raises:
        ValueError: sigma_data or std is not positive.
    """

    def __init__(self, sigma_data: Positive = 0.5, mean: float = -1.2, std: Positive = 1.2):
        self.sigma_data, self.times = check_number("sigma_data", sigma_data, 0), LogNormal(mean, std)

    def omega(self, sde: SDE, t: Tensor) -> Tensor:
        ratio = torch.exp(-0.5 * sde.log_snr(t))
        return (1 + (ratio / self.sigma_data).square()) * self.times.density(sde, t)


@checked
class MinSNRWeighting(Weighting):
    """Weight min(SNR, gamma) on the error of the data (2303.09556, eq. 8).

    omega(t) = min(1, gamma/SNR) / (t_max - t_min) on |eps_hat - eps|^2 / d, with SNR = alpha^2/sigma^2; times uniform.
    Its name in losses is "min_snr".

    Args:
        gamma: the largest weight, 5 in the paper.

    Raises:
        ValueError: gamma is not positive.
    """

    def __init__(self, gamma: Positive = 5.0):
        self.gamma = check_number("gamma", gamma, 0)

    def omega(self, sde: SDE, t: Tensor) -> Tensor:
        return torch.exp(math.log(self.gamma) - sde.log_snr(t)).clamp(max=1) * UniformTime().density(sde, t)


WEIGHTINGS: dict[str, Callable[[], Weighting]] = {
    "variance": VarianceWeighting,
    "likelihood": LikelihoodWeighting,
    "karras": KarrasWeighting,
    "min_snr": MinSNRWeighting,
    "velocity": UnitWeighting,
    "v": lambda: UnitWeighting("v"),
    "data": lambda: UnitWeighting("denoised"),
}
"""The weightings by the name that losses take."""


def resolve(weighting: str | Weighting) -> Weighting:
    """Return the weighting with the given name; return a `Weighting` unchanged.

    Raises:
        TypeError: `weighting` is neither a name nor a weighting.
        ValueError: the name is unknown.
    """
    if not isinstance(weighting, str):
        check_instance("weighting", weighting, "omega")
        return weighting
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}; got {weighting!r}")
    return WEIGHTINGS[weighting]()
