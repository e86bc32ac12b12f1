r"""The views of a diffusion model at (x, t): every view follows from one method, `combine`.

A model knows E[x_0 | x_t] and E[eps | x_t], with alpha E[x_0 | x_t] + sigma E[eps | x_t] = x. Samplers, likelihoods and
losses use combinations of the two,

    combine(d, n) = d E[x_0 | x_t] + n E[eps | x_t],

with float64 coefficients that are cast once. No view is computed from another: at t = 1e-5, with sigma about 1e-3, the
division by sigma would multiply the rounding of float32 by a thousand.

| implementation       | combine(d, n)                                           | used by                            |
| -------------------- | ------------------------------------------------------- | ---------------------------------- |
| `score.NetworkViews` | a(t) x + b(t) F, of the network's output F              | `score.ScoreModel`                 |
| `BlendedViews`       | sum_k w_k(t) views_k.combine(d, n)                      | guidance, compositions             |
| `ShiftedViews`       | views.combine(d, n) + (d - n alpha/sigma) delta         | thresholding                       |
| `TiltedViews`        | views.combine(d, n) + (d sigma^2/alpha - n sigma) g     | guidance, posterior models         |
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from scoresde.tensors import broadcast, check_shape_of_states, float64


class Path(Protocol):
    """The functions of time of an SDE that `Views` and `sdes.transitions.Point` use."""

    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def alpha_dot(self, t: Tensor) -> Tensor: ...
    def sigma_dot(self, t: Tensor) -> Tensor: ...
    def log_snr(self, t: Tensor) -> Tensor: ...
    def size(self, t: Tensor) -> Tensor: ...


class Views(ABC):
    """The views of a model at (x, t), each (B, *) in the dtype of x, computed on access.

    Args:
        sde: the diffusion.
        t: float64, () or (B,).
        variance: the fraction nu (B, *) that a network with learned variance predicts, None for other networks. The
            reverse step then has the variance Sigma with log Sigma = nu log beta + (1 - nu) log beta_tilde, between the
            variances beta of the forward transition and beta_tilde of the posterior (2102.09672, eq. 15).
    """

    def __init__(self, sde: Path, t: Tensor, variance: Tensor | None = None):
        self.sde, self.t, self.variance = sde, t, variance

    @abstractmethod
    def combine(self, denoised: Tensor, noise: Tensor) -> Tensor:
        """Return d E[x_0 | x_t] + n E[eps | x_t], (B, *).

        Args:
            denoised, noise: the coefficients d and n, float64, () or (B,).
        """

    def error(self, x0: Tensor, noise: Tensor) -> "Views":
        """Return the errors of these views, for the true x0 and noise (B, *) in x_t = alpha x0 + sigma noise.

        For a result `error`, `error.noise` is E[eps | x_t] - noise and `error.denoised` is E[x_0 | x_t] - x0.
        `score.NetworkViews` computes them from the error of the network's output, which loses no digits at small t.
        """
        one = torch.ones_like(self.t)
        return BlendedViews([self, Pair(self.sde, self.t, x0, noise)], [one, -one])

    @property
    def denoised(self) -> Tensor:
        """E[x_0 | x_t]."""
        return self.combine(torch.ones_like(self.t), torch.zeros_like(self.t))

    @property
    def noise(self) -> Tensor:
        """E[eps | x_t]."""
        return self.combine(torch.zeros_like(self.t), torch.ones_like(self.t))

    @property
    def score(self) -> Tensor:
        """The gradient of log p_t(x): -E[eps | x_t] / sigma."""
        return self.combine(torch.zeros_like(self.t), -1 / self.sde.sigma(self.t))

    @property
    def v(self) -> Tensor:
        """E[v | x_t], v = (alpha eps - sigma x_0) / (alpha^2 + sigma^2)^(1/2) (2202.00512, appendix D)."""
        size = self.sde.size(self.t)
        return self.combine(-self.sde.sigma(self.t) / size, self.sde.alpha(self.t) / size)

    @property
    def velocity(self) -> Tensor:
        """dx/dt of the probability-flow ODE: alpha' E[x_0 | x_t] + sigma' E[eps | x_t] = f x - g^2/2 score."""
        return self.combine(self.sde.alpha_dot(self.t), self.sde.sigma_dot(self.t))


class Pair(Views):
    """The views of a known pair (x0, noise), (B, *) each: combine(d, n) = d x0 + n noise."""

    def __init__(self, sde: Path, t: Tensor, x0: Tensor, noise: Tensor):
        super().__init__(sde, t)
        check_shape_of_states("noise", noise, x0)
        self._x0, self._noise = x0, noise

    def combine(self, denoised: Tensor, noise: Tensor) -> Tensor:
        return broadcast(denoised, self._x0) * self._x0 + broadcast(noise, self._noise) * self._noise


class BlendedViews(Views):
    """The weighted sum sum_k w_k(t) views_k.combine(d, n); the learned variance is that of views[0].

    Args:
        views: at least one `Views`, all of the same SDE and at the same (x, t).
        weights: w_k, numbers or tensors () or (B,). If they add up to 1, alpha E[x_0 | x_t] + sigma E[eps | x_t] = x
            still holds.

    Raises:
        ValueError: no views, or not as many weights as views.
    """

    def __init__(self, views: Sequence[Views], weights: Sequence[Tensor | float]):
        if not views or len(views) != len(weights):
            raise ValueError(
                f"weights must hold one weight per view, at least one; got {len(weights)} for {len(views)} views"
            )
        super().__init__(views[0].sde, views[0].t, views[0].variance)
        self._views, self._weights = list(views), [float64(weight).to(self.t.device) for weight in weights]

    def combine(self, denoised: Tensor, noise: Tensor) -> Tensor:
        parts = zip(self._views, self._weights, strict=True)
        first, *others = (views.combine(weight * denoised, weight * noise) for views, weight in parts)
        return sum(others, start=first)

    def error(self, x0: Tensor, noise: Tensor) -> Views:
        """Return the errors of the blend, see `Views.error`.

        They are the weighted sum of the errors of its parts plus, where the weights do not add up to 1,
        (sum_k w_k - 1) times the views of the true pair (x0, noise).
        """
        errors = [views.error(x0, noise) for views in self._views]
        excess = sum(self._weights[1:], start=self._weights[0]) - 1
        return BlendedViews([*errors, Pair(self.sde, self.t, x0, noise)], [*self._weights, excess])


class ShiftedViews(Views):
    """Views whose denoised mean is shifted from `before` to `after` at the same x, as by thresholding.

    With delta = after - before, combine(d, n) = views.combine(d, n) + (d - n alpha/sigma) delta. If delta is zero, the
    views are unchanged to the last digit. At sigma = 0, where x does not determine the noise, the noise is unchanged.

    Args:
        views: the views to shift.
        before, after: the denoised mean E[x_0 | x] before and after the shift, (B, *).
    """

    def __init__(self, views: Views, before: Tensor, after: Tensor):
        super().__init__(views.sde, views.t, views.variance)
        check_shape_of_states("the shifted mean", after, before)
        self._views, self._before, self._after = views, before, after

    @property
    def denoised(self) -> Tensor:
        """The shifted mean."""
        return self._after

    def combine(self, denoised: Tensor, noise: Tensor) -> Tensor:
        alpha, sigma = self.sde.alpha(self.t), self.sde.sigma(self.t)
        ratio = torch.where(sigma > 0, alpha / sigma, 0.0)
        delta = self._after - self._before
        return self._views.combine(denoised, noise) + broadcast(denoised - noise * ratio, delta) * delta

    def error(self, x0: Tensor, noise: Tensor) -> Views:
        """Return the errors of the inner views, shifted by the same delta; see `Views.error`."""
        errors = self._views.error(x0, noise)
        return ShiftedViews(errors, self._before - x0, self._after - x0)


class TiltedViews(Views):
    """Views of the density proportional to p_t(x) w(x): their score is increased by g = grad log w(x).

    combine(d, n) = views.combine(d, n) + (d sigma^2/alpha - n sigma) g. Where alpha = 0, x does not determine x_0, and
    the denoised mean is unchanged.

    Args:
        views: the views of p_t.
        gradient: g, (B, *).
    """

    def __init__(self, views: Views, gradient: Tensor):
        super().__init__(views.sde, views.t, views.variance)
        self._views, self._gradient = views, gradient

    def combine(self, denoised: Tensor, noise: Tensor) -> Tensor:
        alpha, sigma = self.sde.alpha(self.t), self.sde.sigma(self.t)
        gain = torch.where(alpha > 0, sigma.square() / alpha, 0.0)
        views = self._views.combine(denoised, noise)
        return views + broadcast(denoised * gain - noise * sigma, self._gradient) * self._gradient.to(views.dtype)

    def error(self, x0: Tensor, noise: Tensor) -> Views:
        """Return the errors of the inner views, with the same gradient added to their score."""
        return TiltedViews(self._views.error(x0, noise), self._gradient)
