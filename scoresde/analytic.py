"""Gaussian mixtures and their exact diffusion, against which every method is tested.

Data of density p_0 = sum_k w_k N(m_k, R_k diag(s_k^2) R_k^T) stay a mixture under every SDE of this library: for
x_t = alpha x_0 + sigma eps,

    p_t = sum_k w_k N(alpha m_k, C_k(t)),      C_k(t) = R_k diag(v_k) R_k^T,      v_k = alpha^2 s_k^2 + sigma^2.

With responsibilities r_k(x) = w_k N(x; alpha m_k, C_k) / p_t(x) and the component scores u_k = -C_k^-1 (x - alpha m_k),

    score       = sum_k r_k u_k
    div(score)  = -sum_k r_k tr(C_k^-1) + sum_k r_k |u_k|^2 - |score|^2
    p(x_0 | x)  = sum_k r_k N(m_k + alpha R_k diag(s_k^2 / v_k) R_k^T (x - alpha m_k),
                              R_k diag(s_k^2 sigma^2 / v_k) R_k^T)

all in float64, for states (B, *) of any shape.

The component is the label of a sample. As p(k | x_t) = r_k(x), the conditional score u_k = score + grad log r_k and the
exact classifier of noisy states are closed forms too: `score_model(sde).given(k)` and `log_posterior`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from scoresde.networks.embeddings import NULL, named
from scoresde.protocols import Condition, expand
from scoresde.score import ScoreModel
from scoresde.sdes import SDE, checked_times
from scoresde.tensors import FullPrecision, broadcast, check_integer, dimensions, float64, floating_dtype, listed
from scoresde.views import Views


class GaussianMixture(FullPrecision):
    """A mixture of K Gaussians over states of shape `*`, with exact densities and scores under any SDE.

    Args:
        means: (K, *).
        stds: standard deviations along the axes of each component, (K,) or (K, *).
        weights: (K,), positive; the constructor normalises them. Default: equal weights.
        rotation: orthogonal matrices R, (D, D) or (K, D, D) with D the product of `*`; default: the identity.

    Raises:
        ValueError: shapes do not fit, a number is NaN or infinite, a standard deviation or weight is not positive, or a
            rotation is not orthogonal.
    """

    means: Tensor
    stds: Tensor
    log_weights: Tensor
    rotation: Tensor | None

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor | None = None, rotation: Tensor | None = None):
        super().__init__()
        means, stds = float64(means), float64(stds)
        if means.ndim < 2 or not means.numel() or stds.shape not in (means.shape[:1], means.shape):
            raise ValueError(
                f"expected means (K, *) and stds (K,) or (K, *); got {tuple(means.shape)} and {tuple(stds.shape)}"
            )
        count, size = means.shape[0], dimensions(means)
        weights = float64(torch.ones(count) if weights is None else weights)
        for name, value in (("means", means), ("stds", stds), ("weights", weights)):
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} must be finite; got {listed(value.flatten())}")
        if weights.shape != (count,) or not bool((weights > 0).all() and (stds > 0).all()):
            raise ValueError(
                f"expected {count} positive weights and positive stds; got {listed(weights.flatten())} and "
                f"{listed(stds.flatten())}"
            )
        if rotation is not None:
            rotation = _checked_rotation(float64(rotation), count, size)
        self.event_shape = means.shape[1:]
        self.register_buffer("means", means.reshape(count, size))
        self.register_buffer("stds", stds.reshape(count, -1).expand(count, size).clone())
        self.register_buffer("log_weights", weights.log().log_softmax(0))
        self.register_buffer("rotation", rotation)

    def log_prob(self, x: Tensor, sde: SDE | None = None, t: Tensor | float | None = None) -> Tensor:
        """Return log p_0 at x (B, *) in nats, float64 (B,); with an SDE and a time, log p_t instead."""
        return _Marginal(self, x, sde, t).log_joint.logsumexp(dim=1)

    def score(self, x: Tensor, sde: SDE | None = None, t: Tensor | float | None = None) -> Tensor:
        """Return the gradient of `log_prob` in x, (B, *), in the dtype of x."""
        return _Marginal(self, x, sde, t).score.reshape(x.shape).to(floating_dtype(x))

    def divergence(self, x: Tensor, sde: SDE | None = None, t: Tensor | float | None = None) -> Tensor:
        """Return the divergence of the score at x, (B,), float64."""
        marginal = _Marginal(self, x, sde, t)
        norms = (marginal.component_scores.square() - 1 / marginal.variances).sum(dim=2)
        return (marginal.responsibilities * norms).sum(dim=1) - marginal.score.square().sum(dim=1)

    def posterior(self, x: Tensor, sde: SDE, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Return p(x_0 | x_t = x), a mixture: weights (B, K), means (B, K, *), stds along the axes R_k (B, K, *)."""
        marginal = _Marginal(self, x, sde, t)
        gain = marginal.alpha * float64(self.stds).square() / marginal.variances
        means = self.means + self._turned(gain * marginal.offset)
        stds = (self.stds * marginal.sigma / marginal.variances.sqrt()).expand_as(means)
        shape = (*means.shape[:2], *self.event_shape)
        return marginal.responsibilities, means.reshape(shape), stds.reshape(shape)

    def log_posterior(self, x: Tensor, sde: SDE | None = None, t: Tensor | float | None = None) -> Tensor:
        """Return log p(component | x) in nats, (B, K), float64; with an SDE and a time, log p(component | x_t)."""
        return _Marginal(self, x, sde, t).log_joint.log_softmax(dim=1)

    def component(self, k: int) -> "GaussianMixture":
        """Return the Gaussian of component k, p(x | k), as a mixture of one."""
        count = len(self.means)
        check_integer("k", k, 0)
        if k >= count:
            raise ValueError(f"k must be from 0 to {count - 1}; got {k}")
        return self._with_components(slice(k, k + 1), torch.zeros(1))

    def tilted(self, log_weights: Tensor) -> "GaussianMixture":
        """Return the mixture with weights proportional to w_k exp(log_weights[k]), for log_weights (K,)."""
        log_weights = float64(log_weights)
        if log_weights.shape != self.log_weights.shape or not bool(torch.isfinite(log_weights).all()):
            raise ValueError(
                f"log_weights must be {len(self.means)} finite numbers, one for each component; got "
                f"{listed(log_weights.flatten())}"
            )
        return self._with_components(slice(None), self.log_weights + log_weights.to(self.log_weights))

    def _with_components(self, which: slice, log_weights: Tensor) -> "GaussianMixture":
        """Return the mixture of the components in the slice `which`, with weights softmax(log_weights)."""
        means = self.means[which].reshape(-1, *self.event_shape)
        rotation = None if self.rotation is None else self.rotation[which]
        return GaussianMixture(means, self.stds[which].reshape(means.shape), log_weights.softmax(0), rotation)

    def denoise(self, x: Tensor, sde: SDE, t: Tensor | float) -> Tensor:
        """Return E[x_0 | x_t = x], (B, *), in the dtype of x."""
        weights, means, _ = self.posterior(x, sde, t)
        return torch.einsum("bk,bk...->b...", weights, means).to(floating_dtype(x))

    def sample(
        self, n: int, sde: SDE | None = None, t: Tensor | float | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw n samples (n, *) of p_0, float64; with an SDE and a time, of p_t instead."""
        _check_marginal(sde, t)
        check_integer("n", n, 0)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        component = torch.multinomial(self.log_weights.exp(), max(n, 1), replacement=True, generator=generator)[:n]
        axes = self.stds[component] * draw((n, self.means.shape[1]))
        if self.rotation is not None:
            axes = torch.einsum("bij,bj->bi", self.rotation[component], axes)
        x0 = (self.means[component] + axes).reshape(n, *self.event_shape)
        if sde is None or t is None:
            return x0
        return sde.perturb(x0, t, draw(x0.shape))

    def mean(self) -> Tensor:
        """Return the mean of the mixture, of shape `*`."""
        return (self.log_weights.exp() @ self.means).reshape(self.event_shape)

    def covariance(self) -> Tensor:
        """Return the covariance of the mixture over the flattened state, (D, D)."""
        weights = self.log_weights.exp()
        axes = self.stds.diag_embed() if self.rotation is None else self.rotation * self.stds[:, None, :]
        centred = self.means - weights @ self.means
        within = torch.einsum("k,kij,klj->il", weights, axes, axes)
        return within + torch.einsum("k,ki,kj->ij", weights, centred, centred)

    def score_model(self, sde: SDE) -> ScoreModel:
        """Return the exact score as a `ScoreModel`; its condition is the component, an integer label () or (B,)."""
        return ExactModel(self, sde)

    def _along(self, states: Tensor) -> Tensor:
        """Return R_k^T x, states x (B, D) along each component's axes: (B, K, D), or (B, 1, D) without a rotation."""
        if self.rotation is None:
            return states[:, None, :]
        return (states @ self.rotation.transpose(0, 1).flatten(1).to(states)).unflatten(1, self.means.shape)

    def _centres(self) -> Tensor:
        """Return the means along each component's axes, R_k^T m_k, (K, D)."""
        means = float64(self.means)
        return means if self.rotation is None else (means[:, None, :] @ float64(self.rotation)).squeeze(1)

    def _turned(self, axes: Tensor) -> Tensor:
        """Return R_k a_k for coordinates a_k along each component's axes, (B, K, D)."""
        if self.rotation is None:
            return axes
        return torch.einsum("kij,bkj->bki", self.rotation.to(axes), axes)

    def _average(self, weights: Tensor, axes: Tensor) -> Tensor:
        """Return sum_k w_k R_k a_k, (B, D), for weights (B, K) and coordinates (B, K, D)."""
        weighted = weights[:, :, None] * axes
        if self.rotation is None:
            return weighted.sum(dim=1)
        return weighted.flatten(1) @ self.rotation.mT.flatten(0, 1).to(weighted)


def _checked_rotation(rotation: Tensor, count: int, size: int) -> Tensor:
    """Return the rotation (K, D, D) of each component; raise ValueError if the matrices are not orthogonal."""
    shapes = (size, size), (count, size, size)
    if rotation.shape not in shapes:
        raise ValueError(f"expected a rotation {shapes[0]} or {shapes[1]}; got {tuple(rotation.shape)}")
    identity = torch.eye(size, dtype=torch.float64, device=rotation.device)
    if not torch.allclose(rotation @ rotation.mT, identity.expand_as(rotation), atol=1e-6):
        raise ValueError("rotation must be orthogonal, R R^T = I within 1e-6; take the Q of a QR decomposition")
    return rotation.expand(count, size, size).clone()


def _check_marginal(sde: SDE | None, t: Tensor | float | None) -> None:
    if (sde is None) != (t is None):
        given = "t" if sde is None else "sde"
        raise ValueError(
            f"sde and t must be given together; got {given} only: give both for p_t, or neither for the data's p_0"
        )


class _Marginal:
    """The mixture at time t, evaluated at x: the terms of the closed forms in the module docstring.

    variances: v_k, (1, K, D) or (B, K, D). offset: R_k^T (x - alpha m_k); component_scores: R_k^T u_k, both (B, K, D)
    along the axes of each component. log_joint: log(w_k N(x; alpha m_k, C_k)); responsibilities: r_k, both (B, K).
    """

    def __init__(
        self,
        mixture: GaussianMixture,
        x: Tensor,
        sde: SDE | None,
        t: Tensor | float | None,
        label: Tensor | None = None,
    ):
        _check_marginal(sde, t)
        if x.shape[1:] != mixture.event_shape:
            raise ValueError(f"expected states (B, {', '.join(map(str, mixture.event_shape))}); got {tuple(x.shape)}")
        along = mixture._along(float64(x).flatten(1))
        if sde is None or t is None:
            self.alpha, self.sigma = along.new_ones(1, 1, 1), along.new_zeros(1, 1, 1)
        else:
            t = checked_times(sde, t).to(along.device)
            t = t if t.ndim else t[None]
            self.alpha, self.sigma = broadcast(sde.alpha(t), along), broadcast(sde.sigma(t), along)
        self._mixture = mixture
        self.variances = (self.alpha * mixture.stds).square() + self.sigma.square()
        self.offset = along - self.alpha * mixture._centres()
        self.component_scores = -self.offset / self.variances
        quadratic = -(self.offset * self.component_scores).sum(dim=2)
        log_volume = self.variances.log().sum(dim=2) + along.shape[2] * math.log(2 * math.pi)
        log_weights = mixture.log_weights if label is None else _given_label(mixture.log_weights, label)
        self.log_joint = log_weights - 0.5 * (quadratic + log_volume)
        self.responsibilities = self.log_joint.softmax(dim=1)

    @property
    def score(self) -> Tensor:
        """The score (B, D)."""
        return self._mixture._average(self.responsibilities, self.component_scores)


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

    def __init__(self, views: Views, mixture: GaussianMixture, sde: SDE, x: Tensor, label: Tensor | None):
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
        score = _Marginal(self._mixture, self._x, self._sde, self.t, self._label).score
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

    def __init__(self, mixture: GaussianMixture, sde: SDE):
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

    def __init__(self, mixture: GaussianMixture, sde: SDE):
        super().__init__()
        self.mixture = mixture
        self.path = (sde,)  # not a submodule: parameters of the SDE belong to the model

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition = None) -> Tensor:
        (sde,) = self.path
        t = float64(c_noise).clamp(sde.t_min, sde.t_max)  # a label in the dtype of x may be rounded out of the range
        marginal = _Marginal(self.mixture, x, sde, t, _label(cond))
        # alpha eps - sigma x_0 of each component, with eps = -sigma u_k and x_0 its posterior mean
        gain = marginal.alpha * marginal.sigma * (float64(self.mixture.stds).square() - 1)
        v = self.mixture._average(marginal.responsibilities, gain * marginal.component_scores)
        v = v - marginal.sigma[:, 0] * (marginal.responsibilities @ self.mixture.means.to(v))
        return v.reshape(x.shape).to(x.dtype)


def _label(cond: Condition) -> Tensor | None:
    """Return the label in a condition; None if it has none."""
    return named(cond, _ExactNetwork.conditions).get("label")
