"""The marginal of a Gaussian mixture at time t, evaluated at states x, and the model with its exact score.

The formulas are in `scoresde.analytic`; a mixture is an `analytic.GaussianMixture`.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from scoresde.networks.condition_embeddings import named
from scoresde.protocols import NULL, Condition, expand
from scoresde.score import ScoreModel
from scoresde.sdes import SDE, checked_times
from scoresde.tensors import broadcast, float64, floating_dtype, listed
from scoresde.views import Views


class Marginal:
    """The mixture at time t, evaluated at x: the terms of the closed forms in the module docstring.

    variances: v_k, (1, K, D) or (B, K, D). offset: R_k^T (x - alpha m_k); component_scores: R_k^T u_k, both (B, K, D)
    along the axes of each component. log_joint: log(w_k N(x; alpha m_k, C_k)); responsibilities: r_k, both (B, K).
    """

    def __init__(
        self,
        mixture: Any,
        x: Tensor,
        sde: SDE | None,
        t: Tensor | float | None,
        label: Tensor | None = None,
    ):
        check_marginal(sde, t)
        if x.shape[1:] != mixture.event_shape:
            raise ValueError(f"expected states (B, {', '.join(map(str, mixture.event_shape))}); got {tuple(x.shape)}")
        self._means, self._rotation = mixture.means, mixture.rotation
        along = self._along(float64(x).flatten(1))
        if sde is None or t is None:
            self.alpha, self.sigma = along.new_ones(1, 1, 1), along.new_zeros(1, 1, 1)
        else:
            t = checked_times(sde, t).to(along.device)
            t = t if t.ndim else t[None]
            self.alpha, self.sigma = broadcast(sde.alpha(t), along), broadcast(sde.sigma(t), along)
        self.variances = (self.alpha * mixture.stds).square() + self.sigma.square()
        self.offset = along - self.alpha * self._centres()
        self.component_scores = -self.offset / self.variances
        quadratic = -(self.offset * self.component_scores).sum(dim=2)
        log_volume = self.variances.log().sum(dim=2) + along.shape[2] * math.log(2 * math.pi)
        log_weights = mixture.log_weights if label is None else _given_label(mixture.log_weights, label)
        self.log_joint = log_weights - 0.5 * (quadratic + log_volume)
        self.responsibilities = self.log_joint.softmax(dim=1)

    @property
    def score(self) -> Tensor:
        """The score (B, D)."""
        return self.average(self.responsibilities, self.component_scores)

    def _along(self, states: Tensor) -> Tensor:
        """Return R_k^T x, states x (B, D) along each component's axes: (B, K, D), or (B, 1, D) without a rotation."""
        if self._rotation is None:
            return states[:, None, :]
        return (states @ self._rotation.transpose(0, 1).flatten(1).to(states)).unflatten(1, self._means.shape)

    def _centres(self) -> Tensor:
        """Return the means along each component's axes, R_k^T m_k, (K, D)."""
        means = float64(self._means)
        return means if self._rotation is None else (means[:, None, :] @ float64(self._rotation)).squeeze(1)

    def turned(self, axes: Tensor) -> Tensor:
        """Return R_k a_k for coordinates a_k along each component's axes, (B, K, D)."""
        if self._rotation is None:
            return axes
        return torch.einsum("kij,bkj->bki", self._rotation.to(axes), axes)

    def average(self, weights: Tensor, axes: Tensor) -> Tensor:
        """Return sum_k w_k R_k a_k, (B, D), for weights (B, K) and coordinates (B, K, D)."""
        weighted = weights[:, :, None] * axes
        if self._rotation is None:
            return weighted.sum(dim=1)
        return weighted.flatten(1) @ self._rotation.mT.flatten(0, 1).to(weighted)


def check_marginal(sde: SDE | None, t: Tensor | float | None) -> None:
    """Raise ValueError unless sde and t are both given or both None."""
    if (sde is None) != (t is None):
        given = "t" if sde is None else "sde"
        raise ValueError(
            f"sde and t must be given together; got {given} only: give both for p_t, or neither for the data's p_0"
        )


def _given_label(log_weights: Tensor, label: Tensor) -> Tensor:
    """Return the log-weights (B, K) of the components given the label (B,) of each sample.

    A label k selects component k: its log-weight is 0, the others are -inf. The null label -1 means no condition: the
    log-weights are those of the mixture.
    """
    count = len(log_weights)
    if label.is_floating_point() or label.dtype == torch.bool or bool(((label < NULL) | (label >= count)).any()):
        raise ValueError(
            f"the label of a mixture must be one of its components 0 .. {count - 1}, or {NULL} for all; got "
            f"{listed(label.flatten())}"
        )
    is_other = torch.arange(count, device=label.device) != label[:, None]
    one = (
        torch.zeros_like(log_weights).expand(len(label), count).masked_fill(is_other.to(log_weights.device), -math.inf)
    )
    return torch.where((label == NULL)[:, None].to(one.device), log_weights, one)


class _ExactViews(Views):
    """The views of the exact model (`scoresde.views`); where sigma is 0, score and velocity come from closed forms."""

    def __init__(self, views: Views, mixture: Any, sde: SDE, x: Tensor, label: Tensor | None):
        super().__init__(sde, views.t)
        self._views, self._mixture, self._sde, self._x, self._label = views, mixture, sde, x, label

    def combine(self, denoised: Tensor, noise: Tensor) -> Tensor:
        return self._views.combine(denoised, noise)

    def error(self, x0: Tensor, noise: Tensor) -> Views:
        return self._views.error(x0, noise)

    @property
    def score(self) -> Tensor:
        return self._unless_clean(super().score, self._closed_score)

    @property
    def velocity(self) -> Tensor:
        return self._unless_clean(super().velocity, self._closed_velocity)

    def _closed_score(self) -> Tensor:
        score = Marginal(self._mixture, self._x, self._sde, self.t, self._label).score
        return score.reshape(self._x.shape).to(floating_dtype(self._x))

    def _closed_velocity(self) -> Tensor:
        """Return the velocity f x - g^2/2 score of the probability flow, with the closed-form score."""
        drift, diffusion = (broadcast(part(self.t), self._x) for part in (self._sde.drift, self._sde.diffusion))
        return drift * self._x - 0.5 * diffusion.square() * self._closed_score()

    def _unless_clean(self, value: Tensor, closed: Callable[[], Tensor]) -> Tensor:
        """Return `value` (B, *), with the samples where sigma is 0 taken from the closed form `closed()` instead."""
        is_clean = broadcast(self.sde.sigma(self.t), value) == 0
        return torch.where(is_clean, closed(), value) if bool(is_clean.any()) else value


class ExactModel(ScoreModel):
    """The exact score of a mixture, made by `GaussianMixture.score_model`."""

    def __init__(self, mixture: Any, sde: SDE):
        super().__init__(_ExactNetwork(mixture, sde), sde, prediction="v")

    def predict(self, x: Tensor, t: Tensor | float) -> Views:
        """Return the exact views; see `ScoreModel.predict`."""
        mixture = cast(_ExactNetwork, self.network).mixture
        return _ExactViews(super().predict(x, t), mixture, self.sde, x, _label(expand(self.cond, len(x))))


class _ExactNetwork(nn.Module):
    """The exact mixture as a network that predicts v = alpha E[eps | x] - sigma E[x_0 | x].

    Unlike the score, v is bounded at both ends of the time range.
    """

    casts_inputs = True
    conditions = ("label",)

    def __init__(self, mixture: Any, sde: SDE):
        super().__init__()
        self.mixture, self.shape = mixture, tuple(mixture.event_shape)
        self.path = (sde,)  # not a submodule: parameters of the SDE belong to the model

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition = None) -> Tensor:
        (sde,) = self.path
        t = float64(c_noise).clamp(sde.t_min, sde.t_max)  # a label in the dtype of x may be rounded out of the range
        marginal = Marginal(self.mixture, x, sde, t, _label(cond))
        # alpha eps - sigma x_0 of each component, with eps = -sigma u_k and x_0 its posterior mean
        gain = marginal.alpha * marginal.sigma * (float64(self.mixture.stds).square() - 1)
        v = marginal.average(marginal.responsibilities, gain * marginal.component_scores)
        v = v - marginal.sigma[:, 0] * (marginal.responsibilities @ self.mixture.means.to(v))
        return v.reshape(x.shape).to(x.dtype)


def _label(cond: Condition) -> Tensor | None:
    """Return the label in a condition; None if it has none."""
    return named(cond, _ExactNetwork.conditions).get("label")
